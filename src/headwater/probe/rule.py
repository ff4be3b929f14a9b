"""From measurements to a recommendation: expected scores of the direct route and of every share upstream.

docs/probe.md has the formulas, where each constant comes from, and on which pairs the rule was right and wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from headwater.config import SHARES

CUT = 0.25
"""Part of a rollout that is handed over before somebody else goes on with it."""
REWARD_HALF = 4.0
"""Labels at which reward has done half of what it can do."""
PROMPT_HALF = 8.0
"""Distinct prompts at which the dense stages have carried half of what they can carry."""
CARRY = 0.6
"""Part of the teacher's lead in log-accuracy, on its own way of working, that dense supervision gives to a student who
goes that way as well as its own."""
FOLLOWING = 3.0
"""Power of (accuracy the teacher's way / its own way) with which that part shrinks for a student who does not."""
WHOLE = 1.1
"""A rate from `CUT` of right rollouts on stands for its power on the whole: they were right so far."""
MODEL_ERROR = 0.03
"""Standard deviation of what the rule leaves unexplained where it was fitted."""
DRAWS = 2000


@dataclass(frozen=True)
class Measured:
    """Shares of right completions by problem [problems]; nan where there was no rollout to go on with.

    `teacher_path`, `followed`: teacher and student go on with the beginnings of the teacher's rollouts; `student_path`:
    the student goes on with those of its own. Of a policy that reward will train only the right rollouts count: reward
    makes the policy that (arXiv:2605.12483, the optimum of equation 1 at small beta).
    """

    student: Float[np.ndarray, " problems"]
    teacher_path: Float[np.ndarray, " problems"]
    followed: Float[np.ndarray, " problems"]
    student_path: Float[np.ndarray, " problems"]


@dataclass(frozen=True)
class Situation:
    """What there is to spend: labels, prompts of the dense stages (None: those of the upstream labels), whether the
    teacher will be trained here, and the fewest problems that a step takes upstream and on the student."""

    labels: int
    dense_prompts: int | None = None
    trained: bool = True
    least: tuple[int, int] = (1, 1)


def feasible(situation: Situation, grid: tuple[float, ...] = SHARES) -> list[float]:
    """Shares that leave each side no label or enough for a step."""

    def fits(share: float) -> bool:
        up = int(situation.labels * share)
        return all(n == 0 or n >= least for n, least in zip((up, situation.labels - up), situation.least, strict=True))

    return [share for share in grid if fits(share)]


def judge(measured: Measured, situation: Situation, grid: tuple[float, ...] = SHARES) -> dict[str, Any]:
    """Expected scores with 95 % intervals (problems resampled, `MODEL_ERROR` added to differences) and what follows.

    Returns `{"reason", "limits", "direct": [x, low, high], "shares": {SHARE: [x, low, high]}, "share", "chance":
    {SHARE: x}, "difference": [x, low, high], "regime": "upstream" | "direct" | "cannot tell", "losses", "limiting"}`.
    `share` has the highest expected score, the largest of equals; `chance` is how often it does so in resampled
    problems; `difference` is the largest share less the direct route. Raises ValueError when no share is feasible.
    """
    shares = feasible(situation, grid)
    if not shares:
        raise ValueError(f"{situation.labels} labels are fewer than a step takes: {situation.least}")
    rng = np.random.default_rng(0)
    count = len(measured.student)
    rows = np.concatenate([np.arange(count)[None], rng.integers(0, count, (DRAWS, count))])
    limits = _limits(measured, rows, situation.trained)
    direct = _after_reward(limits, limits["student"], situation.labels)
    scores = np.array([expected(limits, situation, share) for share in shares])
    best = len(shares) - 1 - int(np.argmax(scores[::-1, 0]))
    difference = scores[-1] - direct
    noisy = np.concatenate([difference[:1], difference[1:] + rng.normal(0, MODEL_ERROR, DRAWS)])
    _, low, high = _interval(noisy)
    winners = len(shares) - 1 - np.argmax(scores[::-1, 1:], 0)
    ways = (measured.teacher_path, measured.followed, measured.student_path)
    known = not any(np.isnan(way).all() for way in ways)
    losses = _losses({name: x[0] for name, x in limits.items()}, situation)
    found = {
        "limits": {name: _interval(x) for name, x in limits.items()},
        "direct": _interval(direct),
        "shares": {f"{share:g}": _interval(x) for share, x in zip(shares, scores, strict=True)},
        "share": shares[best],
        "chance": {f"{share:g}": float((winners == i).mean()) for i, share in enumerate(shares)},
        "difference": _interval(noisy),
        "regime": "upstream" if low > 0 and known else "direct" if high < 0 and known else "cannot tell",
        "losses": losses,
        "limiting": max(losses, key=lambda name: losses[name]),
    }
    return {"reason": reason(found), **found}


def reason(found: dict[str, Any]) -> str:
    """Why this share, in a sentence."""
    limits, chosen = found["limits"], f"{found['share']:g}"
    others = ", ".join(f"{name} {x[0]:.3f}" for name, x in found["shares"].items() if name != chosen)
    said = {
        "upstream": "labels upstream win",
        "direct": "direct GRPO wins",
        "cannot tell": "the sample cannot tell whether labels upstream win",
    }[found["regime"]]
    low, high = found["difference"][1:]
    return (
        f"expected score {found['shares'][chosen][0]:.3f} (others: {others or 'none fits'}; direct "
        f"{found['direct'][0]:.3f}): the teacher reaches {limits['teacher'][0]:.2f} its own way, the student "
        f"{limits['followed'][0]:.2f} that way and {limits['own'][0]:.2f} its own; {said} "
        f"({found['difference'][0]:+.3f} [{low:+.3f}, {high:+.3f}]), and the share is best in "
        f"{found['chance'][chosen]:.0%} of resampled problems"
    )


def expected(limits: dict[str, Any], situation: Situation, share: float) -> Any:
    """Expected score of the student: `share` of the labels upstream, a bridge, the rest in its own GRPO."""
    up = int(situation.labels * share)
    prompts = situation.dense_prompts or up or situation.labels
    bridged = limits["student"] + (limits["bridge"] - limits["student"]) * _carried(situation, up, prompts)
    return _after_reward(limits, bridged, situation.labels - up)


def _carried(situation: Situation, labels: int, prompts: int) -> float:
    reward = _half(labels, REWARD_HALF) if situation.trained else 1.0
    return reward * _half(prompts, PROMPT_HALF)


def _after_reward(limits: dict[str, Any], start: Any, labels: int) -> Any:
    """Reward moves a student towards its own limit, and does nothing for one that is beyond it."""
    return start + np.maximum(0.0, limits["own"] - start) * _half(labels, REWARD_HALF)


def _half(amount: int, half: float) -> float:
    return amount / (amount + half)


def _limits(measured: Measured, rows: np.ndarray, trained: bool) -> dict[str, np.ndarray]:
    """Scores with labels and prompts without end, for each row of resampled problems."""
    teacher, followed = (
        _means(x, rows) ** (WHOLE if trained else 1.0) for x in (measured.teacher_path, measured.followed)
    )
    own = _means(measured.student_path, rows) ** WHOLE
    follows = np.minimum(1.0, np.divide(followed, own, out=np.ones_like(own), where=own > 0))
    # Below the teacher a student gains a part of the way in log-accuracy; above it, imitation takes it down.
    carry = np.where(teacher > followed, CARRY * follows**FOLLOWING, 1.0)
    return {
        "student": _means(measured.student, rows),
        "teacher": teacher,
        "followed": followed,
        "own": own,
        "bridge": followed ** (1 - carry) * teacher**carry,
    }


def _means(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Mean over the problems of each row that have a value; 0 where none has."""
    drawn = values[rows]
    there = ~np.isnan(drawn)
    return np.where(there, drawn, 0.0).sum(1) / np.maximum(there.sum(1), 1)


def _losses(limits: dict[str, float], situation: Situation) -> dict[str, float]:
    """Where the whole route upstream loses points, from 1 down to its expected score."""
    gain = limits["bridge"] - limits["student"]
    prompts = situation.dense_prompts or situation.labels
    reward = _half(situation.labels, REWARD_HALF) if situation.trained else 1.0
    return {
        "teacher": float(1 - limits["teacher"]),
        "student": float(limits["teacher"] - limits["bridge"]),
        "labels": float(gain * (1 - reward)),
        "prompts": float(gain * reward * (1 - _half(prompts, PROMPT_HALF))),
    }


def _interval(draws: np.ndarray) -> list[float]:
    """The estimate, which stands first, and the 95 % quantiles of the rest."""
    low, high = np.quantile(draws[1:], [0.025, 0.975])
    return [float(draws[0]), float(low), float(high)]
