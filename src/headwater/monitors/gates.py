"""Gates: whether a stage should end, from what held-out problems showed so far. Pure functions over series of looks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np

from headwater.methods import Gate

BEYOND = 1.0
"""Standard errors by which a threshold must be passed."""
BENEFIT = 0.5
"""Standard errors in favour of a stage that may still improve: to end it too early costs accuracy, too late only work.
docs/algorithms.md ("Gates") has the error rates."""


@dataclass(frozen=True)
class Look:
    """What a gate saw before a step: one value per held-out problem, in the same order at every look.

    `values` are mean scores of the gate's samples, or mean KLs per token. `mixed` are unbiased estimates of the
    problem's mixed-group rate, where the gate asks for it; `teacher` is the teacher's mean score, where there is one.
    """

    step: int
    values: tuple[float, ...]
    mixed: tuple[float, ...] = ()
    teacher: float | None = None

    @classmethod
    def of(cls, row: dict[str, Any]) -> Look:
        """From a row of gates.jsonl."""
        return cls(row["step"], tuple(row["values"]), tuple(row["mixed"]), row["teacher"])


def mean_and_error(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean over problems and its standard error."""
    array = np.asarray(values, dtype=float)
    return float(array.mean()), float(array.std(ddof=1)) / sqrt(len(array))


def gain(gate: Gate, looks: Sequence[Look]) -> tuple[float, float]:
    """How much better the last `patience` looks were than as many before them, and its standard error.

    Each problem's mean over the later looks is paired with its mean over the earlier ones. For watch = "kl" a fall is a
    gain, in shares of the earlier mean.
    """
    values = np.array([look.values for look in looks[-2 * gate.patience :]])
    before, after = values[: gate.patience].mean(0), values[gate.patience :].mean(0)
    return mean_and_error((before - after) / before.mean() if gate.watch == "kl" else after - before)


def decide(gate: Gate, looks: Sequence[Look]) -> str | None:
    """Why the stage should end now, or None.

    In this order: too few mixed groups (the rate plus a standard error is below `min_mixed`); the threshold is met
    (beyond it by a standard error); a plateau (the gain plus half a standard error is not above `min_delta`).
    """
    last = looks[-1]
    mean, error = mean_and_error(last.values)
    if gate.min_mixed is not None:
        rate, doubt = mean_and_error(last.mixed)
        if rate + BEYOND * doubt < gate.min_mixed:
            return f"mixed groups {rate:.3g} +- {doubt:.2g}, below {gate.min_mixed:g}"
    if gate.threshold is not None:
        is_met = (
            mean + BEYOND * error <= gate.threshold if gate.watch == "kl" else mean - BEYOND * error >= gate.threshold
        )
        if is_met:
            return f"{gate.watch} {mean:.3g} +- {error:.2g} met the threshold {gate.threshold:g}"
    if len(looks) >= 2 * gate.patience:
        more, doubt = gain(gate, looks)
        if more + BENEFIT * doubt <= gate.min_delta:
            what = "fell by a share of" if gate.watch == "kl" else "rose by"
            return (
                f"{gate.watch} {what} {more:.2g} +- {doubt:.2g} from the {gate.patience} looks before to the last "
                f"{gate.patience}: no more than {gate.min_delta:g}"
            )
    return None


def evidence(looks: Sequence[Look], reason: str | None) -> dict[str, Any]:
    """What done.json keeps: the series of means and standard errors, where the gate ended the stage and why.

    With a teacher's score, `gap_recovery` is (score - first score) / (teacher - first score) at every look; None where
    the teacher was not better.
    """
    rows = []
    for look in looks:
        mean, error = mean_and_error(look.values)
        row: dict[str, Any] = {"step": look.step, "mean": mean, "error": error}
        if look.mixed:
            row["mixed"] = mean_and_error(look.mixed)[0]
        if look.teacher is not None:
            base = mean_and_error(looks[0].values)[0]
            row["gap_recovery"] = (mean - base) / (look.teacher - base) if look.teacher > base else None
        rows.append(row)
    return {"looks": rows, "reason": reason, "stopped_at": looks[-1].step if reason else None}
