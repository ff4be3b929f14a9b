"""Learning rates: one grid for every stage, tried in turn on the same tuning problems, every label billed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from headwater.arms import METHODS, Arm, StageName, arm_stages
from headwater.checkpoint import write_atomically
from headwater.config import Recipe
from headwater.overrides import merge
from headwater.store import Store
from headwater.study.executors import OnEvent
from headwater.study.graph import Graph
from headwater.study.run import run

EVALUATION = "tuning"


def tune(
    recipe: Recipe,
    out: Path,
    store: Store,
    *,
    on_event: OnEvent = lambda event: None,
    on_plan: Callable[[Graph, Store], None] = lambda graph, store: None,
) -> dict[str, Any]:
    """Try `tuning.lr` for every stage of the recipe, teachers first, each with the best rates of those before it.

    Returns and writes to `out/tuning.json` `{"grid", "stages": {STAGE: [{"lr", "mean", "ci95"}]}, "chosen": {STAGE:
    lr}, "labels": {"distinct", "revealed"}}`. The score is avg@k of the stage's own model on the tuning problems; every
    model reveals all their answers. Each trial is a run directory `out/STAGE`, so stopping loses nothing.
    Raises ValueError for a recipe without `[tuning]`.
    """
    if recipe.tuning is None:
        raise ValueError(f"{recipe.name} has no [tuning]: give it lr (a grid), seeds, problems and samples")
    chosen: dict[str, float] = {}
    table: dict[str, list[dict[str, Any]]] = {}
    stages: set[str] = set()
    order: list[StageName] = [name for name in METHODS if name in recipe.stages]
    for stage in order:
        trial = trial_recipe(recipe, stage, chosen)
        found = run(trial, out / stage, store, on_event=on_event, on_plan=on_plan)
        rows = [{"lr": float(name), **_score(found, name, stage)} for name in trial.arms]
        table[stage], chosen[stage] = rows, max(rows, key=lambda row: row["mean"])["lr"]
        rows_of = [row for arm in found["arms"].values() for row in arm["seeds"].values()]
        stages |= {part["key"] for row in rows_of for part in row["by_stage"]}
    ledgers = [store.ledger(key) for key in stages]
    problems = set().union(*(ledger.problems for ledger in ledgers))
    models = len(order) * len(recipe.tuning.lr) * len(recipe.tuning.seeds)
    labels = {
        "distinct": len(problems) + recipe.tuning.problems,
        "revealed": sum(ledger.revealed for ledger in ledgers) + models * recipe.tuning.problems,
    }
    tuned = {"grid": list(recipe.tuning.lr), "stages": table, "chosen": chosen, "labels": labels}
    write_atomically(out / "tuning.json", json.dumps(tuned, indent=1))
    return tuned


def trial_recipe(recipe: Recipe, stage: StageName, chosen: dict[str, float]) -> Recipe:
    """The study of one stage: its first arm in the recipe, cut short after it, once for every rate of the grid."""
    tuning = recipe.tuning
    assert tuning is not None
    arm = next(a for a in recipe.arms.values() if stage in arm_stages(a) and a.match_flops is None)
    if stage != "student_rl":
        arm = arm.model_copy(update={"finish": "none", "split": False, "updates": "stage"})
    if stage.startswith("teacher") and "warmup" in recipe.stages:
        arm = arm.model_copy(update={"bridge": "warmup"})
    rates = [chosen, *({stage: lr} for lr in tuning.lr)]
    base, *variants = ({name: {"optimizer": {"lr": lr}} for name, lr in one.items()} for one in rates)
    overrides = {name: value for name, value in arm.overrides.items() if name in arm_stages(arm)}
    arms = {
        f"{lr:g}": Arm.model_validate(arm.model_dump() | {"overrides": merge(overrides, variant)})
        for lr, variant in zip(tuning.lr, variants, strict=True)
    }
    used = arm_stages(arm)
    first = next(iter(recipe.evaluations.values()))
    changes = {"split": tuning.split, "problems": tuning.problems, "samples": tuning.samples, "task": None}
    evaluation = first.model_copy(update=changes)
    raw = recipe.model_dump(exclude={"comparisons", "tuning"}, exclude_unset=True) | {
        "name": f"{recipe.name}-tuning-{stage}",
        "note": f"Learning rate of {stage}.",
        "seeds": tuning.seeds,
        "models": {name: model for name, model in recipe.models.items() if name in ("student", arm.teacher_model)},
        "pool": recipe.pool.model_dump(include={"labels", "exclude_overlap"}, exclude_none=True)
        | ({"unlabelled": recipe.pool.unlabelled} if arm.prompts == "unlabelled" else {}),
        "stages": merge(
            {name: recipe.stages[name].model_dump(exclude_unset=True) for name in used},
            {name: value for name, value in base.items() if name in used},
        ),
        "arms": {name: one.model_dump() for name, one in arms.items()},
        "evaluations": {EVALUATION: evaluation},
    }
    return Recipe.model_validate(raw)


def _score(found: dict[str, Any], arm: str, stage: str) -> dict[str, Any]:
    row = found["arms"][arm]
    if row["stages"][-1] == stage:
        summary = row["summary"]
    else:
        keys = {s["key"] for seed in row["seeds"].values() for s in seed["by_stage"] if s["stage"] == stage}
        summary = next(found["models"][key]["summary"] for key in keys if "summary" in found["models"].get(key, {}))
    return {"mean": summary[EVALUATION]["mean"], "ci95": summary[EVALUATION]["ci95"]}
