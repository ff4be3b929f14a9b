"""Measure one model on benchmarks by name, or on a recipe's evaluations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError

from headwater import spec
from headwater.config import Evaluation, Execution, ModelConfig, Pool, Recipe
from headwater.evals.evaluate import protocol
from headwater.evals.statistics import mean_interval
from headwater.meter import total
from headwater.methods import Frozen
from headwater.overrides import explain, merge, override
from headwater.spec import EvaluationSpec
from headwater.stages.node import Job, check_device, run_node
from headwater.store import Store
from headwater.study.executors import OnEvent, execute
from headwater.study.graph import Graph, plan, probe_node
from headwater.study.run import to_jobs
from headwater.tasks import load_task
from headwater.tasks.benchmarks import benchmarks

PLAIN_STOP = "\n\nQuestion:"
"""Where a base model that was shown questions and answers goes on to a question of its own."""


class Measurement(Frozen):
    """The parts of a recipe that measuring needs: what `--set` can reach."""

    models: dict[Literal["student"], ModelConfig]
    evaluations: dict[str, Evaluation]
    execution: Execution = Execution()


def of_benchmarks(
    names: Sequence[str],
    *,
    task: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    model: Mapping[str, Any],
    overrides: Sequence[str] = (),
) -> Recipe:
    """A recipe without arms that evaluates on whole benchmarks; its student is to be replaced.

    `task`, `evaluation`, `model`: settings of every benchmark (see `tasks.benchmarks.load`), of `Evaluation`, and of
    the model. Greedy with one sample, else at temperature 1, unless said otherwise; `template = "none"` holds for the
    model and the benchmarks, and ends completions before a next "Question:". `overrides` reach `evaluations.NAME`,
    `models.student` and `execution`. Raises ValueError for an unknown name and for settings that are not allowed.
    """
    table = benchmarks()
    if unknown := [name for name in names if name not in table]:
        raise ValueError(f"no benchmark is called {unknown[0]!r}: name a recipe (.toml) or some of {', '.join(table)}")
    plain = {"template": "none"} if model.get("template") == "none" else {}
    student = {"source": "", **({"stop": [PLAIN_STOP]} if plain else {}), **model}
    raw: dict[str, Any] = {"models": {"student": student}, "evaluations": {}}
    for name in names:
        asked = {"name": name, **plain, **task}
        split = "all" if table[name].divided else "test"
        settings = {"temperature": 0.0 if evaluation.get("samples", 1) == 1 else 1.0, "samples": 1, "split": split}
        settings["problems"] = len(load_task(asked).problems(split))
        raw["evaluations"][name] = merge({"task": asked, **settings}, evaluation)
    for text in overrides:
        raw = override(raw, text)
    try:
        checked = Measurement.model_validate(raw)
    except ValidationError as error:
        raise ValueError(f"these settings cannot be measured with:\n{explain(error, Measurement)}") from None
    first = next(iter(checked.evaluations.values()))
    return Recipe.model_construct(
        name="eval", seeds=(0,), task=first.task, pool=Pool(labels=1), stages={}, arms={}, **dict(checked)
    )


def evaluate_model(
    source: str,
    recipe: Recipe,
    seed: int,
    store: Store,
    *,
    on_event: OnEvent = lambda event: None,
    on_plan: Callable[[Graph, Store], None] = lambda graph, store: None,
) -> dict[str, dict[str, Any]]:
    """A model from anywhere on the recipe's evaluations, prompted as the recipe prompts its student.

    What was interrupted goes on after the last finished 512 rollouts. Returns what `evals.evaluate` does of each, with
    `protocol`, the 95 % interval `ci95` over problems (None for one problem), its `standard_error`, and the file of
    the samples.
    """
    config = recipe.models["student"].model_copy(update={"source": source})
    only = recipe.model_copy(update={"models": {"student": config}, "arms": {}, "seeds": (seed,)})
    store.check_writable()
    graph = plan(only)
    if not all(map(store.is_done, graph.nodes)):
        check_device(only.execution.device)
    on_plan(graph, store)
    execute(to_jobs(only, graph), store, only.execution, on_event)
    found = {}
    for name in recipe.evaluations:
        key = graph.evals["student", name, seed]
        node, result = graph.nodes[key], store.outcome(key)["result"]
        assert isinstance(node, EvaluationSpec)
        scores = np.array([list(result["per_problem"].values())])
        estimate = mean_interval(scores) if scores.size > 1 else None
        found[name] = {
            **result,
            "protocol": protocol(node),
            "ci95": list(estimate.ci95) if estimate else None,
            "standard_error": estimate.standard_error if estimate else None,
            "samples_file": str(store.path(key) / "samples.jsonl"),
        }
    return found


def probe_pair(recipe: Recipe, arm: str | None, store: Store) -> dict[str, Any]:
    """The probe of an arm's pair (default: of the first arm with a teacher) on a sample of the first seed's pool.

    Returns what `probe.rule.judge` found, the measurements behind it, the labels it cost and its cost; a second call
    reads it from the store. Raises ValueError as `plan` does.
    """
    node = probe_node(recipe, arm or next((name for name, a in recipe.arms.items() if a.teacher != "none"), ""))
    store.check_writable()
    run_node(Job(node, recipe.execution.model_copy(update={"teacher": None})), store)
    outcome = store.outcome(spec.key(node))
    billed = {"distinct": outcome["distinct"], "revealed": outcome["revealed"]}
    models = {"teacher": node.teacher.name, "student": node.start.name}
    return {**outcome["result"], "pair": models, "billed": billed, "cost": total([outcome["meter"]])}
