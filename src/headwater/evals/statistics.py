"""Intervals, tests and pass@k for studies whose seeds and problems are crossed; numpy and scipy only.

Every matrix is [seeds, problems]: entry (s, p) is a per-problem score in [0, 1] averaged over k samples, or the
difference of two. The same problems meet every seed, so both are random effects: y = mean + seed + problem + residual.
docs/statistics.md has the formulas and the measured coverage.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import comb
from typing import Literal

import numpy as np
from jaxtyping import Float
from scipy import special

Matrix = Float[np.ndarray, "_ _"]
"""Scores, seeds x problems. The sizes are compared by the functions, which say what to do about a difference."""

Over = Literal["seeds and problems", "problems"]
Comparison = Literal["a better", "b better", "not distinguishable"]
Outcome = Literal["confirmed", "refuted", "undecided"]


@dataclass(frozen=True)
class Estimate:
    """A mean or a paired difference with its 95 % t interval.

    `p_value` is two-sided, against the value 0. `over` says which population the interval speaks of: with one seed it
    covers new problems only, not a new training run.
    """

    value: float
    ci95: tuple[float, float]
    p_value: float
    standard_error: float
    degrees_of_freedom: float
    num_seeds: int
    num_problems: int
    over: Over


@dataclass(frozen=True)
class Match:
    """Number of labels at which a curve equals a target, and the ends of its 95 % confidence set.

    `low` and `high` read as "more than low" and "fewer than high" labels; None is an end that the budgets do not bound.
    A target above the whole curve has low = the largest budget, high = None; below it, low = None, high = the smallest.
    `value` is None when the two means are equal at no number of labels within the budgets.
    """

    value: float | None
    low: float | None
    high: float | None


def mean_interval(matrix: Float[np.ndarray, "seeds problems"]) -> Estimate:
    """Mean of per-problem scores with a 95 % interval over seeds and problems (problems only, with one seed).

    The limits are not clipped to [0, 1]. Raises ValueError for fewer than two problems, no seed, or a non-finite entry.
    """
    num_seeds, num_problems = matrix.shape
    if num_seeds < 1 or num_problems < 2:
        raise ValueError(f"a matrix of {num_seeds} seeds x {num_problems} problems has no interval: give >= 1 x >= 2")
    if not np.isfinite(matrix).all():
        raise ValueError("the matrix holds nan or infinite scores: every seed must be scored on every problem")
    value, variance, df = (float(x) for x in _variance(matrix))
    error = variance**0.5
    half = float(special.stdtrit(df, 0.975)) * error
    return Estimate(
        value=value,
        ci95=(value - half, value + half),
        p_value=_two_sided(value, error, df),
        standard_error=error,
        degrees_of_freedom=df,
        num_seeds=num_seeds,
        num_problems=num_problems,
        over="problems" if num_seeds == 1 else "seeds and problems",
    )


def paired_difference(a: Float[np.ndarray, "seeds problems"], b: Float[np.ndarray, "_ _"]) -> Estimate:
    """Mean of a - b, paired by seed and problem, with its 95 % interval and two-sided p-value.

    Raises ValueError when the shapes differ and as `mean_interval` does.
    """
    if a.shape != b.shape:
        raise ValueError(
            f"a is {a.shape} and b is {b.shape} (seeds, problems): compare the seeds and problems both have"
        )
    return mean_interval(a - b)


def holm(p_values: Sequence[float]) -> list[float]:
    """Step-down adjusted p-values, in the order given (Holm 1979). Raises ValueError for a value outside [0, 1]."""
    p = np.asarray(p_values, dtype=float)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p-values must lie in [0, 1], given {list(p_values)}")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p)))), 1.0)
    return [float(x) for x in adjusted]


def verdict(difference: Estimate, p_adjusted: float, *, alpha: float = 0.05) -> Comparison:
    """What a comparison a - b may be called once its p-value is adjusted; `not distinguishable` confirms nothing."""
    if p_adjusted >= alpha or difference.value == 0:
        return "not distinguishable"
    return "a better" if difference.value > 0 else "b better"


def noninferior(difference: Estimate, margin: float) -> Outcome:
    """Whether the prediction `a <= b + margin` holds, from the estimate of a - b.

    Confirmed when the 95 % interval lies at or below the margin, refuted when it lies above, else undecided. For "a is
    not worse than b" pass the estimate of b - a. Raises ValueError for a negative margin: state it before looking.
    """
    if not margin >= 0:
        raise ValueError(f"margin must be >= 0, given {margin}: it is the largest excess that still counts as `<=`")
    low, high = difference.ci95
    return "confirmed" if high <= margin else "refuted" if low > margin else "undecided"


def gap_recovery(student: Matrix, base: Matrix, teacher: Matrix) -> Estimate:
    """Share of the gap from base to teacher that the student closes: (student - base) / (teacher - base), of means.

    1 is the teacher's mean, 0 the base's; `p_value` is against 0. The interval linearises the ratio r (delta method):
    the two-way variance of (student - base - r (teacher - base)) / mean gap. Raises ValueError when the teacher is not
    distinguishably better than the base (p < 0.05, unadjusted), and as `paired_difference` does.
    """
    gain, gap = paired_difference(student, base), paired_difference(teacher, base)
    if verdict(gap, gap.p_value) != "a better":
        raise ValueError(
            f"the teacher's gap to the base is {gap.value:.4g}, 95 % interval {gap.ci95[0]:.4g} to {gap.ci95[1]:.4g}: "
            "a share of it means nothing unless the teacher is distinguishably better; add seeds or problems"
        )
    ratio = gain.value / gap.value
    return mean_interval(ratio + (student - base - ratio * (teacher - base)) / gap.value)


def labels_to_match(budgets: Sequence[int], curve: Sequence[Matrix], target: Matrix) -> Match:
    """Number of labels at which a baseline's curve has the target's mean, with a 95 % confidence set.

    `curve` holds the baseline's scores at each budget, paired with the target's by seed and problem; between budgets
    the matrices are interpolated linearly in log(labels), on a grid of 256 steps. More labels are taken not to hurt:
    the set begins after the last number of labels at which the target's `paired_difference` interval lies above 0, and
    ends before the first at which it lies below 0. Where these contradict each other, the curve falls, and the set is
    the hull of all numbers of labels whose interval contains 0. `value` is the fewest labels in the set with equal
    means.
    Raises ValueError unless there are two or more positive, rising budgets with a matrix each of the target's shape.
    """
    if len(budgets) < 2 or budgets[0] < 1 or any(a >= b for a, b in pairwise(budgets)) or len(curve) != len(budgets):
        raise ValueError(
            f"given budgets {list(budgets)} and {len(curve)} matrices: give two or more rising budgets >= 1 and a "
            "matrix for each"
        )
    logs = np.log(budgets)
    # Budgets and crossings are on the grid too: every change of sign is then in the set, however narrow it is.
    crossings = _crossings(logs, np.array([paired_difference(scores, target).value for scores in curve]))
    grid = np.unique(np.concatenate([np.linspace(logs[0], logs[-1], 257), logs, crossings]))
    differences = [paired_difference(target, _interpolate(logs, curve, at)) for at in grid]
    equal = np.isin(grid, crossings)
    above = np.array([d.ci95[0] > 0 for d in differences]) & ~equal
    below = np.array([d.ci95[1] < 0 for d in differences]) & ~equal
    first = int(np.flatnonzero(above).max(initial=-1)) + 1
    last = int(np.flatnonzero(below).min(initial=len(grid))) - 1
    if first > last + 1:
        inside = np.flatnonzero(~above & ~below)
        first, last = int(inside[0]), int(inside[-1])
    if first == len(grid):
        return Match(None, low=float(budgets[-1]), high=None)
    if last == -1:
        return Match(None, low=None, high=float(budgets[0]))
    values = [float(np.exp(at)) for at in crossings if grid[first] <= at <= grid[last]]
    low = float(np.exp(grid[first])) if first > 0 else None
    return Match(values[0] if values else None, low, float(np.exp(grid[last])) if last < len(grid) - 1 else None)


def _crossings(logs: Float[np.ndarray, " budgets"], gaps: Float[np.ndarray, " budgets"]) -> Float[np.ndarray, " _"]:
    """Where the piecewise linear `gaps` are 0, in rising order."""
    left, right = gaps[:-1], gaps[1:]
    change = left * right < 0
    share = left[change] / (left[change] - right[change])
    return np.unique(np.concatenate([logs[gaps == 0], logs[:-1][change] + share * np.diff(logs)[change]]))


def _interpolate(logs: Float[np.ndarray, " budgets"], curve: Sequence[Matrix], at: float) -> Matrix:
    """The curve's matrix at log(labels) = `at`."""
    right = int(np.clip(np.searchsorted(logs, at), 1, len(logs) - 1))
    share = (at - logs[right - 1]) / (logs[right] - logs[right - 1])
    return (1 - share) * curve[right - 1] + share * curve[right]


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased probability that at least one of k samples is correct (Chen et al. 2021, equation 1), in exact integers.

    Raises ValueError unless 0 <= num_correct <= num_samples and 1 <= k <= num_samples.
    """
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"num_correct must be within 0..{num_samples}, given {num_correct}")
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} needs at least {k} samples (k >= 1), given {num_samples}")
    return 1.0 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def majority(answers: Sequence[str | None], correct: Sequence[bool]) -> float:
    """Probability that the answer most samples agree on is right (maj@k; Wang et al. 2022, self-consistency).

    One vote a sample; equal answers vote together. A tie is decided by chance, so its expected value counts. Samples
    without an answer (None) have no vote unless none has one. Raises ValueError without any sample.
    """
    if not answers or len(answers) != len(correct):
        raise ValueError(f"{len(answers)} answers and {len(correct)} verdicts: give one of each for every sample")
    votes: dict[str | None, list[bool]] = defaultdict(list)
    for answer, right in zip(answers, correct, strict=True):
        votes[answer].append(right)
    if len(votes) > 1:
        votes.pop(None, None)
    most = max(map(len, votes.values()))
    # The same spelling can be judged twice differently, when a grader ran out of time.
    winners = [sum(rights) / len(rights) for rights in votes.values() if len(rights) == most]
    return sum(winners) / len(winners)


def _variance(
    matrix: Float[np.ndarray, "*studies seeds problems"],
) -> tuple[Float[np.ndarray, "*studies"], Float[np.ndarray, "*studies"], Float[np.ndarray, "*studies"]]:
    """Grand mean, its variance and degrees of freedom, for each of any number of studies."""
    num_seeds, num_problems = matrix.shape[-2:]
    mean = np.asarray(matrix.mean((-2, -1)))
    rows, columns = matrix.mean(-1), matrix.mean(-2)
    mean_square_problems = num_seeds * columns.var(-1, ddof=1)
    df_seeds, df_problems = num_seeds - 1, num_problems - 1
    if num_seeds == 1:
        return mean, np.asarray(mean_square_problems / num_problems), np.full(mean.shape, float(df_problems))
    residual = matrix - rows[..., None] - columns[..., None, :] + mean[..., None, None]
    mean_square_residual = (residual**2).sum((-2, -1)) / (df_seeds * df_problems)
    # Seeds that agree more closely than the residual lets them do so by luck: without a floor, means that happen to be
    # equal would give an interval of no width.
    floor = float(special.chdtri(df_seeds, 0.95)) / df_seeds
    seeds = np.maximum(num_problems * rows.var(-1, ddof=1), floor * mean_square_residual)
    problems = np.maximum(mean_square_problems - mean_square_residual, 0.0)
    variance = np.asarray((seeds + problems) / (num_seeds * num_problems))
    # Satterthwaite at the observed seed mean square covers 92 % at three seeds: one that is small by chance narrows the
    # interval and raises the degrees of freedom at once. 6 is derived in docs/statistics.md.
    inflated = (1 + 6 / df_seeds) * seeds
    denominator = inflated**2 / df_seeds + problems**2 / df_problems
    flat = denominator == 0
    df = np.where(flat, df_problems, (inflated + problems) ** 2 / np.where(flat, 1.0, denominator))
    return mean, variance, np.asarray(df)


def _two_sided(value: float, error: float, df: float) -> float:
    """Two-sided t probability; a sample without any spread gives 1 at exactly 0 and 0 elsewhere."""
    if error == 0:
        return 1.0 if value == 0 else 0.0
    return float(2 * special.stdtr(df, -abs(value) / error))
