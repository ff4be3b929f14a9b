"""From finished nodes to `results.json`: bills, summaries with intervals, declared comparisons."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from headwater.checkpoint import write_atomically
from headwater.config import Recipe, arm_stages
from headwater.evals.statistics import holm, mean_interval, paired_difference, verdict
from headwater.meter import total
from headwater.store import Store
from headwater.study.graph import Graph

BASE = {"base student": "student", "base teacher": "teacher"}


@dataclass(frozen=True)
class _Reader:
    recipe: Recipe
    graph: Graph
    store: Store
    out: Path

    def evals(self, model: str, seed: int) -> dict[str, Any]:
        """Every evaluation of a model: the numbers, with the per-problem scores in a file of their own."""
        out = {}
        for name in self.recipe.evaluations:
            key = self.graph.evals[model, name, seed]
            result = dict(self.store.outcome(key)["result"])
            file = f"evals/{key}.json"
            write_atomically(self.out / file, json.dumps(result.pop("per_problem")))
            out[name] = {**result, "per_problem": file}
        return out

    def scores(self, endpoint: str, evaluation: str) -> np.ndarray:
        """avg@k as [seeds, problems] of an arm, `ARM/STAGE`, `base student` or `base teacher`."""
        rows = []
        for seed in self.recipe.seeds:
            key = self.graph.evals[self.endpoint(endpoint, seed), evaluation, seed]
            rows.append(list(self.store.outcome(key)["result"]["per_problem"].values()))
        return np.array(rows)

    def endpoint(self, name: str, seed: int) -> str:
        if name in BASE:
            return BASE[name]
        arm, _, stage = name.partition("/")
        stages = self.graph.arms[arm][seed]
        return stages[arm_stages(self.recipe.arms[arm]).index(stage)] if stage else stages[-1]

    def labels(self, stages: list[str]) -> dict[str, int]:
        ledgers = [self.store.ledger(key) for key in stages]
        distinct = set().union(*(ledger.problems for ledger in ledgers))
        return {"distinct": len(distinct), "revealed": sum(ledger.revealed for ledger in ledgers)}

    def cost(self, stages: list[str]) -> dict[str, Any]:
        return total([self.store.outcome(key)["meter"] for key in stages])


def results(recipe: Recipe, graph: Graph, store: Store, out: Path) -> dict[str, Any]:
    """The contents of `results.json` (schema 1); writes the per-problem files that it names under `out/evals`.

    An arm's labels are the union over its stages; its cost adds them up, whoever else shares them. `study` counts every
    stage once.
    """
    (out / "evals").mkdir(parents=True, exist_ok=True)
    reader = _Reader(recipe, graph, store, out)
    arms: dict[str, Any] = {}
    for name, by_seed in graph.arms.items():
        seeds = {
            str(seed): {
                "stages": stages,
                "labels": reader.labels(stages),
                "cost": reader.cost(stages),
                "evals": reader.evals(stages[-1], seed),
            }
            for seed, stages in by_seed.items()
        }
        summary = {evaluation: _summary(reader.scores(name, evaluation)) for evaluation in recipe.evaluations}
        arms[name] = {"seeds": seeds, "summary": summary}
    stages = graph.stages
    return {
        "schema": 1,
        "recipe": recipe.name,
        "models": _models(reader),
        "arms": arms,
        "comparisons": _comparisons(reader),
        "study": {
            "labels": reader.labels(stages),
            "cost": reader.cost(stages),
            "stages_trained": len(stages),
            "stages_requested": graph.requested,
        },
    }


def _models(reader: _Reader) -> dict[str, Any]:
    """Rows that are no arm's end: base models, and every stage on the way, with their role and seed."""
    graph, recipe, rows = reader.graph, reader.recipe, {}
    for label, role in BASE.items():
        if role in recipe.models:
            rows[role] = {
                "role": label,
                "evals": {str(seed): reader.evals(role, seed) for seed in recipe.seeds},
                "summary": {name: _summary(reader.scores(label, name)) for name in recipe.evaluations},
            }
    ends = {stages[-1] for by_seed in graph.arms.values() for stages in by_seed.values()}
    for name, by_seed in graph.arms.items():
        for seed, stages in by_seed.items():
            for stage, key in zip(arm_stages(recipe.arms[name]), stages, strict=True):
                if key not in ends and key not in rows:
                    role = "trained teacher" if key in graph.teachers else f"student after {stage}"
                    rows[key] = {"role": role, "of": f"{name}/{stage}", "seed": seed}
                    rows[key]["evals"] = {str(seed): reader.evals(key, seed)}
    for name in graph.arms:
        for stage in arm_stages(recipe.arms[name])[:-1]:
            summary = {task: _summary(reader.scores(f"{name}/{stage}", task)) for task in recipe.evaluations}
            key = graph.arms[name][recipe.seeds[0]][arm_stages(recipe.arms[name]).index(stage)]
            if key in rows:
                rows[key].setdefault("summary", summary)
    return rows


def _summary(matrix: np.ndarray) -> dict[str, Any]:
    estimate = mean_interval(matrix)
    return {"mean": estimate.value, "ci95": list(estimate.ci95), "over": estimate.over}


def _comparisons(reader: _Reader) -> list[dict[str, Any]]:
    """Declared comparisons on every evaluation, p-values adjusted by Holm over all of them."""
    rows, estimates = [], []
    for pair in reader.recipe.comparisons:
        for evaluation in reader.recipe.evaluations:
            estimate = paired_difference(reader.scores(pair.a, evaluation), reader.scores(pair.b, evaluation))
            estimates.append(estimate)
            rows.append({"a": pair.a, "b": pair.b, "task": evaluation, "difference": estimate.value})
    for row, estimate, p in zip(
        rows, estimates, holm([e.p_value for e in estimates]) if estimates else [], strict=True
    ):
        row |= {"ci95": list(estimate.ci95), "p_adjusted": p, "num_seeds": estimate.num_seeds, "over": estimate.over}
        row["verdict"] = verdict(estimate, p)
    return rows
