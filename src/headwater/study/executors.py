"""Where nodes run: in this process, or in a few single-thread processes of this machine."""

from __future__ import annotations

import fcntl
import json
import os
import selectors
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO

from headwater import spec
from headwater.config import Execution
from headwater.stages.node import Job, run_node
from headwater.store import Store
from headwater.study.processes import Process, start

POLL_S = 0.5
"""How often a node that another study trains is looked at again."""


@dataclass(frozen=True)
class Event:
    """Something a watcher wants to know: a node `started`, made a `step`, is `done`, or `failed`; `waiting` for another
    study to finish it, which `error` names."""

    kind: str
    key: str
    step: int = 0
    steps: int = 0
    metrics: Mapping[str, float] | None = None
    error: str = ""
    mendable: bool = False
    """The error is one that the user can mend (a ValueError)."""
    everywhere: bool = False
    """The error is the machine's (an OSError, such as a full disk), so that no other node would fare better."""


TAKEN = "another process"
"""Took the node between the look at its lease and this start: it is waited for like any other."""
OnEvent = Callable[[Event], None]


class NodeFailed(RuntimeError):
    """A node ended in an error; the message is what it said."""


def execute(
    jobs: dict[str, Job], store: Store, execution: Execution, on_event: OnEvent, processes: list[Process] | None = None
) -> None:
    """Run all nodes that are not done, parents first; one that another study is at work on is waited for. A local
    executor takes its processes from `processes` while there are any.

    One that fails takes only those with it that need it, unless the machine is at fault (an OSError); the error is
    raised when all the others are done: ValueError for what the user can mend, else NodeFailed.
    """
    waiting = {key: job for key, job in jobs.items() if not store.is_done(key)}
    if not waiting:
        return
    name, _, count = execution.executor.partition(":")
    if name == "inline":
        _inline(waiting, store, on_event)
    else:
        _local(waiting, store, on_event, int(count), [] if processes is None else processes)


def holder(directory: Path) -> str | None:
    """Who holds a directory's lease ("process N on HOST"), or None. Takes it for an instant to find out."""
    try:
        with (directory / "lease").open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                for _ in range(20):  # between taking the lease and signing it
                    file.seek(0)
                    if name := file.read().strip():
                        return name
                    time.sleep(0.01)
                return "another process"
    except FileNotFoundError:
        pass
    return None


def _inline(waiting: dict[str, Job], store: Store, on_event: OnEvent) -> None:
    told: set[str] = set()
    failures: list[Exception] = []
    while waiting:
        if (key := next(_ready(waiting, store), None)) is None:
            _wait(waiting, store, on_event, told)
            continue
        job = waiting.pop(key)
        on_event(Event("started", key))

        def on_log(step: int, steps: int, metrics: Mapping[str, float], key: str = key) -> None:
            on_event(Event("step", key, step, steps, metrics))

        try:
            run_node(job, store, on_log=on_log)
        except BlockingIOError:
            waiting[key] = job
            on_event(Event("waiting", key, error=TAKEN))
            continue
        except Exception as error:
            event = failed(job, error)
            on_event(event)
            raised = _raised(event, _drop(waiting, event))
            raised.__cause__ = error
            failures.append(raised)
            continue
        on_event(Event("done", key))
    if failures:
        raise failures[0]


def failed(job: Job, error: Exception) -> Event:
    """What happened in words; where the traceback is, when it is not the user's to mend."""
    where = "" if isinstance(error, ValueError | OSError) else f" ({type(error).__name__}; see error.txt of its node)"
    key = spec.key(job.spec)
    text = f"{job.spec.label} {key}: {error}{where}"
    mendable, everywhere = (isinstance(error, kind) for kind in (ValueError, OSError))
    return Event("failed", key, error=text, mendable=mendable, everywhere=everywhere)


def _raised(event: Event, heirs: int) -> ValueError | NodeFailed:
    text = event.error + (f"; {heirs} nodes that need it were not run" if heirs else "")
    return (ValueError if event.mendable else NodeFailed)(text)


def _drop(waiting: dict[str, Job], event: Event) -> int:
    """Take what cannot be run after a failure out of `waiting`, which holds parents first; how many need the node."""
    gone = {event.key}
    for key in list(waiting):
        if gone & set(spec.parents(waiting[key].spec)):
            gone.add(key)
            del waiting[key]
    if event.everywhere:
        waiting.clear()
    return len(gone) - 1


class _Worker:
    """A child process that runs one job at a time: a JSON line in, JSON lines of events out."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.key: str | None = None
        self.job: Job | None = None
        self.buffer = b""

    @property
    def out(self) -> IO[bytes]:
        assert self.process.stdout
        return self.process.stdout

    @property
    def is_idle(self) -> bool:
        return self.key is None and self.process.poll() is None

    def give(self, key: str, job: Job) -> None:
        assert self.process.stdin
        self.key, self.job = key, job
        # One that died this instant is found out by `read`.
        with suppress(BrokenPipeError):
            self.process.stdin.write(job.to_json().encode() + b"\n")
            self.process.stdin.flush()

    def read(self) -> list[Event] | None:
        """Whole events that have arrived; None when the process is gone."""
        if not (data := os.read(self.out.fileno(), 1 << 16)):
            self.process.wait()
            return None
        *lines, self.buffer = (self.buffer + data).split(b"\n")
        return [Event(**json.loads(line)) for line in lines if line]


def _local(waiting: dict[str, Job], store: Store, on_event: OnEvent, count: int, processes: list[Process]) -> None:
    workers: list[_Worker] = []
    failures: list[Exception] = []
    told: set[str] = set()
    try:
        with selectors.DefaultSelector() as selector:
            while True:
                _assign(waiting, store, on_event, count, workers, selector, processes)
                if any(w.key for w in workers):
                    for selected, _ in selector.select():
                        for event in _listen(selected.data, on_event, workers, selector, waiting):
                            failures.append(_raised(event, _drop(waiting, event)))
                elif waiting:
                    _wait(waiting, store, on_event, told)
                else:
                    break
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.wait()
    if failures:
        raise failures[0]


def _assign(
    waiting: dict[str, Job],
    store: Store,
    on_event: OnEvent,
    count: int,
    workers: list[_Worker],
    selector: selectors.BaseSelector,
    processes: list[Process],
) -> None:
    """Give what is ready to idle workers, and to new ones while there are fewer than `count`."""
    free = count - sum(w.key is not None for w in workers)
    for key in list(islice(_ready(waiting, store), free)) if free else []:
        worker = next((w for w in workers if w.is_idle), None)
        if worker is None:
            worker = _Worker(processes.pop() if processes else start(store.root))
            workers.append(worker)
            selector.register(worker.out, selectors.EVENT_READ, worker)
        worker.give(key, waiting.pop(key))
        on_event(Event("started", key))


def _listen(
    worker: _Worker,
    on_event: OnEvent,
    workers: list[_Worker],
    selector: selectors.BaseSelector,
    waiting: dict[str, Job],
) -> list[Event]:
    """Pass on what a worker says; the failures among it. One that is gone leaves, with its node when it had one."""
    events = worker.read()
    if events is None:
        selector.unregister(worker.out)
        workers.remove(worker)
        text = f"its process ended with code {worker.process.returncode} (killed for memory?)"
        events = [Event("failed", worker.key, error=text)] if worker.key else []
    for event in events:
        if event.kind == "busy":
            assert worker.job is not None
            waiting[event.key] = worker.job
            on_event(Event("waiting", event.key, error=TAKEN))
        else:
            on_event(event)
        if event.kind in ("done", "failed", "busy"):
            worker.key = worker.job = None
    return [event for event in events if event.kind == "failed"]


def _ready(waiting: dict[str, Job], store: Store) -> Iterator[str]:
    """Nodes whose parents are done and which nobody else is at work on: evaluations last, which nobody waits
    for."""
    for key in sorted(waiting, key=lambda k: waiting[k].spec.kind == "evaluate"):
        if all(map(store.is_done, spec.parents(waiting[key].spec))) and holder(store.path(key)) is None:
            yield key


def _wait(waiting: dict[str, Job], store: Store, on_event: OnEvent, told: set[str]) -> None:
    """Nothing can begin until another study has finished a node; say once whose, and which."""
    held = {key: who for key in waiting if (who := holder(store.path(key)))}
    if not held and next(_ready(waiting, store), None) is None:
        raise NodeFailed(f"{len(waiting)} nodes never became ready; this is a bug")
    for key in held.keys() - told:
        on_event(Event("waiting", key, error=held[key]))
        told.add(key)
    time.sleep(POLL_S)
