"""A miniature study end to end: results, bills, resuming, executors."""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Done  # pyright: ignore -- pytest puts it on the path
from safetensors.torch import load_file

from headwater.config import load_recipe
from headwater.report.compare import compare
from headwater.stages.node import Job, run_node
from headwater.store import Store
from headwater.study.executors import Event
from headwater.study.graph import plan
from headwater.study.results import results
from headwater.study.run import executed_otherwise, run, to_jobs
from headwater.study.tune import tune

EVALUATION = {
    "avg@k",
    "k",
    "num_problems",
    "pass@k",
    "maj@k",
    "protocol",
    "parsed",
    "truncated",
    "reasons",
    "styles",
    "per_problem",
}


def check_evaluation(row: dict[str, Any], out: Path) -> None:
    assert set(row) == EVALUATION and (row["k"], row["num_problems"]) == (2, 4)
    assert set(row["pass@k"]) == {"1", "2"} and row["pass@k"]["1"] == pytest.approx(row["avg@k"])
    scores = json.loads((out / row["per_problem"]).read_text())
    assert len(scores) == 4 and sum(scores.values()) / 4 == pytest.approx(row["avg@k"])
    assert sum(row["reasons"].values()) == 8


def test_results_have_the_documented_shape(done: Done):
    found = json.loads((done.out / "results.json").read_text())
    assert found == done.results
    assert set(found) == {"schema", "recipe", "complete", "models", "plan", "arms", "comparisons", "study"}
    assert (found["schema"], found["recipe"], found["complete"]) == (1, "miniature", True)
    assert set(found["arms"]) == {"direct", "bridge", "finished"}
    for name, arm in found["arms"].items():
        assert set(arm) == {"arm", "budget", "stages", "seeds", "summary"} and set(arm["seeds"]) == {"0"}
        assert (arm["arm"], arm["budget"]) == (name, 8)
        row = arm["seeds"]["0"]
        assert set(row) == {"stages", "labels", "cost", "by_stage", "evals"}
        assert [(part["stage"], part["key"]) for part in row["by_stage"]] == list(
            zip(arm["stages"], row["stages"], strict=True)
        )
        for cost in ("flops", "seconds"):
            assert sum(part["cost"][cost] for part in row["by_stage"]) == pytest.approx(row["cost"][cost])
        assert set(row["labels"]) == {"distinct", "revealed"}
        assert {"tokens", "flops", "seconds", "executed_flops", "mfu", "wasted"} <= set(row["cost"])
        assert row["cost"]["seconds"] > 0
        check_evaluation(row["evals"]["rows"], done.out)
        summary = arm["summary"]["rows"]
        keys = {"mean", "ci95", "over", "pass@k", "unparsed", "wrong", "truncated", "styles"}
        assert keys <= set(summary) <= keys | {"gap_recovery"} and summary["over"] == "problems"
        assert summary["mean"] + summary["wrong"] + summary["unparsed"] == pytest.approx(1)
        assert {k: p["mean"] for k, p in summary["pass@k"].items()} == pytest.approx(row["evals"]["rows"]["pass@k"])
        assert summary["mean"] == pytest.approx(row["evals"]["rows"]["avg@k"])
        assert summary["ci95"][0] <= summary["mean"] <= summary["ci95"][1]
    for row in found["comparisons"]:
        keys = {"a", "b", "task", "difference", "ci95", "p_adjusted", "num_seeds", "over", "verdict"}
        assert set(row) == keys and row["verdict"] in ("a better", "b better", "not distinguishable")
    means = {name: arm["summary"]["rows"]["mean"] for name, arm in found["arms"].items()}
    assert found["comparisons"][0]["difference"] == pytest.approx(means["bridge"] - means["direct"])


def test_base_models_and_stages_on_the_way_are_models(done: Done):
    models, arms = done.results["models"], done.results["arms"]
    teacher, warmup, _ = arms["bridge"]["seeds"]["0"]["stages"]
    assert {key: row["role"] for key, row in models.items()} == {
        "student": "base student",
        "teacher": "base teacher",
        teacher: "trained teacher",
        warmup: "student after warmup",
    }
    for row in models.values():
        check_evaluation(row["evals"]["0"]["rows"], done.out)


def test_bills(done: Done):
    """An arm pays the union over its stages, the study pays every stage once."""
    arms, study = done.results["arms"], done.results["study"]
    rows = {name: arm["seeds"]["0"] for name, arm in arms.items()}
    keys = list(dict.fromkeys(key for row in rows.values() for key in row["stages"]))
    reveals = {
        key: [(r["step"], r["problem"]) for r in map(json.loads, path.read_text().splitlines())]
        for key in keys
        if (path := done.store.path(key) / "ledger.jsonl").exists()
    }
    direct, bridge, finished = (rows[name]["stages"] for name in ("direct", "bridge", "finished"))
    assert set(reveals) == {direct[0], bridge[0], finished[3]}, "dense stages reveal nothing"
    assert all(len(r) == 4 for r in reveals.values())
    for row in rows.values():
        seen = [problem for key in row["stages"] for _, problem in reveals.get(key, [])]
        assert row["labels"] == {"distinct": len(set(seen)), "revealed": len(seen)}
        assert row["labels"]["revealed"] == 4 * sum(key in reveals for key in row["stages"])
    once = [problem for r in reveals.values() for _, problem in r]
    assert study["labels"] == {"distinct": len(set(once)), "revealed": 12}
    asked = sum(len(row["stages"]) for row in rows.values())
    assert (study["stages_trained"], study["stages_requested"]) == (len(keys), asked) == (5, 8)
    meters = {key: done.store.outcome(key)["meter"] for key in keys}

    def flops(stages: list[str]) -> float:
        return sum(role["flops"] for key in stages for role in meters[key].values())

    assert study["cost"]["flops"] == pytest.approx(flops(keys))
    assert rows["finished"]["cost"]["flops"] == pytest.approx(flops(finished))
    assert rows["finished"]["cost"]["flops"] > rows["bridge"]["cost"]["flops"]
    trained = sum(meters[key]["trained"]["tokens"] for key in bridge)
    assert rows["bridge"]["cost"]["tokens"]["trained"] == trained > 0


def test_run_directory_explains_itself(done: Done):
    graph = json.loads((done.out / "stages.json").read_text())
    assert load_recipe(done.out / "recipe.toml") == load_recipe(done.recipe)
    assert {"python", "packages", "device", "command"} <= set(json.loads((done.out / "environment.json").read_text()))
    for name, row in done.results["arms"].items():
        assert graph["arms"][name]["0"] == row["seeds"]["0"]["stages"]
    for key, node in graph["nodes"].items():
        copies = {path.name for path in (done.out / "nodes" / key).iterdir()}
        assert {"spec.json", "done.json", "samples.jsonl"} <= copies
        assert ("metrics.jsonl" in copies) == (node["kind"] == "stage")
        assert "error.txt" not in {path.name for path in done.store.path(key).iterdir()}


def test_events_tell_every_step(done: Done):
    key = done.results["arms"]["direct"]["seeds"]["0"]["stages"][0]
    order = [(e.kind, e.step, e.steps) for e in done.events if e.key == key]
    assert order == [("started", 0, 0), ("step", 1, 2), ("step", 2, 2), ("done", 0, 0)]
    assert sum(e.kind == "done" for e in done.events) == 5 + 7


def test_training_changed_the_weights(done: Done):
    chain = done.results["arms"]["finished"]["seeds"]["0"]["stages"]
    student = [load_file(done.recipe.parent / "student" / "model.safetensors")]
    student += [load_file(done.store.model(key) / "model.safetensors") for key in chain[1:]]
    for before, after in pairwise(student):
        assert any(not torch.equal(before[name], after[name]) for name in after)


def test_a_second_run_trains_nothing_and_finds_the_same(done: Done):
    events: list[Event] = []
    found = run(load_recipe(done.recipe), done.out, done.store, on_event=events.append)
    assert events == [] and found == done.results


def test_another_executor_reuses_the_store(done: Done, tmp_path: Path):
    events: list[Event] = []
    changed = load_recipe(done.recipe, ["execution.executor=local:2", "execution.micro_batch_tokens=64"])
    found = run(changed, tmp_path, done.store, on_event=events.append)
    assert events == []
    assert found == done.results


def test_reuse_of_stages_executed_otherwise_is_seen_and_can_be_refused(done: Done, tmp_path: Path):
    changed = load_recipe(done.recipe, ["execution.micro_batch_tokens=64", "execution.log_every=2"])
    graph = plan(changed)
    differing = executed_otherwise(to_jobs(changed, graph), done.store)
    assert set(differing) == set(graph.stages) and {tuple(names) for names in differing.values()} == {
        ("micro_batch_tokens",)
    }
    with pytest.raises(ValueError, match=r"5 stages were executed otherwise, .*micro_batch_tokens differ"):
        run(changed, tmp_path / "out", done.store, strict=True)
    run(load_recipe(done.recipe), tmp_path / "same", done.store, strict=True)


def test_a_new_arm_trains_only_what_is_new(done: Done, tmp_path: Path):
    events: list[Event] = []
    changes = ["arms.lean={teacher='rl', bridge='warmup'}", "arms.opd={teacher='rl', bridge='opd'}"]
    found = run(load_recipe(done.recipe, changes), tmp_path, done.store, on_event=events.append)
    # "lean" ends where "bridge" passes through; "opd" needs one stage, and that stage one evaluation.
    assert [e.kind for e in events].count("done") == 2
    assert found["arms"]["lean"]["seeds"]["0"]["stages"] == found["arms"]["bridge"]["seeds"]["0"]["stages"][:2]
    assert found["arms"]["bridge"] == done.results["arms"]["bridge"]


def test_two_processes_give_the_same_numbers(done: Done, tmp_path: Path):
    recipe = load_recipe(done.recipe, ["execution.executor=local:2"])
    events: list[Event] = []
    found = run(recipe, tmp_path / "out", Store(tmp_path / "store"), on_event=events.append)
    assert sum(e.kind == "done" for e in events) == 12 and not any(e.kind == "failed" for e in events)
    for name, arm in done.results["arms"].items():
        ours, theirs = arm["seeds"]["0"], found["arms"][name]["seeds"]["0"]
        assert (ours["stages"], ours["labels"], ours["evals"]) == (theirs["stages"], theirs["labels"], theirs["evals"])
        assert ours["cost"]["tokens"] == theirs["cost"]["tokens"]
        for key in ours["stages"]:
            weights = [load_file(s.model(key) / "model.safetensors") for s in (done.store, Store(tmp_path / "store"))]
            assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])
    assert [c["difference"] for c in found["comparisons"]] == [c["difference"] for c in done.results["comparisons"]]


def test_the_directory_of_another_recipe_is_refused(done: Done):
    before = (done.out / "recipe.toml").read_text()
    with pytest.raises(ValueError, match=r"run of another recipe \(pool, stages differ\): choose another --out"):
        run(load_recipe(done.recipe, ["pool.labels=9", "stages.distill.steps=3"]), done.out, done.store)
    assert (done.out / "recipe.toml").read_text() == before


def test_seeds_are_rows_of_the_statistics(done: Done, tmp_path: Path):
    changes = ["seeds=[0, 1]", "evaluations.rows.samples=2"]
    recipe = load_recipe(done.recipe, changes).model_copy(update={"comparisons": ()})
    found = run(recipe, tmp_path, done.store)
    direct = found["arms"]["direct"]
    assert set(direct["seeds"]) == {"0", "1"} and found["comparisons"] == []
    assert direct["seeds"]["0"] == done.results["arms"]["direct"]["seeds"]["0"] != direct["seeds"]["1"]
    values = [row["evals"]["rows"]["avg@k"] for row in direct["seeds"].values()]
    assert direct["summary"]["rows"]["mean"] == pytest.approx(sum(values) / 2)


def test_evaluating_and_auditing_during_training_change_nothing(done: Done, tmp_path: Path):
    audit = f"execution.audit_grader={done.recipe.parent}/grader.py:grade"
    recipe = load_recipe(done.recipe, ["execution.eval_every=1", "execution.eval_problems=2", audit])
    graph = plan(recipe)
    key = graph.arms["direct"][0][0]
    node: Any = graph.nodes[key]
    store = Store(tmp_path)
    run_node(Job(node, recipe.execution, graph.monitors[0]), store)
    curve = [json.loads(line) for line in (store.path(key) / "evals.jsonl").read_text().splitlines()]
    assert [row["updates"] for row in curve] == [1, 2] and all(0 <= row["eval/avg@k"] <= 1 for row in curve)
    rows = [json.loads(line) for line in (store.path(key) / "metrics.jsonl").read_text().splitlines()]
    assert [(row["audit/agreement"], row["audit/reward_gap"]) for row in rows] == [(1, 0)] * 2
    ours, theirs = (load_file(s.model(key) / "model.safetensors") for s in (store, done.store))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("executor", ["inline", "local:2"])
def test_a_failed_node_costs_only_itself_and_what_needs_it(mini: Path, tmp_path: Path, executor: str):
    """All others are run, the message names the node, there are results so far, and the next run goes on."""
    store = Store(tmp_path / "store")
    recipe = load_recipe(mini, ["arms.raw={preset='raw'}", f"execution.executor={executor}"])
    graph = plan(recipe)
    _, warmup, _ = bridge = graph.arms["bridge"][0]
    store.path(warmup).mkdir(parents=True)
    (store.path(warmup) / "rollouts.jsonl").write_text("torn")
    events: list[Event] = []
    # Needs it: two stages of "finished", the last of "bridge" among them, and the evaluations of the three.
    with pytest.raises(ValueError, match=f"warmup {warmup}.*; 5 nodes that need it were not run"):
        run(recipe, tmp_path / "out", store, on_event=events.append)
    assert [e.key for e in events if e.kind == "failed"] == [warmup]
    assert "Traceback" in (store.path(warmup) / "error.txt").read_text()
    lost = {*graph.arms["finished"][0][1:]} | {graph.evals[key, "rows", 0] for key in graph.arms["finished"][0][1:]}
    assert {key for key in graph.nodes if not store.is_done(key)} == lost and store.is_done(bridge[0])
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(found["arms"]) == {"direct", "raw"} and not found["complete"]
    assert (tmp_path / "out" / "nodes" / warmup / "error.txt").exists()
    (store.path(warmup) / "rollouts.jsonl").unlink()
    assert set(run(recipe, tmp_path / "out", store)["arms"]) == {"direct", "bridge", "finished", "raw"}
    assert not (store.path(warmup) / "error.txt").exists()
    assert not (tmp_path / "out" / "nodes" / warmup / "error.txt").exists()


def test_the_run_directory_tells_what_happened(done: Done):
    events = [json.loads(line) for line in (done.out / "events.jsonl").read_text().splitlines()]
    kinds = [event["kind"] for event in events]
    assert kinds[0] == "run" and kinds[-1] == "end" and kinds.count("started") == kinds.count("done") >= 12
    graph = json.loads((done.out / "stages.json").read_text())
    assert {event["key"] for event in events if event["kind"] == "done"} == set(graph["nodes"])
    bridge, student = graph["arms"]["bridge"]["0"], graph["evals"]["student"]["rows"]["0"]
    assert [graph["nodes"][key]["stage"] for key in bridge] == ["teacher_rl", "warmup", "distill"]
    assert graph["nodes"][bridge[2]]["parents"] == [bridge[1], bridge[0]]
    assert graph["nodes"][student]["kind"] == "evaluate" and graph["nodes"][student]["stage"] is None
    assert graph["evals"][bridge[2]]["rows"]["0"] in graph["nodes"] and graph["requested"] == 8


def test_results_so_far_leave_out_what_is_not_finished(done: Done, tmp_path: Path):
    recipe = load_recipe(done.recipe)
    graph = plan(recipe)
    store = Store(tmp_path / "store")
    bridge = graph.arms["bridge"][0]
    for key in graph.nodes:
        if key != graph.evals[bridge[-1], "rows", 0]:
            shutil.copytree(done.store.path(key), store.path(key))
    found = results(recipe, graph, store, tmp_path)
    assert not found["complete"] and set(found["arms"]) == {"direct", "finished"}
    assert [(row["a"], row["b"]) for row in found["comparisons"]] == [("bridge/teacher_rl", "base teacher")]
    (whole,) = [row for row in done.results["comparisons"] if row["a"] == "bridge/teacher_rl"]
    assert found["comparisons"][0]["p_adjusted"] >= whole["p_adjusted"], "no `better` is withdrawn when the rest comes"


def test_gap_recovery_is_against_the_arms_own_teacher_or_the_first_trained_one(done: Done, tmp_path: Path):
    """Scores are written by hand: base student 0, teacher 1, bridge 1/2, direct 1/4, of two samples each."""
    recipe = load_recipe(done.recipe)
    graph, store = plan(recipe), Store(tmp_path / "store")
    shutil.copytree(done.store.root, store.root)
    teacher, _, distill = graph.arms["bridge"][0]
    (direct,) = graph.arms["direct"][0]
    known = {"student": (0, 0, 0, 0), teacher: (1, 1, 1, 0.5), distill: (0.5,) * 4, direct: (0, 0, 0.5, 0.5)}
    for model, scores in known.items():
        path = store.path(graph.evals[model, "rows", 0]) / "done.json"
        outcome = json.loads(path.read_text())
        outcome["result"]["per_problem"] = dict(zip(outcome["result"]["per_problem"], scores, strict=True))
        path.write_text(json.dumps(outcome))
    found = results(recipe, graph, store, tmp_path)["arms"]
    for arm, share in {"bridge": 0.5 / 0.875, "direct": 0.25 / 0.875}.items():
        gap = found[arm]["summary"]["rows"]["gap_recovery"]
        assert gap["value"] == pytest.approx(share) and gap["ci95"][0] < share < gap["ci95"][1]
        assert gap["teacher"] == "bridge/teacher_rl"
    assert "gap_recovery" not in results(recipe, graph, store, tmp_path)["models"]["student"]["summary"]["rows"]


def test_curves_and_labels_to_match(done: Done, tmp_path: Path):
    recipe = load_recipe(done.recipe, ["pool.budgets=[4, 8]", "comparisons=[{a='bridge', b='direct', margin=0.5}]"])
    found = run(recipe, tmp_path, done.store)
    assert set(found["arms"]) == {f"{arm}@{n}" for arm in ("direct", "bridge", "finished") for n in (4, 8)}
    assert found["arms"]["bridge@8"]["seeds"] == done.results["arms"]["bridge"]["seeds"], "the full pool is shared"
    for arm, curve in found["curves"].items():
        assert [point["labels"] for point in curve["rows"]] == [4, 8]
        for point in curve["rows"]:
            summary = found["arms"][f"{arm}@{point['labels']}"]["summary"]["rows"]
            assert (point["mean"], point["ci95"]) == (summary["mean"], summary["ci95"])
    assert [(row["arm"], row["baseline"], row["labels"]) for row in found["labels_to_match"]] == [
        (f"{arm}@{n}", "direct", n) for arm in ("bridge", "finished") for n in (4, 8)
    ]
    assert [(row["a"], row["b"], row["margin"]) for row in found["comparisons"]] == [
        ("bridge@4", "direct@4", 0.5),
        ("bridge@8", "direct@8", 0.5),
    ]
    assert all(row["outcome"] in ("confirmed", "refuted", "undecided") for row in found["comparisons"])


def test_a_matched_arm_spends_what_it_is_matched_to(done: Done, tmp_path: Path):
    recipe = load_recipe(done.recipe, ["arms.more={preset='direct-matched'}"])
    found = run(recipe, tmp_path, done.store)
    bridge, more = (found["arms"][name]["seeds"]["0"] for name in ("bridge", "more"))
    steps = [json.loads(r) for r in (tmp_path / "nodes" / more["stages"][0] / "metrics.jsonl").read_text().splitlines()]
    last_step = more["cost"]["flops"] / len(steps)
    assert bridge["cost"]["flops"] <= more["cost"]["flops"] < bridge["cost"]["flops"] + 2 * last_step
    assert len(steps) > 2


def test_tuning_tries_one_grid_on_every_stage_and_bills_it(mini: Path, tmp_path: Path):
    grid = "tuning={lr=[1e-3, 1e-2], seeds=[7], problems=2, samples=2}"
    recipe = load_recipe(mini, [grid, "pool.labels=4"])
    store = Store(tmp_path / "store")
    found = tune(recipe, tmp_path / "out", store)
    assert found == json.loads((tmp_path / "out" / "tuning.json").read_text())
    assert list(found["stages"]) == ["teacher_rl", "warmup", "distill", "student_rl"] == list(found["chosen"])
    for stage, rows in found["stages"].items():
        assert [row["lr"] for row in rows] == [1e-3, 1e-2]
        assert found["chosen"][stage] == max(rows, key=lambda row: row["mean"])["lr"]
        trial = load_recipe(tmp_path / "out" / stage / "recipe.toml")
        assert trial.seeds == (7,) and trial.evaluations["tuning"].split == "tuning"
        assert {trial.settings(arm, stage).optimizer.lr for arm in trial.arms} == {1e-3, 1e-2}
    distill = load_recipe(tmp_path / "out" / "distill" / "recipe.toml")
    assert distill.stages["teacher_rl"].optimizer.lr == found["chosen"]["teacher_rl"]
    # Two trials of two stages reveal four answers each; every trial of all four stages is graded on two problems.
    assert found["labels"] == {"distinct": 4 + 2, "revealed": 4 * 4 + 4 * 2 * 2}
    with pytest.raises(ValueError, match=r"no \[tuning\]"):
        tune(load_recipe(mini), tmp_path / "none", store)


def test_a_run_compared_with_itself(done: Done):
    found = compare(done.out, done.out)
    assert found["stages"] == {"same": 5, "a": 5, "b": 5} and found["not_compared"] == []
    assert {r["name"] for r in found["differences"]} == {"base student", "base teacher", "direct", "bridge", "finished"}
