"""The dry run: what a study would do and cost, told from a plan and a store without training anything."""

import json
import re
from pathlib import Path

import miniature
import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM

from headwater.config import Recipe, load_recipe
from headwater.report.terminal import Progress, dry_run, state
from headwater.run import lease
from headwater.store import Store
from headwater.study.executors import Event
from headwater.study.forecast import at_most, forecast, num_parameters
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
    """A finished node as far as a forecast looks at it."""
    store.path(key).mkdir(parents=True)
    (store.path(key) / "spec.json").write_text(to_jobs(recipe, graph)[key].to_json())
    half = {"tokens": 1, "flops": 1.0, "seconds": seconds / 2}
    store.finish(key, {"meter": {"sampled": half, "trained": half}})


def shown(recipe: Recipe, graph: Graph, store: Store) -> str:
    console = Console(width=160, highlight=False, record=True, quiet=False)
    with console.capture() as capture:
        dry_run(console, recipe, graph, store)
    return capture.get()


def test_tokens_at_most_by_hand(planned: tuple[Recipe, Graph]):
    """2 steps of 2 problems x 3 rollouts x 6 tokens; the warmup trains on 2 x 4 of the teacher's 8 rollouts."""
    _, graph = planned
    teacher_rl, warmup, distill, student_rl = graph.arms["finished"][0]
    rows = {key: [(role, n, ref.stage) for role, n, ref in at_most(graph.nodes[key])] for key in graph.nodes}
    assert rows[teacher_rl] == [("sampled", 72, None), ("trained", 72, None)]
    assert rows[student_rl] == [("sampled", 72, distill), ("trained", 72, distill)]
    assert rows[warmup] == [("trained", 48, None), ("sampled", 48, teacher_rl), ("scored", 48, teacher_rl)]
    assert rows[distill] == [("sampled", 48, warmup), ("trained", 48, warmup), ("scored", 48, teacher_rl)]
    assert rows[graph.evals["student", "rows", 0]] == [("evaluated", 48, None)]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["stages.teacher_rl.redraws=2"], {"sampled": 216, "trained": 72}),
        (["stages.teacher_rl.updates_per_batch=2"], {"sampled": 72, "trained": 72, "scored": 72}),
        (["stages.teacher_rl.kl_coef=0.1"], {"sampled": 72, "trained": 72, "scored": 72}),
    ],
)
def test_tokens_of_grpo_settings(changes: list[str], expected: dict[str, int], mini: Path):
    graph = plan(load_recipe(mini, changes))
    assert {role: n for role, n, _ in at_most(graph.nodes[graph.arms["bridge"][0][0]])} == expected


def test_tokens_of_a_stored_teacher_and_half_a_pool(mini: Path):
    changes = ["stages.warmup.stored_top_k=4", "stages.warmup.rollouts_per_problem=3", "arms.bridge.split=true"]
    graph = plan(load_recipe(mini, changes))
    warmup = graph.nodes[graph.arms["bridge"][0][1]]
    assert [(role, n) for role, n, _ in at_most(warmup)] == [("trained", 48), ("sampled", 72), ("scored", 72)]


def test_flops_count_as_the_meter_does(planned: tuple[Recipe, Graph], tmp_path: Path):
    recipe, graph = planned
    sizes = {}
    for role in ("teacher", "student"):
        source = recipe.models[role].source
        model = AutoModelForCausalLM.from_pretrained(source.removeprefix("file:"))
        sizes[role] = sum(p.numel() for p in model.parameters())
        assert num_parameters(source) == sizes[role]
    assert num_parameters("hf:owner/name") is None
    costs = forecast(graph, Store(tmp_path))
    _, _, distill, student_rl = graph.arms["finished"][0]
    assert costs[student_rl].flops == 72 * (2 + 6) * sizes["student"]
    assert costs[distill].flops == 48 * ((2 + 6) * sizes["student"] + 2 * sizes["teacher"])
    assert (costs[student_rl].tokens, costs[distill].tokens) == (144, 144)


def test_seconds_come_from_finished_nodes_alike(planned: tuple[Recipe, Graph], mini: Path, tmp_path: Path):
    """The median of seconds a step, times the steps; other seeds and other numbers of steps count, others not."""
    recipe, graph = planned
    store = Store(tmp_path)
    key = graph.arms["direct"][0][0]
    assert (forecast(graph, store)[key].seconds, forecast(graph, store)[key].rests_on) == (None, 0)
    finish(store, recipe, graph, graph.arms["direct"][1][0], 3.0)
    longer = load_recipe(mini, [*TWO_SEEDS, "stages.student_rl.steps=8"])
    more = plan(longer)
    for seed, seconds in ((0, 8.0), (1, 40.0)):  # 1 and 5 seconds a step, after 1.5
        finish(store, longer, more, more.arms["direct"][seed][0], seconds)
    costs = forecast(graph, store)
    assert costs[key].rests_on == 3 and costs[key].seconds == pytest.approx(2 * 1.5)
    assert forecast(more, store)[more.arms["direct"][0][0]].seconds == pytest.approx(8 * 1.5)
    # The teacher's GRPO has another model, the warmup another method.
    assert costs[graph.arms["bridge"][0][0]].rests_on == costs[graph.arms["bridge"][0][1]].rests_on == 0
    assert costs[graph.evals["student", "rows", 0]].rests_on == 0


def test_a_matched_stage_ends_by_flops(mini: Path, tmp_path: Path):
    graph = plan(load_recipe(mini, ["arms.matched={finish='full', match_flops='bridge'}"]))
    costs = forecast(graph, Store(tmp_path))
    matched = costs[graph.arms["matched"][0][0]]
    spent = [costs[key].flops for key in graph.arms["bridge"][0]]
    assert (matched.tokens, matched.seconds) == (None, None)
    assert matched.flops == sum(x for x in spent if x) > 0


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
    tree = text[: text.index("cost of one node")]
    lines = {key: [line for line in tree.splitlines() if f") {key[:8]}" in line] for key in graph.stages}
    assert all(len(lines[key]) == (graph.nodes[key].seed == 0) for key in graph.stages)
    depth = {key: re.search(r"\w", lines[key][0]).start() for key in (teacher, warmup, distill, last)}  # pyright: ignore -- found
    assert depth[warmup] == depth[teacher] < depth[distill] < depth[last]
    assert f"taught by {teacher[:8]}" in lines[warmup][0]
    assert "[to do] ends lean; serves bridge, finished" in lines[warmup][0]
    assert "[1 done, 1 to do] ends direct" in lines[graph.arms["direct"][0][0]][0]
    assert "10 distinct stages serve 20 asked for by the arms (sharing ratio 2.00)" in text
    assert "to do: 9 stages and 14 evaluations" in text
    row = next(line for line in text.splitlines() if "│ student_rl" in line and graph.arms["direct"][0][0][:8] in line)
    assert [cell.strip() for cell in row.split("│")[3:-1]][::2] == ["144", "36.0"] and "1 finished" in row


def test_the_time_that_is_left(planned: tuple[Recipe, Graph], tmp_path: Path):
    """A finished stage of 36 s: the same at the other seed, and the student's last stage of two seeds, are to come."""
    recipe, graph = planned
    two = recipe.model_copy(update={"execution": recipe.execution.model_copy(update={"executor": "local:2"})})
    store = Store(tmp_path)
    assert "time to do: not known: none finished here yet" in shown(two, graph, store)
    finish(store, recipe, graph, graph.arms["direct"][0][0], 3600.0)
    text = " ".join(shown(two, graph, store).split())
    assert "time to do: 3 core-hours, 1.5 h on local:2" in text
    assert "without 2 grpo, 2 warmup, 2 distill, 14 evaluate: not known" in text
    for key in graph.nodes:
        if not store.is_done(key):
            finish(store, recipe, graph, key, 1.0)
    assert "nothing is left to do" in shown(two, graph, store)


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


def test_the_forecast_reads_only_what_it_understands(planned: tuple[Recipe, Graph], tmp_path: Path):
    """Nodes of another version, torn files: not counted, no failure."""
    _, graph = planned
    store = Store(tmp_path)
    for name, text in {"old": '{"spec": {"kind": "stage", "new": 1}}', "torn": "{"}.items():
        store.path(name).mkdir(parents=True)
        (store.path(name) / "spec.json").write_text(text)
        store.finish(name, {"meter": {}})
    assert all(cost.rests_on == 0 for cost in forecast(graph, store).values())
    assert json.loads((store.path("old") / "done.json").read_text()) == {"meter": {}}
