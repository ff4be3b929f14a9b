"""Plans: work by hand, calibration of real (tiny) models, planned against actual, what fits."""

import json
import math
from pathlib import Path
from typing import Any

import miniature
import pytest

from headwater import plan
from headwater.config import LoRA, Recipe, load_recipe
from headwater.flops import Shape
from headwater.models.language_model import adapt, load_model
from headwater.plan import GROWTH, Device, Speed, Writer
from headwater.store import Store
from headwater.study import calibrate as calibrations
from headwater.study.calibrate import Calibration, _two_rates, _uses, calibrate, model_key
from headwater.study.graph import Graph
from headwater.study.graph import plan as draw
from headwater.study.outlook import SPEED_SPREAD, outlook, profile_of, writer_of
from headwater.study.run import run


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return miniature.write(tmp_path_factory.mktemp("plan"))


@pytest.fixture(scope="module")
def planned(mini: Path) -> tuple[Recipe, Graph]:
    recipe = load_recipe(mini)
    return recipe, draw(recipe)


def made(graph: Graph, lengths: tuple[int, ...] = (2, 4)) -> Calibration:
    refs = [node.start for node in graph.nodes.values()]
    keys = {model_key(ref) for ref in refs}
    return Calibration({k: Writer(10, lengths) for k in keys}, {k: Speed(1, 0.1, 0.01, 2, 0.02) for k in keys}, 100.0)


def test_what_every_stage_does(planned: tuple[Recipe, Graph]):
    """2 steps of 2 problems x 3 rollouts; the warmup trains on 2 x 4 of the teacher's 8 rollouts."""
    _, graph = planned
    teacher_rl, warmup, distill, student_rl = graph.arms["finished"][0]
    rows = {k: [(i.role, i.model, i.sequences, i.calls) for i in plan.items(n)] for k, n in graph.nodes.items()}
    assert rows[teacher_rl] == [("sampled", "start", 12, 2), ("trained", "start", 12, 2), ("graded", "start", 12, 2)]
    assert rows[warmup] == [("trained", "start", 8, 2), ("sampled", "teacher", 8, 1), ("scored", "teacher", 8, 1)]
    assert rows[distill] == [("sampled", "start", 8, 2), ("trained", "start", 8, 2), ("scored", "teacher", 8, 2)]
    assert rows[graph.evals["student", "rows", 0]] == [("evaluated", "start", 8, 1)]
    assert [plan.labels(graph.nodes[k]) for k in (teacher_rl, warmup, distill, student_rl)] == [4, 0, 0, 4]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["stages.teacher_rl.updates_per_batch=2"], {"sampled": 12, "trained": 12, "graded": 12, "scored": 12}),
        (["stages.teacher_rl.kl_coef=0.1"], {"sampled": 12, "trained": 12, "graded": 12, "scored": 12}),
    ],
)
def test_work_of_grpo_settings(changes: list[str], expected: dict[str, int], mini: Path):
    graph = draw(load_recipe(mini, changes))
    assert {i.role: i.sequences for i in plan.items(graph.nodes[graph.arms["bridge"][0][0]])} == expected


def test_tokens_and_seconds_by_hand(planned: tuple[Recipe, Graph]):
    """Lengths 2 and 4 under a limit of 6: mean 3; times sqrt 2 it is 4.24; times 2 it is (4 + 6) / 2."""
    recipe, graph = planned
    found = outlook(recipe, graph, made(graph))
    teacher_rl, warmup, distill, _ = graph.arms["finished"][0]
    completions = (3, 3 * 2**0.5, 5)
    sampled, trained = [12 * (c + 10 / 3) for c in completions], [12 * (10 + c) for c in completions]
    row = found["nodes"][teacher_rl]
    assert row["tokens"] == pytest.approx([a + b for a, b in zip(sampled, trained, strict=True)])
    longest = (4, 4 * 2**0.5, 6)
    time = [2 * m + 1.2 * c + 2 * 2 + 12 * (10 + c) * 0.02 for m, c in zip(longest, completions, strict=True)]
    spread = [math.exp(math.hypot(math.log(r), math.log(SPEED_SPREAD))) for r in (time[1] / time[0], time[2] / time[1])]
    assert row["seconds"] == pytest.approx([time[1] / spread[0], time[1], time[1] * spread[1]])
    assert found["nodes"][warmup]["tokens"][1] == pytest.approx(8 * (completions[1] + 10) + 16 * (10 + completions[1]))
    assert found["nodes"][distill]["tokens"][2] < 2 * found["nodes"][distill]["tokens"][0]
    total = sum(node["tokens"][1] for node in found["nodes"].values())
    assert found["total"]["tokens"][1] == pytest.approx(total)


def test_reward_lengthens_and_students_write_like_their_teachers(planned: tuple[Recipe, Graph]):
    _, graph = planned
    teacher_rl, _, distill, student_rl = (graph.nodes[k] for k in graph.arms["finished"][0])
    base = {model_key(teacher_rl.start): "teacher", model_key(student_rl.start): "student"}

    def who(node):
        ref, grown = writer_of(graph, node, plan.items(node)[0])
        return base[model_key(ref)], grown

    assert who(teacher_rl) == ("teacher", True) and who(distill) == ("teacher", True)
    assert who(graph.nodes[graph.evals["student", "rows", 0]]) == ("student", False)
    after = graph.evals[graph.arms["bridge"][0][-1], "rows", 0]
    assert who(graph.nodes[after]) == ("teacher", True)
    assert who(graph.nodes[graph.arms["direct"][0][0]]) == ("student", True)
    assert GROWTH["high"] / GROWTH["low"] == 2


def test_a_matched_stage_spends_what_the_other_arm_does(mini: Path):
    graph = draw(load_recipe(mini, ["arms.matched={finish='full', match_flops='bridge'}"]))
    found = outlook(load_recipe(mini), graph, made(graph))["nodes"]
    matched = found[graph.arms["matched"][0][0]]
    spent = sum(found[key]["flops"][1] for key in graph.arms["bridge"][0])
    assert matched["flops"][1] == pytest.approx(spent) and matched["steps"] > 2


def test_a_stage_on_adapters_trains_those_alone(mini: Path):
    recipe = load_recipe(mini, ["stages.student_rl.lora={rank = 3, targets = ['q_proj', 'k_proj', 'down_proj']}"])
    graph = draw(recipe)
    key = graph.arms["direct"][0][0]
    config = recipe.models["student"]
    model = load_model(config, mini.parent / "student", lora=recipe.stages["student_rl"].lora)
    row, full = (
        outlook(r, g, made(g))["nodes"] for r, g in ((recipe, graph), (load_recipe(mini), draw(load_recipe(mini))))
    )
    assert row[key]["memory"]["optimizer"] == 12 * model.num_trained
    assert row[key]["flops"][1] < 0.9 * full[draw(load_recipe(mini)).arms["direct"][0][0]]["flops"][1]
    assert (
        plan.adapted(model.shape, 3).adapters
        == adapt(load_model(config, mini.parent / "student"), LoRA(rank=3), 0).num_trained
    )


def test_a_side_without_labels_does_nothing(mini: Path):
    """And nobody is asked its prompts, of which there are none."""
    raw = load_recipe(mini).model_dump(exclude_unset=True) | {"comparisons": []}
    raw["arms"] = {"fresh": {"teacher": "rl", "bridge": "full", "finish": "fresh", "split": 0.0}}
    recipe = Recipe.model_validate(raw)
    graph = draw(recipe)
    teacher_rl = graph.arms["fresh"][0][0]
    row = outlook(recipe, graph, made(graph))["nodes"][teacher_rl]
    assert (row["tokens"], row["labels"], row["memory"]["optimizer"]) == ([0, 0, 0], 0, 0)
    assert {name: plan.pool_size(node) for name, (_, node) in _uses(graph, served=False).items()} == {
        model_key(graph.nodes[key].start): 8 for key in (teacher_rl, graph.arms["fresh"][0][1])
    }


def test_labels_of_a_gate_that_watches_the_score(mini: Path):
    gate = "{watch = 'score', every = 1, problems = 2, samples = 2}"
    graph = draw(load_recipe(mini, [f"stages.{stage}.gate={gate}" for stage in ("teacher_rl", "warmup", "distill")]))
    assert [plan.labels(graph.nodes[key]) for key in graph.arms["bridge"][0]] == [4 + 2, 2, 2]


def test_without_a_calibration_nothing_is_timed(planned: tuple[Recipe, Graph], tmp_path: Path):
    recipe, graph = planned
    assert calibrate(recipe, graph, Store(tmp_path), measure=False) is None
    found = outlook(recipe, graph, None)
    assert found["total"]["seconds"] is None and "no seconds" in found["rests_on"]
    known = outlook(recipe, graph, None, profile_of("h100"))
    assert known["total"]["seconds"][0] > 0 and "data sheet" in known["rests_on"]
    with pytest.raises(ValueError, match="name one of a100, h100"):
        profile_of("abacus")


def test_a_calibration_trains_a_model_as_its_stages_do(mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Weights that stay frozen in the study are not given an optimizer, which there may be no room for."""
    lent = load_recipe(mini, ["stages.student_rl.lora={rank = 2}"])
    raw: dict[str, Any] = lent.model_dump(exclude_unset=True) | {"comparisons": []}
    raw["arms"] = {"raw": {"teacher": "raw", "bridge": "opd", "finish": "full"}}
    raw["stages"] = {name: raw["stages"][name] | {"lora": {"rank": 2}} for name in ("distill", "student_rl")}
    recipe = Recipe.model_validate(raw)
    seen = {}

    def measured(model, node, recipe):
        seen[Path(model.config.source).name] = model.num_trained / model.num_parameters
        return Writer(1, (1,)), Speed(1, 1, 1, 1, 1)

    monkeypatch.setattr(calibrations, "_measure", measured)
    calibrate(recipe, draw(recipe), Store(tmp_path))
    assert seen["teacher"] == 0 and 0 < seen["student"] < 0.5


def test_two_rates():
    assert _two_rates((3.0, 1, 10), (5.0, 1, 20)) == pytest.approx((1.0, 0.2))
    assert _two_rates((5.0, 1, 10), (4.0, 1, 20)) == pytest.approx((4.0, 0.0))
    assert _two_rates((0.1, 1, 10), (4.0, 1, 20)) == pytest.approx((0.0, 0.2))


def test_what_fits(planned: tuple[Recipe, Graph]):
    recipe, graph = planned
    node = graph.nodes[graph.arms["direct"][0][0]].model_copy(
        update={"settings": recipe.stages["student_rl"].model_copy(update={"problems_per_step": 999})}
    )
    shape = Shape(layers=28, hidden=1024, heads=16, kv_heads=8, head_dim=128, mlp=3072, vocab=151_936, tied=True)

    def fits(gigabytes: float) -> list[str] | None:
        return plan.what_fits(node, recipe.execution, shape, None, 500, 0, gigabytes * 1e9)

    assert fits(400) == []
    smaller = fits(20)
    assert smaller and all(s.startswith("execution.") for s in smaller)
    assert "lora = { rank = 16 }" in (fits(6) or []) and fits(1) is None
    memory = plan.memory(node, recipe.execution, shape, None, 500, 0)
    assert memory.weights == 4 * shape.parameters and memory.optimizer == 12 * shape.parameters


def test_planned_against_actual(mini: Path, tmp_path: Path):
    """A whole run of the miniature: its plan is in the results; a second calibration is read from the store."""
    raw = load_recipe(mini).model_dump(exclude_unset=True)
    raw |= {"arms": {"direct": {"finish": "full"}}, "stages": {"student_rl": raw["stages"]["student_rl"]}}
    raw |= {"models": {"student": raw["models"]["student"]}, "comparisons": []}
    recipe = Recipe.model_validate(raw)
    store = Store(tmp_path / "store")
    found = run(recipe, tmp_path / "run", store, calibrated=True)["plan"]
    assert set(found["planned_against_actual"]) == {"tokens", "seconds", "flops", "peak_memory"}
    assert 0.5 < found["planned_against_actual"]["tokens"]["ratio"] < 2
    assert len(found["nodes"]) == 3 and all(row["actual"]["tokens"] > 0 for row in found["nodes"].values())
    assert len(list((tmp_path / "store" / "calibrations").iterdir())) == 1
    assert calibrate(recipe, draw(recipe), store, measure=False) is not None
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["total"]["tokens"][1] > 0


def test_data_sheets():
    """Decoding a 1 GB model at 40 % of 1 GB/s takes 2.5 s a step."""
    shape = Shape(layers=1, hidden=1, heads=1, kv_heads=1, head_dim=1, mlp=0, vocab=499_999_996, tied=True)
    assert shape.parameters == 500_000_000
    assert plan.assumed_speed(Device(1e12, 1e9, 1e9), shape).step == pytest.approx(2.5)
