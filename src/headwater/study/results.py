"""From finished nodes to `results.json`: bills, summaries with intervals, declared comparisons, label curves."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from headwater.arms import StageName
from headwater.checkpoint import write_atomically
from headwater.config import Recipe, arm_stages
from headwater.evals.evaluate import protocol
from headwater.evals.statistics import (
    gap_recovery,
    holm,
    labels_to_match,
    mean_interval,
    noninferior,
    paired_difference,
    pass_at_k,
    verdict,
)
from headwater.meter import total
from headwater.spec import EvaluationSpec
from headwater.store import Store
from headwater.study.graph import Graph
from headwater.study.outlook import against


@dataclass(frozen=True)
class _Reader:
    recipe: Recipe
    graph: Graph
    store: Store
    out: Path
    outcomes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def outcome(self, key: str) -> dict[str, Any]:
        if key not in self.outcomes:
            self.outcomes[key] = self.store.outcome(key)
        return self.outcomes[key]

    def result(self, model: str, evaluation: str, seed: int) -> dict[str, Any]:
        return self.outcome(self.graph.evals[model, evaluation, seed])["result"]

    def is_finished(self, endpoint: str) -> bool:
        """Whether every evaluation of an endpoint is there, on every seed."""
        recipe = self.recipe
        models = [(self.model(endpoint, seed), seed) for seed in recipe.seeds]
        keys = [self.graph.evals[model, name, seed] for model, seed in models for name in recipe.evaluations]
        return all(map(self.store.is_done, keys))

    def evals(self, model: str, seed: int) -> dict[str, Any]:
        """Every evaluation of a model: the numbers, with the per-problem scores in a file of their own."""
        out = {}
        for name in self.recipe.evaluations:
            key = self.graph.evals[model, name, seed]
            result = dict(self.outcome(key)["result"])
            file = f"evals/{key}.json"
            write_atomically(self.out / file, json.dumps(result.pop("per_problem")))
            node = self.graph.nodes[key]
            assert isinstance(node, EvaluationSpec)
            out[name] = {**result, "per_problem": file, "protocol": protocol(node)}
        return out

    def scores(self, endpoint: str, evaluation: str) -> np.ndarray:
        """avg@k as [seeds, problems] of an arm, `ARM/STAGE` or `base MODEL`."""
        seeds = self.recipe.seeds
        rows = [self.result(self.model(endpoint, seed), evaluation, seed)["per_problem"] for seed in seeds]
        return np.array([list(row.values()) for row in rows], dtype=float)

    def model(self, endpoint: str, seed: int) -> str:
        """The name under which the graph's evaluations know an endpoint."""
        if endpoint.startswith("base "):
            return endpoint.removeprefix("base ")
        name, _, stage = endpoint.partition("/")
        stages = self.graph.arms[name][seed]
        return stages[self.stages(name).index(stage)] if stage else stages[-1]  # pyright: ignore -- checked by the recipe

    def stages(self, name: str) -> list[StageName]:
        return arm_stages(self.recipe.arms[self.recipe.variants[name].arm])

    def labels(self, stages: list[str]) -> dict[str, int]:
        ledgers = [self.store.ledger(key) for key in stages]
        distinct = set().union(*(ledger.problems for ledger in ledgers))
        return {"distinct": len(distinct), "revealed": sum(ledger.revealed for ledger in ledgers)}

    def cost(self, stages: list[str]) -> dict[str, Any]:
        """The bill; MFU is model FLOPs over what the devices could have multiplied in the time outside grading."""
        outcomes = [self.outcome(key) for key in stages]
        bill = total([outcome["meter"] for outcome in outcomes])
        bill["device_seconds"] = sum(_device_seconds(outcome) for outcome in outcomes)
        able = sum(_device_seconds(o, "graded", "lost") * o.get("peak_flops", 0) for o in outcomes)
        bill["mfu"] = bill["flops"] / able if able else None
        bill["peak_memory"] = max((outcome.get("peak_memory", 0) for outcome in outcomes), default=0)
        if (price := self.recipe.execution.price_per_hour) is not None:
            bill["price"] = bill["device_seconds"] / 3600 * price
        return bill


def _device_seconds(outcome: dict[str, Any], *without: str) -> float:
    busy = [row["seconds"] for role, row in outcome["meter"].items() if role not in without]
    return outcome.get("devices", 1) * sum(busy, 0.0)


def results(recipe: Recipe, graph: Graph, store: Store, out: Path) -> dict[str, Any]:
    """The contents of `results.json` (schema 1); writes the per-problem files that it names under `out/evals`.

    What is not finished on every seed is left out, and `complete` is false; curves come when all is done. An arm's
    labels are the union over its stages; its cost adds them up, whoever else shares them. `study` counts every stage
    once.
    """
    (out / "evals").mkdir(parents=True, exist_ok=True)
    reader = _Reader(recipe, graph, store, out)
    finished = [name for name in graph.arms if reader.is_finished(name)]
    stages = [key for key in graph.stages if store.is_done(key)]
    spent = [*stages, *filter(store.is_done, dict.fromkeys(graph.decisions.values()))]
    complete = all(map(store.is_done, graph.nodes))
    return {
        "schema": 1,
        "recipe": recipe.name,
        "complete": complete,
        "models": _models(reader),
        "arms": {name: _arm(reader, name) for name in finished},
        "comparisons": _comparisons(reader),
        **(_curves(reader) if complete else {}),
        "study": {
            "labels": reader.labels(spent),
            "cost": reader.cost(spent),
            "stages_trained": len(stages),
            "stages_requested": graph.requested,
        },
        **_planned(reader),
    }


def _planned(reader: _Reader) -> dict[str, Any]:
    path = reader.out / "plan.json"
    if not path.exists():
        return {}
    return {"plan": against(json.loads(path.read_text(encoding="utf-8")), reader.graph, reader.store)}


def _arm(reader: _Reader, name: str) -> dict[str, Any]:
    seeds, names = {}, [*reader.stages(name), "probe"]
    for seed, stages in reader.graph.arms[name].items():
        decision = reader.graph.decisions.get((name, seed))
        billed = [*stages, *([decision] if decision else [])]
        by_stage = [
            {"stage": stage, "key": key, "labels": reader.labels([key]), "cost": reader.cost([key])}
            for stage, key in zip(names, billed, strict=False)
        ]
        seeds[str(seed)] = {
            "stages": stages,
            "labels": reader.labels(billed),
            "cost": reader.cost(billed),
            "by_stage": by_stage,
            **({"decision": {"key": decision, **reader.outcome(decision)["result"]}} if decision else {}),
            "evals": reader.evals(stages[-1], seed),
        }
    variant = reader.recipe.variants[name]
    summary = {evaluation: _summary(reader, name, evaluation) for evaluation in reader.recipe.evaluations}
    return {"arm": variant.arm, "budget": variant.labels, "stages": names[:-1], "seeds": seeds, "summary": summary}


def _models(reader: _Reader) -> dict[str, Any]:
    """Rows that are no arm's end: base models, and every stage on the way, with their role and seed."""
    graph, recipe, rows = reader.graph, reader.recipe, {}
    for role in recipe.models:
        if reader.is_finished(f"base {role}"):
            rows[role] = {
                "role": f"base {role}",
                "evals": {str(seed): reader.evals(role, seed) for seed in recipe.seeds},
                "summary": {name: _summary(reader, f"base {role}", name) for name in recipe.evaluations},
            }
    ends = {stages[-1] for by_seed in graph.arms.values() for stages in by_seed.values()}
    for name, by_seed in graph.arms.items():
        for i, stage in enumerate(reader.stages(name)):
            new = {seed: keys[i] for seed, keys in by_seed.items() if keys[i] not in ends and keys[i] not in rows}
            if not new or not reader.is_finished(f"{name}/{stage}"):
                continue
            for seed, key in new.items():
                role = "trained teacher" if key in graph.teachers else f"student after {stage}"
                rows[key] = {"role": role, "of": f"{name}/{stage}", "seed": seed}
                rows[key]["evals"] = {str(seed): reader.evals(key, seed)}
            first = next(iter(new.values()))
            rows[first]["summary"] = {task: _summary(reader, f"{name}/{stage}", task) for task in recipe.evaluations}
    return rows


def _summary(reader: _Reader, endpoint: str, evaluation: str) -> dict[str, Any]:
    """Means over seeds of one endpoint; unparsed + wrong + mean = 1."""
    matrix = reader.scores(endpoint, evaluation)
    estimate = mean_interval(matrix)
    rows = [reader.result(reader.model(endpoint, seed), evaluation, seed) for seed in reader.recipe.seeds]
    samples, unparsed = rows[0]["k"], 1 - float(np.mean([row["parsed"] for row in rows]))
    right = np.rint(matrix * samples).astype(int)
    passes = {}
    for k in rows[0]["pass@k"]:
        table = np.array([pass_at_k(samples, count, int(k)) for count in range(samples + 1)])
        passed = mean_interval(table[right])
        passes[k] = {"mean": passed.value, "ci95": list(passed.ci95)}
    return {
        "mean": estimate.value,
        "ci95": list(estimate.ci95),
        "over": estimate.over,
        "pass@k": passes,
        "unparsed": unparsed,
        "wrong": 1 - unparsed - estimate.value,
        "truncated": float(np.mean([row["truncated"] for row in rows])),
        "styles": _styles([row["styles"] for row in rows]),
        **_recovered(reader, endpoint, evaluation, matrix),
    }


def _styles(rows: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    out = {}
    for style in sorted(set().union(*rows)):
        shares = [row.get(style, {"share": 0.0})["share"] for row in rows]
        right = [row[style]["share"] * row[style]["accuracy"] for row in rows if style in row]
        out[style] = {"share": float(np.mean(shares)), "accuracy": sum(right) / sum(shares)}
    return out


def _recovered(reader: _Reader, endpoint: str, evaluation: str, matrix: np.ndarray) -> dict[str, Any]:
    """Gap recovery of a student against its own arm's trained teacher, or where the arm trained none against that of
    the first arm that did; nothing where there is no gap to speak of."""
    name, _, stage = endpoint.partition("/")
    recipe = reader.recipe
    if name not in recipe.variants or stage.startswith("teacher"):
        return {}
    peers = [other for other, variant in recipe.variants.items() if variant.labels == recipe.variants[name].labels]
    trained = [
        f"{arm}/{reader.stages(arm)[0]}" for arm in (name, *peers) if reader.stages(arm)[0].startswith("teacher")
    ]
    if not trained or not (reader.is_finished(trained[0]) and reader.is_finished("base student")):
        return {}
    try:
        found = gap_recovery(matrix, reader.scores("base student", evaluation), reader.scores(trained[0], evaluation))
    except ValueError:
        return {}
    return {"gap_recovery": {"value": found.value, "ci95": list(found.ci95), "teacher": trained[0]}}


def _comparisons(reader: _Reader) -> list[dict[str, Any]]:
    """Declared comparisons on every evaluation, p-values adjusted by Holm over all that are declared."""
    rows, estimates = [], []
    declared = len(reader.recipe.pairs) * len(reader.recipe.evaluations)
    for pair in reader.recipe.pairs:
        if not (reader.is_finished(pair.a) and reader.is_finished(pair.b)):
            continue
        for evaluation in reader.recipe.evaluations:
            estimate = paired_difference(reader.scores(pair.a, evaluation), reader.scores(pair.b, evaluation))
            estimates.append(estimate)
            row = {"a": pair.a, "b": pair.b, "task": evaluation, "difference": estimate.value}
            if pair.margin is not None:
                row |= {"margin": pair.margin, "outcome": noninferior(estimate, pair.margin)}
            rows.append(row)
    # Those not finished yet count as p = 1, so that no `better` of a partial table is withdrawn when they come.
    adjusted = holm([e.p_value for e in estimates] + [1.0] * (declared - len(estimates)))
    for row, estimate, p in zip(rows, estimates, adjusted, strict=False):
        row |= {"ci95": list(estimate.ci95), "p_adjusted": p, "num_seeds": estimate.num_seeds, "over": estimate.over}
        row["verdict"] = verdict(estimate, p)
    return rows


def _curves(reader: _Reader) -> dict[str, Any]:
    """Accuracy against labels of every arm, and how many labels direct GRPO needs to match each of the others."""
    recipe = reader.recipe
    budgets = recipe.pool.budgets
    if not budgets:
        return {}
    whole = list(recipe.arms)
    curves: dict[str, Any] = {}
    matches = []
    baseline = next((a for a in whole if recipe.arms[a].bridge == "none" and not recipe.arms[a].match_flops), None)
    for evaluation in recipe.evaluations:
        of = {arm: [reader.scores(f"{arm}@{n}", evaluation) for n in budgets] for arm in whole}
        for arm, matrices in of.items():
            points = [(n, mean_interval(matrix)) for n, matrix in zip(budgets, matrices, strict=True)]
            rows = [{"labels": n, "mean": e.value, "ci95": list(e.ci95)} for n, e in points]
            curves.setdefault(arm, {})[evaluation] = rows
            if baseline is None or arm == baseline or len(budgets) < 2:
                continue
            for n, matrix in zip(budgets, matrices, strict=True):
                found = labels_to_match(budgets, of[baseline], matrix)
                row = {"arm": f"{arm}@{n}", "baseline": baseline, "task": evaluation, "labels": n}
                row |= {"value": found.value, "ci95": [found.low, found.high], "range": [budgets[0], budgets[-1]]}
                matches.append(row)
    return {"curves": curves, "labels_to_match": matches}
