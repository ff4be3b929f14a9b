"""Progress and results in a terminal; plain lines when it is not one."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from headwater.config import Recipe, arm_stages
from headwater.spec import StageSpec
from headwater.store import Store
from headwater.study.executors import Event
from headwater.study.graph import Graph, most_reveals
from headwater.study.run import executed_otherwise, to_jobs

SHOWN = ("reward/mean", "teacher/reverse_kl", "teacher/forward_kl", "policy/cross_entropy", "tokens/s")
PLAIN_EVERY_S = 10.0


class Progress:
    """One bar per running node on a terminal, else a line every ten seconds and at every end."""

    def __init__(self, console: Console, recipe: Recipe) -> None:
        self.console, self.recipe = console, recipe
        self.titles: dict[str, str] = {}
        self.total = self.done = 0
        self.started: dict[str, float] = {}
        self.begun: dict[str, tuple[float, int]] = {}
        self.spoken = 0.0
        self.bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Progress:
        self.bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bars.stop()

    def on_plan(self, graph: Graph, store: Store) -> None:
        self.titles = graph.titles
        kept = sum(map(store.is_done, graph.nodes))
        self.total, self.done = len(graph.nodes) - kept, 0
        self.console.print(
            f"{self.recipe.name}: {len(graph.nodes)} nodes, {kept} done before, {self.total} to do "
            f"({len(graph.stages)} distinct stages for {graph.requested} asked for by the arms)"
        )
        if other := executed_otherwise(to_jobs(self.recipe, graph), store):
            differing = sorted(set().union(*other.values()))
            self.console.print(
                f"{len(other)} finished stages are reused that were executed otherwise ({', '.join(differing)}): "
                "equal up to rounding, not bit for bit; --strict refuses them"
            )

    def on_event(self, event: Event) -> None:
        title = self.titles.get(event.key, event.key)
        if event.kind == "started":
            self.started[event.key] = time.monotonic()
            self.tasks[event.key] = self.bars.add_task(title, total=None, note="")
        elif event.kind == "step":
            self._step(event, title)
        elif event.kind in ("done", "failed"):
            self.done += event.kind == "done"
            seconds = time.monotonic() - self.started.get(event.key, time.monotonic())
            self.bars.remove_task(self.tasks.pop(event.key))
            self.console.print(
                f"[{self.done}/{self.total}] {title}: {event.kind} in {seconds:.0f} s {event.error}", markup=False
            )

    def _step(self, event: Event, title: str) -> None:
        metrics = event.metrics or {}
        note = "  ".join(f"{name} {_short(metrics[name])}" for name in SHOWN if name in metrics)
        begun, before = self.begun.setdefault(event.key, (self.started[event.key], event.step - 1))
        self.bars.update(self.tasks[event.key], total=event.steps, completed=event.step, note=note)
        now = time.monotonic()
        if not self.console.is_terminal and now - self.spoken > PLAIN_EVERY_S:
            self.spoken = now
            left = (now - begun) / (event.step - before) * (event.steps - event.step)
            self.console.print(f"  {title}: step {event.step}/{event.steps}  {note}  {left:.0f} s left", markup=False)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def dry_run(console: Console, recipe: Recipe, graph: Graph, store: Store) -> None:
    """The graph, what is done, and the most labels every arm can reveal."""
    console.print(f"{recipe.name}: {recipe.note.strip()}", markup=False)
    for name, model in recipe.models.items():
        console.print(f"  {name}: {model.source} ({model.dtype}, template {model.template}, thinking {model.thinking})")
    table = Table("arm", "stages (first seed)", "labels", "reveals at most", title="arms")
    for name, arm in recipe.arms.items():
        keys = graph.arms[name][recipe.seeds[0]]
        marks = [f"{s} {k[:8]} {_state(store, k)}" for s, k in zip(arm_stages(arm), keys, strict=True)]
        labels = recipe.pool.labels if most_reveals(recipe, name, arm) else 0
        table.add_row(name, "\n".join(marks), str(labels), str(most_reveals(recipe, name, arm)))
    console.print(table)
    for line in graph.unchecked:
        console.print(f"not checked here: {line}", markup=False)
    todo = [key for key in graph.nodes if not store.is_done(key)]
    stages = sum(isinstance(graph.nodes[key], StageSpec) for key in todo)
    console.print(
        f"{len(graph.nodes)} nodes over {len(recipe.seeds)} seeds; to do: {stages} stages and {len(todo) - stages} "
        f"evaluations; {len(graph.stages)} distinct stages serve {graph.requested} asked for by the arms"
    )


def _state(store: Store, key: str) -> str:
    if store.is_done(key):
        return "done"
    return "begun" if (store.path(key) / "checkpoints").exists() else "to do"


def print_results(console: Console, recipe: Recipe, found: dict[str, Any], out: Path) -> None:
    """Models, arms and comparisons with intervals, labels, tokens and seconds."""
    for name, settings in recipe.evaluations.items():
        table = Table(
            "", f"avg@{settings.samples} [95 %]", "labels", "reveals", "tokens", "seconds",
            title=f"{name}: {settings.problems} problems, {len(recipe.seeds)} seeds, mean over seeds",
        )  # fmt: skip
        for row in found["models"].values():
            if "summary" in row:
                table.add_row(
                    f"{row['role']} ({row['of']})" if "of" in row else row["role"], _interval(row["summary"][name])
                )
        for arm, row in found["arms"].items():
            bills = list(row["seeds"].values())
            mean = {
                "labels": sum(b["labels"]["distinct"] for b in bills) / len(bills),
                "reveals": sum(b["labels"]["revealed"] for b in bills) / len(bills),
                "tokens": sum(sum(b["cost"]["tokens"].values()) for b in bills) / len(bills),
                "seconds": sum(b["cost"]["seconds"] for b in bills) / len(bills),
            }
            table.add_row(arm, _interval(row["summary"][name]), *(f"{v:,.0f}" for v in mean.values()), style="bold")
        console.print(table)
    for row in found["comparisons"]:
        low, high = row["ci95"]
        console.print(
            f"{row['a']} - {row['b']} on {row['task']}: {row['difference']:+.3f} [{low:+.3f}, {high:+.3f}], "
            f"p {row['p_adjusted']:.2g} (Holm), over {row['over']}: {row['verdict']}"
            + (f"; {row['a']} <= {row['b']} + {row['margin']}: {row['outcome']}" if "outcome" in row else ""),
            markup=False,
        )
    study = found["study"]
    console.print(
        f"{study['stages_trained']} distinct stages for {study['stages_requested']} asked for by the arms; "
        f"{study['labels']['distinct']} distinct labels in all, {study['labels']['revealed']} reveals; results in {out}"
    )


def _interval(summary: dict[str, Any]) -> str:
    low, high = summary["ci95"]
    return f"{summary['mean']:.3f} [{low:.3f}, {high:.3f}]"


def print_tuning(console: Console, found: dict[str, Any], out: Path) -> None:
    """The grid of learning rates, the best of each stage, and the lines to put into the recipe."""
    table = Table("stage", *(f"{lr:g}" for lr in found["grid"]), title="avg@k on tuning problems [95 %]")
    for stage, rows in found["stages"].items():
        best = found["chosen"][stage]
        table.add_row(stage, *(_interval(row) + (" *" if row["lr"] == best else "") for row in rows))
    console.print(table)
    for stage, lr in found["chosen"].items():
        console.print(f"[stages.{stage}] optimizer = {{ lr = {lr:g} }}", markup=False)
    labels = found["labels"]
    console.print(f"{labels['distinct']} distinct labels, {labels['revealed']} reveals; all numbers in {out}")
