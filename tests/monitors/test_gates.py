"""Gates decide from looks alone; their error rates are simulated and held to what docs/algorithms.md says."""

import importlib.util
import json
import math
from pathlib import Path

import miniature  # pyright: ignore -- pytest puts it on the path
import numpy as np
import pytest

from headwater.config import GRPO, Distill, Gate, Joint, Warmup, load_recipe
from headwater.monitors.gates import Look, decide, evidence, gain
from headwater.stages.node import Job, run_node
from headwater.store import Store
from headwater.study.budget import most_reveals
from headwater.study.graph import plan
from headwater.study.run import to_jobs

METHOD = {"steps": 9, "max_new_tokens": 4, "optimizer": {"lr": 1e-3}}


def gate(watch="score", **settings) -> Gate:
    return Gate.model_validate({"watch": watch, "every": 5, "problems": 4} | settings)


def looks(*rows: list[float], mixed: tuple[float, ...] = ()) -> list[Look]:
    return [Look(5 * i, tuple(row), mixed) for i, row in enumerate(rows)]


def test_gain_is_a_paired_difference_of_window_means():
    series = looks([0.9, 0.9, 0.9, 0.9], [0.0, 0.2, 0.4, 0.6], [0.2, 0.2, 0.4, 0.8], [0.3, 0.4, 0.5, 0.9])
    more, error = gain(gate(patience=1), series)
    assert more == pytest.approx(0.125) and error == pytest.approx(np.std([0.1, 0.2, 0.1, 0.1], ddof=1) / 2)
    # Earlier windows: (0.45, 0.55, 0.65, 0.75); later: (0.25, 0.3, 0.45, 0.85).
    more, error = gain(gate(patience=2), series)
    assert more == pytest.approx(-0.1375)
    assert error == pytest.approx(np.std([-0.2, -0.25, -0.2, 0.1], ddof=1) / 2)
    # A fall of the KL is a gain, in shares of the earlier mean.
    more, error = gain(gate("kl", patience=1), looks([2.0, 2.0, 2.0, 2.0], [1.8, 1.6, 1.4, 1.6]))
    assert more == pytest.approx(0.2) and error == pytest.approx(np.std([0.1, 0.2, 0.3, 0.2], ddof=1) / 2)


def test_a_plateau_needs_two_windows_and_the_benefit_of_doubt():
    flat = looks(*[[0.5] * 4] * 6)
    assert [decide(gate(patience=2), flat[:n]) is None for n in range(1, 6)] == [True, True, True, False, False]
    assert [decide(gate(patience=3), flat[:n]) is None for n in range(1, 7)] == [True] * 5 + [False]
    rising = looks([0.0, 0.2, 0.4, 0.6], [0.1, 0.3, 0.6, 0.6])  # gain 0.1, error 0.0408
    assert decide(gate(patience=1, min_delta=0.120), rising) is None
    assert "score rose by 0.1 +- 0.041" in str(decide(gate(patience=1, min_delta=0.121), rising))
    falling = looks([1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.9])
    assert decide(gate("kl", patience=1), falling) is None and decide(gate("kl", patience=1), falling[::-1])


def test_threshold_and_mixed_groups_come_first():
    series = looks([0.5, 0.6, 0.7, 0.6])
    error = math.sqrt(2 / 300) / 2
    assert decide(gate(threshold=0.6 - error - 1e-6), series) and not decide(gate(threshold=0.6 - error + 1e-6), series)
    near, far = (gate("kl", threshold=0.6 + error + d) for d in (1e-6, -1e-6))
    assert "met the threshold" in str(decide(near, series)) and decide(far, series) is None
    few = looks([0.0] * 4, mixed=(0.0, 0.1, 0.0, 0.1))
    assert "mixed groups 0.05" in str(decide(gate(min_mixed=0.2), few))
    assert decide(gate(min_mixed=0.07), few) is None  # 0.05 + 0.029 is not below


def test_evidence_has_gap_recovery_where_the_teacher_is_better():
    rows = [Look(0, (0.2, 0.4), teacher=0.8), Look(5, (0.4, 0.6), teacher=0.8)]
    found = evidence(rows, "plateau")
    assert [row["gap_recovery"] for row in found["looks"]] == pytest.approx([0.0, 0.4])
    assert (found["stopped_at"], found["reason"]) == (5, "plateau")
    worse = evidence([Look(0, (0.2, 0.4), teacher=0.1)], None)
    assert worse["looks"][0]["gap_recovery"] is None and worse["stopped_at"] is None


@pytest.fixture(scope="module")
def simulation():
    """scripts/simulate_gates.py as a module."""
    spec = importlib.util.spec_from_file_location("simulate_gates", miniature.ROOT / "scripts" / "simulate_gates.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_error_rates_are_those_of_the_documentation(simulation):
    settings = gate(problems=32, samples=4, patience=3)
    flat = simulation.simulate(simulation.curve(0.0), settings, 100)
    assert flat.min() == 5 and 6.5 <= flat.mean() <= 9 and (flat == simulation.LOOKS).mean() <= 0.02
    rising = simulation.simulate(simulation.curve(4.0), settings, 100)
    assert (rising < simulation.RISE).mean() <= 0.03 and (rising - simulation.RISE).mean() <= 8
    # The benefit of doubt is not enough for 2 points a look at 16 problems.
    weak = simulation.simulate(simulation.curve(2.0), gate(problems=16, patience=3), 100)
    assert 0.2 <= (weak < simulation.RISE).mean() <= 0.5


@pytest.mark.parametrize(
    ("method", "settings", "words"),
    [
        (GRPO, {"problems_per_step": 2, "gate": {"watch": "kl"}}, "'score' for grpo"),
        (GRPO, {"problems_per_step": 2, "gate": {"watch": "score", "min_mixed": 0.2}}, "gate.samples >= group_size"),
        (Joint, {"problems_per_step": 2, "reward_weight": 0.5, "gate": {"watch": "score"}}, "none for the others"),
        (Warmup, {"sequences_per_step": 2, "gate": {"watch": "kl", "problems": 2.5}}, "whole number"),
        (Distill, {"problems_per_step": 2, "divergence": "constant", "gate": {"watch": "kl"}}, "does not have"),
        (
            Distill,
            {"problems_per_step": 2, "optimizer": {"lr": 1e-3, "schedule": "linear"}, "gate": {"watch": "kl"}},
            "schedule = 'constant'",
        ),
    ],
)
def test_gates_that_cannot_work_are_refused(method, settings, words):
    settings = METHOD | settings | {"gate": {"every": 2, "problems": 4} | settings["gate"]}
    with pytest.raises(ValueError, match=words):
        method.model_validate(settings)


def run_all(recipe_path: Path, store: Store, *overrides: str):
    recipe = load_recipe(recipe_path, overrides)
    graph = plan(recipe)
    for job in to_jobs(recipe, graph).values():
        if job.spec.kind == "stage":
            run_node(Job(job.spec, job.execution, job.monitor), store)
    return recipe, graph


GATES = (
    "stages.teacher_rl.gate={watch='score', every=1, problems=0.5, samples=3, min_delta=1.5, patience=1}",
    "stages.student_rl.gate={watch='score', every=1, problems=2, samples=4, min_mixed=0.001, threshold=0.0}",
    "stages.warmup.gate={watch='kl', every=1, problems=3, samples=1, threshold=1e-9}",
    "stages.distill.gate={watch='score', every=2, problems=2, samples=2}",
)


def test_a_gated_study_bills_its_looks_and_keeps_the_evidence(tmp_path):
    store = Store(tmp_path / "store")
    recipe, graph = run_all(miniature.write(tmp_path), store, *GATES)
    teacher, warmup, distill, student = graph.arms["finished"][0]
    rows = {key: store.outcome(key) for key in (teacher, warmup, distill, student)}
    # Half of 8 labels are looked at, at steps 0 and 1, where no score can have risen by 1.5; a step
    # draws 2 of the others.
    assert (rows[teacher]["gate"]["stopped_at"], rows[teacher]["distinct"], rows[teacher]["revealed"]) == (1, 6, 10)
    assert rows[warmup]["gate"]["reason"] is None and rows[warmup]["revealed"] == 0
    assert [row["step"] for row in rows[warmup]["gate"]["looks"]] == [0, 1]
    assert rows[distill]["revealed"] == 2 and "gap_recovery" in rows[distill]["gate"]["looks"][0]
    # A score of 0 is met at once: skipped before its first step, so that the student is the distilled one.
    skipped = rows[student]["gate"]
    assert (skipped["stopped_at"], rows[student]["revealed"]) == (0, 2) and "met the threshold" in skipped["reason"]
    assert 0 < skipped["looks"][0]["mixed"] <= 1
    before, after = (store.model(key) / "model.safetensors" for key in (distill, student))
    assert before.read_bytes() == after.read_bytes()
    for key, row in rows.items():
        assert row["meter"]["evaluated"]["tokens"] > 0
        steps = [json.loads(line)["step"] for line in (store.path(key) / "gates.jsonl").read_text().splitlines()]
        assert steps == [look["step"] for look in row["gate"]["looks"]]
    revealed = sum(row["revealed"] for row in rows.values())
    assert revealed <= (most_reveals(recipe, "finished") or 0) == 4 + 4 + 2 * 4 + 2 * 2 + 1 * 2


def test_monitoring_more_often_changes_nothing(tmp_path):
    """Weights, metrics and bills are equal bit for bit; C2 is there at start and end, or at every step."""
    path = miniature.write(tmp_path)
    stores = {n: Store(tmp_path / str(n)) for n in (0, 1, 2)}
    found = {}
    for n, store in stores.items():
        options = ("arms.direct.finish=full", f"execution.monitor_every={n}")
        off = ("execution.monitor_problems=0",) if n == 2 else ("execution.monitor_problems=2",)
        _, found[n] = run_all(path, store, *options, *off)
    assert found[0].arms == found[1].arms == found[2].arms
    for stage, key in zip(("teacher", "warmup", "distill"), found[0].arms["bridge"][0], strict=True):
        weights = [(s.model(key) / "model.safetensors").read_bytes() for s in stores.values()]
        assert weights[0] == weights[1] == weights[2], stage
        metrics = [miniature.without_time((s.path(key) / "metrics.jsonl").read_text()) for s in stores.values()]
        assert metrics[0] == metrics[1] == metrics[2]
        bills = [{r: (v["tokens"], v["flops"]) for r, v in s.outcome(key)["meter"].items()} for s in stores.values()]
        assert bills[0] == bills[1] == bills[2]
        files = [s.path(key) / "monitors.jsonl" for s in stores.values()]
        assert [file.exists() for file in files] == [stage != "teacher"] * 2 + [False]
        if stage != "teacher":
            rows = [[json.loads(line) for line in file.read_text().splitlines()] for file in files[:2]]
            assert [row["step"] for row in rows[0]] == [0, 2] and [row["step"] for row in rows[1]] == [0, 1, 2]
            assert rows[0][0] == rows[1][0] and rows[0][-1] == rows[1][-1]
            assert rows[0][0]["c2/reverse_kl@student"] > 0
