"""Run a recipe: plan, execute, bill, compare; everything a reader needs ends up in the run directory."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import tomli_w

from headwater.checkpoint import write_atomically
from headwater.config import Recipe, load_recipe
from headwater.doctor.checkup import checkup
from headwater.doctor.finding import Finding
from headwater.models.lora import check_targets
from headwater.run import lease
from headwater.spec import StageSpec, parents
from headwater.stages.node import Job, check_device, environment, model_directory
from headwater.store import Store
from headwater.study.calibrate import calibrate
from headwater.study.executors import Event, OnEvent, execute, holder
from headwater.study.graph import Graph, plan
from headwater.study.outlook import outlook
from headwater.study.processes import Process
from headwater.study.results import results
from headwater.trackers import check_installed as check_trackers

OnWarning = Callable[[Finding], None]
COPIED = (
    "spec.json",
    "done.json",
    "metrics.jsonl",
    "samples.jsonl",
    "evals.jsonl",
    "monitors.jsonl",
    "gates.jsonl",
    "ledger.jsonl",
    "error.txt",
)
ROUNDING = (
    "device",
    "threads",
    "micro_batch_tokens",
    "sampler_tokens",
    "chunk_tokens",
    "gradient_checkpointing",
    "compile",
    "teacher",
    "sampler",
)
"""Keys of `[execution]` on which the order of sums depends, or who makes them."""
REFRESH_S, RESULTS_S = 3.0, 30.0
"""How old copies of a running node's files, and the results so far, may grow while a study runs."""


def run(
    recipe: Recipe,
    out: Path,
    store: Store,
    *,
    on_event: OnEvent = lambda event: None,
    on_plan: Callable[[Graph, Store], None] = lambda graph, store: None,
    on_warning: OnWarning = lambda finding: None,
    strict: bool = False,
    calibrated: bool = False,
    processes: list[Process] | None = None,
) -> dict[str, Any]:
    """Run or resume a study; returns the contents of `out/results.json`.

    `calibrated`: ask the models first how they answer and how fast, for the plan in `out/plan.json`. `processes`:
    started already for a local executor, which takes them from the list.
    While it runs, `out` is kept fresh for a reader: copies of the small files, events, the results so far.
    Raises ValueError for anything wrong with recipe, data or models before a weight is loaded, when `out` holds a run
    of another recipe, and when `strict` refuses finished stages that were executed otherwise.
    """
    store.check_writable()
    graph = plan(recipe)
    with _alone(out):
        claim(recipe, out)
        if not all(map(store.is_done, graph.nodes)):
            check_device(recipe.execution.device)
            check_trackers(recipe.execution.trackers)
            check_up(recipe, on_warning)
            check_adapters(graph)
        jobs = to_jobs(recipe, graph)
        if strict and (differing := executed_otherwise(jobs, store)):
            key, names = next(iter(differing.items()))
            raise ValueError(
                f"{len(differing)} stages were executed otherwise, for example {graph.titles[key]} ({', '.join(names)} "
                "differ), and equal bits are promised within one execution only: use another --store or leave out "
                "--strict"
            )
        on_plan(graph, store)
        # A run that trains nothing says nothing about where the numbers came from.
        if not all(map(store.is_done, graph.nodes)) or not (out / "environment.json").exists():
            made = {**environment(), "command": sys.argv}
            write_atomically(out / "environment.json", json.dumps(made, indent=1))
        write_atomically(out / "stages.json", json.dumps(describe(graph), indent=1))
        if not (out / "plan.json").exists():
            found = calibrate(recipe, graph, store, measure=calibrated and not all(map(store.is_done, graph.nodes)))
            write_atomically(out / "plan.json", json.dumps(outlook(recipe, graph, found), indent=1))
        keeper = _Keeper(recipe, graph, store, out)
        keeper.note("run", command=sys.argv)
        try:
            execute(jobs, store, recipe.execution, keeper.then(on_event), processes)
        finally:
            for key in graph.nodes:
                copy_small_files(key, store, out)
            found = keeper.write_results() if any(map(store.is_done, graph.nodes)) else {}
        keeper.note("end")
        return found


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold a run directory; BlockingIOError naming the process that writes it already."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{out} cannot be made ({error.strerror}): choose another --out") from None
    with ExitStack() as stack:
        try:
            stack.enter_context(lease(out))
        except BlockingIOError:
            raise BlockingIOError(
                f"this study is being run by {holder(out) or 'another process'}: wait until it ends or stop it; then "
                "the same command goes on"
            ) from None
        yield


class _Keeper:
    """Keeps the run directory fresh while nodes run: events, copies of their small files, the results so far."""

    def __init__(self, recipe: Recipe, graph: Graph, store: Store, out: Path) -> None:
        self.recipe, self.graph, self.store, self.out = recipe, graph, store, out
        self._copied: dict[str, float] = {}
        self._written = 0.0
        _heal(out / "events.jsonl")
        for key in graph.nodes:
            copy_small_files(key, store, out)

    def then(self, on_event: OnEvent) -> OnEvent:
        def both(event: Event) -> None:
            self.on_event(event)
            on_event(event)

        return both

    def on_event(self, event: Event) -> None:
        now = time.monotonic()
        if event.kind != "step":
            self.note(event.kind, key=event.key, **({"error": event.error} if event.error else {}))
        if event.kind != "step" or now - self._copied.get(event.key, 0.0) > REFRESH_S:
            self._copied[event.key] = now
            copy_small_files(event.key, self.store, self.out)
        if event.kind == "done" and now - self._written > RESULTS_S:
            self.write_results()

    def write_results(self) -> dict[str, Any]:
        found = results(self.recipe, self.graph, self.store, self.out)
        write_atomically(self.out / "results.json", json.dumps(found, indent=1))
        self._written = time.monotonic()
        return found

    def note(self, kind: str, **what: Any) -> None:
        with (self.out / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": time.time(), "kind": kind, **what}) + "\n")


def _heal(path: Path) -> None:
    """Drop a last line torn by a crash."""
    if path.exists() and not (text := path.read_text(encoding="utf-8")).endswith("\n"):
        write_atomically(path, text[: text.rfind("\n") + 1])


def claim(recipe: Recipe, out: Path) -> None:
    """Write the resolved recipe into the run directory, or check that it holds the same study."""
    path = out / "recipe.toml"
    if path.exists():
        theirs = load_recipe(path)
        ours, held = (r.model_dump(mode="json", exclude={"execution"}) for r in (recipe, theirs))
        if differing := [name for name in ours if ours[name] != held[name]]:
            raise ValueError(
                f"{out} holds a run of another recipe ({', '.join(differing)} differ): choose another --out"
            )
    write_atomically(path, tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True)))


def check_up(recipe: Recipe, on_warning: OnWarning) -> None:
    """The doctor's cheap checks: ValueError now, not after hours, for what it calls an error."""
    _, findings = checkup(recipe)
    errors = [f for f in findings if f.level == "error"]
    for found in findings:
        if found.level == "warning":
            on_warning(found)
    if errors:
        first = f"{errors[0].name}: {errors[0].seen}. {errors[0].why}: {errors[0].change}"
        raise ValueError(first + f" (and {len(errors) - 1} more: headwater doctor RECIPE)" * (len(errors) > 1))


def check_adapters(graph: Graph) -> None:
    """ValueError now, not after the teacher's training, without peft and for targets that a model does not have."""
    stages = [node for node in graph.nodes.values() if isinstance(node, StageSpec)]
    for lora, source in {(s.settings.lora, s.start.config.source) for s in stages}:
        if lora is not None:
            check_targets(lora, model_directory(source))


def to_jobs(recipe: Recipe, graph: Graph) -> dict[str, Job]:
    """Every node with how to execute it; local processes get one torch thread unless the recipe says otherwise."""
    execution = recipe.execution
    if execution.threads is None and execution.executor != "inline":
        execution = execution.model_copy(update={"threads": 1})
    execution = execution.model_copy(update={"project": execution.project or recipe.name})
    monitored = bool(execution.eval_every or execution.monitor_problems)
    # What does not ask the teacher is not executed otherwise because of where it is.
    alone, nodes = execution.model_copy(update={"teacher": None}), graph.nodes.items()
    taught = [node.teacher for _, node in nodes if isinstance(node, StageSpec) and node.teacher]
    asks = {key: bool(n.teacher) if isinstance(n, StageSpec) else n.start in taught for key, n in nodes}
    monitors = {key: graph.monitors[n.seed] for key, n in nodes if monitored and isinstance(n, StageSpec)}
    return {key: Job(node, execution if asks[key] else alone, monitors.get(key)) for key, node in nodes}


def executed_otherwise(jobs: dict[str, Job], store: Store) -> dict[str, list[str]]:
    """Stages finished or begun with other values of those `[execution]` keys that can change last bits."""
    out = {}
    for key, job in jobs.items():
        if job.spec.kind != "stage":
            continue
        if store.is_done(key):
            then = store.outcome(key)["execution"]
        elif any((store.path(key) / "checkpoints").glob("*")):
            then = json.loads((store.path(key) / "spec.json").read_text(encoding="utf-8"))["execution"]
        else:
            continue
        now = job.execution.model_dump(mode="json")
        if names := [name for name in ROUNDING if then.get(name, now[name]) != now[name]]:
            out[key] = names
    return out


def describe(graph: Graph) -> dict[str, Any]:
    """The graph for people and for the report."""
    evals: dict[str, dict[str, dict[str, str]]] = {}
    for (model, evaluation, seed), key in graph.evals.items():
        evals.setdefault(model, {}).setdefault(evaluation, {})[str(seed)] = key
    decisions: dict[str, dict[str, str]] = {}
    for (variant, seed), key in graph.decisions.items():
        decisions.setdefault(variant, {})[str(seed)] = key
    return {
        "nodes": {
            key: {
                "title": graph.titles[key],
                "kind": node.kind,
                "label": node.label,
                "stage": graph.names[key] if isinstance(node, StageSpec) else None,
                "seed": node.seed,
                "parents": parents(node),
                "steps": node.settings.steps if isinstance(node, StageSpec) and not node.match else None,
            }
            for key, node in graph.nodes.items()
        },
        "arms": {name: {str(seed): keys for seed, keys in seeds.items()} for name, seeds in graph.arms.items()},
        "decisions": decisions,
        "evals": evals,
        "requested": graph.requested,
        "unchecked": graph.unchecked,
    }


def copy_small_files(key: str, store: Store, out: Path) -> None:
    """Copies of a node's small files, so that the run directory explains itself without the store."""
    target = out / "nodes" / key
    for name in COPIED:
        source, copy = store.path(key) / name, target / name
        if not source.exists():
            copy.unlink(missing_ok=True)  # an error that a later try has mended
            continue
        there, had = source.stat(), copy.stat() if copy.exists() else None
        if had is None or (had.st_size, had.st_mtime_ns) != (there.st_size, there.st_mtime_ns):
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy)
