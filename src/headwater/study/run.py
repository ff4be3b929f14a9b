"""Run a recipe: plan, execute, bill, compare; everything a reader needs ends up in the run directory."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tomli_w
from transformers import AutoTokenizer

from headwater.checkpoint import write_atomically
from headwater.config import Recipe, load_recipe
from headwater.models.language_model import check_same_tokens
from headwater.spec import StageSpec
from headwater.stages.node import Job, environment, model_directory, run_node
from headwater.store import Store
from headwater.study.executors import OnEvent, execute
from headwater.study.graph import Graph, plan
from headwater.study.results import results

COPIED = ("spec.json", "done.json", "metrics.jsonl", "samples.jsonl", "evals.jsonl", "ledger.jsonl")


def run(
    recipe: Recipe,
    out: Path,
    store: Store,
    *,
    on_event: OnEvent = lambda event: None,
    on_plan: Callable[[Graph, Store], None] = lambda graph, store: None,
) -> dict[str, Any]:
    """Run or resume a study; returns the contents of `out/results.json`.

    Raises ValueError for anything wrong with recipe, data or models before a weight is loaded, and when `out` holds a
    run of another recipe.
    """
    store.check_writable()
    graph = plan(recipe)
    claim(recipe, out)
    if not all(map(store.is_done, graph.stages)):
        check_tokenizers(recipe)
    on_plan(graph, store)
    jobs = to_jobs(recipe, graph)
    write_atomically(out / "environment.json", json.dumps({**environment(), "command": sys.argv}, indent=1))
    write_atomically(out / "stages.json", json.dumps(describe(graph), indent=1))
    try:
        execute(jobs, store, recipe.execution, on_event)
    finally:
        copy_small_files(graph, store, out)
    found = results(recipe, graph, store, out)
    write_atomically(out / "results.json", json.dumps(found, indent=1))
    return found


def claim(recipe: Recipe, out: Path) -> None:
    """Write the resolved recipe into the run directory, or check that it holds the same study."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{out} cannot be made ({error.strerror}): choose another --out") from None
    path = out / "recipe.toml"
    if path.exists():
        theirs = load_recipe(path)
        ours, held = (r.model_dump(mode="json", exclude={"execution"}) for r in (recipe, theirs))
        if differing := [name for name in ours if ours[name] != held[name]]:
            raise ValueError(
                f"{out} holds a run of another recipe ({', '.join(differing)} differ): choose another --out"
            )
    write_atomically(path, tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True)))


def check_tokenizers(recipe: Recipe) -> None:
    """ValueError now, not after the teacher's training, when its tokens are not the student's."""
    if any(arm.bridge != "none" for arm in recipe.arms.values()):
        sources = [recipe.models[role].source for role in ("student", "teacher")]
        student, teacher = (AutoTokenizer.from_pretrained(model_directory(source)) for source in sources)
        check_same_tokens(student, teacher, names=(sources[0], sources[1]))


def to_jobs(recipe: Recipe, graph: Graph) -> dict[str, Job]:
    """Every node with how to execute it; local processes get one torch thread unless the recipe says otherwise."""
    execution = recipe.execution
    if execution.threads is None and execution.executor != "inline":
        execution = execution.model_copy(update={"threads": 1})
    monitored = bool(execution.eval_every)
    return {
        key: Job(node, execution, graph.monitors[node.seed] if monitored and isinstance(node, StageSpec) else None)
        for key, node in graph.nodes.items()
    }


def describe(graph: Graph) -> dict[str, Any]:
    """The graph for people and for the report."""
    return {
        "nodes": {
            key: {"title": graph.titles[key], "kind": node.kind, "label": node.label}
            for key, node in graph.nodes.items()
        },
        "arms": {name: {str(seed): keys for seed, keys in seeds.items()} for name, seeds in graph.arms.items()},
    }


def copy_small_files(graph: Graph, store: Store, out: Path) -> None:
    """Copies of every node's small files, so that the run directory explains itself without the store."""
    for key in graph.nodes:
        target = out / "nodes" / key
        for name in COPIED:
            source = store.path(key) / name
            if source.exists():
                target.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target / name)


def evaluate_model(source: str, recipe: Recipe, seed: int, store: Store) -> dict[str, Any]:
    """A model from anywhere on the recipe's evaluations, prompted as the recipe prompts its student."""
    config = recipe.models["student"].model_copy(update={"source": source})
    stages = {name: stage for name, stage in recipe.stages.items() if name == "student_rl"}
    only = recipe.model_copy(update={"models": {"student": config}, "arms": {}, "stages": stages, "seeds": (seed,)})
    store.check_writable()
    graph = plan(only)
    for job in to_jobs(only, graph).values():
        run_node(job, store)
    return {name: store.outcome(graph.evals["student", name, seed])["result"] for name in recipe.evaluations}
