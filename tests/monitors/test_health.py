from typing import Any

import pytest

from headwater.monitors.health import repetition, warnings

STEPS = 20


def rows(**metrics: Any) -> list[dict[str, Any]]:
    """20 steps; a metric is a constant, or a function of the step."""
    return [{"step": i, **{k: v(i) if callable(v) else v for k, v in metrics.items()}} for i in range(STEPS)]


def falls(at: int, before: float, after: float):
    return lambda step: before if step < at else after


HEALTHY = {
    "policy/entropy": lambda i: 0.5 - 0.02 * i,
    "completion/len_mean": lambda i: 20 + 2 * i,
    "reward/mean": lambda i: 0.2 + 0.02 * i,
    "completion/frac_truncated": 0.02,
    "completion/repetition": 0.01,
    "reward/frac_groups_zero_std": 0.5,
    "policy/sampler_mismatch_kl": 1e-8,
}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        # The mean of steps 6..10 is the first that lies below a tenth of 0.5.
        ({"policy/entropy": falls(6, 0.5, 0.01)}, "entropy fell below a tenth of its start at step 10: 0.01"),
        # A spike of one step is no collapse, and a student as sure as its teacher neither.
        ({"policy/entropy": lambda i: 0.0 if i == 9 else 0.5}, None),
        ({"policy/entropy": falls(6, 0.5, 0.01), "teacher/entropy": 0.02}, None),
        ({"policy/entropy": falls(6, 0.5, 0.001), "teacher/entropy": 0.02}, "a tenth of its teacher's at step 10"),
        ({"completion/len_mean": falls(5, 20, 50), "reward/mean": 0.2}, "length doubled without reward at step 8"),
        ({"completion/len_mean": falls(5, 20, 2), "reward/mean": 0.2}, "length halved without reward at step 7"),
        ({"completion/len_mean": falls(5, 20, 50)}, None),
        ({"completion/frac_truncated": falls(10, 0.0, 0.4)}, "40% of completions are cut, above a tenth since step 11"),
        ({"completion/frac_truncated": falls(10, 0.4, 0.0)}, None),
        ({"completion/repetition": falls(10, 0.05, 0.5)}, "repeat themselves (23% of their tail) at step 11"),
        ({"completion/repetition": 0.25}, None),
        ({"reward/frac_groups_zero_std": 0.95}, "95% of groups carry no gradient at step 4"),
        # Reward means rise by 0.02 a step. A gap that takes 0.018 of it: at step 10 it has grown by 6 x 0.018 = 0.108.
        (
            {"audit/reward_gap": lambda i: 0.018 * i},
            "reward up by 0.12, but its gap to the second grader by 0.11 at step 10",
        ),
        # Of an honest rise a strict second grader misses a share: 0.135 of 0.3 in the end.
        ({"audit/reward_gap": lambda i: 0.1 + 0.009 * i}, None),
        ({"audit/reward_gap": 0.6}, None),
        ({"audit/reward_gap": lambda i: 0.018 * i, "reward/mean": 0.5, "completion/len_mean": 20}, None),
        ({"policy/sampler_mismatch_kl": 0.1}, "sampler and trainer disagree (KL 0.1) at step 4"),
    ],
)
def test_warnings(changes, words):
    found = warnings(rows(**{**HEALTHY, **changes}))
    assert (found == []) if words is None else (len(found) == 1 and words in found[0]), found


def test_a_stage_of_a_few_steps_is_not_judged():
    assert warnings(rows(**{**HEALTHY, "reward/frac_groups_zero_std": 1.0})[:4]) == []


def test_repetition():
    assert repetition([]) == 0 and repetition(list(range(300))) == 0 and repetition([7] * 7) == 0
    assert repetition([7] * 30) == pytest.approx(22 / 23)  # 23 runs of 8, one distinct
    # Two rounds of 20 tokens: 33 runs, of which the 13 that begin in the second round have come before.
    assert repetition(list(range(20)) * 2) == pytest.approx(13 / 33)
    assert repetition([7] * 30 + list(range(1000, 1256))) == 0  # only the tail counts
