"""Tables of a run as plain values, and as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal

from headwater.report.directory import Number, Run
from headwater.report.headline import decisions, further, headlines, mean_over, points, prediction, signed

Role = Literal["base", "teacher", "stage", "arm"]
Bound = tuple[Number | None, Number | None]
DASH = "\N{EN DASH}"


@dataclass(frozen=True)
class Table:
    """Text cells; the first of a row is its header. `numeric` columns are set flush right."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: bool = True


@dataclass(frozen=True)
class ArmRow:
    """One model on one task: shares in 0..1; labels and costs are means over seeds, None for what was not trained."""

    name: str
    role: Role
    task: str
    mean: Number | None
    ci95: Bound
    over: str
    num_seeds: int
    passes: dict[str, tuple[Number, Bound]]
    unparsed: Number | None
    wrong: Number | None
    truncated: Number | None
    styles: dict[str, tuple[Number, Number]]
    gap: tuple[Number, Bound] | None = None
    distinct: Number | None = None
    revealed: Number | None = None
    tokens: Number | None = None
    flops: Number | None = None
    seconds: Number | None = None
    stages: tuple[str, ...] = ()
    below: tuple[ArmRow, ...] = ()
    """The arm's rows stage by stage."""


def tasks(run: Run) -> list[str]:
    """Evaluations in the recipe's order."""
    return list(run.recipe.get("evaluations", {}))


def arm_rows(run: Run, task: str) -> list[ArmRow]:
    """Base models, trained teachers, then every arm: with its numbers when it is finished, empty when it is not."""
    models, arms = run.results.get("models", {}), run.results.get("arms", {})
    base = sorted((row for row in models.values() if row["role"].startswith("base")), key=lambda row: row["role"])
    taught = [row for row in models.values() if row["role"] == "trained teacher" and task in row.get("summary", {})]
    rows = [_model_row(row, row["role"], "base", task) for row in base if task in row.get("summary", {})]
    rows += [_model_row(row, f"teacher of {row.get('of', '?').partition('/')[0]}", "teacher", task) for row in taught]
    for name in dict.fromkeys([*arms, *run.arms]):
        rows.append(_arm_row(run, name, task) if name in arms else _unfinished(name, task))
    return rows


def _model_row(row: Mapping[str, Any], name: str, role: Role, task: str) -> ArmRow:
    return _row(name, role, task, row["summary"][task], len(row["evals"]))


def _arm_row(run: Run, name: str, task: str) -> ArmRow:
    arm = run.results["arms"][name]
    bills = arm["seeds"].values()
    row = replace(
        _row(name, "arm", task, arm["summary"][task], len(bills)),
        **_mean_bill(list(bills)),
        stages=tuple(arm["stages"]),
    )
    return replace(row, below=tuple(_stage_rows(run, row, arm, task)))


def _mean_bill(bills: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    labels = {name: mean_over(bills, "labels", name) for name in ("distinct", "revealed")}
    return labels | {name: mean_over(bills, "cost", name) for name in ("tokens", "flops", "seconds")}


def _stage_rows(run: Run, row: ArmRow, arm: Mapping[str, Any], task: str) -> list[ArmRow]:
    """Bills of an arm's stages (means over seeds), with the accuracy after each where it was measured."""
    found, seeds = [], arm["seeds"].values()
    for place, stage in enumerate(row.stages):
        last = place == len(row.stages) - 1
        shown = row if last else _after(run, {seed["stages"][place] for seed in seeds}, stage, task)
        bill = _mean_bill([seed["by_stage"][place] for seed in seeds])
        found.append(replace(shown, name=stage, role="stage", gap=None, stages=(), **bill))
    return found if len(found) > 1 else []


def _after(run: Run, keys: set[str], stage: str, task: str) -> ArmRow:
    """Accuracy of the students or teachers that these stages left: of their own row, or of an arm that ends there."""
    models, arms = run.results.get("models", {}), run.results.get("arms", {})
    for key in keys & set(models):
        if task in models[key].get("summary", {}):
            return _model_row(models[key], stage, "stage", task)
    for arm in arms.values():
        if keys & {seed["stages"][-1] for seed in arm["seeds"].values()}:
            return _row(stage, "stage", task, arm["summary"][task], len(arm["seeds"]))
    return _unfinished(stage, task)


def _row(name: str, role: Role, task: str, summary: Mapping[str, Any], num_seeds: int) -> ArmRow:
    gap = summary.get("gap_recovery")
    return ArmRow(
        name=name,
        role=role,
        task=task,
        mean=summary["mean"],
        ci95=tuple(summary["ci95"]),
        over=summary["over"],
        num_seeds=num_seeds,
        passes={k: (row["mean"], tuple(row["ci95"])) for k, row in summary["pass@k"].items()},
        unparsed=summary["unparsed"],
        wrong=summary["wrong"],
        truncated=summary["truncated"],
        styles={name: (row["share"], row["accuracy"]) for name, row in summary["styles"].items()},
        gap=(gap["value"], tuple(gap["ci95"])) if gap else None,
    )


def _unfinished(name: str, task: str) -> ArmRow:
    return ArmRow(name, "arm", task, None, (None, None), "", 0, {}, None, None, None, {})


def bill_table(run: Run) -> Table | None:
    """Labels of every arm seed by seed, of its stages as means over seeds, and of the whole study."""
    rows = []
    for name, arm in run.results.get("arms", {}).items():
        for seed, bill in arm["seeds"].items():
            for stage in bill["by_stage"]:
                rows.append((name, seed, stage["stage"], *_labels(stage["labels"])))
            rows.append((name, seed, "arm (union)", *_labels(bill["labels"])))
    if not rows:
        return None
    rows.append(("whole study", "all", "each stage once", *_labels(run.results["study"]["labels"])))
    caption = "Label bills: distinct problems whose answers were used, and reveals (using an answer again counts again)"
    return Table(caption, ("arm", "seed", "stage", "distinct", "revealed"), tuple(rows))


def _labels(row: Mapping[str, Any]) -> tuple[str, str]:
    return count(row["distinct"]), count(row["revealed"])


def match_table(run: Run) -> Table | None:
    """How many labels a baseline needs to reach an arm, from `labels_to_match`."""
    rows = tuple(
        (row["arm"], row["task"], count(row["labels"]), row["baseline"], match(row), match_bounds(row))
        for row in run.results.get("labels_to_match", [])
    )
    head = ("arm", "task", "its labels", "baseline", "labels it needs", "95 % set")
    return Table("Labels the baseline needs to match an arm", head, rows) if rows else None


def match(row: Mapping[str, Any]) -> str:
    """The number of labels at which the baseline's curve crosses; in words when it does not inside the budgets."""
    if row.get("value") is not None:
        return count(row["value"])
    low, high = row["ci95"]
    fewest, most = row["range"]
    if low is not None and high is None:
        return f"more than {count(most)}"
    return f"fewer than {count(fewest)}" if high is not None and low is None else "outside the budgets"


def match_bounds(row: Mapping[str, Any]) -> str:
    """The confidence set in words; an open end lies outside the budgets that were run."""
    low, high = row["ci95"]
    fewest, most = row["range"]
    if low is None and high is None:
        return f"nothing between {count(fewest)} and {count(most)} is ruled out"
    if low is None:
        return f"fewer than {count(high)}"
    return f"more than {count(low)}" if high is None else f"{count(low)} to {count(high)}"


def comparison_rows(run: Run) -> list[tuple[str, ...]]:
    """Declared comparisons as text: pair, task, difference in points with interval, p, seeds, over, verdict."""
    rows = []
    for row in run.results.get("comparisons", []):
        low, high = row["ci95"]
        rows.append(
            (
                f"{row['a']} \N{MINUS SIGN} {row['b']}",
                row["task"],
                f"{signed(row['difference'])} [{signed(low)}, {signed(high)}]",
                p_value(row["p_adjusted"]),
                str(row["num_seeds"]),
                row["over"],
                verdict_text(row),
            )
        )
    return rows


COMPARISON_HEAD = ("difference of", "task", "points [95 %]", "p (Holm)", "seeds", "interval over", "verdict")


def verdict_text(row: Mapping[str, Any]) -> str:
    """`bridge better`, `not distinguishable`; with the outcome of a prediction when the row declares one."""
    side = {"a better": "a", "b better": "b"}.get(row["verdict"])
    name = f"{row[side]} better" if side else str(row["verdict"])
    outcome = f"; at most {signed(row['margin'])} points: {row['outcome']}" if row.get("outcome") else ""
    return name + outcome


def interval(mean: Number | None, ci95: Sequence[Number | None], text: Any = points) -> str:
    """`40.5 [37.6, 43.4]` in points; without brackets when there is no interval, a dash when there is nothing."""
    if mean is None:
        return DASH
    low, high = ci95
    return text(mean) if low is None or high is None else f"{text(mean)} [{text(low)}, {text(high)}]"


def share(value: Number | None) -> str:
    return DASH if value is None else points(value)


def count(value: Number | None) -> str:
    return DASH if value is None else f"{value:,.0f}"


def flops(value: Number | None) -> str:
    """`0.88 T`, `3.2 P`: with an SI prefix, three digits at most."""
    if value is None:
        return DASH
    for prefix, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g}"


def duration(value: Number | None) -> str:
    """`45 s`, `12 min`, `3 h 05 min`, `2 d 4 h`."""
    if value is None:
        return DASH
    if value < 100:
        return f"{value:.0f} s"
    minutes = round(value / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def when(value: Number | None) -> str:
    return DASH if value is None else datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def p_value(value: Number) -> str:
    return "< .001" if value < 0.001 else f"{value:.3f}".removeprefix("0")


def style_text(row: ArmRow) -> str:
    """`worked 90 x 44`: share of the samples times accuracy within it, in percent."""
    return "; ".join(f"{n} {100 * s:.0f} \N{MULTIPLICATION SIGN} {100 * a:.0f}" for n, (s, a) in row.styles.items())


def as_json(run: Run) -> str:
    """results.json's own content, with the headline's sentences."""
    said = [s.text for s in headlines(run)]
    predicted = [text for row in run.results.get("comparisons", []) if (text := prediction(row))]
    also = [s.text for s in further(run)]
    return json.dumps({**run.results, "headline": said, "further": also, "predictions": predicted}, indent=1)


CSV_HEAD = (
    "name", "role", "task", "mean", "ci95_low", "ci95_high", "over", "num_seeds", "gap_recovery", "gap_low", "gap_high",
    "labels_distinct", "labels_revealed", "tokens", "flops", "seconds", "unparsed", "wrong", "truncated",
)  # fmt: skip  # a table: several entries a line


def as_csv(run: Run) -> str:
    """One row per model or arm and task; shares in 0..1, empty where there is no number."""
    rows = [row for task in tasks(run) for row in arm_rows(run, task)]
    ks = sorted({k for row in rows for k in row.passes}, key=int)
    styles = list(dict.fromkeys(style for row in rows for style in row.styles))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    extra = [f"{what}_{style}" for style in styles for what in ("share", "accuracy")]
    writer.writerow([*CSV_HEAD, *(f"pass@{k}" for k in ks), *extra])
    for r in rows:
        gap = (r.gap[0], *r.gap[1]) if r.gap else (None, None, None)
        own = (r.name, r.role, r.task, r.mean, *r.ci95, r.over, r.num_seeds, *gap, r.distinct, r.revealed)
        own += (r.tokens, r.flops, r.seconds, r.unparsed, r.wrong, r.truncated)
        passes = [r.passes[k][0] if k in r.passes else None for k in ks]
        shares = [value for style in styles for value in r.styles.get(style, (None, None))]
        writer.writerow([*own, *passes, *shares])
    return out.getvalue()


ARM_HEAD = ("", "accuracy, % [95 %]", "gap recovery", "labels", "reveals", "tokens", "FLOPs", "seconds")


def arm_cells(row: ArmRow) -> tuple[str, ...]:
    """What stands under `ARM_HEAD`."""
    bill = (count(row.distinct), count(row.revealed), count(row.tokens), flops(row.flops), duration(row.seconds))
    return (row.name, interval(row.mean, row.ci95), interval(*row.gap) if row.gap else DASH, *bill)


def as_markdown(run: Run) -> str:
    """Headline, the arms table of every task, and the comparisons."""
    lines = [f"# {run.name}", ""]
    lines += [f"**{_plain(s.text)}**\n" for s in headlines(run)] + [f"{_plain(s.text)}\n" for s in further(run)]
    lines += [f"{_plain(text)}\n" for row in run.results.get("comparisons", []) if (text := prediction(row))]
    lines += [f"{_plain(text)}\n" for text in decisions(run.results)]
    for task in tasks(run):
        rows = [arm_cells(row) for row in arm_rows(run, task)]
        lines += [f"## {task}", "", *_grid(ARM_HEAD, rows), ""]
    if rows := comparison_rows(run):
        lines += ["## Declared comparisons", "", *_grid(COMPARISON_HEAD, rows), ""]
    return "\n".join(lines)


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(_plain(cell) for cell in row)} |" for row in [head, ["---"] * len(head), *rows]]


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
