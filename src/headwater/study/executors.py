"""Where nodes run: in this process, or in a few single-thread processes of this machine."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from headwater import spec
from headwater.config import Execution
from headwater.stages.node import Job, run_node
from headwater.store import Store


@dataclass(frozen=True)
class Event:
    """Something a watcher wants to know: a node `started`, made a `step`, is `done`, or `failed`."""

    kind: str
    key: str
    step: int = 0
    steps: int = 0
    metrics: Mapping[str, float] | None = None
    error: str = ""
    mendable: bool = False
    """The error is one that the user can mend (a ValueError)."""


OnEvent = Callable[[Event], None]


class NodeFailed(RuntimeError):
    """A node ended in an error; the message is what it said."""


def execute(jobs: dict[str, Job], store: Store, execution: Execution, on_event: OnEvent) -> None:
    """Run all nodes that are not done, parents first.

    When one fails, raises once the others at work have ended: ValueError for what the user can mend, else NodeFailed.
    """
    waiting = {key: job for key, job in jobs.items() if not store.is_done(key)}
    if not waiting:
        return
    name, _, count = execution.executor.partition(":")
    if name == "inline":
        _inline(waiting, store, on_event)
    else:
        _local(waiting, store, on_event, min(int(count), len(waiting)))


def _inline(waiting: dict[str, Job], store: Store, on_event: OnEvent) -> None:
    for key, job in waiting.items():
        on_event(Event("started", key))

        def on_log(step: int, steps: int, metrics: Mapping[str, float], key: str = key) -> None:
            on_event(Event("step", key, step, steps, metrics))

        try:
            run_node(job, store, on_log=on_log)
        except Exception as error:
            event = Event("failed", key, error=failure(job, error), mendable=isinstance(error, ValueError))
            on_event(event)
            raise _raised(event) from error
        on_event(Event("done", key))


def failure(job: Job, error: Exception) -> str:
    """What happened in words; where the traceback is, when it is not the user's to mend."""
    where = "" if isinstance(error, ValueError | OSError) else f" ({type(error).__name__}; see error.txt of its node)"
    return f"{job.spec.label} {spec.key(job.spec)}: {error}{where}"


def _raised(event: Event) -> ValueError | NodeFailed:
    return (ValueError if event.mendable else NodeFailed)(event.error)


class _Worker:
    """A child process that runs one job at a time: a JSON line in, JSON lines of events out."""

    def __init__(self, store: Store) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "headwater.study.worker", str(store.root), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        self.key: str | None = None
        self.buffer = b""

    def give(self, key: str, job: Job) -> None:
        assert self.process.stdin
        self.key = key
        self.process.stdin.write(job.to_json().encode() + b"\n")
        self.process.stdin.flush()

    def read(self) -> list[Event]:
        """Whole events that have arrived; a `failed` one when the process is gone."""
        assert self.process.stdout and self.key
        data = os.read(self.process.stdout.fileno(), 1 << 16)
        if not data:
            code = self.process.wait()
            return [Event("failed", self.key, error=f"its process ended with code {code} (killed for memory?)")]
        *lines, self.buffer = (self.buffer + data).split(b"\n")
        return [Event(**json.loads(line)) for line in lines if line]


def _local(waiting: dict[str, Job], store: Store, on_event: OnEvent, count: int) -> None:
    workers = [_Worker(store) for _ in range(count)]
    failures: list[Event] = []
    try:
        with selectors.DefaultSelector() as selector:
            for worker in workers:
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)  # pyright: ignore -- a pipe by construction
            while True:
                busy = [w for w in workers if w.key]
                ready = [] if failures else _ready(waiting, store, {w.key for w in busy})
                for worker, key in zip([w for w in workers if not w.key], ready, strict=False):
                    worker.give(key, waiting.pop(key))
                    on_event(Event("started", key))
                if not any(w.key for w in workers):
                    break
                for selected, _ in selector.select():
                    worker = selected.data
                    for event in worker.read():
                        on_event(event)
                        if event.kind in ("done", "failed"):
                            worker.key = None
                        if event.kind == "failed":
                            failures.append(event)
                            if worker.process.poll() is not None:
                                selector.unregister(worker.process.stdout)
                                workers.remove(worker)
                                break
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.wait()
    if failures:
        raise _raised(failures[0])
    if waiting:
        raise NodeFailed(f"{len(waiting)} nodes never became ready; this is a bug")


def _ready(waiting: dict[str, Job], store: Store, running: set[str | None]) -> list[str]:
    """Nodes whose parents are done: stages before evaluations, since others wait for them."""
    free = [k for k, job in waiting.items() if k not in running and all(map(store.is_done, spec.parents(job.spec)))]
    return sorted(free, key=lambda k: waiting[k].spec.kind != "stage")
