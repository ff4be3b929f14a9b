"""The recipe: a TOML file as frozen, checked values; unknown keys fail, and no field is without effect."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from headwater.arms import METHODS, PRESETS, Arm, Name, StageName, arm_stages
from headwater.execution import Execution, Served, ServedStudent
from headwater.methods import (
    GRPO,
    SFT,
    Distill,
    Frozen,
    Gate,
    Joint,
    LoRA,
    Method,
    MethodConfig,
    ModelConfig,
    Optimizer,
    TeacherRollouts,
    Warmup,
    needs_answers,
    needs_weights,
)
from headwater.overrides import explain, merge, override

__all__ = [
    "GRPO",
    "PRESETS",
    "SFT",
    "Arm",
    "Comparison",
    "Distill",
    "Evaluation",
    "Execution",
    "Frozen",
    "Gate",
    "Joint",
    "LoRA",
    "Method",
    "MethodConfig",
    "ModelConfig",
    "Optimizer",
    "Pool",
    "Probe",
    "Recipe",
    "Served",
    "ServedStudent",
    "TeacherRollouts",
    "Tuning",
    "Variant",
    "Warmup",
    "arm_stages",
    "canonical",
    "load_recipe",
    "needs_answers",
]

UNBOUNDED = 10**9
"""Steps of a stage that ends when its FLOPs are spent."""


class Pool(Frozen):
    """The label pool: a seed draws `labels` problems of the training split, nested over budgets."""

    labels: int = Field(ge=1)
    max_reveals: int | None = Field(default=None, ge=1)
    """Refuse an arm that would reveal more answers than this (re-reading an answer counts again)."""
    unlabelled: int = Field(default=0, ge=0)
    """Prompts without answers for arms with `prompts = "unlabelled"`."""
    budgets: tuple[int, ...] = ()
    """Label-efficiency curves: every arm is run at each of these sizes of the pool, the last of which is `labels`. The
    smaller pools are subsets of the larger; an arm `bridge` becomes `bridge@32` and so on."""
    exclude_overlap: float | None = Field(default=None, gt=0, le=1)
    """Keep out training and unlabelled problems that overlap this much with a problem of an evaluation, in words or but
    for numbers (`tasks.overlap`; `headwater overlap` shows them)."""

    @model_validator(mode="after")
    def _nested(self) -> Pool:
        if self.budgets and (sorted(set(self.budgets)) != list(self.budgets) or self.budgets[0] < 1):
            raise ValueError(f"budgets {list(self.budgets)} must be positive and ascending")
        if self.budgets and self.budgets[-1] != self.labels:
            raise ValueError(f"the last of budgets {list(self.budgets)} must be labels = {self.labels}")
        return self


class Tuning(Frozen):
    """One grid of learning rates for every stage, tried on the same tuning problems (`headwater tune`)."""

    lr: tuple[float, ...] = Field(min_length=2)
    seeds: tuple[int, ...] = Field(min_length=1)
    """Disjoint from the study's seeds, so that no tuned pool is met again."""
    problems: int = Field(ge=2)
    samples: int = Field(ge=1)
    split: str = "tuning"


SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


class Probe(Frozen):
    """How a pair of models is looked at before labels are spent (`headwater probe`, `split = "auto"`)."""

    problems: int = Field(default=128, ge=2)
    """Labelled problems of the pool whose answers are looked at: all of a smaller pool."""
    samples: int = Field(default=8, ge=2)
    shares: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field(default=SHARES, min_length=1)
    """What `split = "auto"` chooses from."""


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


class Comparison(Frozen):
    """Declared before the run: is `a` better than `b`?

    Each is an arm, a stage on an arm's way (`ARM/STAGE`), or `base MODEL`. Over budgets, `ARM` stands for the arm at
    every budget and `ARM@32` for one of them.
    """

    a: str
    b: str
    margin: float | None = Field(default=None, ge=0)
    """Makes it the prediction `a <= b + margin` in avg@k: confirmed, refuted or undecided by the 95 % interval."""


class Variant(Frozen):
    """An arm at a size of the label pool."""

    arm: str
    labels: int


class Recipe(Frozen):
    """A study: models, one label pool, arms and evaluations."""

    name: Name
    note: str = ""
    """One paragraph for the reader of the results."""
    seeds: tuple[int, ...] = Field(min_length=1)
    models: dict[Name, ModelConfig]
    """`student`, and whichever models teach; an arm's `teacher_model` is `teacher` unless it says otherwise."""
    task: dict[str, Any]
    pool: Pool
    stages: dict[StageName, MethodConfig]
    arms: dict[Name, Arm] = Field(min_length=1)
    evaluations: dict[Name, Evaluation] = Field(min_length=1)
    comparisons: tuple[Comparison, ...] = ()
    tuning: Tuning | None = None
    probe: Probe = Probe()
    execution: Execution = Execution()

    @model_validator(mode="after")
    def _whole(self) -> Recipe:
        if "student" not in self.models:
            raise ValueError("[models.student] is missing")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds {list(self.seeds)} repeat; each must be distinct")
        for name, settings in self.stages.items():
            if settings.method != METHODS[name]:
                raise ValueError(f"[stages.{name}] must have method = {METHODS[name]!r}, not {settings.method!r}")
        for name in self.arms:
            self._check_arm(name)
        for pair in self.pairs:
            if pair.a == pair.b:
                raise ValueError(f"comparison of {pair.a!r} with itself: name two different ones")
            for name in (pair.a, pair.b):
                if not self._is_endpoint(name):
                    raise ValueError(
                        f"comparison names {name!r}; use an arm of {sorted(self.variants)}, ARM/STAGE, or one of "
                        f"{[f'base {role}' for role in self.models]}"
                    )
        self._check_idle()
        self._check_tuning()
        self._check_served()
        self._check_sampler()
        return self

    def _check_arm(self, name: str) -> None:
        arm = self.arms[name]
        needed = arm_stages(arm)
        others: list[StageName] = ["warmup", "distill"] if arm.updates == "bridge" else []
        for stage in needed + others:
            if stage not in self.stages:
                raise ValueError(f"arm {name!r} needs [stages.{stage}]")
        for stage in arm.overrides:
            if stage not in needed:
                raise ValueError(f"arm {name!r} overrides {stage!r}, which it does not run: it runs {needed}")
        settings = {stage: self.settings(name, stage) for stage in needed}
        if arm.teacher != "none" and arm.teacher_model not in self.models:
            raise ValueError(f"arm {name!r} needs [models.{arm.teacher_model}]")
        if arm.share is not None and min(self.pool.budgets or (self.pool.labels,)) < 2:
            raise ValueError(f"arm {name!r} splits the pool: pool.labels must be at least 2, and so must every budget")
        if arm.prompts == "unlabelled" and not self.pool.unlabelled:
            raise ValueError(f"arm {name!r} has prompts = 'unlabelled': set pool.unlabelled")
        dense = [s for stage, s in settings.items() if stage not in ("teacher_rl", "teacher_sft", "student_rl")]
        if arm.prompts == "unlabelled" and any(map(needs_answers, dense)):
            raise ValueError(f"arm {name!r} has prompts = 'unlabelled', but 'keep', 'solutions' and joint need answers")
        if arm.share in (0.0, "auto") and any(map(needs_answers, dense)):
            raise ValueError(
                f"arm {name!r} may leave no labels upstream (split = {arm.split!r}), but 'keep' needs some: remove it"
            )
        distill = settings.get("distill")
        if isinstance(distill, Distill) and (distill.divergence == "constant") != (arm.bridge == "no-teacher"):
            raise ValueError(f"arm {name!r}: divergence = 'constant' is for bridge = 'no-teacher', which has no other")
        sft = settings.get("teacher_sft")
        if isinstance(sft, SFT) and sft.tokens != "solutions":
            raise ValueError("[stages.teacher_sft] has no teacher to sample from: set tokens = 'solutions'")
        student_sft = settings.get("sft")
        if isinstance(student_sft, SFT) and student_sft.tokens == "solutions" and arm.teacher in ("rl", "sft"):
            raise ValueError(f"arm {name!r} trains a teacher that tokens = 'solutions' never asks: teacher = 'raw'")
        if arm.match_flops is not None:
            other = self.arms.get(arm.match_flops)
            if other is None or other.match_flops is not None:
                raise ValueError(f"arm {name!r}: match_flops = {arm.match_flops!r} must name an arm, not a matched one")
            if settings["student_rl"].optimizer.schedule != "constant":
                raise ValueError(
                    f"arm {name!r}: match_flops needs schedule = 'constant', since its steps are not known"
                )

    def _check_served(self) -> None:
        taught = {name: arm for name, arm in self.arms.items() if arm.teacher != "none"}
        models = {arm.teacher_model for arm in taught.values()}
        if self.execution.teacher is not None and (len(models) != 1 or "student" in models):
            raise ValueError(
                f"[execution.teacher] serves one model that only teaches, but the arms' teachers are {sorted(models)}"
            )
        for name, arm in taught.items() if self.execution.teacher is not None else ():
            for stage in arm_stages(arm):
                change = None if stage == "student_rl" else needs_weights(self.settings(name, stage))
                if stage.startswith("teacher"):
                    change = "it is frozen, so teacher = 'raw' or 'given'"
                if change is not None:
                    raise ValueError(
                        f"arm {name!r}, [stages.{stage}]: a served teacher gives top-k log-probs at temperature 1 "
                        f"and samples: {change}; or remove [execution.teacher]"
                    )

    def _check_sampler(self) -> None:
        if (served := self.execution.sampler) is None:
            return
        if served.url and self.execution.executor not in ("inline", "local:1"):
            raise ValueError("[execution.sampler] url has one set of weights: use `python`, or executor = 'inline'")
        if served.url and self.execution.teacher is not None and self.execution.teacher.root == served.root:
            raise ValueError("[execution.sampler] and [execution.teacher] are one url, but two sets of weights")
        for name, arm in self.arms.items():
            stages = {stage: self.settings(name, stage) for stage in arm_stages(arm)}
            sampling = {stage: s for stage, s in stages.items() if isinstance(s, GRPO | Distill | Joint)}
            if lora := [stage for stage, settings in sampling.items() if settings.lora is not None]:
                raise ValueError(f"arm {name!r}, {lora}: [execution.sampler] has no adapters; remove it or lora")
            if served.url and "teacher_rl" in sampling and arm.teacher_model != "student":
                raise ValueError(f"arm {name!r}: [execution.sampler] url serves the student alone; use `python`")

    def _is_endpoint(self, name: str) -> bool:
        arm, _, stage = name.partition("/")
        known = arm in self.variants and (not stage or stage in arm_stages(self.arms[self.variants[arm].arm]))
        return known or name in {f"base {role}" for role in self.models}

    def _check_idle(self) -> None:
        used = {stage for arm in self.arms.values() for stage in arm_stages(arm)}
        if any(arm.updates == "bridge" for arm in self.arms.values()):
            used |= {"warmup", "distill"}
        if idle := sorted(set(self.stages) - used):
            raise ValueError(f"no arm uses [stages.{idle[0]}]: remove it or add an arm")
        teachers = {arm.teacher_model for arm in self.arms.values() if arm.teacher != "none"}
        if idle := sorted(set(self.models) - teachers - {"student", "teacher"}):
            raise ValueError(f"no arm uses [models.{idle[0]}]: remove it or add an arm")
        if self.pool.unlabelled and all(arm.prompts == "pool" for arm in self.arms.values()):
            raise ValueError("no arm has prompts = 'unlabelled': remove pool.unlabelled or add one")

    def _check_tuning(self) -> None:
        if self.tuning is None:
            return
        if shared := sorted(set(self.tuning.seeds) & set(self.seeds)):
            raise ValueError(f"seeds {shared} are both in tuning.seeds and in seeds: tune on other seeds")
        evaluated = {e.split for e in self.evaluations.values() if e.task in (None, self.task)}
        if self.tuning.split in {"train", "unlabelled"} | evaluated:
            raise ValueError(
                f"tuning.split = {self.tuning.split!r} is trained or evaluated on: tune on a split of its own"
            )
        for name, arm in self.arms.items():
            for stage in arm_stages(arm):
                lr = self.settings(name, stage).optimizer.lr
                if lr not in self.tuning.lr:
                    raise ValueError(
                        f"arm {name!r}: [stages.{stage}] has lr = {lr}, which is not in tuning.lr = "
                        f"{list(self.tuning.lr)}: all stages are tuned over one grid"
                    )

    @property
    def variants(self) -> dict[str, Variant]:
        """The arms that are run: at every budget where there are budgets, named `ARM@LABELS`."""
        if not self.pool.budgets:
            return {name: Variant(arm=name, labels=self.pool.labels) for name in self.arms}
        return {f"{name}@{n}": Variant(arm=name, labels=n) for name in self.arms for n in self.pool.budgets}

    @property
    def pairs(self) -> list[Comparison]:
        """The declared comparisons, over budgets once for each of them."""
        if not self.pool.budgets:
            return list(self.comparisons)
        pairs: dict[Comparison, None] = {}
        for pair in self.comparisons:
            for labels in self.pool.budgets:
                a, b = (self._at(name, labels) for name in (pair.a, pair.b))
                pairs[pair.model_copy(update={"a": a, "b": b})] = None
        return list(pairs)

    def _at(self, name: str, labels: int) -> str:
        arm, slash, stage = name.partition("/")
        return f"{arm}@{labels}{slash}{stage}" if arm in self.arms else name

    def settings(self, arm: str, stage: StageName) -> GRPO | Warmup | Distill | SFT | Joint:
        """Settings of a stage as an arm runs it."""
        base, point = self.stages[stage], self.arms[arm]
        changes: dict[str, Any] = {}
        if point.bridge == "no-teacher" and stage == "distill":
            changes["divergence"] = "constant"
        if point.updates == "bridge" and stage not in ("teacher_rl", "teacher_sft", "student_rl"):
            changes["steps"] = self.stages["warmup"].steps + self.stages["distill"].steps
        if point.match_flops is not None:
            changes |= {"steps": UNBOUNDED, "gate": None}
        changes = merge(changes, point.overrides.get(stage, {}))
        if not changes:
            return base
        try:
            return type(base).model_validate(merge(base.model_dump(exclude_unset=True), changes))
        except ValidationError as error:
            raise ValueError(f"arm {arm!r}, overrides of {stage!r}:\n{explain(error, type(base))}") from None


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a TOML recipe and apply dotted `key=value` overrides.

    `extends = "other.toml"` (beside it) starts from another recipe, whose keys those of this one replace or add to.

    Raises ValueError naming the file, the key, what was given and what is allowed.
    """
    raw = _read(path)
    for text in overrides:
        raw = override(raw, text)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise ValueError(f"{path}:\n{explain(error, Recipe)}") from None


def _read(path: Path, inner: tuple[Path, ...] = ()) -> dict[str, Any]:
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = sorted(p.name for p in path.parent.glob("*.toml")) if path.parent.is_dir() else []
        raise ValueError(f"no recipe at {path}; there are {near or 'no recipes'} in {path.parent}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; name a recipe, a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None
    base = raw.pop("extends", None)
    if base is None:
        return raw
    if not isinstance(base, str) or (there := path.parent / base) in (*inner, path):
        raise ValueError(f"{path}: extends = {base!r}; name one other recipe, by a path relative to this one")
    return merge(_read(there, (*inner, path)), raw)


def canonical(value: object) -> str:
    """Canonical JSON: what keys are hashed from."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
