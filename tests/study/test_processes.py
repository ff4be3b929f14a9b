"""Processes that are started ahead: taken by the executor, or ended."""

import os
from pathlib import Path

from headwater.study.processes import started


def test_processes_that_nobody_takes_are_ended(tmp_path: Path):
    with started(2, tmp_path) as processes:
        taken, left = processes.pop(), processes[0]
        assert taken.poll() is None and left.poll() is None
        with open(f"/proc/{taken.pid}/environ", "rb") as file:
            assert b"OMP_NUM_THREADS=1" in file.read().split(b"\0")
    assert left.returncode == -9 and taken.poll() is None
    taken.kill()
    taken.wait()
    assert not os.path.exists(f"/proc/{left.pid}")
