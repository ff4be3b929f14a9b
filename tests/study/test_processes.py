"""Processes that are started ahead: taken by the executor, or ended."""

import time
from pathlib import Path

from headwater.study.processes import Process, started


def environment(process: Process) -> list[bytes]:
    """Of a process that has just been started: the kernel shows none for an instant."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if found := Path(f"/proc/{process.pid}/environ").read_bytes():
            return found.split(b"\0")
        time.sleep(0.01)
    raise AssertionError("no environment in a minute")


def test_processes_that_nobody_takes_are_ended(tmp_path: Path):
    with started(2, tmp_path) as processes:
        taken, left = processes.pop(), processes[0]
        assert taken.poll() is None and left.poll() is None
        assert b"OMP_NUM_THREADS=1" in environment(taken)
    assert left.returncode == -9 and taken.poll() is None
    taken.kill()
    taken.wait()
