"""Arms to nodes: keys, sharing, label pools, and everything refused before a model is loaded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from headwater import spec
from headwater.config import Recipe, load_recipe
from headwater.spec import EvaluationSpec, Problems, StageSpec
from headwater.stages.node import select
from headwater.study.budget import most_reveals
from headwater.study.graph import Graph, plan
from headwater.tasks import load_task
from headwater.tasks.pool import draw_pool, part_of, pool_digest
from headwater.types import Message, Problem


def planned(mini: Path, *changes: str) -> tuple[Recipe, Graph]:
    recipe = load_recipe(mini, changes)
    return recipe, plan(recipe)


def stages(graph: Graph, arm: str, seed: int = 0) -> list[StageSpec]:
    found = [graph.nodes[key] for key in graph.arms[arm][seed]]
    assert all(isinstance(node, StageSpec) for node in found)
    return found  # pyright: ignore -- asserted above


def ids(problems: Problems) -> list[str]:
    return [p.id for p in select(problems)]


def test_keys_are_the_same_in_another_process(mini: Path):
    code = "import sys; from pathlib import Path; from headwater.config import load_recipe\n"
    code += "from headwater.study.graph import plan; print(*plan(load_recipe(Path(sys.argv[1]))).nodes)"
    command = [sys.executable, "-c", code, str(mini)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": "7"}
    )
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


def test_budgets_are_nested_and_differ_between_seeds(mini: Path):
    draws = {}
    for seed in (0, 1):
        for labels in (8, 16, 32):
            _, graph = planned(mini, f"pool.labels={labels}", f"seeds=[{seed}]")
            draws[seed, labels] = ids(stages(graph, "direct", seed)[0].problems)
            assert len(set(draws[seed, labels])) == labels
        assert draws[seed, 8] == draws[seed, 16][:8] and draws[seed, 16] == draws[seed, 32][:16]
    assert set(draws[0, 16]) != set(draws[1, 16])


def test_pools_of_the_embedded_task_are_nested():
    problems = load_task({"name": "chains"}).problems("train")
    small, large = (draw_pool(problems, count, 5) for count in (64, 128))
    assert large[:64] == small and len({p.id for p in large}) == 128
    assert small != draw_pool(problems, 64, 6)
    assert draw_pool(problems, 64, None) == list(problems[:64])


@pytest.mark.parametrize("labels", [8, 9])
def test_halves_are_disjoint_and_the_finish_gets_its_own(mini: Path, labels: int):
    changes = [f"arms.{f}={{teacher='rl', bridge='full', finish='{f}'}}" for f in ("fresh", "replay", "full")]
    _, graph = planned(mini, f"pool.labels={labels}", *changes)
    pool = ids(stages(graph, "direct")[0].problems)
    fresh, replay, full = ([ids(s.problems) for s in stages(graph, name)] for name in ("fresh", "replay", "full"))
    assert fresh[0] == fresh[1] == fresh[2] == pool[: labels // 2]
    assert fresh[3] == pool[labels // 2 :] and not set(fresh[3]) & set(fresh[0])
    assert replay[3] == replay[0] == fresh[0]
    assert full == [pool] * 4


def test_halves_of_any_pool():
    for count in range(2, 7):
        pool = [Problem((Message("user", str(i)),)) for i in range(count)]
        first, second = part_of(pool, "first"), part_of(pool, "second")
        assert first + second == pool == part_of(pool, "all") and 0 <= len(second) - len(first) <= 1


def test_dense_stages_see_no_answers(mini: Path):
    _, graph = planned(mini)
    for stage, sparse in zip(stages(graph, "finished"), (True, False, False, True), strict=True):
        problems = select(stage.problems)
        assert stage.problems.labelled == sparse == (stage.grader is not None) == (stage.grader_digest is not None)
        assert all((p.answer is not None) == sparse for p in problems)
        assert all(bool(p.columns) == sparse for p in problems)
        assert (stage.teacher is None) == sparse


def test_filters_are_labelled_and_worked_solutions_have_no_teacher(mini: Path):
    sft = "stages.sft={method='sft', steps=2, sequences_per_step=4, max_new_tokens=6, optimizer={lr=0.01}}"
    arms = "arms.sft={teacher='rl', bridge='sft'}"
    plain = stages(planned(mini, sft, arms)[1], "sft")[1]
    filtered = stages(planned(mini, sft, arms, "stages.sft.keep=correct")[1], "sft")[1]
    (solutions,) = stages(planned(mini, sft, arms, "stages.sft.tokens=solutions", "arms.sft.teacher=raw")[1], "sft")
    with pytest.raises(ValueError, match="arm 'sft' trains a teacher that tokens = 'solutions' never asks"):
        planned(mini, sft, arms, "stages.sft.tokens=solutions")
    assert (plain.problems.labelled, plain.grader) == (False, None) and plain.teacher is not None
    assert filtered.problems.labelled and filtered.grader is not None and filtered.teacher is not None
    assert solutions.problems.labelled and solutions.teacher is None


def test_unlabelled_prompts_are_those_of_another_split(tmp_path: Path):
    path = tmp_path / "recipe.toml"
    root = Path(__file__).resolve().parents[2]
    path.write_text((root / "recipes" / "quickstart.toml").read_text())
    changes = ["pool.unlabelled=32", "arms.more={teacher='raw', bridge='full', prompts='unlabelled'}"]
    graph = plan(load_recipe(path, [*changes, "seeds=[0]"]), offline=True)
    warmup, distill = stages(graph, "more")
    unlabelled = {p.id for p in load_task({"name": "chains"}).problems("unlabelled")}
    assert ids(warmup.problems) == ids(distill.problems) and set(ids(warmup.problems)) <= unlabelled
    assert len(ids(warmup.problems)) == 32 and not warmup.problems.labelled
    assert not unlabelled & set(ids(stages(graph, "direct")[0].problems))


def test_digests_of_pools_see_prompts_order_and_answers(mini: Path):
    problems = load_task({"name": "chains"}).problems("train")[:4]
    bare = [p.unlabelled() for p in problems]
    digests = {
        pool_digest(problems, labelled=True),
        pool_digest(problems[::-1], labelled=True),
        pool_digest(problems[:3], labelled=True),
        pool_digest(bare, labelled=True),
        pool_digest(bare, labelled=False),
    }
    assert len(digests) == 5 and pool_digest(bare, labelled=False) == pool_digest(problems, labelled=False)


def test_data_that_changed_after_planning_are_refused(tmp_path: Path):
    import miniature

    path = miniature.write(tmp_path)
    problems = stages(planned(path)[1], "direct")[0].problems
    rows = tmp_path / "rows.jsonl"
    rows.write_text(rows.read_text().replace('"answer": "', '"answer": "1'))
    with pytest.raises(ValueError, match="data of task 'jsonl' changed since the study was planned"):
        select(problems)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ("pool.max_reveals=3", r"arm 'direct' would reveal up to 4 answers a seed, over pool.max_reveals = 3: lower"),
        ("pool.max_reveals=7", r"arm 'finished' would reveal up to 8 answers"),
        ("pool.labels=41", "41 problems asked for, but the split has 40: lower the number or add data"),
        ("pool.labels=1", r"arm 'direct': \[stages.student_rl\] takes 2 problems a step, .* has 1: lower"),
        ("evaluations.rows.problems=9", "9 problems asked for, but the split has 8"),
        ("evaluations.rows.split=exam", "no split 'exam'; choose one of"),
        ("evaluations.rows.split=train", r"4 of 40 training prompts are also test prompts, for example"),
        ("task.answer_column=solution", r"row 1 of .*rows.jsonl has no column \['solution'\]; it has \['answer'"),
        ("task.source=nowhere.jsonl", "'nowhere.jsonl' does not exist"),
        ("task.nme=x", r"jsonl has no \['nme'\]; it takes"),
        ("task.name=jason", "no task is called 'jason'; use"),
        ("task.grader=nowhere.py:grade", "grader 'nowhere.py:grade' is in a file that does not exist"),
        ("models.student.source=world:pupil", "world:pupil is not shipped; available:"),
        ("models.student.source=file:/nowhere", "'/nowhere' does not exist"),
    ],
)
def test_refused_before_a_model_is_loaded(mini: Path, change: str, part: str):
    with pytest.raises(ValueError, match=part):
        planned(mini, change)


def test_a_half_that_is_too_small_is_refused(mini: Path):
    arm = "arms.half={teacher='rl', bridge='full', split=true}"
    planned(mini, arm, "pool.labels=4")
    with pytest.raises(ValueError, match=r"arm 'half': \[stages.teacher_rl\] takes 2 problems a step, .* has 1"):
        planned(mini, arm, "pool.labels=3")


def test_most_reveals_by_hand(mini: Path):
    def bound(arm: str, *changes: str) -> int | None:
        return most_reveals(load_recipe(mini, changes), arm)

    assert bound("direct") == 2 * 2 and bound("bridge") == 4 and bound("finished") == 8
    assert bound("direct", "stages.student_rl.redraws=2") == 2 * 2 * 3
    assert bound("bridge", "stages.warmup.keep=correct") == 4 + 8
    assert bound("bridge", "arms.bridge.overrides.teacher_rl.steps=5") == 10
    assert bound("direct", "arms.direct.match_flops=bridge") is None
    with pytest.raises(ValueError, match="an unknown number of answers"):
        plan(load_recipe(mini, ["arms.direct.match_flops=bridge", "pool.max_reveals=100"]))


def test_planning_reads_no_weights(mini: Path):
    code = "import sys; from pathlib import Path; from headwater.config import load_recipe\n"
    code += "from headwater.study.graph import plan; plan(load_recipe(Path(sys.argv[1])))\n"
    code += "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code, str(mini)], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.replace("'", '"')) == []


def test_offline_plans_tolerate_what_is_out_of_reach(mini: Path):
    recipe = load_recipe(mini, ["models.teacher.source=file:/nowhere", "models.student.source=hf:owner/name"])
    graph = plan(recipe, offline=True)
    assert len(graph.stages) == 5
    with pytest.raises(ValueError, match="'/nowhere' does not exist"):
        plan(recipe)


def test_a_matched_arm_waits_for_what_it_is_matched_to(mini: Path):
    _, graph = planned(mini, "arms.more={preset='direct-matched'}", "seeds=[0, 1]")
    for seed in (0, 1):
        (matched,) = stages(graph, "more", seed)
        assert list(matched.match) == graph.arms["bridge"][seed] == spec.parents(matched)
        (direct,) = stages(graph, "direct", seed)
        assert not direct.match and direct.settings.steps == 2 < matched.settings.steps
    assert list(graph.arms)[-1] == "more"


def test_the_same_size_teacher_is_the_direct_student(mini: Path):
    """One training serves both: the control costs its dense stages alone."""
    _, graph = planned(mini, "arms.small={preset='same-size'}")
    teacher_rl, warmup, distill = graph.arms["small"][0]
    assert [teacher_rl] == graph.arms["direct"][0] and teacher_rl in graph.teachers
    small = stages(graph, "small")
    assert small[1].teacher == small[1].start.model_copy(update={"stage": teacher_rl})
    assert small[1].start.stage is None and small[2].start.stage == warmup != distill


def test_an_sft_teacher_learns_from_solutions_and_pays_for_them(mini: Path):
    sft = "method='sft', tokens='solutions', steps=2, sequences_per_step=2, max_new_tokens=6, optimizer={lr=1e-2}"
    changes = ["arms.taught={preset='sft-teacher-replay'}", f"stages.teacher_sft={{{sft}}}"]
    recipe, graph = planned(mini, *changes)
    teacher_sft, warmup, distill, student_rl = stages(graph, "taught")
    assert (teacher_sft.start.config, teacher_sft.teacher) == (recipe.models["teacher"], None)
    assert teacher_sft.problems.labelled and teacher_sft.problems.part == "first"
    assert not warmup.problems.labelled and warmup.teacher is not None and distill.teacher == warmup.teacher
    assert warmup.teacher.stage == graph.arms["taught"][0][0] and student_rl.problems.part == "first"
    assert most_reveals(recipe, "taught") == 2 * 2 + 2 * 2
    with pytest.raises(ValueError, match="set tokens = 'solutions'"):
        planned(mini, *changes, "stages.teacher_sft.tokens=teacher")


def test_joint_rewards_and_teaches(mini: Path):
    settings = "method='joint', reward_weight=0.5, steps=2, problems_per_step=2, group_size=2, max_new_tokens=6"
    changes = ["arms.both={preset='joint'}", f"stages.joint={{{settings}, optimizer={{lr=1e-2}}}}"]
    _, graph = planned(mini, *changes)
    both = stages(graph, "both")[-1]
    assert both.problems.labelled and both.grader and both.teacher == stages(graph, "both")[1].teacher
    with pytest.raises(ValueError, match="joint need answers"):
        planned(mini, *changes, "arms.both.prompts=unlabelled", "pool.unlabelled=4")


def test_pools_over_budgets_are_nested_and_share_what_no_label_decides():
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
