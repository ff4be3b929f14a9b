"""What teacher and student can do on a sample of labelled problems, and where the teacher's ways take the student."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from headwater.evals.evaluate import of_styles
from headwater.evals.statistics import mean_interval, pass_at_k
from headwater.meter import Meter
from headwater.models.language_model import LanguageModel
from headwater.monitors.trainability import estimated_mixed_rate
from headwater.probe.rule import CUT, Measured
from headwater.rollouts.batch import Batch
from headwater.rollouts.sampler import Sampling, TransformersSampler
from headwater.spec import DecisionSpec
from headwater.types import Grade, Problem, Rollout, Verdict

CONTINUATIONS = 2
"""Of every beginning: more problems say more than more of these."""


def measure(
    node: DecisionSpec,
    *,
    student: LanguageModel,
    teacher: LanguageModel,
    problems: Sequence[Problem],
    grade: Grade,
    meter: Meter,
    max_tokens: int = 262_144,
) -> tuple[Measured, dict[str, Any]]:
    """Sample both models, hand the beginnings of rollouts over, grade what comes of them.

    Of a teacher that reward will train only the right rollouts count as its way of working. Every problem's answer is
    looked at: the caller bills `len(problems)` labels. Returns the rule's input and, for people, for each of
    teacher and student `{"pass@1", "pass@k", "mixed_groups": [x, low, high], "reasons", "truncated", "length",
    "styles"}`. Random numbers depend on (seed, problem, sample) alone.
    """
    own = {"teacher": teacher, "student": student}

    def sample(role: str, stream: str, group: int, starts: Sequence[tuple[Problem, list[int]]]) -> list[Row]:
        """`group` completions of every problem, whose answer is begun already, graded from its beginning on."""
        model, sampler = own[role], TransformersSampler(own[role], max_tokens=max_tokens)
        sampling = Sampling(("probe", stream, node.seed), group, node.max_new_tokens, node.temperature)
        prompts = [model.encode(p.messages) + begun for p, begun in starts]
        with meter.timed("evaluated"):
            rollouts = sampler.complete([p for p, _ in starts], prompts, sampling)
        sizes = Batch.of(rollouts).sizes
        meter.add("evaluated", model.shape, sizes, sampler.decoded)
        meter.add("evaluated", model.shape, [(p, 0) for p, _ in sizes[::group]], sampler.prefilled)
        of = [starts[i // group] for i in range(len(rollouts))]
        texts = [model.decode(begun + r.completion_ids) for (_, begun), r in zip(of, rollouts, strict=True)]
        verdicts = grade([(p, text) for (p, _), text in zip(of, texts, strict=True)])
        return [(p, r, v) for (p, _), r, v in zip(of, rollouts, verdicts, strict=True)]

    seen = {role: sample(role, role, node.settings.samples, [(p, []) for p in problems]) for role in own}

    def go_on(role: str, way: str) -> np.ndarray:
        rows = [row for row in seen[way] if row[2].correct or (way == "teacher" and not node.trained)]
        begun = [(p, r.completion_ids[: int(len(r.completion_ids) * CUT)]) for p, r, _ in rows]
        found = sample(role, f"{role} after {way}", CONTINUATIONS, begun) if begun else []
        return _shares(found, problems)

    measured = Measured(
        student=_shares(seen["student"], problems),
        teacher_path=go_on("teacher", "teacher"),
        followed=go_on("student", "teacher"),
        student_path=go_on("student", "student"),
    )
    return measured, {role: describe(rows, problems, node) for role, rows in seen.items()}


Row = tuple[Problem, Rollout, Verdict]


def describe(rows: Sequence[Row], problems: Sequence[Problem], node: DecisionSpec) -> dict[str, Any]:
    """A model on the sample, for people; U_G is left out where groups are larger than the samples of a problem."""
    k, group = node.settings.samples, node.group_size
    right = Counter(p.id for p, _, v in rows if v.correct)
    counts = [right[p.id] for p in problems]
    found: dict[str, Any] = {
        "pass@1": _mean([n / k for n in counts]),
        f"pass@{k}": _mean([pass_at_k(k, n, k) for n in counts]),
        "reasons": dict(Counter(v.reason for _, _, v in rows)),
        "truncated": float(np.mean([not r.finished for _, r, _ in rows])),
        "length": float(np.mean([len(r.completion_ids) for _, r, _ in rows])),
    }
    if group <= k:
        found["mixed_groups"] = _mean([estimated_mixed_rate(k, n, group) for n in counts])
    return found | {"styles": of_styles([(v.correct, v.style) for _, _, v in rows])}


def _mean(values: Sequence[float]) -> list[float]:
    """The mean over problems with its 95 % interval."""
    estimate = mean_interval(np.array([values], dtype=float))
    return [estimate.value, *estimate.ci95]


def _shares(rows: Sequence[Row], problems: Sequence[Problem]) -> np.ndarray:
    """Share of right completions by problem [problems]; nan for one without completions."""
    asked, right = Counter(p.id for p, _, _ in rows), Counter(p.id for p, _, v in rows if v.correct)
    return np.array([right[p.id] / asked[p.id] if asked[p.id] else np.nan for p in problems])
