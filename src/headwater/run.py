"""One stage's directory: metrics, samples, ledger, meter, checkpoints - what its loop writes and resumes from."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from headwater import checkpoint
from headwater.config import Execution, ServedStudent
from headwater.ledger import Ledger
from headwater.mesh import Mesh
from headwater.meter import Bill, Meter, difference
from headwater.models.language_model import LanguageModel
from headwater.models.lora import merged, save_adapter
from headwater.trackers import Mirror
from headwater.types import Grade, Rollout, Verdict
from headwater.update import AdamW, NonFiniteError

OnLog = Callable[[int, int, dict[str, float]], None]
"""Called with (steps done, steps in all, metrics) after every step: progress display only."""

SAMPLES_SHOWN = 4


class StageRun:
    """What a stage loop needs besides models: where it writes, how often, and how far it got.

    `evaluate`, when given, is called every `execution.eval_every` steps with the number of updates done, `monitor`
    every `execution.monitor_every` and at start and end; they have their own random streams, so calling them more often
    changes nothing. `audit` is a second grader (`stages.common.audit_metrics`). `sampler` is a running server that
    samples from the model under training. `gate` is the evidence of a gated stage, set when its loop has ended.
    """

    def __init__(
        self,
        directory: Path,
        *,
        execution: Execution | None = None,
        mesh: Mesh | None = None,
        on_log: OnLog | None = None,
        evaluate: Callable[[int], dict[str, float]] | None = None,
        monitor: Callable[[], dict[str, float]] | None = None,
        mirror: Mirror | None = None,
        audit: Grade | None = None,
    ) -> None:
        self.directory = directory
        self.execution = execution or Execution()
        self.mesh = mesh or Mesh()
        directory.mkdir(parents=True, exist_ok=True)
        self.ledger = Ledger(directory / "ledger.jsonl", writes=self.mesh.is_writer)
        self.meter = Meter()
        self._on_log = on_log
        self._evaluate = evaluate
        self._monitor = monitor
        self._mirror = mirror
        self.audit = audit
        self.sampler: ServedStudent | None = None
        self.gate: dict[str, Any] | None = None
        self._seen = (time.monotonic(), 0)

    def restore(self, optimizer: AdamW) -> int:
        """Bring the optimizer (and so the weights) and the meter to the newest checkpoint; the number of steps done."""
        found = checkpoint.load_newest(self.directory / "checkpoints")
        if found is None:
            done = 0
        else:
            tensors, state = found
            optimizer.restore(tensors)
            self.meter.restore(state["meter"])
            done = state["step"]
        self._book_lost(done)
        if self.mesh.is_writer:
            names = ("metrics.jsonl", "samples.jsonl", "evals.jsonl", "monitors.jsonl", "gates.jsonl", "meter.jsonl")
            for name in names:
                _truncate(self.directory / name, done)
        self._seen = (time.monotonic(), self.meter.tokens)
        return done

    def _book_lost(self, done: int) -> None:
        """Meter as lost what earlier attempts spent on finished steps from `done` on."""
        path = self.directory / "lost.jsonl"
        lost = {row["time"]: row["meter"] for row in _rows(path)}
        repeated = [row for row in _rows(self.directory / "meter.jsonl") if row["step"] >= done]
        # By the time of its last step, so that a crash in here does not book an attempt twice.
        if repeated and repeated[-1]["time"] not in lost:
            kept: Bill = self.meter.state()
            if not done and (rollouts := _rows(self.directory / "rollouts.jsonl")):
                kept = rollouts[0]["meter"]
            lost[repeated[-1]["time"]] = difference(repeated[-1]["meter"], kept)
            if self.mesh.is_writer:
                text = "".join(json.dumps({"time": t, "meter": bill}) + "\n" for t, bill in lost.items())
                checkpoint.write_atomically(path, text)
        self.meter.lose(self.mesh.collect(list(lost.values()))[0])

    def logs(self, step: int, steps: int) -> bool:
        """Whether step 0..steps-1 gets a row of metrics."""
        return (step + 1) % self.execution.log_every == 0 or step + 1 == steps

    def log(self, step: int, steps: int, metrics: dict[str, float]) -> None:
        """Append one row of metrics for step 0..steps-1, every `execution.log_every` steps and at the last."""
        if self.logs(step, steps):
            row = {"step": step, "time": time.time(), **metrics, "ledger/labels": self.ledger.labels(step)}
            self._append("metrics.jsonl", [row])
            if self._mirror is not None:
                self._mirror.log(row)
        self._append("meter.jsonl", [{"step": step, "time": time.time(), "meter": self.meter.state()}])
        now, tokens = time.monotonic(), self.meter.tokens
        rate = (tokens - self._seen[1]) / max(1e-9, now - self._seen[0])
        self._seen = (now, tokens)
        if self._on_log is not None:
            self._on_log(step + 1, steps, {**metrics, "tokens/s": rate})

    def show(self, step: int, rollouts: Sequence[Rollout], verdicts: Sequence[Verdict] | None = None) -> None:
        """Keep a few rollouts of this step, with their verdicts, for people to read."""
        if step % self.execution.save_every:
            return
        rows = []
        for place, rollout in enumerate(rollouts[:SAMPLES_SHOWN]):
            row: dict[str, Any] = {
                "step": step,
                "problem": rollout.problem_id,
                "text": rollout.text,
                "finished": rollout.finished,
            }
            if verdicts is not None:
                row["verdict"] = asdict(verdicts[place])
            rows.append(row)
        self._append("samples.jsonl", rows)

    def save_if_due(self, done: int, steps: int, optimizer: AdamW) -> None:
        """Checkpoint after every `execution.save_every` steps (the end of the stage saves the model instead)."""
        if done % self.execution.save_every == 0 and done < steps and self.mesh.is_writer:
            checkpoint.save(self.directory / "checkpoints", done, optimizer.state(), {"meter": self.meter.state()})

    def evaluate_if_due(self, done: int) -> None:
        """Learning curve: held-out evaluation after every `execution.eval_every` steps."""
        every = self.execution.eval_every
        if self._evaluate is not None and every and done % every == 0:
            self._append("evals.jsonl", [{"step": done - 1, "updates": done, **self._evaluate(done)}])

    def monitor_if_due(self, done: int, *, last: bool = False) -> None:
        """A row of monitors.jsonl before step `done`: at the start, the end, and every `execution.monitor_every`."""
        every = self.execution.monitor_every
        if self._monitor is not None and (done == 0 or last or (every and done % every == 0)):
            self.keep("monitors.jsonl", {"step": done, **self._monitor()})

    def keep(self, name: str, row: dict[str, Any]) -> None:
        """Append a row, seen before step `row["step"]`, to a file that a resumed stage cuts back to its checkpoint."""
        self._append(name, [row])

    def kept(self, name: str) -> list[dict[str, Any]]:
        """Rows of such a file, the same on every rank."""
        return self.mesh.collect(_rows(self.directory / name) if self.mesh.is_writer else [])[0]

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Save the batch when the block meets a non-finite loss or gradient, and say where."""
        try:
            yield
        except NonFiniteError as error:
            if not error.micro_batches:
                raise  # another rank has the batch
            path = self.directory / "nonfinite.safetensors"
            tensors = {}
            for i, micro in enumerate(error.micro_batches):
                tensors |= {f"{i}.ids": micro.ids, f"{i}.predicts": micro.predicts, f"{i}.targets": micro.targets}
                tensors |= {f"{i}.{name}": values for name, values in micro.fields.items()}
                if micro.prefixes is not None:  # the prompts less their last token, which `ids` then lack
                    tensors |= {f"{i}.prefixes.{name}": values for name, values in vars(micro.prefixes).items()}
            save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, path)
            error.args = (
                f"{error}; the batch is in {path}. The weights were not changed: lower the learning rate or look at "
                "the batch, then run the same command to go on from the last checkpoint",
            )
            raise

    def _append(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        if self.mesh.is_writer and rows:
            try:
                with (self.directory / name).open("a", encoding="utf-8") as file:
                    file.write("".join(json.dumps(row) + "\n" for row in rows))
            except OSError as error:
                if checkpoint._is_full(error):
                    raise checkpoint.disk_full(self.directory, name) from error
                raise


def save_model(model: LanguageModel, optimizer: AdamW, directory: Path) -> None:
    """Write the trained model as a Hugging Face directory with its tokenizer: float32 masters, whole or not at all.

    Adapters are merged into the weights they were trained on, in float32, and kept beside as `adapter`.
    """
    aside, adapter = directory.with_name(f".{directory.name}"), directory.with_name("adapter")
    optimizer.unround()
    try:
        module = model.module
        if model.lora is not None:
            assert model.directory is not None
            shutil.rmtree(adapter, ignore_errors=True)
            save_adapter(module, adapter)
            module = merged(model.directory, adapter)
        module.save_pretrained(aside)
        model.tokenizer.save_pretrained(aside)
    except Exception as error:
        if checkpoint._is_full(error):
            raise checkpoint.disk_full(directory.parent, "the trained model") from error
        raise
    # Left by a crash after the rename: the stage was not recorded as finished, so it ran to its end again.
    shutil.rmtree(directory, ignore_errors=True)
    aside.rename(directory)


@contextmanager
def lease(directory: Path) -> Iterator[None]:
    """Hold a node's directory: one writer at a time, released by the kernel when the holder dies.

    Raises BlockingIOError naming the holder when another process has it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lease").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise BlockingIOError(f"{directory} is being trained by {file.read().strip()}") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _truncate(path: Path, done: int) -> None:
    """Drop rows of steps that will be run again, and a last line torn by a crash."""
    if path.exists():
        kept = [row for row in _rows(path) if row["step"] < done]
        checkpoint.write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))


def _rows(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a JSONL file; none when there is none."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def set_deterministic(threads: int | None) -> None:
    """Fixed thread count and deterministic kernels: the same inputs give the same bits."""
    if threads is not None:
        torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # A help in finding reads of memory that nobody wrote, at the price of writing all of it twice.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore -- set through the module's class
