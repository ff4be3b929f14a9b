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
from headwater.config import Recipe, load_recipe
from headwater.report import page
from headwater.spec import DecisionSpec, StageSpec
from headwater.stages import node
from headwater.stages.node import select
from headwater.store import Store
from headwater.study import gc
from headwater.study.budget import most_reveals
from headwater.study.graph import Graph, plan
from headwater.study.outlook import against, outlook
from headwater.study.run import run

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
    store, recipe = Store(tmp_path / "store"), load_recipe(mini, AUTO)
    recipe = recipe.model_copy(update={"arms": {"auto": recipe.arms["auto"]}, "comparisons": ()})
    found = run(recipe, tmp_path / "out", store)
    graph = plan(recipe)
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


def test_the_same_decision_again(mini: Path, tmp_path: Path):
    outcomes = []
    for name in ("a", "b"):
        store, graph = Store(tmp_path / name), plan(recipe := load_recipe(mini, AUTO))
        key = graph.decisions["auto", 0]
        node.run_node(node.Job(graph.nodes[key], recipe.execution), store)
        outcomes.append(store.outcome(key))
        assert store.ledger(key).revealed == 6
    assert outcomes[0]["result"] == outcomes[1]["result"]
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
