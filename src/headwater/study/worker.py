"""The process behind the local executor: jobs as JSON lines on stdin, events as JSON lines on stdout."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO

import torch

from headwater import spec
from headwater.grading.child import die_with
from headwater.stages.node import Job, run_node
from headwater.store import Store
from headwater.study.executors import failed


def main(root: Path, jobs: IO[str], events: IO[str]) -> None:
    """Run jobs until stdin closes; an error ends the job, not the process."""

    def say(**event: object) -> None:
        events.write(json.dumps(event) + "\n")
        events.flush()

    torch.set_num_threads(1)
    store = Store(root)
    for line in jobs:
        job = Job.from_json(line)
        key = spec.key(job.spec)

        def on_log(step: int, steps: int, metrics: Mapping[str, float], key: str = key) -> None:
            say(kind="step", key=key, step=step, steps=steps, metrics=metrics)

        try:
            run_node(job, store, on_log=on_log)
            say(kind="done", key=key)
        except BlockingIOError:
            say(kind="busy", key=key)
        except Exception as error:
            say(**asdict(failed(job, error)))


if __name__ == "__main__":
    die_with(int(sys.argv[2]))
    # Ctrl-C reaches the whole group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Events own the real stdout; whatever a library prints goes to stderr.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    main(Path(sys.argv[1]), sys.stdin, channel)
