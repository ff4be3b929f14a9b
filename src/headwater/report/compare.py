"""Two run directories side by side: what differs in configuration, code and data, and what that did to the numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from headwater.evals.statistics import Estimate, holm, paired_difference, verdict
from headwater.report.directory import Run, read, read_json

ABSENT = "-"
Endpoints = dict[str, dict[str, dict[str, Any]]]


def compare(a: Path, b: Path) -> dict[str, Any]:
    """What differs between two runs, from their directories alone.

    Returns `{"a", "b", "configuration", "code", "data": [{"key", "a", "b"}], "stages": {"same", "a", "b"},
    "differences": [{"name", "task", "difference", "ci95", "p_adjusted", "num_seeds", "num_problems", "over",
    "verdict"}], "not_compared": [{"name", "task", "why"}], "only_a", "only_b"}`. A difference is a - b, paired by
    problem and by the seeds that both have, its p-value adjusted by Holm over all differences shown. Numbers on other
    problems, or by another grader, are named and not compared.
    Raises ValueError for a directory that holds no run, or whose stages.json cannot be read.
    """
    ours, theirs = read(a), read(b)
    if missing := [run.root for run in (ours, theirs) if not run.nodes]:
        raise ValueError(f"{missing[0]}/stages.json cannot be read: run `headwater resume {missing[0]}` again")
    ends, data = (_endpoints(ours), _endpoints(theirs)), (_data(ours), _data(theirs))
    stages = [{node.key for node in run.stages} for run in (ours, theirs)]
    differences, refused = _differences(ours, theirs, *ends)
    return {
        "a": str(a),
        "b": str(b),
        "configuration": _differing(*({k: v for k, v in r.recipe.items() if k != "execution"} for r in (ours, theirs))),
        "code": _differing(_code(ours), _code(theirs)),
        # A stage or seed that one does not have is a difference of configuration.
        "data": _differing(*({name: one[name] for name in one if all(name in d for d in data)} for one in data)),
        "stages": {"same": len(stages[0] & stages[1]), "a": len(stages[0]), "b": len(stages[1])},
        "differences": differences,
        "not_compared": refused,
        "only_a": [name for name in ends[0] if name not in ends[1]],
        "only_b": [name for name in ends[1] if name not in ends[0]],
    }


def _endpoints(run: Run) -> Endpoints:
    """Arms and untrained models -> seed -> task -> its row in the results."""
    arms = {
        name: {seed: row["evals"] for seed, row in arm["seeds"].items()}
        for name, arm in run.results.get("arms", {}).items()
    }
    rows = run.results.get("models", {}).values()
    return {row["role"]: row["evals"] for row in rows if row["role"].startswith("base ")} | arms


def _spec(run: Run, key: str) -> dict[str, Any]:
    """A node's specification; {} when it has not been begun."""
    return read_json(run.root / "nodes" / key / "spec.json").get("spec", {})


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Dotted keys whose values differ; `-` where there is none."""
    ours, theirs = dict(_flat(a)), dict(_flat(b))
    rows = [{"key": key, "a": ours.get(key, ABSENT), "b": theirs.get(key, ABSENT)} for key in {**ours, **theirs}]
    return [row for row in rows if row["a"] != row["b"]]


def _code(run: Run) -> dict[str, Any]:
    """Versions, hardware, the revision of every method, and how it was executed."""
    revisions: dict[str, set[int]] = {}
    for key, node in run.nodes.items():
        if spec := _spec(run, key):
            revisions.setdefault(node.method, set()).add(spec["revision"])
    listed = {method: ", ".join(map(str, sorted(found))) for method, found in sorted(revisions.items())}
    known = {key: value for key, value in run.environment.items() if key != "command"}
    return {**known, "revision": listed, "execution": run.recipe.get("execution", {})}


def _data(run: Run) -> dict[str, Any]:
    """Digests of the problems of every stage and evaluation by name and seed; several where budgets differ."""
    found: dict[str, dict[str, None]] = {}
    for key, node in run.nodes.items():
        if problems := _spec(run, key).get("problems"):
            name = node.stage.partition(" of base ")[0].partition(" after ")[0]
            place = name if problems["seed"] is None else f"{name}, seed {problems['seed']}"
            text = f"{problems['digest']} ({problems['count']} of {problems['split']}, {problems['part']})"
            found.setdefault(place, {})[text] = None
    return {name: "; ".join(sorted(texts)) for name, texts in found.items()}


def _differences(
    a: Run, b: Run, ours: Endpoints, theirs: Endpoints
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    rows: list[dict[str, Any]] = []
    estimates: list[Estimate] = []
    refused: list[dict[str, str]] = []
    for name in (name for name in ours if name in theirs):
        seeds = sorted(ours[name].keys() & theirs[name].keys(), key=int)
        mine, other = ({task for seed in runs[name].values() for task in seed} for runs in (ours, theirs))
        for task in sorted(mine | other):
            pair = [[runs[name][seed].get(task) for seed in seeds] for runs in (ours, theirs)]
            why = _obstacle(a, b, *pair)
            if why is None:
                estimates.append(paired_difference(*_matrices(a, b, *pair)))
                rows.append({"name": name, "task": task})
            else:
                refused.append({"name": name, "task": task, "why": why})
    adjusted = holm([estimate.p_value for estimate in estimates]) if estimates else []
    for row, estimate, p in zip(rows, estimates, adjusted, strict=True):
        row |= {
            "difference": estimate.value,
            "ci95": list(estimate.ci95),
            "p_adjusted": p,
            "num_seeds": estimate.num_seeds,
            "num_problems": estimate.num_problems,
            "over": estimate.over,
            "verdict": verdict(estimate, p),
        }
    return rows, refused


def _obstacle(a: Run, b: Run, ours: list[Any], theirs: list[Any]) -> str | None:
    """Why two rows of evaluations, seed by seed, may not be compared; None when they may."""
    if not ours:
        return "no seed that both have"
    if None in ours or None in theirs:
        return "evaluated in one of them only, or not at every seed yet"
    for mine, other in zip(ours, theirs, strict=True):
        specs = [_spec(run, Path(row["per_problem"]).stem) for run, row in ((a, mine), (b, other))]
        sizes = mine["num_problems"], other["num_problems"]
        if _scores(a, mine).keys() != _scores(b, other).keys():
            return f"other problems ({sizes[0]} and {sizes[1]}): their accuracies are not on one scale"
        # Without specifications the prompts are all there is to go by.
        problems = [spec["problems"]["digest"] for spec in specs if spec]
        graders = [(spec["grader"], spec["grader_digest"]) for spec in specs if spec]
        if len(set(problems)) > 1:
            return "the same prompts with other answers: what is right is not the same"
        if len(set(graders)) > 1:
            return "another grader: what is right is not the same"
        settings = [json.dumps([spec.get("settings"), spec.get("revision")], sort_keys=True) for spec in specs if spec]
        if len(set(settings)) > 1:
            return "other evaluation settings: their accuracies are not on one scale"
        if sizes[0] < 2:
            return "one problem has no interval"
    return None


def _matrices(a: Run, b: Run, ours: list[Any], theirs: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    """[seeds, problems] of both, problems in the order of the first."""
    order = list(_scores(a, ours[0]))
    first, second = (
        np.array([[_scores(run, row)[problem] for problem in order] for row in rows], dtype=float)
        for run, rows in ((a, ours), (b, theirs))
    )
    return first, second


def _scores(run: Run, row: Mapping[str, Any]) -> dict[str, float]:
    return json.loads((run.root / row["per_problem"]).read_text(encoding="utf-8"))


def print_comparison(console: Console, found: Mapping[str, Any]) -> None:
    """What `compare` found, for people."""
    console.print(f"A: {found['a']}\nB: {found['b']}", markup=False)
    stages = found["stages"]
    console.print(f"{stages['same']} stages are the same: of {stages['a']} in A, of {stages['b']} in B")
    for name in ("configuration", "code", "data"):
        _print_differing(console, name, found[name])
    for letter in ("a", "b"):
        if found[f"only_{letter}"]:
            console.print(f"only in {letter.upper()}: {', '.join(found[f'only_{letter}'])}", markup=False)
    if found["differences"]:
        table = Table(
            "", "on", Column("A - B [95 %]", no_wrap=True), "p (Holm)", "seeds", "over", "verdict", title="numbers"
        )
        for row in found["differences"]:
            low, high = row["ci95"]
            shown = f"{row['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"
            p, words = f"{row['p_adjusted']:.2g}", row["verdict"].replace("a b", "A b").replace("b b", "B b")
            table.add_row(row["name"], row["task"], shown, p, str(row["num_seeds"]), row["over"], words)
        console.print(table)
    else:
        console.print("no numbers can be compared")
    for row in found["not_compared"]:
        console.print(f"not compared: {row['name']} on {row['task']}: {row['why']}", markup=False)


def _print_differing(console: Console, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    if not rows:
        console.print(f"{name}: the same")
        return
    table = Table("", "A", "B", title=f"{name}: {len(rows)} differ")
    for row in rows:
        table.add_row(
            Text(row["key"]), *(Text(v if isinstance(v := row[side], str) else json.dumps(v)) for side in "ab")
        )
    console.print(table)
