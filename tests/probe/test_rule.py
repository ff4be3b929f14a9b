"""The probe's rule by hand: expected scores, feasible shares, regimes on both sides of the boundary."""

import numpy as np
import pytest

from headwater.probe.rule import (
    CARRY,
    FOLLOWING,
    PROMPT_HALF,
    REWARD_HALF,
    WHOLE,
    Measured,
    Situation,
    expected,
    feasible,
    judge,
)


def constant(student: float, teacher_path: float, followed: float, student_path: float, count: int = 50) -> Measured:
    return Measured(*(np.full(count, x) for x in (student, teacher_path, followed, student_path)))


def reward(labels: float) -> float:
    return labels / (labels + REWARD_HALF)


def carried(prompts: float) -> float:
    return prompts / (prompts + PROMPT_HALF)


def test_limits_and_scores_by_hand():
    found = judge(constant(0.1, 0.8, 0.4, 0.3), Situation(64))
    teacher, followed, own = 0.8**WHOLE, 0.4**WHOLE, 0.3**WHOLE
    bridge = followed ** (1 - CARRY) * teacher**CARRY
    values = {name: x[0] for name, x in found["limits"].items()}
    assert values == pytest.approx(
        {"student": 0.1, "teacher": teacher, "followed": followed, "own": own, "bridge": bridge}
    )
    assert found["direct"][0] == pytest.approx(0.1 + (own - 0.1) * reward(64))
    assert found["shares"]["1"][0] == pytest.approx(0.1 + (bridge - 0.1) * reward(64) * carried(64))
    assert found["shares"]["0"][0] == found["direct"][0]  # an untrained teacher's bridge is taken to do nothing
    losses = found["losses"]
    assert 1 - sum(losses.values()) == pytest.approx(found["shares"]["1"][0])
    assert (found["share"], found["regime"], found["chance"]["1"]) == (1.0, "upstream", 1.0)


def test_the_less_a_student_follows_the_less_it_takes():
    found = judge(constant(0.1, 0.8, 0.2, 0.4), Situation(64))["limits"]
    teacher, followed, own = 0.8**WHOLE, 0.2**WHOLE, 0.4**WHOLE
    carry = CARRY * (followed / own) ** FOLLOWING
    assert found["bridge"][0] == pytest.approx(followed ** (1 - carry) * teacher**carry)
    lost = judge(constant(0.1, 0.8, 0.2, 0.0), Situation(64))["limits"]  # nothing of its own to compare with
    assert lost["bridge"][0] == pytest.approx(followed ** (1 - CARRY) * teacher**CARRY)


def test_half_and_half_is_a_bridge_and_then_the_students_own_reward():
    limits = {"student": 0.1, "own": 0.6, "bridge": 0.5}
    bridged = 0.1 + 0.4 * reward(32) * carried(32)
    assert expected(limits, Situation(64), 0.5) == pytest.approx(bridged + (0.6 - bridged) * reward(32))
    beyond = {**limits, "own": 0.2}
    assert expected(beyond, Situation(64), 0.5) == pytest.approx(bridged)  # reward has nothing left to do


def test_unlabelled_prompts_help_where_prompts_are_few():
    pool, free = (judge(constant(0.1, 0.8, 0.4, 0.3), Situation(8, prompts)) for prompts in (None, 1024))
    assert pool["limiting"] == "prompts" or pool["losses"]["prompts"] > 5 * free["losses"]["prompts"]
    assert free["shares"]["1"][0] > pool["shares"]["1"][0] + 0.1


@pytest.mark.parametrize(
    ("measured", "regime"),
    [
        (constant(0.1, 0.9, 0.6, 0.3), "upstream"),
        (constant(0.3, 0.4, 0.8, 0.8), "direct"),  # a teacher that is worse than its student
        (constant(0.2, 0.4, 0.1, 0.6), "direct"),  # one whose ways the student cannot follow
        (constant(0.1, 0.4, 0.4, 0.4), "cannot tell"),  # the same model
    ],
)
def test_regimes(measured: Measured, regime: str):
    assert judge(measured, Situation(256))["regime"] == regime


def test_a_given_teacher_needs_no_labels_and_no_extrapolation():
    found = judge(constant(0.1, 0.5, 0.3, 0.2), Situation(4, 1024, trained=False))
    assert found["limits"]["teacher"][0] == pytest.approx(0.5) and found["losses"]["labels"] == 0


def test_feasible_shares():
    assert feasible(Situation(64, least=(16, 16))) == [0, 0.25, 0.5, 0.75, 1]
    assert feasible(Situation(32, least=(16, 16))) == [0, 0.5, 1]
    assert feasible(Situation(16, least=(16, 8))) == [0, 1]
    with pytest.raises(ValueError, match="fewer than a step takes"):
        judge(constant(0.1, 0.5, 0.3, 0.2), Situation(8, least=(16, 16)))


def test_problems_without_rollouts_are_left_out_and_intervals_cover_the_noise():
    rng = np.random.default_rng(1)
    draws = [rng.binomial(8, p, 64) / 8 for p in (0.2, 0.8, 0.5, 0.4)]
    draws[2][:30] = np.nan
    found = judge(Measured(*draws), Situation(64))
    assert found["limits"]["followed"][0] == pytest.approx(np.nanmean(draws[2]) ** WHOLE)
    for value, low, high in found["limits"].values():
        assert low < value < high and high - low < 0.25
    none = judge(Measured(draws[0], *(np.full(64, np.nan) for _ in range(3))), Situation(64))
    assert none["regime"] == "cannot tell" and none["limits"]["bridge"][0] == 0
