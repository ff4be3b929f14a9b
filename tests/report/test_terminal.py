"""The dry run: what a study would do and cost, told from a plan and a store without training anything."""

import re
from pathlib import Path

import miniature
import pytest
from rich.console import Console

from headwater.config import Recipe, load_recipe
from headwater.report.terminal import Progress, dry_run, state
from headwater.run import lease
from headwater.store import Store
from headwater.study.executors import Event
from headwater.study.graph import Graph, plan
from headwater.study.run import to_jobs

TWO_SEEDS = ["seeds=[0, 1]", "arms.lean={teacher='rl', bridge='warmup'}"]


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return miniature.write(tmp_path_factory.mktemp("terminal"))


@pytest.fixture(scope="module")
def planned(mini: Path) -> tuple[Recipe, Graph]:
    recipe = load_recipe(mini, TWO_SEEDS)
    return recipe, plan(recipe)


def finish(store: Store, recipe: Recipe, graph: Graph, key: str, seconds: float) -> None:
    """A finished node as far as the dry run looks at it."""
    store.path(key).mkdir(parents=True)
    (store.path(key) / "spec.json").write_text(to_jobs(recipe, graph)[key].to_json())
    half = {"tokens": 1, "flops": 1.0, "seconds": seconds / 2}
    store.finish(key, {"meter": {"sampled": half, "trained": half}})


def shown(recipe: Recipe, graph: Graph, store: Store) -> str:
    console = Console(width=160, highlight=False, record=True, quiet=False)
    with console.capture() as capture:
        dry_run(console, recipe, graph, store)
    return capture.get()


def test_states(planned: tuple[Recipe, Graph], tmp_path: Path):
    _, graph = planned
    store, key = Store(tmp_path), graph.arms["direct"][0][0]
    assert state(store, key) == "to do" and not store.path(key).exists()
    with lease(store.path(key)):
        assert state(store, key) == "running"
    assert state(store, key) == "to do"
    (store.path(key) / "spec.json").write_text("{}")
    assert state(store, key) == "begun"
    store.finish(key, {})
    assert state(store, key) == "done"


def test_the_dry_run_draws_every_stage_once(planned: tuple[Recipe, Graph], tmp_path: Path):
    recipe, graph = planned
    store = Store(tmp_path)
    teacher, warmup, distill, last = graph.arms["finished"][0]
    finish(store, recipe, graph, graph.arms["direct"][0][0], 36.0)
    text = shown(recipe, graph, store)
    tree = text[: text.index("plan: middle")]
    lines = {key: [line for line in tree.splitlines() if f") {key[:8]}" in line] for key in graph.stages}
    assert all(len(lines[key]) == (graph.nodes[key].seed == 0) for key in graph.stages)
    depth = {key: re.search(r"\w", lines[key][0]).start() for key in (teacher, warmup, distill, last)}  # pyright: ignore -- found
    assert depth[warmup] == depth[teacher] < depth[distill] < depth[last]
    assert f"taught by {teacher[:8]}" in lines[warmup][0]
    assert "[to do] ends lean; serves bridge, finished" in lines[warmup][0]
    assert "[1 done, 1 to do] ends direct" in lines[graph.arms["direct"][0][0]][0]
    assert "10 distinct stages serve 20 asked for by the arms (sharing ratio 2.00)" in text
    assert "to do: 9 stages and 14 evaluations" in text


def test_many_arms_and_seeds_stay_readable(mini: Path, tmp_path: Path):
    """Thirty arms over five seeds that share their upstream: a line for each stage, not for each seed."""
    other = "arms.a{}={{teacher='rl', bridge='full', overrides={{distill={{temperature={}}}}}}}"
    changes = [other.format(i, 1.1 + i / 10) for i in range(30)]
    recipe = load_recipe(mini, ["seeds=[0, 1, 2, 3, 4]", *changes])
    graph = plan(recipe)
    text = shown(recipe, graph, Store(tmp_path))
    assert max(map(len, text.splitlines())) <= 160
    assert len(text.splitlines()) < 2 * 33 + 33 + 30
    assert "serves bridge, finished, a0 and 29 more" in text


def test_waiting_is_said(planned: tuple[Recipe, Graph]):
    recipe, graph = planned
    console = Console(width=160)
    with console.capture() as capture:
        progress = Progress(console, recipe)
        progress.titles = graph.titles
        progress.on_event(Event("waiting", graph.arms["bridge"][0][0], error="process 7 on here"))
    assert capture.get() == "waiting for teacher_rl, seed 0: process 7 on here is at work on it\n"


def test_the_time_left_is_of_the_steps_seen(planned: tuple[Recipe, Graph], monkeypatch: pytest.MonkeyPatch):
    """A resumed stage and an evaluation begin at a step far from 0."""
    recipe, graph = planned
    key, clock, console = graph.arms["bridge"][0][0], [1000.0], Console(width=160)
    monkeypatch.setattr("headwater.report.terminal.time.monotonic", lambda: clock[0])
    with console.capture() as capture:
        progress = Progress(console, recipe)
        progress.on_event(Event("started", key))
        for step in (512, 1024):
            clock[0] += 100
            progress.on_event(Event("step", key, step=step, steps=1536))
    first, second = capture.get().splitlines()
    assert "512/1536" in first and "left" not in first
    assert second.endswith("100 s left")
