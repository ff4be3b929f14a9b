"""How labels are divided: fixed shares, the decision node of `split = "auto"`, and sides without labels."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from headwater import spec
from headwater.cli import app
from headwater.config import Pool, Recipe, load_recipe
from headwater.export import export_model
from headwater.report import page
from headwater.spec import DecisionSpec, StageSpec
from headwater.stages import node
from headwater.stages.node import select
from headwater.store import Store
from headwater.study import gc
from headwater.study.budget import most_reveals
from headwater.study.graph import Graph, plan, probe_node
from headwater.study.outlook import against, outlook
from headwater.study.run import run
from headwater.study.tune import trial_recipe, tune

AUTO = ["arms.auto={preset='fresh', split='auto'}", "probe.problems=6", "probe.samples=2"]


def planned(mini: Path, *changes: str) -> tuple[Recipe, Graph]:
    recipe = load_recipe(mini, changes)
    return recipe, plan(recipe)


def stage_nodes(graph: Graph, arm: str) -> list[StageSpec]:
    found = [graph.nodes[key] for key in graph.arms[arm][0]]
    assert all(isinstance(n, StageSpec) for n in found)
    return found  # pyright: ignore -- asserted above


@pytest.mark.parametrize(("share", "sizes"), [(0.0, (0, 8, 8)), (0.25, (2, 2, 6)), (0.75, (6, 6, 2)), (1.0, (8, 8, 0))])
def test_fixed_shares(mini: Path, share: float, sizes: tuple[int, int, int]):
    recipe, graph = planned(mini, f"arms.s={{preset='fresh', split={share}}}")
    teacher, warmup, distill, student = stage_nodes(graph, "s")
    chosen = [[p.id for p in select(n.problems)] for n in (teacher, warmup, student)]
    assert tuple(map(len, chosen)) == sizes and distill.problems == warmup.problems
    whole = [p.id for p in select(stage_nodes(graph, "direct")[0].problems)]
    assert chosen[0] + chosen[2] == whole and not set(chosen[0]) & set(chosen[2])
    assert most_reveals(recipe, "s") == sum(4 for size in (sizes[0], sizes[2]) if size)


def test_half_is_a_share_and_one_shares_the_bridge(mini: Path):
    arms = [
        "arms.half={preset='fresh'}",
        "arms.point={preset='fresh', split=0.5}",
        "arms.one={preset='fresh', split=1}",
    ]
    _, graph = planned(mini, *arms)
    assert graph.arms["half"] == graph.arms["point"]
    assert graph.arms["one"][0][:3] == graph.arms["bridge"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("arms.bad={preset='bridge', split='auto'}", "finish = 'fresh'"),
        ("arms.bad={preset='raw-grpo', split='auto'}", "teacher = 'rl'"),
        ("arms.bad={preset='fresh', split=1.5}", "less than or equal to 1"),
        ("arms.bad={preset='fresh', split='auto', overrides={warmup={keep='correct'}}}", "no labels upstream"),
        ("arms.bad={preset='fresh', split=0.2}", "takes 2 problems a step"),
    ],
)
def test_refused(mini: Path, change: str, message: str):
    with pytest.raises(ValueError, match=message):
        planned(mini, change)


def test_a_decision_is_known_by_its_configuration(mini: Path):
    recipe, graph = planned(mini, *AUTO)
    key = graph.decisions["auto", 0]
    decision = graph.nodes[key]
    assert isinstance(decision, DecisionSpec) and decision == spec.parse(decision.model_dump_json())
    assert (decision.labels, decision.problems.count, decision.least) == (8, 6, (2, 2))
    sample, pool = select(decision.problems), select(stage_nodes(graph, "direct")[0].problems)
    assert sample == pool[:6]
    assert all(key in spec.parents(n) for n in stage_nodes(graph, "auto"))
    assert list(graph.nodes).index(key) < min(list(graph.nodes).index(k) for k in graph.arms["auto"][0])
    assert most_reveals(recipe, "auto") == 6 + 4 + 4
    assert planned(mini, *AUTO, "probe.samples=3")[1].decisions != graph.decisions
    assert planned(mini, *AUTO, "execution.threads=2")[1].decisions == graph.decisions


def spent(store: Store, key: str) -> int:
    return store.outcome(key)["revealed"]


@pytest.mark.parametrize("share", [0.0, 0.75])
def test_stages_follow_the_decision(mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float):
    real = node.judge

    def judge(*given: Any) -> dict[str, Any]:
        return {**real(*given), "share": share}

    monkeypatch.setattr(node, "judge", judge)
    again = "arms.again={preset='fresh', split='auto', overrides={student_rl={steps=1}}}"
    store, recipe = Store(tmp_path / "store"), load_recipe(mini, [*AUTO, again])
    arms = {name: recipe.arms[name] for name in ("auto", "again")}
    recipe = recipe.model_copy(update={"arms": arms, "comparisons": ()})
    found = run(recipe, tmp_path / "out", store)
    graph = plan(recipe)
    assert len(set(graph.decisions.values())) == 1  # one probe for both arms, billed once in the study
    teacher, _, _, student = graph.arms["auto"][0]
    up = int(8 * share)
    assert spent(store, teacher) == (4 if up else 0) and spent(store, student) == (4 if up < 8 else 0)
    nodes = stage_nodes(graph, "auto")
    first, last = (select(n.problems, share) for n in (nodes[0], nodes[3]))
    assert store.ledger(teacher).problems <= {p.id for p in first}
    assert store.ledger(student).problems <= {p.id for p in last}
    assert (len(first), len(last), len(select(nodes[1].problems, share))) == (up, 8 - up, up or 8)
    if not up:
        base, same = (load_file(p / "model.safetensors") for p in (mini.parent / "teacher", store.model(teacher)))
        assert all(torch.equal(base[name], same[name]) for name in base)
        assert store.outcome(teacher)["meter"] == {}
    row = found["arms"]["auto"]["seeds"]["0"]
    assert row["decision"]["share"] == share and row["decision"]["key"] == graph.decisions["auto", 0]
    assert [part["stage"] for part in row["by_stage"]] == [*found["arms"]["auto"]["stages"], "probe"]
    assert row["labels"]["revealed"] == 6 + spent(store, teacher) + spent(store, student)
    assert found["study"]["labels"]["revealed"] == sum(spent(store, key) for key in graph.stages) + 6
    assert row["cost"]["flops"] == pytest.approx(sum(part["cost"]["flops"] for part in row["by_stage"]))
    assert f"auto sends {share:g} of the labels upstream" in page.text(tmp_path / "out", "md")
    page.write(tmp_path / "out")
    kept = {item.key for item in gc.survey(store, {student}, tmp_path).items if item.kind.startswith("unused")}
    assert graph.decisions["auto", 0] not in kept and kept  # a stage needs its decision, and no evaluation
    kinds = {item.key: item.kind for item in gc.survey(store, set(), tmp_path).items if item.kind.startswith("unused")}
    assert kinds[graph.decisions["auto", 0]] == "unused stage"
    export_model(tmp_path / "out", "auto", None, tmp_path / "model", store, dtype="float32", adapter=False)
    billed = f"Labels: {row['labels']['distinct']} distinct, {row['labels']['revealed']} reveals."
    assert billed in (tmp_path / "model" / "README.md").read_text()


def test_a_dry_run_names_probes(mini: Path, tmp_path: Path):
    sets = [part for change in AUTO for part in ("--set", change)]
    shown = CliRunner().invoke(app, ["run", str(mini), "--dry-run", "--store", str(tmp_path), *sets])
    assert shown.exit_code == 0 and "evaluations and 1 probes;" in shown.output.replace("\n", " "), shown.output
    assert "evaluation probe" not in shown.output


def test_held_out_prompts_are_those_that_no_stage_sees(mini: Path):
    unlabelled = "task.fractions={train=0.5, test=0.2, tuning=0.1, unlabelled=0.2}"
    sizes = "task.sizes={train=16, test=4, tuning=4, unlabelled=8}"
    changes = [unlabelled, sizes, "probe.problems=4", "pool.labels=4"]
    assert probe_node(load_recipe(mini, changes), "bridge").held_out.split == "unlabelled"  # pyright: ignore -- there
    changes += ["pool.unlabelled=4", "arms.free={preset='bridge', prompts='unlabelled'}"]
    assert probe_node(load_recipe(mini, changes), "free").held_out.split == "tuning"  # pyright: ignore -- likewise


def test_tuning_bills_the_probe_and_keeps_overlaps_out(mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    grid = "tuning={lr=[1e-3, 1e-2], seeds=[7], problems=2, samples=2}"
    recipe = load_recipe(mini, [*AUTO, grid])
    recipe = recipe.model_copy(update={"arms": {"auto": recipe.arms["auto"]}, "comparisons": ()})
    careful = recipe.model_copy(update={"pool": Pool(labels=8, exclude_overlap=0.9)})
    assert trial_recipe(careful, "warmup", {}).pool == careful.pool
    store, score = Store(tmp_path / "store"), {"summary": {"tuning": {"mean": 0.5, "ci95": [0.4, 0.6]}}}

    def ran(trial: Recipe, *_: Any, **__: Any) -> dict[str, Any]:
        """One label of every stage of the trial, and those of its probe."""
        arms, graph = {}, plan(trial)
        for name, by_seed in graph.arms.items():
            probes = [graph.decisions[name, 7]] if (name, 7) in graph.decisions else []
            for key in (*by_seed[7], *probes):
                store.path(key).mkdir(parents=True, exist_ok=True)
                store.ledger(key).reveal(0, [f"{i}" for i in range(6 if key in probes else 1)])
            rows = [{"stage": graph.names[key], "key": key} for key in (*by_seed[7], *probes)]
            stages = [graph.names[key] for key in by_seed[7]]
            arms[name] = {"stages": stages, "seeds": {"7": {"stages": by_seed[7], "by_stage": rows}}, **score}
        return {
            "arms": arms,
            "models": {row["key"]: score for arm in arms.values() for row in arm["seeds"]["7"]["by_stage"]},
        }

    monkeypatch.setattr("headwater.study.tune.run", ran)
    found = tune(recipe, tmp_path, store)
    stages = len(list((store.root / "nodes").iterdir())) - 1
    assert found["labels"] == {"distinct": 6 + 2, "revealed": stages + 6 + 4 * 2 * 2}


def test_the_same_decision_again(mini: Path, tmp_path: Path):
    outcomes = []
    for name in ("a", "b"):
        store, graph = Store(tmp_path / name), plan(recipe := load_recipe(mini, [*AUTO, "probe.shares=[1.0, 0.25]"]))
        key = graph.decisions["auto", 0]
        node.run_node(node.Job(graph.nodes[key], recipe.execution), store)
        outcomes.append(store.outcome(key))
        assert store.ledger(key).revealed == 6
    assert outcomes[0]["result"] == outcomes[1]["result"]
    assert list(outcomes[0]["result"]["shares"]) == ["0.25", "1"]
    planned = outlook(recipe, graph, None)
    assert planned["nodes"][key]["labels"] == 6 and planned["nodes"][key]["tokens"][1] > 0
    assert against(planned, graph, store)["nodes"][key]["actual"]["tokens"] > 0


def test_probe_command(mini: Path, tmp_path: Path):
    size = ["--problems", "6", "--samples", "3", "--set", "task.sizes.tuning=6"]
    call = ["probe", str(mini), *size, "--store", str(tmp_path)]
    text = CliRunner().invoke(app, call)
    assert text.exit_code == 0, text.output
    assert "billed: 6 distinct labels" in text.output and "held out" in text.output and "mixed_groups" in text.output
    found = json.loads(CliRunner().invoke(app, [*call, "--format", "json"]).output)
    assert found["billed"] == {"distinct": 6, "revealed": 6} and set(found["c2"]) == {"pool", "held out"}
    assert set(found["models"]["student"]) >= {"pass@1", "pass@3", "mixed_groups", "reasons", "truncated", "length"}
    refused = CliRunner().invoke(app, [*call, "--arm", "direct"])
    assert refused.exit_code == 2 and "arm with a teacher" in refused.output
