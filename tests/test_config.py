"""Recipes: what is accepted, what is refused and in which words, and that a resolved recipe is the same recipe."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from pydantic import ValidationError

from headwater.config import (
    GRPO,
    PRESETS,
    SFT,
    Arm,
    Distill,
    Evaluation,
    Execution,
    Pool,
    Recipe,
    Variant,
    arm_stages,
    load_recipe,
)
from headwater.overrides import merge, override
from headwater.study.run import claim

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "recipes" / "quickstart.toml"
ROLLOUTS: dict[str, Any] = {"steps": 1, "max_new_tokens": 8, "optimizer": {"lr": 1e-3}}
GROUPS: dict[str, Any] = {**ROLLOUTS, "problems_per_step": 4}
TEACHER: dict[str, Any] = {**ROLLOUTS, "sequences_per_step": 4}
EVALUATION: dict[str, Any] = {"problems": 4, "samples": 2, "max_new_tokens": 8}
BRIDGE: dict[str, Any] = {"teacher": "raw", "bridge": "full"}


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda p: p.stem)
def test_shipped_recipes_load_and_round_trip(path: Path, tmp_path: Path):
    recipe = load_recipe(path)
    claim(recipe, tmp_path)
    assert load_recipe(tmp_path / "recipe.toml") == recipe
    assert "teacher" in recipe.models and recipe.comparisons


def test_everything_round_trips(tmp_path: Path):
    """Optional values left out, set, nested and overridden by an arm."""
    changes = [
        "stages.student_rl.sampler_weight_cap=0",
        "stages.student_rl.kl_coef=0.1",
        "stages.distill.divergence=jsd",
        "stages.distill.beta=0.25",
        "pool.unlabelled=64",
        'arms.extra={teacher="rl", bridge="full", prompts="unlabelled", overrides={distill={optimizer={lr=3e-5}}}}',
        'models.student.stop_tokens=["a", "b"]',
        'evaluations.other={task={name="chains", seed=7}, problems=8, samples=1, max_new_tokens=8, temperature=0}',
    ]
    recipe = load_recipe(QUICKSTART, changes)
    claim(recipe, tmp_path)
    again = load_recipe(tmp_path / "recipe.toml")
    assert again == recipe
    settings = again.settings("extra", "distill")
    assert isinstance(settings, Distill) and (settings.optimizer.lr, settings.beta) == (3e-5, 0.25)
    claim(again, tmp_path)
    assert load_recipe(tmp_path / "recipe.toml") == recipe


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ("pool.label=3", ["pool.label:", "did you mean 'labels'", "max_reveals", "given: 3"]),
        ("nam='x'", ["  nam:", "did you mean 'name'", "evaluations"]),
        ("stages.warmup.stepz=3", ["stages.warmup.stepz:", "did you mean 'steps'", "stored_top_k"]),
        ("stages.distill.optimizer.rl=1", ["stages.distill.optimizer.rl:", "betas, lr"]),
        ("evaluations.chains.problem=3", ["evaluations.chains.problem:", "did you mean 'problems'"]),
        ("arms.bridge.teachr=1", ["arms.bridge.teachr:", "did you mean 'teacher'"]),
        ("arms.bridge.overrides.distill.stepz=1", ["arm 'bridge'", "'distill'", "stepz", "did you mean 'steps'"]),
        ("stages.warmup.steps=many", ["stages.warmup.steps", "integer", "'many'"]),
        ("stages.warmup.steps=0", ["stages.warmup.steps", "greater than or equal to 1", "given: 0"]),
        ("stages.warmup.optimizer.lr=inf", ["stages.warmup.optimizer.lr", "finite", "inf"]),
        ("pool=3", ["  pool:", "given: 3"]),
        ("comparisons=[{a='bridge'}]", ["comparisons.0.b", "required"]),
        ("stages.teacher_rl.method=grppo", ["stages.teacher_rl", "'grppo'", "'distill'"]),
        ("stages.sft.steps=1", ["stages.sft: 'method' is missing"]),
        ("stages.teacher_rl.method=warmup", ["stages.teacher_rl"]),
        ("models.pupil.source=x", ["no arm uses [models.pupil]"]),
        ("pool.budgets=[64, 32]", ["pool", "[64, 32]", "ascending"]),
        ("pool.budgets=[32, 64]", ["pool", "last of budgets", "128"]),
        ("arms.x={preset='bridges'}", ["arms.x", "'bridges'", "raw-grpo"]),
        ("tuning={lr=[1e-4, 1e-3], seeds=[9], problems=9, samples=1}", ["[stages.warmup] has lr = 0.0003", "one grid"]),
        ("tuning={lr=[1e-4, 3e-4], seeds=[4, 5], problems=9, samples=1}", ["[4]", "tune on other seeds"]),
        ("execution.executor=slurm", ["execution.executor", "'slurm'", "'inline' or 'local:N'"]),
        ("execution.executor=local:0", ["'local:0'", "N >= 1"]),
        ("seeds=[1, 1]", ["[1, 1]", "distinct"]),
        ("seeds=[]", ["seeds", "at least 1"]),
        ("name=a/b", ["name", "'a/b'"]),
        ("arms.a/b={teacher='none', finish='full'}", ["a/b"]),
    ],
)
def test_refusals_name_the_key_the_value_and_the_choice(change: str, parts: list[str]):
    with pytest.raises(ValueError) as error:
        load_recipe(QUICKSTART, [change])
    message = str(error.value)
    assert message.startswith(str(QUICKSTART))
    for part in parts:
        assert part in message
    assert "pydantic" not in message and "For further information" not in message


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ("arms.lone={teacher='rl', bridge='sft'}", r"arm 'lone' needs \[stages.sft\]"),
        ("arms.direct.overrides.warmup.steps=3", "overrides 'warmup', which it does not run: it runs"),
        ("arms.direct.bridge=full", "a teacher if and only if it has a bridge"),
        ("arms.x={preset='opd-long', overrides={distill={steps=3}}}", "set the steps of distill"),
        ("arms.direct={preset='direct-matched', overrides={student_rl={steps=3}}}", "set the steps of student_rl"),
        ("arms.direct.overrides.student_rl.optimizer.lr=7e-4", r"arm 'direct': \[stages.student_rl\] has lr = 0.0007"),
        ("tuning.split=test", "'test' is trained or evaluated on"),
        ("tuning.split=train", "'train' is trained or evaluated on"),
        ("arms.direct.teacher_model=student", "no effect in an arm without a teacher"),
        ("arms.bridge.teacher_model=larger", r"needs \[models.larger\]"),
        ("arms.bridge.updates=bridge", "bridges of one stage; 'full' is not one"),
        ("arms.bridge.match_flops=direct", "match_flops is for direct GRPO"),
        ("arms.direct.match_flops=brigde", "must name an arm"),
        ("arms.direct={preset='direct-matched', match_flops='direct'}", "not a matched one"),
        ("arms.bridge.overrides.distill.divergence=constant", "is for bridge = 'no-teacher'"),
        ("arms.direct.finish=none", "direct GRPO: finish = 'full'"),
        ("arms.direct.split=true", "split and prompts are about a bridge"),
        ("arms.direct.prompts=unlabelled", "split and prompts are about a bridge"),
        ("arms.bridge.prompts=unlabelled", "set pool.unlabelled"),
        ("pool.unlabelled=8", "no arm has prompts = 'unlabelled'"),
        ("arms.bridge.finish=sometimes", "'none', 'fresh', 'replay' or 'full'"),
        ("comparisons=[{a='bridge', b='direkt'}]", r"'direkt'; use an arm of \['bridge', 'direct'\]"),
        ("comparisons=[{a='bridge/sft', b='direct'}]", "'bridge/sft'"),
        ("comparisons=[{a='bridge', b='bridge'}]", "with itself"),
        ('stages.sft={method="sft", steps=1, max_new_tokens=1, sequences_per_step=1, optimizer={lr=1}}', "no arm uses"),
    ],
)
def test_arms_and_axes(change: str, part: str):
    with pytest.raises(ValueError, match=part):
        load_recipe(QUICKSTART, [change])


def test_a_filter_needs_answers_that_unlabelled_prompts_lack():
    changes = ["pool.unlabelled=64", "arms.bridge.prompts=unlabelled"]
    load_recipe(QUICKSTART, changes)
    with pytest.raises(ValueError, match="'unlabelled', but 'keep'"):
        load_recipe(QUICKSTART, [*changes, "arms.bridge.overrides.warmup.keep=correct"])


def test_halves_need_two_labels_and_arms_need_their_teacher():
    raw = tomllib.loads(QUICKSTART.read_text())
    halves = merge(raw, {"pool": {"labels": 1}, "arms": {"bridge": {"finish": "fresh"}}})
    with pytest.raises(ValidationError, match=r"pool\.labels must be at least 2"):
        Recipe.model_validate(halves)
    alone = {**raw, "models": {"student": raw["models"]["student"]}}
    with pytest.raises(ValidationError, match=r"arm 'bridge' needs \[models.teacher\]"):
        Recipe.model_validate(alone)
    direct = {**alone, "arms": {"direct": raw["arms"]["direct"]}, "stages": {"student_rl": raw["stages"]["student_rl"]}}
    with pytest.raises(ValidationError, match="'base teacher'"):
        Recipe.model_validate({**direct, "comparisons": [{"a": "direct", "b": "base teacher"}]})
    assert Recipe.model_validate({**direct, "comparisons": [{"a": "direct", "b": "base student"}]})


@pytest.mark.parametrize("change", [{"top_p": 0.9}, {"top_k": 50}])
@pytest.mark.parametrize(("method", "settings"), [(GRPO, GROUPS), (Distill, GROUPS), (SFT, TEACHER)])
def test_truncated_sampling_is_refused_in_training(method: Any, settings: dict[str, Any], change: dict[str, Any]):
    method.model_validate(settings)
    with pytest.raises(ValidationError, match=r"top_[pk] = .*log-probs would be those of another distribution"):
        method.model_validate({**settings, **change})


@pytest.mark.parametrize(
    ("model", "settings", "part"),
    [
        (GRPO, {**GROUPS, "overlong_buffer": 4}, "overlong_buffer is for overlong = 'penalty'"),
        (GRPO, {**GROUPS, "overlong": "penalty"}, "which needs it > 0"),
        (GRPO, {**GROUPS, "overlong": "penalty", "overlong_buffer": 9}, "9 exceeds max_new_tokens 8"),
        (GRPO, {**GROUPS, "kl_estimator": "k3"}, "no effect with kl_coef = 0"),
        (GRPO, {**GROUPS, "updates_per_batch": 5}, "5 exceeds problems_per_step 4"),
        (GRPO, {**GROUPS, "group_size": 1}, "greater than or equal to 2"),
        (Distill, {**GROUPS, "beta": 0.5}, "beta is for divergence = 'jsd'"),
        (Distill, {**GROUPS, "divergence": "jsd"}, "which needs it"),
        (SFT, {**TEACHER, "tokens": "solutions", "keep": "correct"}, "'keep'"),
        (SFT, {**TEACHER, "tokens": "solutions", "rollouts_per_problem": 4}, "'rollouts_per_problem'"),
        (SFT, {**TEACHER, "tokens": "solutions", "temperature": 0.5}, "'temperature'"),
        (Evaluation, {**EVALUATION, "temperature": 0}, "2 equal samples"),
        (Evaluation, {**EVALUATION, "temperature": 0, "samples": 1, "top_k": 5}, "no effect at temperature = 0"),
    ],
)
def test_settings_without_effect_are_refused(model: Any, settings: dict[str, Any], part: str):
    with pytest.raises(ValidationError, match=part):
        model.model_validate(settings)


def test_values_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        Pool(labels=3).labels = 4  # pyright: ignore -- what is refused


@pytest.mark.parametrize(
    ("arm", "stages", "halves"),
    [
        ({"teacher": "none", "finish": "full"}, ["student_rl"], False),
        ({"teacher": "rl", "bridge": "opd"}, ["teacher_rl", "distill"], False),
        ({"teacher": "given", "bridge": "warmup"}, ["warmup"], False),
        ({**BRIDGE, "split": True}, ["warmup", "distill"], True),
        ({**BRIDGE, "finish": "fresh"}, ["warmup", "distill", "student_rl"], True),
        ({**BRIDGE, "teacher": "rl", "finish": "replay"}, ["teacher_rl", "warmup", "distill", "student_rl"], True),
        ({**BRIDGE, "bridge": "sft", "finish": "full"}, ["sft", "student_rl"], False),
    ],
)
def test_stages_of_arms(arm: dict[str, Any], stages: list[str], halves: bool):
    point = Arm.model_validate(arm)
    assert (arm_stages(point), point.share == 0.5) == (stages, halves)


def test_an_arm_overrides_leaves_and_keeps_the_rest():
    changes = ["arms.bridge.overrides.distill.optimizer.schedule=cosine", "arms.bridge.overrides.distill.steps=7"]
    recipe = load_recipe(QUICKSTART, changes)
    base, own = recipe.stages["distill"], recipe.settings("bridge", "distill")
    assert isinstance(own, Distill)
    assert (own.steps, own.optimizer.schedule, own.optimizer.lr) == (7, "cosine", base.optimizer.lr)
    assert recipe.settings("bridge", "warmup") == recipe.stages["warmup"]


def test_override_syntax():
    raw = {"a": {"b": 1, "c": 2}}
    assert override(raw, "a.b=3") == {"a": {"b": 3, "c": 2}} and raw["a"]["b"] == 1
    assert override(raw, " a.d = [1, 2]") == {"a": {"b": 1, "c": 2, "d": [1, 2]}}
    assert override(raw, "x.y.z='1=2'") == {**raw, "x": {"y": {"z": "1=2"}}}
    assert override(raw, "s=world:student") == {**raw, "s": "world:student"}
    for bad in ("a", "=3", "a..b=3", "a.=3"):
        with pytest.raises(ValueError, match="write key=value, for example"):
            override(raw, bad)


def test_files_that_are_no_recipes(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no recipe at .*quick.toml; there are \['.*quickstart.toml'"):
        load_recipe(QUICKSTART.with_name("quick.toml"))
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        load_recipe(tmp_path)
    (tmp_path / "bad.toml").write_text("a = [1,\nb = ")
    with pytest.raises(ValueError, match=r"bad.toml is not valid TOML: .*line 2"):
        load_recipe(tmp_path / "bad.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not valid TOML"):
        load_recipe(tmp_path / "binary.toml")


def test_execution_defaults_are_written_out(tmp_path: Path):
    claim(load_recipe(QUICKSTART), tmp_path)
    written = tomllib.loads((tmp_path / "recipe.toml").read_text())
    assert written["execution"]["chunk_tokens"] == Execution().chunk_tokens
    assert written["stages"]["teacher_rl"]["clip_high"] == 0.2
    assert tomli_w.dumps(written) == (tmp_path / "recipe.toml").read_text()


def test_every_preset_is_an_arm_and_its_own_keys_win():
    for name in PRESETS:
        arm = Arm.model_validate({"preset": name})
        assert arm_stages(arm)[-1] in ("distill", "warmup", "sft", "joint", "student_rl"), name
        assert Arm.model_validate(arm.model_dump()) == arm, "the resolved axes alone say the same"
    assert Arm.model_validate({"preset": "bridge", "finish": "fresh"}) == Arm.model_validate({"preset": "fresh"})
    wrong = Arm.model_validate({"preset": "warmup-wrong", "overrides": {"warmup": {"rollouts_per_problem": 24}}})
    assert wrong.overrides == {"warmup": {"keep": "wrong", "rollouts_per_problem": 24}}
    raw, rl = (Arm.model_validate({"preset": name}) for name in ("raw-grpo", "bridge-grpo"))
    assert arm_stages(raw) == ["warmup", "distill", "student_rl"] and arm_stages(rl) == ["teacher_rl", *arm_stages(raw)]


def test_a_bridge_of_one_stage_can_have_the_updates_of_both():
    recipe = load_recipe(QUICKSTART, ["arms.long={preset='opd-long'}", "arms.short={preset='opd'}"])
    assert recipe.settings("short", "distill").steps == 30
    assert recipe.settings("long", "distill").steps == 60
    assert recipe.settings("long", "teacher_rl") == recipe.settings("short", "teacher_rl")


def test_the_control_without_a_teacher_has_a_constant_advantage():
    recipe = load_recipe(QUICKSTART, ["arms.alone={preset='no-teacher'}"])
    settings = recipe.settings("alone", "distill")
    assert isinstance(settings, Distill) and settings.divergence == "constant"
    assert recipe.settings("bridge", "distill") == recipe.stages["distill"]


def test_budgets_make_an_arm_and_a_comparison_at_each():
    recipe = load_recipe(QUICKSTART, ["pool.budgets=[32, 128]"])
    assert list(recipe.variants) == ["direct@32", "direct@128", "bridge@32", "bridge@128"]
    assert recipe.variants["bridge@32"] == Variant(arm="bridge", labels=32)
    pairs = [(pair.a, pair.b) for pair in recipe.pairs]
    assert pairs[:2] == [("bridge@32", "direct@32"), ("bridge@128", "direct@128")]
    assert ("bridge@32/teacher_rl", "base teacher") in pairs and len(pairs) == 6
    fixed = load_recipe(QUICKSTART, ["pool.budgets=[32, 128]", "comparisons=[{a='bridge@32', b='direct@128'}]"])
    assert [(pair.a, pair.b) for pair in fixed.pairs] == [("bridge@32", "direct@128")]
    assert not load_recipe(QUICKSTART).pool.budgets
