"""What is wrong with a stage, read off its metrics rows alone; docs/metrics.md ("Health") says why and what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

WINDOW = 5
"""Rows that are averaged before anything is compared, so that one odd batch warns nobody."""
TAIL_TOKENS, RUN_TOKENS = 256, 8

Rows = Sequence[Mapping[str, Any]]


def repetition(completion: Sequence[int]) -> float:
    """Share of the runs of 8 tokens among a completion's last 256 that occurred before in them; linear time."""
    tail = completion[-TAIL_TOKENS:]
    runs = [tuple(tail[i : i + RUN_TOKENS]) for i in range(len(tail) - RUN_TOKENS + 1)]
    return 1.0 - len(set(runs)) / len(runs) if runs else 0.0


def warnings(rows: Rows) -> list[str]:
    """One line for each thing that went out of its healthy range in a stage, with the step where it first did."""
    checks = (_entropy, _length, _truncation, _repetition, _dead_groups, _mismatch, _gamed)
    return [line for check in checks if (line := check(rows))]


def _means(rows: Rows, name: str) -> list[tuple[int, float]]:
    """(step, mean of the metric over the window that ends there), as far as there are whole windows."""
    seen = [(row["step"], float(row[name])) for row in rows if isinstance(row.get(name), int | float)]
    spans = [seen[i - WINDOW : i] for i in range(WINDOW, len(seen) + 1)]
    return [(span[-1][0], sum(value for _, value in span) / WINDOW) for span in spans]


def _entropy(rows: Rows) -> str | None:
    ours, theirs = _means(rows, "policy/entropy"), dict(_means(rows, "teacher/entropy"))
    for step, value in ours:
        # A student becomes as sure as its teacher: that is no collapse.
        allowed = min(ours[0][1], theirs.get(step, ours[0][1])) / 10
        if value < allowed:
            whose = "its teacher's" if step in theirs and theirs[step] < ours[0][1] else "its start"
            return (
                f"entropy fell below a tenth of {whose} at step {step}: {value:.3g}; "
                "lower the learning rate or raise kl_coef"
            )
    return None


def _length(rows: Rows) -> str | None:
    lengths, rewards = _means(rows, "completion/len_mean"), dict(_means(rows, "reward/mean"))
    for step, value in lengths:
        first, before = lengths[0][1], rewards.get(lengths[0][0], 0.0)
        if not first / 2 <= value <= 2 * first and rewards.get(step, before) <= before + 0.02:
            change = "doubled" if value > first else "halved"
            return (
                f"length {change} without reward at step {step}: {first:.0f} -> {value:.0f} tokens; "
                "look at the samples for a lost end token or empty answers"
            )
    return None


def _first_above(rows: Rows, name: str, limit: float) -> tuple[int, float] | None:
    return next(((step, value) for step, value in _means(rows, name) if value > limit), None)


def _truncation(rows: Rows) -> str | None:
    last = _means(rows, "completion/frac_truncated")[-1:]
    found = _first_above(rows, "completion/frac_truncated", 0.1)
    if found and last[0][1] > 0.1:
        return f"{last[0][1]:.0%} of completions are cut, above a tenth since step {found[0]}; raise max_new_tokens"
    return None


def _repetition(rows: Rows) -> str | None:
    start = _means(rows, "completion/repetition")[:1]
    found = _first_above(rows, "completion/repetition", max(0.2, 2 * start[0][1])) if start else None
    if found:
        return (
            f"completions repeat themselves ({found[1]:.0%} of their tail) at step {found[0]}; lower the learning rate"
        )
    return None


def _dead_groups(rows: Rows) -> str | None:
    found = _first_above(rows, "reward/frac_groups_zero_std", 0.9)
    if found:
        return (
            f"{found[1]:.0%} of groups carry no gradient at step {found[0]}: problems too easy or too hard; "
            "use redraws, other problems, or stop here (gate.min_mixed)"
        )
    return None


def _mismatch(rows: Rows) -> str | None:
    found = _first_above(rows, "policy/sampler_mismatch_kl", 0.01)
    if found:
        return f"sampler and trainer disagree (KL {found[1]:.2g}) at step {found[0]}: another template, dtype or model?"
    return None


def _gamed(rows: Rows) -> str | None:
    gaps, rewards = _means(rows, "audit/reward_gap"), dict(_means(rows, "reward/mean"))
    for step, gap in gaps:
        rise, growth = rewards[step] - rewards[gaps[0][0]], gap - gaps[0][1]
        # A second grader that is strict misses its share of an honest rise too, but not most of it.
        if rise > 0.02 and growth > max(0.1, rise / 2):
            return (
                f"reward up by {rise:.2f}, but its gap to the second grader by {growth:.2f} at step {step}; look at "
                "the samples for what is rewarded and not right"
            )
    return None
