"""An arm: a chain of stages ending in a student, as a point on the study's axes; presets are named points."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from headwater.methods import Frozen
from headwater.overrides import merge

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
StageName = Literal["teacher_rl", "teacher_sft", "warmup", "distill", "sft", "joint", "student_rl"]
METHODS: dict[StageName, str] = {
    "teacher_rl": "grpo",
    "teacher_sft": "sft",
    "warmup": "warmup",
    "distill": "distill",
    "sft": "sft",
    "joint": "joint",
    "student_rl": "grpo",
}
"""The method of every `[stages.NAME]`."""

BRIDGES: dict[str, list[StageName]] = {
    "none": [],
    "full": ["warmup", "distill"],
    "opd": ["distill"],
    "warmup": ["warmup"],
    "sft": ["sft"],
    "joint": ["warmup", "joint"],
    "no-teacher": ["distill"],
}

_BRIDGE = {"teacher": "rl", "bridge": "full"}
PRESETS: dict[str, dict[str, Any]] = {
    "direct": {"finish": "full"},
    "bridge": _BRIDGE,
    "half": {**_BRIDGE, "split": True},
    "fresh": {**_BRIDGE, "finish": "fresh"},
    "replay": {**_BRIDGE, "finish": "replay"},
    "bridge-grpo": {**_BRIDGE, "finish": "full"},
    "raw": {"teacher": "raw", "bridge": "full"},
    "raw-grpo": {"teacher": "raw", "bridge": "full", "finish": "full"},
    "given": {"teacher": "given", "bridge": "full"},
    "sft-teacher": {"teacher": "sft", "bridge": "full"},
    "sft-teacher-fresh": {"teacher": "sft", "bridge": "full", "finish": "fresh"},
    "sft-teacher-replay": {"teacher": "sft", "bridge": "full", "finish": "replay"},
    "same-size": {**_BRIDGE, "teacher_model": "student"},
    "larger": {**_BRIDGE, "teacher_model": "larger"},
    "opd": {"teacher": "rl", "bridge": "opd"},
    "opd-long": {"teacher": "rl", "bridge": "opd", "updates": "bridge"},
    "opd-fresh": {"teacher": "rl", "bridge": "opd", "finish": "fresh"},
    "warmup": {"teacher": "rl", "bridge": "warmup"},
    "warmup-long": {"teacher": "rl", "bridge": "warmup", "updates": "bridge"},
    "warmup-fresh": {"teacher": "rl", "bridge": "warmup", "finish": "fresh"},
    "sft": {"teacher": "rl", "bridge": "sft"},
    "sft-long": {"teacher": "rl", "bridge": "sft", "updates": "bridge"},
    "sft-fresh": {"teacher": "rl", "bridge": "sft", "finish": "fresh"},
    "warmup-correct": {**_BRIDGE, "overrides": {"warmup": {"keep": "correct"}}},
    "warmup-wrong": {**_BRIDGE, "overrides": {"warmup": {"keep": "wrong"}}},
    "no-teacher": {"bridge": "no-teacher"},
    "joint": {"teacher": "rl", "bridge": "joint"},
    "direct-matched": {"finish": "full", "match_flops": "bridge"},
}
"""Presets by name: what `preset = "NAME"` in an arm stands for. Keys beside `preset` win; overrides are merged."""


class Arm(Frozen):
    """A chain of stages ending in a student, as a point on the study's axes."""

    teacher: Literal["none", "raw", "sft", "rl", "given"] = "none"
    """`rl`: trained here with GRPO; `sft`: trained here on worked solutions; `raw`: as it comes; `given`: as it comes,
    and somebody's reward-trained teacher."""
    teacher_model: Name = "teacher"
    """Which of `[models]` teaches: `student` is the same-size control."""
    bridge: Literal["none", "full", "opd", "warmup", "sft", "joint", "no-teacher"] = "none"
    """`full`: warmup, then distillation; `joint`: warmup, then reward and teacher at once; `no-teacher`: distillation
    with a constant advantage in the teacher's place."""
    finish: Literal["none", "fresh", "replay", "full"] = "none"
    """Student GRPO: on the second half of the pool, again on the first half, or on the whole pool."""
    split: bool | Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = False
    """Share of the pool that is spent upstream, its first problems; `true` is a half (implied by `fresh` and `replay`),
    `auto` is decided by a probe of the pair (docs/probe.md). A side without labels is not trained."""
    prompts: Literal["pool", "unlabelled"] = "pool"
    """Which prompts the dense stages see."""
    updates: Literal["stage", "bridge"] = "stage"
    """`bridge`: a bridge of one stage gets the updates of warmup and distillation together."""
    match_flops: Name | None = None
    """Direct GRPO goes on until it has spent the FLOPs of this arm, teacher's training included."""
    overrides: dict[StageName, dict[str, Any]] = Field(default_factory=dict)
    """Settings of `[stages.NAME]` that differ in this arm."""

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, given: Any) -> Any:
        if not isinstance(given, dict) or "preset" not in given:
            return given
        name = given["preset"]
        if name not in PRESETS:
            raise ValueError(f"no preset {name!r}: choose one of {', '.join(PRESETS)}")
        return merge(PRESETS[name], {key: value for key, value in given.items() if key != "preset"})

    @model_validator(mode="after")
    def _chain(self) -> Arm:
        taught = self.bridge not in ("none", "no-teacher")
        if taught != (self.teacher != "none"):
            raise ValueError(
                f"teacher = {self.teacher!r}, bridge = {self.bridge!r}: an arm has a teacher if and only if it has a "
                "bridge that takes one (all but 'none' and 'no-teacher')"
            )
        if not taught and self.teacher_model != "teacher":
            raise ValueError("teacher_model has no effect in an arm without a teacher: remove it")
        if self.bridge == "none" and self.finish != "full":
            raise ValueError("an arm without a bridge is direct GRPO: finish = 'full'")
        if self.bridge == "none" and (self.share is not None or self.prompts != "pool"):
            raise ValueError("split and prompts are about a bridge, which this arm does not have: remove them")
        if self.updates == "bridge" and len(BRIDGES[self.bridge]) != 1:
            raise ValueError(f"updates = 'bridge' is for bridges of one stage; {self.bridge!r} is not one")
        if self.split == "auto" and (self.finish != "fresh" or self.teacher != "rl" or self.bridge == "joint"):
            raise ValueError(
                "split = 'auto' divides the labels between teacher GRPO and student GRPO: it needs teacher = 'rl', "
                "finish = 'fresh' and a bridge without reward (not 'joint')"
            )
        if self.match_flops is not None and self.bridge != "none":
            raise ValueError("match_flops is for direct GRPO (bridge = 'none')")
        for stage, changes in self.overrides.items():
            if "steps" in changes and (
                self.match_flops or (self.updates == "bridge" and stage in BRIDGES[self.bridge])
            ):
                raise ValueError(f"match_flops and updates = 'bridge' set the steps of {stage}: remove them or steps")
        return self

    @property
    def share(self) -> float | Literal["auto"] | None:
        """Share of the pool that goes upstream, `auto` where a decision node says it; None: nothing is split."""
        if isinstance(self.split, bool):
            return 0.5 if self.split or self.finish in ("fresh", "replay") else None
        return self.split


def arm_stages(arm: Arm) -> list[StageName]:
    """Names of the stages an arm runs, in order (teacher x bridge x finish)."""
    upstream: dict[str, list[StageName]] = {"rl": ["teacher_rl"], "sft": ["teacher_sft"]}
    finish: list[StageName] = ["student_rl"] if arm.finish != "none" else []
    return upstream.get(arm.teacher, []) + BRIDGES[arm.bridge] + finish
