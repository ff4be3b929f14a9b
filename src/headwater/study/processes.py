"""Processes for nodes, started before the one that starts them has imported what both need: each takes seconds."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

Process = subprocess.Popen[bytes]
KEPT, MAPPED = 1 << 28, 1 << 25
"""Bytes that glibc keeps for the next tensors of a process, and from which it asks the kernel for each anew: else the
pages of activations would be given back and zeroed again at every step."""


def start(store: Path) -> Process:
    """One process of one thread that runs nodes of a store (`study.worker`)."""
    environment = {"MALLOC_TRIM_THRESHOLD_": str(KEPT), "MALLOC_MMAP_THRESHOLD_": str(MAPPED), **os.environ}
    environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "headwater.study.worker", str(store), str(os.getpid())]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)


@contextmanager
def started(count: int, store: Path) -> Iterator[list[Process]]:
    """So many processes; those that nobody has taken from the list by the end are ended."""
    processes = [start(store) for _ in range(count)]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()
