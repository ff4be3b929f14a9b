"""Frozen records that cross module borders; no torch, so graders and planners can import them cheaply."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol, runtime_checkable

Reason = Literal["correct", "wrong", "partial", "unparsed", "truncated", "timeout", "memory", "error"]


@dataclass(frozen=True)
class Message:
    """One turn of a conversational prompt."""

    role: str
    content: str


@dataclass(frozen=True)
class Problem:
    """A prompt and, when labelled, its checkable answer.

    `columns` holds every other field of the source row as JSON values; graders and TRL-style reward functions receive
    it.
    """

    messages: tuple[Message, ...]
    answer: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def id(self) -> str:
        """16 hex digits of the SHA-256 of the prompt alone: equal prompts are one problem whatever their answer."""
        text = json.dumps([[m.role, m.content] for m in self.messages], ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]

    def unlabelled(self) -> Problem:
        """The same prompt without its answer and columns: all that a dense stage may see."""
        return Problem(self.messages)


@dataclass(frozen=True)
class Verdict:
    """A grader's result. `score` is the reward; `correct` is True only for a fully right answer.

    `style` is a label that the task can read off the completion (how it was solved); None when it cannot tell.
    `answer` is what was read as the answer, in a canonical spelling: what counts as one vote in maj@k. Equal strings
    are equal answers; equal answers are equal strings where that is cheap to see, and always when they are correct and
    the task has one gold answer. None when there is none, or when the grader does not say. Reason "truncated" is set
    outside graders, which see text alone (`evals.evaluate.mark_truncated`).
    """

    correct: bool
    parsed: bool
    reason: Reason
    score: float
    style: str | None = None
    answer: str | None = None


@runtime_checkable
class Task(Protocol):
    """Problems and the dotted name of their grader (`module:function` or `file.py:function`).

    The grader has the signature `(completion: str, problem: Problem) -> Verdict` and is only ever called in a child
    process.
    """

    @property
    def name(self) -> str: ...

    @property
    def grader(self) -> str: ...

    def problems(self, split: str) -> Sequence[Problem]: ...


@dataclass(frozen=True)
class Rollout:
    """One completion with its record. `finished` is False when the length limit cut it."""

    problem_id: str
    index: int
    prompt_ids: list[int]
    completion_ids: list[int]
    sampler_logprobs: list[float]
    text: str
    finished: bool
    policy_version: int


Grade = Callable[[list[tuple[Problem, str]]], list[Verdict]]
"""Completions to verdicts; `GraderPool.grade` is the one that is safe for model output."""
