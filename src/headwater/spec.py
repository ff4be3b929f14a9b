"""Serialisable specifications of the study's nodes, and the keys they hash to."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from headwater.config import Evaluation, Frozen, MethodConfig, ModelConfig, Probe, canonical

REVISIONS = {"grpo": 7, "warmup": 5, "distill": 6, "sft": 6, "joint": 7, "evaluate": 6, "probe": 6}
"""Raised when a method's numbers change for the same specification; a golden trajectory fails until it is."""
EVALUATED_AT_ONCE = 512
"""Rollouts of an evaluation between two writes: so many that a few long ones do not run alone for long."""


class ModelRef(Frozen):
    """A model: a source, or the student or teacher that a stage left in the store."""

    config: ModelConfig
    fingerprint: str
    """Digest of the source's files, so that a changed model is another model."""
    stage: str | None = None
    """Key of the stage whose weights replace the source's."""

    @property
    def name(self) -> str:
        return self.config.source if self.stage is None else f"{self.config.source} after {self.stage}"


class Problems(Frozen):
    """Which problems a node sees: `count` drawn by a seed from a split of a task, or a part of them."""

    task: dict[str, Any]
    split: str
    count: int
    seed: int | None
    """None keeps the split's own order (evaluation); a seed draws a nested subset (label pool)."""
    part: Literal["all", "first", "second"] = "all"
    share: float | None = 0.5
    """Size of the first part. None: the decision that the node names says it, an empty part of a dense stage is then
    the whole pool, and `digest` is the whole pool's."""
    labelled: bool = True
    """False: the node gets prompts alone."""
    excluded: tuple[str, ...] = ()
    """Ids of problems that are left out before any is drawn."""
    digest: str
    """Of the prompts and, when labelled, the answers: the data are part of the key."""


class StageSpec(Frozen):
    """One method run on one model; everything that decides its weights."""

    kind: Literal["stage"] = "stage"
    settings: MethodConfig
    revision: int
    seed: int
    start: ModelRef
    teacher: ModelRef | None = None
    problems: Problems
    grader: str | None = None
    grader_digest: str | None = None
    """Of a grader that is a file of the user's: when it changes, so do the rewards."""
    match: tuple[str, ...] = ()
    """Keys of stages: this one ends when it has spent as many FLOPs as they did together."""
    decision: str | None = None
    """Key of the decision whose share of the pool this stage takes."""

    @property
    def label(self) -> str:
        return self.settings.method


class EvaluationSpec(Frozen):
    """One model on one evaluation; has random streams of its own."""

    kind: Literal["evaluate"] = "evaluate"
    settings: Evaluation
    revision: int
    seed: int
    start: ModelRef
    problems: Problems
    grader: str
    grader_digest: str | None = None

    @property
    def label(self) -> str:
        return "evaluate"


class DecisionSpec(Frozen):
    """A probe of a student and a teacher, and the share of the labels that it sends upstream."""

    kind: Literal["decision"] = "decision"
    settings: Probe
    revision: int
    seed: int
    start: ModelRef
    teacher: ModelRef
    trained: bool = True
    """Reward will train the teacher; False: it teaches as it comes."""
    problems: Problems
    """The sample whose answers are looked at."""
    held_out: Problems | None = None
    """Prompts to compare with the sample's (C2), for people; the decision does not need them."""
    labels: int
    dense_prompts: int | None = None
    """Prompts of the dense stages where they are not those of the upstream labels."""
    least: tuple[int, int]
    """Fewest problems that a step takes upstream and on the student."""
    group_size: int
    max_new_tokens: int
    temperature: float
    grader: str
    grader_digest: str | None = None

    @property
    def label(self) -> str:
        return "probe"


NodeSpec = Annotated[StageSpec | EvaluationSpec | DecisionSpec, Field(discriminator="kind")]
Node = StageSpec | EvaluationSpec | DecisionSpec
_ADAPTER: TypeAdapter[Node] = TypeAdapter(NodeSpec)


def parse(text: str) -> Node:
    """A specification from JSON."""
    return _ADAPTER.validate_json(text)


def key(spec: Node) -> str:
    """20 hex digits that name the node: equal for equal semantics, whatever executes it."""
    return digest(spec.model_dump(mode="json"))


def parents(spec: Node) -> list[str]:
    """Keys of the nodes that this one reads: their weights, what they spent, what they decided."""
    refs, others = [spec.start], ()
    if not isinstance(spec, EvaluationSpec):
        refs += [spec.teacher] if spec.teacher else []
    if isinstance(spec, StageSpec):
        others = (*spec.match, *([spec.decision] if spec.decision else []))
    return [*(ref.stage for ref in refs if ref.stage is not None), *others]


def digest(value: object) -> str:
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:20]
