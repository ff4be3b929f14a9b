"""Grade in parallel in child processes that can be killed.

Threads and signal alarms cannot stop a grader stuck in C code, and a process pool keeps a stuck worker; here the parent
holds a plain pipe to each child, knows which item it works on, and kills it when that item's time is up.
"""

from __future__ import annotations

import contextlib
import math
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from headwater.grading import wire
from headwater.grading.child import split_spec
from headwater.types import Problem, Reason, Verdict

_START_S = 60.0
_WINDOW = 32
_CHUNK = 1 << 16
_MAX_REPLY = 1 << 20
_PATIENCE = 10  # Times the timeout, by the clock on the wall, for a child that other processes keep from running.


@dataclass(eq=False)
class _Worker:
    """A child, the bytes on their way to and from it, and the items it has been given, oldest first."""

    process: subprocess.Popen[bytes]
    deadline: float
    began: float = math.inf
    """When the item at hand was begun, and below the child's processor seconds by then."""
    used: float = 0.0
    ready: bool = False
    spent: bool = False
    outbox: bytearray = field(default_factory=bytearray)
    inbox: bytearray = field(default_factory=bytearray)
    items: deque[int] = field(default_factory=deque)

    @property
    def stdin(self) -> int:
        assert self.process.stdin
        return self.process.stdin.fileno()

    @property
    def stdout(self) -> int:
        assert self.process.stdout
        return self.process.stdout.fileno()


@dataclass(frozen=True)
class _Call:
    """The state of one `grade`: what was asked, what is known, and which items no child holds."""

    items: Sequence[tuple[Problem, str]]
    verdicts: list[Verdict | None]
    pending: deque[int]


class GraderPool:
    """Children that run one grader; a context manager.

    `grader` is `module:function` or `path/file.py:function` of a `(completion, problem) -> Verdict | bool | number`;
    with `trl:` in front a TRL reward function that gets message lists, with `trl-text:` one that gets strings.
    `timeout_s` is seconds per completion: by the clock, and of processor time (at most ten times as long by the clock)
    for a child that is ready to run and has to wait for a busy machine. `memory_mb` is the address space of a child.

    An item whose grader hangs, crashes, exhausts its memory or breaks the protocol gets `Verdict(False, False, reason,
    0.0)` with reason "timeout", "memory" or "error". Its child is killed, with everything in the child's process group,
    and replaced; no other item is affected. A grader that raises costs its item too ("error") but not its child.
    `counts` tallies the verdicts by reason, `last_error` keeps what the last failing grader said.

    A child bounds time and memory; it is no barrier against hostile code. Not for use from several threads at once.
    """

    def __init__(self, grader: str, *, workers: int, timeout_s: float = 5.0, memory_mb: int = 1024) -> None:
        if workers < 1 or timeout_s <= 0 or memory_mb < 1:
            raise ValueError(
                "a grader pool needs workers >= 1, timeout_s > 0 and memory_mb >= 1, "
                f"not {workers}, {timeout_s} and {memory_mb}"
            )
        split_spec(grader)
        self.grader, self.timeout_s, self.memory_mb = grader, timeout_s, memory_mb
        self.counts: Counter[str] = Counter()
        self.last_error = ""
        self._size = workers
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()

    def __enter__(self) -> GraderPool:
        """Start the first child, so that a grader that cannot be loaded is a ValueError before any work is done."""
        self._start()
        self._run(_Call([], [], deque()))
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill every child and wait for its end. The pool may be used again."""
        while self._workers:
            self._end(self._workers[0])

    def grade(self, items: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        """One verdict per (problem, completion), in order.

        Raises ValueError when the grader cannot be loaded in a child or a problem's columns are not JSON values.
        """
        call = _Call(items, [None] * len(items), deque(range(len(items))))
        self._drop_dead()
        self._run(call)
        done = [verdict for verdict in call.verdicts if verdict is not None]
        assert len(done) == len(items)
        self.counts.update(verdict.reason for verdict in done)
        return done

    def _run(self, call: _Call) -> None:
        """Serve the children until nothing is pending, sent or starting."""
        try:
            while call.pending or any(w.items or not w.ready for w in self._workers):
                self._assign(call)
                wait = min(w.deadline for w in self._workers) - time.monotonic()
                for key, events in self._selector.select(max(0.0, wait)):
                    if key.data in self._workers:  # One that failed earlier in this round is gone.
                        (self._write if events & selectors.EVENT_WRITE else self._read)(key.data, call)
                for worker in [w for w in self._workers if w.deadline <= time.monotonic()]:
                    if (left := self._seconds_left(worker)) > 0:
                        worker.deadline = time.monotonic() + left
                    else:
                        self._fail(worker, call, "timeout", "no answer in time")
        except BaseException:
            self.close()  # Replies to an abandoned call must not be taken for those of the next.
            raise

    def _assign(self, call: _Call) -> None:
        """Start children that are missing and have work; top up every child's queue."""
        idle = sum(not w.items for w in self._workers)
        for _ in range(min(self._size - len(self._workers), len(call.pending) - idle)):
            self._start()
        window = max(1, min(_WINDOW, len(call.pending) // (2 * self._size)))
        for worker in self._workers:
            while call.pending and len(worker.items) < window:
                problem, completion = call.items[call.pending[0]]
                worker.outbox += wire.encode_item(completion, problem)
                worker.items.append(call.pending.popleft())
                if worker.ready and len(worker.items) == 1:
                    self._begin(worker)
            if worker.outbox and worker.stdin not in self._selector.get_map():
                self._selector.register(worker.stdin, selectors.EVENT_WRITE, worker)

    def _write(self, worker: _Worker, call: _Call) -> None:
        try:
            del worker.outbox[: os.write(worker.stdin, worker.outbox[:_CHUNK])]
        except BlockingIOError:
            return
        except BrokenPipeError:  # It died; the end of its output says what that costs.
            worker.outbox.clear()
        if not worker.outbox:
            self._selector.unregister(worker.stdin)

    def _read(self, worker: _Worker, call: _Call) -> None:
        """Take the whole lines that have arrived; an end of file or anything but a verdict is a failure."""
        data = os.read(worker.stdout, _CHUNK)
        *lines, worker.inbox = (worker.inbox + data).split(b"\n")
        try:
            for line in lines:
                self._take(worker, bytes(line), call)
        except (ValueError, IndexError) as error:
            if not worker.ready:
                raise
            self._fail(worker, call, "error", f"broke the protocol: {error}")
            return
        if worker.spent:
            self._requeue(worker, call)
        elif len(worker.inbox) > _MAX_REPLY:
            self._fail(worker, call, "error", "broke the protocol: endless line")
        elif not data:
            self._fail(worker, call, None, "the grading process ended")

    def _take(self, worker: _Worker, line: bytes, call: _Call) -> None:
        """A greeting, or the verdict of the oldest item; either starts the clock of the next."""
        if not worker.ready:
            if error := wire.ready_error(line):
                raise ValueError(f"grader {self.grader!r} cannot be loaded in a child process: {error}")
            worker.ready = True
        else:
            verdict, note = wire.decode_verdict(line)
            call.verdicts[worker.items.popleft()] = verdict
            self.last_error = note or self.last_error
            worker.spent = verdict.reason == "memory"  # What it can still allocate is anybody's guess.
        worker.deadline = math.inf
        if worker.items:
            self._begin(worker)

    def _begin(self, worker: _Worker) -> None:
        worker.began, worker.used = time.monotonic(), _processor_seconds(worker.process.pid)
        worker.deadline = worker.began + self.timeout_s

    def _seconds_left(self, worker: _Worker) -> float:
        """Of processor time, for a child that wants to run and could not: on a busy machine verdicts stay the same."""
        pid = worker.process.pid
        if not worker.ready or time.monotonic() - worker.began > _PATIENCE * self.timeout_s or not _is_runnable(pid):
            return 0.0
        return self.timeout_s - (_processor_seconds(pid) - worker.used)

    def _fail(self, worker: _Worker, call: _Call, reason: Reason | None, note: str) -> None:
        """Charge the item the child was at, and only that one. Reason None: the child ended by itself."""
        self._requeue(worker, call)
        status = worker.process.returncode
        if not worker.ready:
            raise ValueError(
                f"grader {self.grader!r} cannot be loaded in a child process: {note} (status {status}) before it was "
                f"ready; allow more than {self.memory_mb} MiB, or see what importing it in a fresh Python says"
            )
        if worker.items:
            reason = reason or ("memory" if status == -signal.SIGKILL else "error")  # Nobody but the kernel kills it.
            call.verdicts[worker.items[0]] = Verdict(False, False, reason, 0.0)
            self.last_error = f"{note} (status {status})"

    def _requeue(self, worker: _Worker, call: _Call) -> None:
        """End a child and give back the items it had not come to."""
        self._end(worker)
        started = worker.ready and not worker.spent
        call.pending.extendleft(reversed(list(worker.items)[started:]))

    def _start(self) -> None:
        one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        process = subprocess.Popen(
            [sys.executable, "-m", "headwater.grading.child", self.grader, str(self.memory_mb), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,
            env={**os.environ, **one_thread, "PYTHONHASHSEED": "0"},
        )
        worker = _Worker(process, time.monotonic() + _START_S)
        os.set_blocking(worker.stdin, False)
        self._selector.register(worker.stdout, selectors.EVENT_READ, worker)
        self._workers.append(worker)

    def _end(self, worker: _Worker) -> None:
        """Kill the child's process group, then reap it: a reaped number could already name another process."""
        self._workers.remove(worker)
        for stream in (worker.stdin, worker.stdout):
            if stream in self._selector.get_map():
                self._selector.unregister(stream)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.process.pid, signal.SIGKILL)
        worker.process.wait()
        for pipe in (worker.process.stdin, worker.process.stdout):
            assert pipe
            pipe.close()

    def _drop_dead(self) -> None:
        """Forget children that ended while idle, so that no item is charged for it."""
        for key, _ in self._selector.select(0):
            self._end(key.data)


def _processor_seconds(pid: int) -> float:
    """What a process has computed; 0 where it is gone, or the system has no such clock."""
    try:
        return time.clock_gettime(~pid << 3 | 2)  # As Linux's clock_getcpuclockid has it.
    except OSError:
        return 0.0


def _is_runnable(pid: int) -> bool:
    """Whether a process computes or waits for a processor, rather than for anything else."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] == b"R"
    except OSError:
        return False
