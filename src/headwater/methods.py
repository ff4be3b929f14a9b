"""Settings of models and methods as frozen, checked values; unknown keys fail, and no field is without effect."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Frozen(BaseModel):
    """Values only: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelConfig(Frozen):
    """Where a model comes from and how it is prompted."""

    source: str
    """`hf:`, `file:`, `wheel:` or `world:` (see `headwater.assets`)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type. Trained weights keep float32 masters whatever this says."""
    template: str = "chat"
    """`chat`: the tokenizer's chat template; `none`: contents of the messages joined by newlines; `PATH.jinja`: a file
    with a chat template, whose content is part of the model's key."""
    system: str | None = None
    """System message put before every prompt that has none; "" empties the one that the template itself puts in."""
    thinking: bool = False
    """Off, a template that thinks gets the empty thought; on, the template must know `enable_thinking`."""
    stop_tokens: tuple[str, ...] = ()
    """Tokens that end a completion besides the tokenizer's and the generation config's own."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion. Its text stops before the first one; its tokens go on to the one that completes
    it."""

    @model_validator(mode="after")
    def _prompting(self) -> ModelConfig:
        if self.template not in ("chat", "none") and not self.template.endswith(".jinja"):
            raise ValueError(f"template = {self.template!r}: use 'chat', 'none' or the path of a .jinja file")
        if not all(self.stop):
            raise ValueError("stop holds an empty text, which would end every completion: remove it")
        return self


class Optimizer(Frozen):
    """AdamW with a schedule over the stage's steps."""

    lr: float = Field(gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = Field(default=1.0, gt=0)


class LoRA(Frozen):
    """Low-rank adapters (arXiv:2106.09685): a frozen W is run as W + alpha / rank B A, and A and B are trained."""

    rank: int = Field(default=16, ge=1)
    alpha: int = Field(default=32, ge=1)
    targets: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = "all-linear"
    """Names of linear layers, such as `q_proj`; `all-linear` is every one but the LM head."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Of the adapters' inputs in the update; sampler and scores are without."""


class Gate(Frozen):
    """Ends a stage at what held-out problems show, `steps` at the latest (docs/algorithms.md, "Gates")."""

    watch: Literal["score", "kl"]
    """`score`: mean verdict score, which reveals the held-out answers; `kl`: KL per token between student and teacher
    (forward on the teacher's rollouts in a warmup, reverse on the student's in a distillation), which needs none."""
    every: int = Field(ge=1)
    """Steps between looks, the first of which comes before any step."""
    problems: float = Field(gt=0)
    """How many of the stage's problems, the last of its list, are kept out of training; below 1 a share of them."""
    samples: int = Field(default=4, ge=1)
    """Completions of each at a look."""
    patience: int = Field(default=3, ge=1)
    """A plateau: the last so many looks are no better than as many before them."""
    min_delta: float = Field(default=0.0, ge=0)
    """What their gain (plus half its standard error) must exceed: in score, or as a share of the KL."""
    threshold: float | None = None
    """Ends the stage as soon as the score is above, or the KL below it."""
    min_mixed: float | None = Field(default=None, gt=0, le=1)
    """Ends a `grpo` stage, before its first step where it must, when fewer groups than this share are mixed."""

    def held_out(self, available: int) -> int:
        """Problems kept out of a list of this length: at least 2, which a standard error needs."""
        return max(2, round(self.problems * available) if self.problems < 1 else round(self.problems))


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
    lora: LoRA | None = None
    """Train adapters and merge them at the end of the stage; unset = train all weights."""
    gate: Gate | None = None

    @model_validator(mode="after")
    def _gated(self) -> Method:
        if self.gate is None:
            return self
        if self.optimizer.schedule != "constant":
            raise ValueError(
                f"schedule = {self.optimizer.schedule!r} and a gate: a gated stage needs schedule = 'constant', since "
                "its steps are not known"
            )
        if self.gate.problems >= 1 and self.gate.problems != round(self.gate.problems):
            raise ValueError(f"gate.problems = {self.gate.problems}: give a whole number, or a share below 1")
        is_grpo = isinstance(self, GRPO)
        if isinstance(self, SFT | Joint) or (is_grpo and self.gate.watch == "kl"):
            raise ValueError("gates: 'score' for grpo, 'score' and 'kl' for warmup and distill, none for the others")
        if self.gate.min_mixed is not None and not (is_grpo and self.gate.samples >= self.group_size):
            raise ValueError("gate.min_mixed is for grpo, and needs gate.samples >= group_size")
        return self

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


Alignment = Literal["tokens", "spans"]


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
    alignment: Alignment = "tokens"
    """`spans`: of a teacher with another tokenizer; see `Distill.alignment`."""

    @model_validator(mode="after")
    def _aligned(self) -> Warmup:
        if self.alignment == "spans" and not self.stored_top_k:
            raise ValueError("alignment = 'spans' needs stored_top_k > 0: how many of the teacher's tokens to map")
        _check_gate(self)
        return self


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


Divergence = Literal["reverse_kl", "jsd", "forward_kl", "sampled_token", "sampled_sequence", "constant"]
EXACT = ("reverse_kl", "forward_kl", "jsd")
"""Those that are taken between distributions, not on drawn tokens."""


class Distill(Method):
    """Stage 2b: on-policy distillation on student rollouts (arXiv:2605.12483)."""

    method: Literal["distill"] = "distill"
    problems_per_step: int = Field(ge=1)
    group_size: int = Field(default=8, ge=1)
    divergence: Divergence = "reverse_kl"
    """The first three are exact over the vocabulary; `sampled_*` are policy gradients on the drawn tokens; `constant`
    gives every drawn token the advantage -1 and asks no teacher (the control of arXiv:2608.31046)."""
    beta: float | None = Field(default=None, gt=0, lt=1)
    """Weight of the teacher in the mixture of the generalised JSD (arXiv:2306.13649)."""
    alignment: Alignment = "tokens"
    """`tokens`: teacher and student share their tokenizer. `spans`: they do not, and the teacher's scores are carried
    over the shortest spans of text that both spell in whole tokens: an approximation (docs/algorithms.md)."""
    stored_top_k: int = Field(default=0, ge=0)
    """0: the teacher's whole distributions; k: its top-k + tail mass. With `spans`, how many of its likeliest tokens
    are mapped to the student's."""

    @model_validator(mode="after")
    def _aligned(self) -> Distill:
        if self.alignment == "spans" and not self.stored_top_k:
            raise ValueError("alignment = 'spans' needs stored_top_k > 0: how many of the teacher's tokens to map")
        if self.stored_top_k and self.divergence not in EXACT:
            raise ValueError(f"stored_top_k has no effect with divergence = {self.divergence!r}: remove it")
        if self.alignment == "spans" and self.divergence != "reverse_kl":
            raise ValueError(f"alignment = 'spans' knows divergence = 'reverse_kl' only, not {self.divergence!r}")
        _check_gate(self)
        return self

    @model_validator(mode="after")
    def _beta(self) -> Distill:
        if (self.divergence == "jsd") != (self.beta is not None):
            raise ValueError("beta is for divergence = 'jsd', which needs it (0 < beta < 1)")
        if self.divergence == "constant" and self.gate is not None and self.gate.watch == "kl":
            raise ValueError("gate.watch = 'kl' compares with a teacher, which divergence = 'constant' does not have")
        return self


class Joint(GRPO):
    """Reward and teacher at once on the student's rollouts: (1 - lambda) reverse KL + lambda policy gradient
    (the axis of arXiv:2605.12483 v1)."""

    method: Literal["joint"] = "joint"  # pyright: ignore -- the discriminator differs by design
    reward_weight: float = Field(ge=0, le=1)
    """Lambda: 0 is on-policy distillation, 1 is GRPO. Each loss has its own denominator."""

    @model_validator(mode="after")
    def _one_update(self) -> Joint:
        if self.kl_coef or self.updates_per_batch > 1 or self.redraws:
            raise ValueError(
                "joint takes one update a batch of the groups it drew, and the teacher is its anchor: "
                "remove kl_coef, updates_per_batch and redraws"
            )
        return self


def _check_gate(settings: Warmup | Distill) -> None:
    if settings.alignment == "spans" and settings.gate and settings.gate.watch == "kl":
        raise ValueError("gate: watch = 'kl' compares token by token, which alignment = 'spans' cannot: watch 'score'")


def needs_weights(settings: Method) -> str | None:
    """What to change so that a stage can do with top-k log-probs of its teacher at temperature 1; None if it can."""
    if not isinstance(settings, Warmup | Distill):
        return None if isinstance(settings, SFT) else "use warmup, distill or sft in place of joint"
    if settings.temperature != 1:
        return "set temperature = 1, since without the tail no other follows"
    if settings.alignment == "spans":
        return "set alignment = 'tokens'"
    if settings.gate is not None and settings.gate.watch == "kl":
        return "set gate.watch = 'score'"
    sampled = isinstance(settings, Distill) and settings.divergence not in EXACT
    return None if settings.stored_top_k or sampled else "set stored_top_k > 0"


MethodConfig = Annotated[GRPO | Warmup | Distill | SFT | Joint, Field(discriminator="method")]


def needs_answers(settings: MethodConfig) -> bool:
    """Whether the stage looks at answers: reward, a filter, worked solutions, or a gate that watches the score."""
    if isinstance(settings, GRPO) or (settings.gate is not None and settings.gate.watch == "score"):
        return True
    return isinstance(settings, TeacherRollouts) and (
        settings.keep != "all" or (isinstance(settings, SFT) and settings.tokens == "solutions")
    )
