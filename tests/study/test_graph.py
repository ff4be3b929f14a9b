"""Arms to nodes: keys, sharing, label pools, and everything refused before a model is loaded."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from headwater import spec
from headwater.config import Recipe, load_recipe
from headwater.spec import EvaluationSpec, Problems, StageSpec
from headwater.stages.node import select
from headwater.study.graph import Graph, most_reveals, plan
from headwater.tasks import load_task
from headwater.tasks.pool import draw_pool, half, pool_digest
from headwater.types import Message, Problem


def planned(mini: Path, *changes: str) -> tuple[Recipe, Graph]:
    recipe = load_recipe(mini, changes)
    return recipe, plan(recipe)


def stages(graph: Graph, arm: str, seed: int = 0) -> list[StageSpec]:
    found = [graph.nodes[key] for key in graph.arms[arm][seed]]
    assert all(isinstance(node, StageSpec) for node in found)
    return found  # pyright: ignore[reportReturnType]


def ids(problems: Problems) -> list[str]:
    return [p.id for p in select(problems)]


def test_keys_are_the_same_in_another_process(mini: Path):
    code = "import sys; from pathlib import Path; from headwater.config import load_recipe\n"
    code += "from headwater.study.graph import plan; print(*plan(load_recipe(Path(sys.argv[1]))).nodes)"
    command = [sys.executable, "-c", code, str(mini)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"})
    assert done.stdout.split() == list(planned(mini)[1].nodes)


def test_key_is_the_hash_of_the_specification(mini: Path):
    _, graph = planned(mini)
    for key, node in graph.nodes.items():
        assert spec.key(node) == key == spec.key(spec.parse(node.model_dump_json()))
    assert len(set(graph.nodes)) == len(graph.nodes)


@pytest.mark.parametrize(
    "change",
    [
        "execution.threads=2",
        "execution.executor=local:3",
        "execution.micro_batch_tokens=64",
        "execution.chunk_tokens=8",
        "execution.sampler_tokens=512",
        "execution.save_every=7",
        "execution.eval_every=1",
        "execution.grader_workers=2",
        "execution.device=cuda",
        "note='other words'",
        "name=renamed",
        "comparisons=[]",
    ],
)
def test_how_the_work_is_done_is_no_part_of_a_key(mini: Path, change: str):
    assert list(planned(mini, change)[1].nodes) == list(planned(mini)[1].nodes)


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        # Stages of arm "finished" (teacher_rl, warmup, distill, student_rl) whose keys must change: the one that is
        # touched and all that come after it.
        ("stages.teacher_rl.clip_high=0.3", [1, 1, 1, 1]),
        ("stages.warmup.optimizer.lr=0.02", [0, 1, 1, 1]),
        ("stages.distill.divergence=forward_kl", [0, 0, 1, 1]),
        ("stages.student_rl.steps=3", [0, 0, 0, 1]),
        ("models.teacher.thinking=true", [1, 1, 1, 1]),
        ("models.teacher.dtype=bfloat16", [1, 1, 1, 1]),
        ("models.student.system=Think", [0, 1, 1, 1]),
        ("seeds=[1]", [1, 1, 1, 1]),
        ("pool.labels=9", [1, 1, 1, 1]),
        ("arms.finished.finish=replay", [1, 1, 1, 1]),
        ("arms.finished.overrides.student_rl.clip_low=0.1", [0, 0, 0, 1]),
        ("evaluations.rows.samples=3", [0, 0, 0, 0]),
    ],
)
def test_what_decides_the_weights_decides_the_key(mini: Path, change: str, changed: list[int]):
    before, (recipe, graph) = planned(mini)[1], planned(mini, change)
    after = graph.arms["finished"][recipe.seeds[0]]
    assert [int(a != b) for a, b in zip(before.arms["finished"][0], after, strict=True)] == changed


def test_changed_files_are_other_models_data_and_graders(tmp_path: Path):
    import miniature

    path = miniature.write(tmp_path)
    before = planned(path)[1]

    def changed() -> list[int]:
        after = planned(path)[1].arms["finished"][0]
        return [int(a != b) for a, b in zip(before.arms["finished"][0], after, strict=True)]

    def edit(name: str, old: str, new: str) -> None:
        text = (tmp_path / name).read_text()
        assert old in text
        (tmp_path / name).write_text(text.replace(old, new))

    edit("student/config.json", "{", "{ ")
    assert changed() == [0, 1, 1, 1]
    edit("student/config.json", "{ ", "{")
    assert changed() == [0, 0, 0, 0]
    edit("grader.py", "> 0.3", "> 0.4")
    assert changed() == [1, 1, 1, 1]
    edit("grader.py", "> 0.4", "> 0.3")
    answered = ids(stages(planned(path)[1], "finished")[0].problems)
    assert answered
    edit("rows.jsonl", '"answer": "', '"answer": "0')  # the same prompts: only what sees answers changes
    after = planned(path)[1]
    assert ids(stages(after, "finished")[0].problems) == answered
    assert stages(after, "finished")[1].problems == stages(before, "finished")[1].problems
    assert stages(after, "finished")[0].problems.digest != stages(before, "finished")[0].problems.digest


def test_a_revision_makes_another_key(mini: Path):
    node = stages(planned(mini)[1], "direct")[0]
    assert spec.key(node.model_copy(update={"revision": node.revision + 1})) != spec.key(node)


def test_shared_stages_appear_once(mini: Path):
    changes = [
        "arms.fresh={teacher='rl', bridge='full', finish='fresh'}",
        "arms.replay={teacher='rl', bridge='full', finish='replay'}",
        "arms.half={teacher='rl', bridge='full', split=true}",
        "arms.raw={teacher='raw', bridge='full'}",
        "arms.given={teacher='given', bridge='full'}",
    ]
    _, graph = planned(mini, *changes)
    chain = {name: seeds[0] for name, seeds in graph.arms.items()}
    assert chain["finished"][:3] == chain["bridge"]
    assert chain["fresh"][:3] == chain["replay"][:3] == chain["half"]
    assert chain["fresh"][3] != chain["replay"][3]
    assert not set(chain["half"]) & set(chain["bridge"])
    assert chain["raw"] == chain["given"] and not set(chain["raw"]) & set(chain["bridge"])
    # direct 1, bridge 3, finished +1, half 3, fresh +1, replay +1, raw 2
    assert len(graph.stages) == 12 and graph.requested == 1 + 3 + 4 + 4 + 4 + 3 + 2 + 2
    assert list(graph.teachers) == [chain["bridge"][0], chain["half"][0]]


def test_parents_come_first(mini: Path):
    _, graph = planned(mini, "seeds=[3, 1]")
    order = list(graph.nodes)
    for place, node in enumerate(graph.nodes.values()):
        assert all(order.index(parent) < place for parent in spec.parents(node))
    student_rl = stages(graph, "finished", 3)[3]
    assert spec.parents(student_rl) == [graph.arms["finished"][3][2]]
    warmup = stages(graph, "finished", 3)[1]
    assert spec.parents(warmup) == [graph.arms["finished"][3][0]]


def test_every_model_is_evaluated_for_every_seed(mini: Path):
    _, graph = planned(mini, "seeds=[0, 1]")
    evaluations = [node for node in graph.nodes.values() if isinstance(node, EvaluationSpec)]
    assert len(evaluations) == 2 * (2 + 5)
    assert {node.start.stage for node in evaluations} == {None, *graph.stages}
    assert len({node.problems.digest for node in evaluations}) == 1
    assert all(isinstance(graph.nodes[key], EvaluationSpec) for key in graph.evals.values())


def test_budgets_are_nested_and_share_what_no_label_decides():
    quickstart = Path(__file__).resolve().parents[2] / "recipes" / "quickstart.toml"
    changes = ["pool.budgets=[16, 128]", "pool.unlabelled=64", "arms.raw={preset='raw', prompts='unlabelled'}"]
    recipe = load_recipe(quickstart, [*changes, "seeds=[0]"])
    graph = plan(recipe)
    small, large = (stages(graph, f"bridge@{n}")[0].problems for n in (16, 128))
    assert ids(small) == ids(large)[:16] and len(ids(large)) == 128
    assert graph.arms["raw@16"] == graph.arms["raw@128"], "the unlabelled prompts are the same at every budget"
    assert graph.arms["bridge@16"][0] != graph.arms["bridge@128"][0]
    assert list(graph.arms) == list(recipe.variants)
    with pytest.raises(ValueError, match="arm 'direct@8'"):
        plan(load_recipe(quickstart, ["pool.budgets=[8, 128]"]))
