"""The page's charts with caption, text alternative and the table of their numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

from markupsafe import Markup

from headwater.report.directory import Group, Node, Number, Run, groups
from headwater.report.figures import Axis, Point, Series, chart, legend, linear_axis, log_axis
from headwater.report.headline import plural, points
from headwater.report.tables import ArmRow, Table, arm_rows, count, flops, interval

METRICS = {
    "reward/mean": "mean reward, before any length penalty; 0 to 1",
    "teacher/forward_kl": "KL(teacher\u2016student) on the teacher's tokens; nats a token",
    "teacher/reverse_kl": "KL(student\u2016teacher) on the student's tokens; nats a token",
    "policy/cross_entropy": "mean of \u2212log policy on the given tokens; nats",
    "policy/entropy": "entropy of the next-token distribution; nats",
    "completion/len_mean": "completion length; tokens, end token included",
    "completion/frac_truncated": "share of completions cut by the length limit",
    "reward/frac_groups_zero_std": "share of groups whose rewards are all equal (no gradient)",
    "eval/avg@k": "held-out accuracy during the stage; 0 to 1",
}
KEPT_POINTS, TABLE_STEPS = 100, 9


@dataclass(frozen=True)
class Panel:
    """A figure: what it shows, the drawing, its legend, and its numbers."""

    title: str
    caption: str
    chart: Markup
    legend: Markup
    table: Table


@dataclass(frozen=True)
class StageCurves:
    stage: str
    legend: Markup
    panels: tuple[Panel, ...]


def efficiency(run: Run, task: str) -> Panel | None:
    """Accuracy against the pool's labels, one line per arm; None without curves."""
    curves = {arm: by_task[task] for arm, by_task in run.results.get("curves", {}).items() if by_task.get(task)}
    if not curves:
        return None
    series = [
        Series(arm, slot, tuple((r["labels"], r["mean"], r["ci95"][0], r["ci95"][1]) for r in rows))
        for slot, (arm, rows) in enumerate(curves.items())
    ]
    budgets = sorted({p[0] for s in series for p in s.points})
    x = log_axis(budgets, "labels in the pool (log scale)", count, at=budgets)
    alt = f"Accuracy on {task} against labels. " + "; ".join(
        f"{s.name}: {', '.join(f'{points(p[1])} % at {count(p[0])}' for p in s.points)}" for s in series
    )
    cells = [(count(b), *(interval(*_at(s, b)) for s in series)) for b in budgets]
    head = ("labels", *(s.name for s in series))
    return Panel(
        f"Accuracy against labels, {task}",
        "Mean over seeds; the band is the 95 % interval of the mean. Dashed lines: untrained models.",
        _accuracies(run, task, series, x, alt),
        legend(series),
        Table(f"Accuracy on {task} by labels, % [95 %]", head, tuple(cells)),
    )


def _at(series: Series, x: Number) -> tuple[Number | None, tuple[Number | None, Number | None]]:
    found = [p for p in series.points if p[0] == x]
    return (found[0][1], (found[0][2], found[0][3])) if found else (None, (None, None))


def cost(run: Run, task: str) -> Panel | None:
    """Accuracy against the FLOPs of an arm's training; None when no finished arm has both."""
    rows = [r for r in arm_rows(run, task) if r.role == "arm" and r.mean is not None and r.flops]
    if not rows:
        return None
    series = [Series(r.name, slot, (_cost_point(r),), line=False) for slot, r in enumerate(rows)]
    x = log_axis([p[0] for s in series for p in s.points], "training FLOPs, mean over seeds (log scale)", flops)
    alt = f"Accuracy on {task} against training FLOPs. " + "; ".join(
        f"{r.name}: {interval(r.mean, r.ci95)} % at {flops(r.flops)}FLOP" for r in rows
    )
    cells = tuple((r.name, interval(r.mean, r.ci95), f"{flops(r.flops)}", count(r.tokens)) for r in rows)
    return Panel(
        f"Accuracy against cost, {task}",
        "Whiskers are 95 % intervals. Cost counts every stage of an arm, the teacher's included. "
        "Dashed lines: untrained models.",
        _accuracies(run, task, series, x, alt),
        legend(series),
        Table(f"Accuracy on {task} and cost", ("arm", "accuracy, % [95 %]", "FLOPs", "tokens"), cells),
    )


def _cost_point(row: ArmRow) -> Point:
    assert row.flops is not None and row.mean is not None
    return (row.flops, row.mean, *row.ci95)


def _accuracies(run: Run, task: str, series: Sequence[Series], x: Axis, alt: str) -> Markup:
    """A chart whose heights are accuracies; intervals that reach beyond 0 or 1 do not stretch it."""
    rules = [(r.mean, r.name) for r in arm_rows(run, task) if r.role == "base" and r.mean is not None]
    heights = [*_heights(series), *(value for value, _ in rules)]
    y = linear_axis([min(max(value, 0), 1) for value in heights], "accuracy, %", scale=100)
    return chart(series, x, y, alt, height=320, rules=rules)


def _heights(series: Sequence[Series]) -> list[Number]:
    return [v for s in series for p in s.points for v in p[1:] if v is not None]


def learning(run: Run) -> list[StageCurves]:
    """For every stage, one small multiple per metric that it logged; a line per set of arms that share the nodes."""
    by_stage: dict[str, list[Group]] = {}
    for group in groups(run):
        by_stage.setdefault(group.stage, []).append(group)
    found = []
    for stage, members in by_stage.items():
        logged = {node.key: _logged(run, node) for group in members for node in group.nodes}
        panels = [p for metric in METRICS if (p := _metric_panel(stage, metric, members, logged))]
        if panels:
            begun = [any(logged[node.key] for node in group.nodes) for group in members]
            names = [Series(g.name, slot, ((0, 0, None, None),) * 13) for slot, g in enumerate(members) if begun[slot]]
            found.append(StageCurves(stage, legend(names), tuple(panels)))
    return found


def _logged(run: Run, node: Node) -> dict[str, dict[int, Number]]:
    """Metric -> step -> value; a step that was repeated after a crash keeps its last row."""
    found: dict[str, dict[int, Number]] = {}
    for name in ("metrics.jsonl", "evals.jsonl"):
        for row in run.rows(node.key, name):
            for metric, value in row.items():
                shown = "eval/avg@k" if metric.startswith("eval/") else metric
                if shown in METRICS and isinstance(value, int | float) and isfinite(value) and "step" in row:
                    found.setdefault(shown, {})[row["step"]] = value
    return found


def _metric_panel(
    stage: str, metric: str, members: Sequence[Group], logged: dict[str, dict[str, dict[int, Number]]]
) -> Panel | None:
    series = []
    for slot, group in enumerate(members):
        seeds = [logged[node.key][metric] for node in group.nodes if metric in logged[node.key]]
        if seeds:
            series.append(Series(group.name, slot, _over_seeds(seeds)))
    if not series:
        return None
    x = _step_axis([p[0] for s in series for p in s.points])
    alt = f"{metric} in {stage}. " + "; ".join(
        f"{s.name}: from {s.points[0][1]:.3g} to {s.points[-1][1]:.3g}" for s in series
    )
    steps = sorted({p[0] for s in series for p in s.points})
    cells = tuple((count(step), *(_range(s, step) for s in series)) for step in _thin(steps, TABLE_STEPS))
    return Panel(
        metric,
        METRICS[metric],
        chart(series, x, linear_axis(_heights(series), "", count=3), alt, height=130),
        Markup(""),
        Table(f"{metric} in {stage}, mean over seeds [range]", ("step", *(s.name for s in series)), cells),
    )


def _over_seeds(seeds: Sequence[dict[int, Number]]) -> tuple[Point, ...]:
    """Mean and range over the seeds that have a step: at most `KEPT_POINTS` steps, first and last among them."""
    steps = sorted(set().union(*seeds))
    out = []
    for step in map(int, _thin(steps, KEPT_POINTS)):
        values = [seed[step] for seed in seeds if step in seed]
        out.append((float(step), sum(values) / len(values), min(values), max(values)))
    return tuple(out)


def _thin(values: Sequence[Number], most: int) -> list[Number]:
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def _step_axis(steps: Sequence[Number]) -> Axis:
    whole = linear_axis(steps, "step", count=4)
    low, high = (min(steps), max(steps)) if min(steps) < max(steps) else (whole.low, whole.high)
    ticks = tuple((v, t) for v, t in whole.ticks if low <= v <= high and float(v).is_integer())
    return Axis(low, high, ticks, "step")


def _range(series: Series, step: Number) -> str:
    found = [p for p in series.points if p[0] == step]
    if not found:
        return "\N{EN DASH}"
    _, mean, low, high = found[0]
    return f"{mean:.3g}" if low == high else f"{mean:.3g} [{low:.3g}, {high:.3g}]"


def seeds_note(run: Run) -> str:
    most = max((len(group.nodes) for group in groups(run)), default=0)
    return f"Lines are means over {plural(most, 'seed')}" + (
        "; bands run from the lowest to the highest." if most > 1 else "."
    )
