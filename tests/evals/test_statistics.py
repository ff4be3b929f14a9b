"""Hand values, agreement with scipy, and coverage measured by simulation (docs/statistics.md quotes the slow one)."""

from itertools import combinations, product

import numpy as np
import pytest
from scipy import stats

from headwater.evals import statistics
from headwater.evals.statistics import (
    Estimate,
    Match,
    gap_recovery,
    holm,
    labels_to_match,
    mean_interval,
    noninferior,
    paired_difference,
    pass_at_k,
    verdict,
)

HAND = np.array([[0.0, 2.0], [2.0, 4.0], [4.0, 12.0]])  # rows mean 1, 3, 8; columns mean 2, 6


def estimate(value: float, low: float, high: float) -> Estimate:
    return Estimate(value, (low, high), 0.5, (high - low) / 4, 50.0, 3, 100, "seeds and problems")


def test_crossed_interval_by_hand():
    # MS_seeds = 2 * 13 = 26, MS_problems = 3 * 8 = 24, residuals 1 -1 1 -1 -2 2 so MS_residual = 12 / 2 = 6.
    # Variance = (24 + 20) / 6. Degrees of freedom at the doubled 26: (24 + 52 - 6)^2 / (24^2/1 + 52^2/2 + 6^2/2).
    got = mean_interval(HAND)
    df = 70**2 / (576 + 1352 + 18)
    assert got.value == pytest.approx(4.0)
    assert got.standard_error == pytest.approx((44 / 6) ** 0.5)
    assert got.degrees_of_freedom == pytest.approx(df)
    half = stats.t.ppf(0.975, df) * (44 / 6) ** 0.5
    assert got.ci95 == pytest.approx((4 - half, 4 + half))
    assert got.p_value == pytest.approx(2 * stats.t.sf(4 / (44 / 6) ** 0.5, df))
    assert (got.num_seeds, got.num_problems, got.over) == (3, 2, "seeds and problems")


def test_negative_seed_component_counts_as_zero():
    # Every seed has the same mean, so MS_seeds = 0 and the interval is the t interval over per-problem means.
    matrix = np.array([[0.0, 1.0, 0.5], [1.0, 0.5, 0.0], [0.75, 0.25, 0.5]])
    got = mean_interval(matrix)
    means = matrix.mean(0)
    assert got.standard_error == pytest.approx(means.std(ddof=1) / 3**0.5)
    assert got.degrees_of_freedom == pytest.approx(2)


def test_one_seed_is_the_paired_t_test_over_problems():
    rng = np.random.default_rng(0)
    a, b = rng.random((1, 40)), rng.random((1, 40))
    got, want = paired_difference(a, b), stats.ttest_rel(a[0], b[0])
    assert got.over == "problems"
    assert got.p_value == pytest.approx(want.pvalue)  # type: ignore -- scipy result
    assert got.ci95 == pytest.approx(tuple(want.confidence_interval()))  # type: ignore -- likewise


def test_shared_problem_difficulty_cancels_and_sign_follows_a():
    rng = np.random.default_rng(1)
    difficulty = rng.random((1, 50))
    noise = rng.normal(0, 0.01, (2, 3, 50))
    a, b = difficulty + 0.1 + noise[0], difficulty + noise[1]
    got = paired_difference(a, b)
    assert got.value == pytest.approx(0.1, abs=0.005)
    assert got.standard_error < 0.005 < 0.1 * mean_interval(a).standard_error * 5
    assert paired_difference(b, a).ci95 == pytest.approx((-got.ci95[1], -got.ci95[0]))
    assert verdict(got, got.p_value) == "a better"
    assert verdict(paired_difference(b, a), got.p_value) == "b better"


def test_equal_arms_are_not_distinguishable_and_a_flat_gap_is():
    same = np.full((3, 10), 0.25)
    got = paired_difference(same, same)
    assert (got.value, got.ci95, got.p_value) == (0.0, (0.0, 0.0), 1.0)
    assert verdict(got, got.p_value) == "not distinguishable"
    assert paired_difference(np.ones((3, 10)), np.zeros((3, 10))).p_value == 0.0


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (np.zeros((2, 3)), np.zeros((3, 3)), "compare the seeds and problems"),
        (np.zeros((3, 1)), np.zeros((3, 1)), "give >= 1 x >= 2"),
        (np.full((2, 3), np.nan), np.zeros((2, 3)), "every seed must be scored"),
    ],
)
def test_unusable_matrices_are_refused(a, b, words):
    with pytest.raises(ValueError, match=words):
        paired_difference(a, b)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []
    with pytest.raises(ValueError, match="must lie in"):
        holm([0.5, 1.5])


def test_verdict_needs_the_adjusted_p():
    assert verdict(estimate(0.1, 0.01, 0.19), 0.06) == "not distinguishable"
    assert verdict(estimate(-0.1, -0.19, -0.01), 0.049) == "b better"


def test_noninferior_confirms_only_inside_the_margin():
    assert noninferior(estimate(0.0, -0.05, 0.05), 0.05).outcome == "confirmed"
    assert noninferior(estimate(0.0, -0.05, 0.05), 0.02).outcome == "undecided"
    assert noninferior(estimate(0.1, 0.03, 0.17), 0.02).outcome == "refuted"
    assert noninferior(estimate(0.1, 0.03, 0.17), 0.2).outcome == "confirmed"
    # (0 - 0.05) / 0.025 = -2 with 50 degrees of freedom
    assert noninferior(estimate(0.0, -0.05, 0.05), 0.05).p_value == pytest.approx(stats.t.cdf(-2, 50))
    assert noninferior(estimate(0.1, 0.05, 0.15), 0.05).p_value == pytest.approx(stats.t.cdf(2, 50))
    with pytest.raises(ValueError, match="margin must be"):
        noninferior(estimate(0.0, -0.05, 0.05), -0.1)


def test_gap_recovery_by_hand():
    base = np.array([[0.0, 0.2, 0.1], [0.1, 0.1, 0.1]])
    teacher = base + 0.8
    student = base + np.array([[0.3, 0.4, 0.5], [0.4, 0.4, 0.4]])
    got = gap_recovery(student, base, teacher)
    gain = paired_difference(student, base)  # the gap has no spread, so the ratio is the gain divided by a constant
    assert got.value == pytest.approx(0.5)
    assert got.ci95 == pytest.approx((gain.ci95[0] / 0.8, gain.ci95[1] / 0.8))
    assert got.p_value == pytest.approx(gain.p_value)
    rng = np.random.default_rng(4)
    base = rng.uniform(0.0, 0.3, (3, 20))
    teacher = base + rng.uniform(0.4, 0.7, base.shape)
    half = gap_recovery(base + 0.5 * (teacher - base), base, teacher)  # half of every gap: a ratio without any error
    assert (half.value, half.standard_error) == pytest.approx((0.5, 0.0), abs=1e-12)
    assert gap_recovery(teacher, base, teacher).value == pytest.approx(1.0)


def test_gap_recovery_interval_covers_the_known_ratio():
    rng = np.random.default_rng(5)

    def arm(mean: float, shared: np.ndarray) -> np.ndarray:
        return mean + shared + rng.normal(0, 0.04, (5, 1)) + rng.normal(0, 0.2, (5, 100))

    hits = 0
    for _ in range(1000):
        shared = rng.normal(0, 0.3, (1, 100))
        low, high = gap_recovery(arm(0.5, shared), arm(0.2, shared), arm(0.6, shared)).ci95
        hits += low <= 0.75 <= high
    assert 0.93 <= hits / 1000 <= 0.975


def test_gap_recovery_refuses_a_gap_that_may_be_zero_or_is_negative():
    rng = np.random.default_rng(6)
    base = rng.random((3, 20))
    for teacher in (base + rng.normal(0, 0.1, (3, 20)), base, base - 0.5):
        with pytest.raises(ValueError, match="distinguishably better"):
            gap_recovery(base, base, teacher)


BUDGETS = [16, 64, 256]


def flat(value: float) -> np.ndarray:
    return np.full((3, 20), value)


def test_labels_to_match_interpolates_in_log_labels():
    curve = [flat(0.2), flat(0.4), flat(0.5)]
    for value, labels in ((0.3, 32.0), (0.45, 128.0), (0.4, 64.0)):
        got = labels_to_match(BUDGETS, curve, flat(value))
        assert (got.value, got.low, got.high) == pytest.approx((labels, labels, labels))  # no spread, no doubt
    assert labels_to_match(BUDGETS, curve, flat(0.6)) == Match(None, 256.0, None)
    assert labels_to_match(BUDGETS, curve, flat(0.1)) == Match(None, None, 16.0)
    peak = [flat(0.2), flat(0.6), flat(0.2)]
    got = labels_to_match(BUDGETS, peak, flat(0.4))
    assert (got.value, got.low, got.high) == pytest.approx((32.0, 32.0, 128.0))  # the hull of the two crossings


def test_labels_to_match_inverts_the_paired_test():
    rng = np.random.default_rng(7)
    target = 0.4 + rng.normal(0, 0.1, (5, 200))
    curve = [mean + rng.normal(0, 0.1, (5, 200)) for mean in (0.2, 0.4, 0.6)]
    got = labels_to_match(BUDGETS, curve, target)
    assert got.value is not None and got.low is not None and got.high is not None
    assert 16 < got.low < got.value < got.high < 256
    for labels, right in ((got.value, 0.0), (got.low, 1.0), (got.high, -1.0)):
        i = 0 if labels < 64 else 1
        share = np.log(labels / BUDGETS[i]) / np.log(4)
        there = paired_difference(target, (1 - share) * curve[i] + share * curve[i + 1])
        edge = there.ci95[0] if right > 0 else there.ci95[1]
        assert (edge if right else there.value) == pytest.approx(0.0, abs=0.002)  # a grid step moves the mean by 0.0016


def test_labels_to_match_says_which_end_is_open():
    rng = np.random.default_rng(8)
    curve = [mean + rng.normal(0, 0.1, (3, 50)) for mean in (0.2, 0.4, 0.6)]
    nearly = labels_to_match(BUDGETS, curve, 0.595 + rng.normal(0, 0.1, (3, 50)))
    assert nearly.low is not None and 64 < nearly.low < 256 and nearly.high is None
    low = labels_to_match(BUDGETS, curve, 0.205 + rng.normal(0, 0.1, (3, 50)))
    assert low.low is None and low.high is not None and 16 < low.high < 64
    noisy = labels_to_match(BUDGETS, curve, 0.4 + rng.normal(0, 3.0, (3, 50)))
    assert noisy.low is None and noisy.high is None


@pytest.mark.parametrize(("budgets", "sizes"), [([16], 1), ([0, 16], 2), ([64, 16], 2), ([16, 16], 2), ([16, 64], 3)])
def test_labels_to_match_refuses_unusable_budgets(budgets: list[int], sizes: int):
    with pytest.raises(ValueError, match="rising budgets"):
        labels_to_match(budgets, [flat(0.1)] * sizes, flat(0.1))
    with pytest.raises(ValueError, match="compare the seeds"):
        labels_to_match([16, 64], [flat(0.1), np.zeros((3, 19))], flat(0.1))


def test_pass_at_k_by_hand_and_by_enumeration():
    assert pass_at_k(4, 1, 2) == pytest.approx(0.5)  # 1 - C(3,2)/C(4,2)
    assert pass_at_k(8, 3, 1) == pytest.approx(3 / 8)
    assert (pass_at_k(8, 0, 8), pass_at_k(8, 1, 8), pass_at_k(8, 6, 3)) == (0.0, 1.0, 1.0)
    samples = [1, 1, 0, 0, 0, 0]
    draws = [any(draw) for draw in combinations(samples, 3)]
    assert pass_at_k(6, 2, 3) == pytest.approx(sum(draws) / len(draws))
    for bad in ((4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0)):
        with pytest.raises(ValueError):
            pass_at_k(*bad)


def mean_accuracy(shift: float, variance: float) -> float:
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    return float(weights @ (1 / (1 + np.exp(-shift - variance**0.5 * nodes))) / weights.sum())


def coverage(num_studies: int, num_seeds: int, num_problems: int, seed_sd: float, taste_sd: float, shift: float):
    """Share of studies whose 95 % interval holds the true (difference, mean of a) and the mean half width of the first.

    avg@8 of two arms on a logit scale: problem difficulty N(0, 1.5) shared by the arms, taste (arm x problem), seed
    (arm x seed) and residual N(0, 0.3) effects of each arm's own. a is better by `shift`.
    """
    rng = np.random.default_rng([num_seeds, num_problems, int(100 * seed_sd), int(100 * taste_sd), int(100 * shift)])
    variance = 1.5**2 + taste_sd**2 + seed_sd**2 + 0.3**2
    true_a, true_b = mean_accuracy(shift, variance), mean_accuracy(0.0, variance)
    inside = np.zeros(2)
    width = 0.0
    for chunk in np.array_split(np.arange(num_studies), max(1, num_studies * num_seeds * num_problems // 1_000_000)):
        n = len(chunk)
        difficulty = rng.normal(0, 1.5, (n, 1, num_problems))

        def arm(extra: float, n: int = n, difficulty: np.ndarray = difficulty) -> np.ndarray:
            logit = difficulty + extra + taste_sd * rng.standard_normal((n, 1, num_problems))
            logit = logit + seed_sd * rng.standard_normal((n, num_seeds, 1))
            logit = logit + 0.3 * rng.standard_normal((n, num_seeds, num_problems))
            return rng.binomial(8, 1 / (1 + np.exp(-logit))) / 8

        a, b = arm(shift), arm(0.0)
        for i, (matrix, truth) in enumerate(((a - b, true_a - true_b), (a, true_a))):
            mean, variances, df = statistics._variance(matrix)
            half = stats.t.ppf(0.975, df) * variances**0.5
            inside[i] += (np.abs(mean - truth) <= half).sum()
            width += half.sum() if i == 0 else 0.0
    return inside[0] / num_studies, inside[1] / num_studies, width / num_studies


@pytest.mark.parametrize(("num_seeds", "seed_sd"), [(3, 0.0), (3, 0.3), (10, 0.0), (10, 0.3)])
def test_intervals_cover_and_nulls_are_not_called_different(num_seeds: int, seed_sd: float):
    difference, mean, _ = coverage(2000, num_seeds, 100, seed_sd, 0.7, 0.0)
    assert 0.93 <= difference <= 0.975  # 1 - difference is the rate at which equal arms are called different
    assert 0.93 <= mean <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize(("num_seeds", "num_problems"), list(product((3, 5, 10), (100, 500))))
def test_full_coverage_table(num_seeds: int, num_problems: int):
    for taste_sd, shift, seed_sd in product((0.0, 0.7), (0.0, 0.5), (0.0, 0.05, 0.1, 0.2, 0.5)):
        difference, mean, width = coverage(4000, num_seeds, num_problems, seed_sd, taste_sd, shift)
        cell = f"| {num_seeds} | {num_problems} | {taste_sd} | {shift} | {seed_sd} |"
        print(f"{cell} {difference:.3f} | {mean:.3f} | {width:.4f} |")
        assert 0.925 <= difference <= 0.98, cell
        assert 0.93 <= mean <= 0.97, cell
