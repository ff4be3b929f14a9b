"""Progress and results in a terminal; plain lines when it is not one."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from headwater import spec
from headwater.config import Recipe, arm_stages
from headwater.doctor.finding import Finding
from headwater.report import observations
from headwater.report.directory import read
from headwater.report.headline import decisions
from headwater.report.tables import ARM_HEAD, arm_cells, arm_rows, comparison_rows, count, duration, flops, interval
from headwater.spec import DecisionSpec, StageSpec
from headwater.store import Store
from headwater.study.budget import most_reveals
from headwater.study.calibrate import calibrate
from headwater.study.executors import Event, holder
from headwater.study.graph import Graph
from headwater.study.outlook import outlook
from headwater.study.run import executed_otherwise, to_jobs

SHOWN = ("reward/mean", "teacher/reverse_kl", "teacher/forward_kl", "policy/cross_entropy", "eval/avg@k", "tokens/s")
PLAIN_EVERY_S = 10.0
SPANS: tuple[tuple[str, Callable[[float], str]], ...] = (("tokens", count), ("flops", flops), ("seconds", duration))


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
        elif event.kind == "waiting":
            if event.key in self.tasks:
                self.bars.remove_task(self.tasks.pop(event.key))
            self.console.print(f"waiting for {title}: {event.error} is at work on it", markup=False)
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
        now = time.monotonic()
        begun, before = self.begun.setdefault(event.key, (now, event.step))  # resumed, or many steps at once
        self.bars.update(self.tasks[event.key], total=event.steps, completed=event.step, note=note)
        if not self.console.is_terminal and now - self.spoken > PLAIN_EVERY_S:
            self.spoken = now
            left = (now - begun) / max(1, event.step - before) * (event.steps - event.step)
            when = f"  {left:.0f} s left" if event.step > before else ""
            self.console.print(f"  {title}: step {event.step}/{event.steps}  {note}{when}", markup=False)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def dry_run(console: Console, recipe: Recipe, graph: Graph, store: Store) -> None:
    """What a run would do: the graph of its stages, what is done, the most labels each arm reveals, what it will
    cost."""
    console.print(f"{recipe.name}: {recipe.note.strip()}", markup=False)
    states = {key: state(store, key) for key in graph.nodes}
    console.print(_tree(recipe, graph, states))
    print_plan(console, recipe, outlook(recipe, graph, calibrate(recipe, graph, store, measure=False)))
    table = Table("arm", "stages", "labels", "reveals at most", title="arms, a seed")
    for name, variant in recipe.variants.items():
        reveals = most_reveals(recipe, name)
        shown = "until its FLOPs are spent" if reveals is None else f"{reveals:,}"
        labels = f"{variant.labels if reveals != 0 else 0:,}"
        table.add_row(name, " > ".join(arm_stages(recipe.arms[variant.arm])) or "-", labels, shown)
    console.print(table)
    for line in graph.unchecked:
        console.print(f"not checked here: {line}", markup=False)
    todo = [key for key in graph.nodes if states[key] != "done"]
    stages, probes = (sum(isinstance(graph.nodes[key], kind) for key in todo) for kind in (StageSpec, DecisionSpec))
    sharing = graph.requested / max(1, len(graph.stages))
    evaluations = f"{len(todo) - stages - probes} evaluations" + (f" and {probes} probes" if probes else "")
    console.print(
        f"{len(graph.nodes)} nodes over {len(recipe.seeds)} seeds; to do: {stages} stages and {evaluations}; "
        f"{len(graph.stages)} distinct stages serve {graph.requested} asked for by the arms "
        f"(sharing ratio {sharing:.2f})"
    )


def state(store: Store, key: str) -> str:
    """`done`, `running` (another process holds it), `begun` (and stopped) or `to do`."""
    if store.is_done(key):
        return "done"
    if holder(store.path(key)):
        return "running"
    return "begun" if (store.path(key) / "spec.json").exists() else "to do"


def _tree(recipe: Recipe, graph: Graph, states: dict[str, str]) -> Tree:
    """Weights from the base models down, every stage of the first seed once; states are over all seeds."""
    first = recipe.seeds[0]
    over_seeds: dict[str, set[str]] = {}
    ends: dict[str, list[str]] = {}
    through: dict[str, list[str]] = {}
    for name, by_seed in graph.arms.items():
        for place, key in enumerate(by_seed[first]):
            over_seeds.setdefault(key, set()).update(stages[place] for stages in by_seed.values())
            is_last = place + 1 == len(by_seed[first])
            (ends if is_last else through).setdefault(key, []).append(name)
    tree = Tree(f"stages of seed {first}, states over {len(recipe.seeds)} seeds")
    bases = {
        name: graph.nodes[graph.evals[name, next(iter(recipe.evaluations)), first]].start for name in recipe.models
    }
    branches: dict[str, Tree] = {}
    for name, ref in bases.items():
        model = f"base {name}: {ref.config.source} ({ref.config.dtype}, template {ref.config.template})"
        branches[spec.digest(ref.model_dump())] = tree.add(Text(model))
    for key in over_seeds:
        node = graph.nodes[key]
        assert isinstance(node, StageSpec)
        counts = Counter(states[k] for k in over_seeds[key])
        shown = ", ".join(s if len(counts) == 1 else f"{n} {s}" for s, n in sorted(counts.items()))
        teacher = (
            f", taught by {node.teacher.stage[:8] if node.teacher.stage else 'a base model'}" if node.teacher else ""
        )
        arms = [f"{word} {_few(names[key])}" for word, names in (("ends", ends), ("serves", through)) if key in names]
        text = f"{graph.names[key]} ({node.label}) {key[:8]}{teacher} [{shown}] {'; '.join(arms)}"
        under = node.start.stage or spec.digest(node.start.model_dump())
        branches[key] = branches[under].add(Text(text))
    return tree


def _few(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"


def plan_table(recipe: Recipe, planned: dict[str, Any]) -> Table:
    """One row for every stage of the first seed, and for every evaluation that costs otherwise."""
    table = Table("node", "steps", "labels", "tokens", "FLOPs", "time", "memory", title="plan: middle (low to high)")
    seen: set[tuple[str, ...]] = set()
    for row in planned["nodes"].values():
        spans = [_span(row[name], text) for name, text in SPANS]
        cost = (row["name"], *spans)
        if row["seed"] != recipe.seeds[0] or (row["kind"] != "stage" and cost in seen):
            continue
        seen.add(cost)
        memory = f"{row['memory']['peak'] / 1e9:.2f} GB" if row["memory"] else "not known"
        shown = "" if row["kind"] != "stage" else "by FLOPs" if row["steps"] is None else f"{row['steps']:.0f}"
        table.add_row(row["title"].replace(f", seed {row['seed']}", ""), shown, f"{row['labels']:,}", *spans, memory)
    return table


def _span(levels: list[float] | None, text: Callable[[float], str]) -> str:
    return "not known" if levels is None else f"{text(levels[1])} ({text(levels[0])} to {text(levels[2])})"


def print_plan(console: Console, recipe: Recipe, planned: dict[str, Any]) -> None:
    """The table, what will not fit with what will, and the study's sums."""
    console.print(plan_table(recipe, planned))
    for row in planned["nodes"].values():
        if row["seed"] == recipe.seeds[0] and row["fits"] != []:
            how = "none of the settings that save memory is enough" if row["fits"] is None else "; ".join(row["fits"])
            console.print(f"{row['title']} does not fit: {how}", markup=False)
    whole, processes = planned["total"], int(recipe.execution.executor.partition(":")[2] or 1)
    amounts = [_span(whole[name], text) for name, text in SPANS]
    text = f"all {len(planned['nodes'])} nodes: {amounts[0]} tokens, {amounts[1]} FLOP, {amounts[2]} of work"
    if whole["seconds"]:
        text += f", {duration(whole['seconds'][1] / processes)} on {recipe.execution.executor}"
    if "price" in whole:
        text += f", price {_span(whole['price'], '{:.2f}'.format)}"
    console.print(f"{text}; rests on {planned['rests_on']}", markup=False)


def print_results(console: Console, recipe: Recipe, found: dict[str, Any], out: Path) -> None:
    """Models, arms and comparisons with intervals, labels, tokens and seconds."""
    seen = read(out)
    for name, settings in recipe.evaluations.items():
        title = f"{name}: avg@{settings.samples} of {settings.problems} problems, mean over {len(recipe.seeds)} seeds"
        table = Table(*ARM_HEAD, title=title)
        for row in arm_rows(seen, name):
            table.add_row(*arm_cells(row), style="bold" if row.role == "arm" else None)
            for stage in row.below:
                table.add_row(*arm_cells(replace(stage, name=f"  {stage.name}")))
        console.print(table)
    for pair, task, points, p, _, over, verdict in comparison_rows(seen):
        console.print(f"{pair} on {task}: {points} points, p {p} (Holm), over {over}: {verdict}", markup=False)
    for line in [*observations.gates(seen), *(f"warning: {line}" for line in observations.health(seen))]:
        console.print(line, markup=False)
    for text in decisions(found):
        console.print(text, markup=False)
    for name, row in found.get("plan", {}).get("planned_against_actual", {}).items():
        console.print(f"planned {name}: {row['planned']:.3g}, actual {row['actual']:.3g}", markup=False)
    study = found["study"]
    console.print(
        f"{study['stages_trained']} distinct stages for {study['stages_requested']} asked for by the arms; "
        f"{study['labels']['distinct']} distinct labels in all, {study['labels']['revealed']} reveals; results in {out}"
    )


def print_tuning(console: Console, found: dict[str, Any], out: Path) -> None:
    """The grid of learning rates, the best of each stage, and the lines to put into the recipe."""
    table = Table("stage", *(f"{lr:g}" for lr in found["grid"]), title="avg@k on tuning problems, % [95 %]")
    for stage, rows in found["stages"].items():
        marks = [" *" if row["lr"] == found["chosen"][stage] else "" for row in rows]
        cells = [interval(row["mean"], row["ci95"]) for row in rows]
        table.add_row(stage, *map(str.__add__, cells, marks))
    console.print(table)
    for stage, lr in found["chosen"].items():
        console.print(f"[stages.{stage}] optimizer = {{ lr = {lr:g} }}", markup=False)
    labels = found["labels"]
    console.print(f"{labels['distinct']} distinct labels, {labels['revealed']} reveals; all numbers in {out}")


def print_findings(console: Console, findings: Sequence[Finding]) -> None:
    """What the doctor saw; of what is not as it should be also why it matters and what to change."""
    for found in findings:
        style = {"ok": "green", "warning": "yellow", "error": "red"}[found.level]
        console.print(Text.assemble((f"{found.level:<8}", style), f"{found.name}: {found.seen}"), soft_wrap=True)
        if found.why:
            console.print(Text(f"        why: {found.why}\n        change: {found.change}"), soft_wrap=True)
