"""The sentences follow from the numbers, whatever they are."""

from pathlib import Path
from typing import Any

import pytest
from made_run import compared

from headwater.report.directory import Run
from headwater.report.headline import further, headlines, mean_over, points, prediction, sentence, signed


def bill(labels: int, tokens: int) -> dict[str, Any]:
    return {
        "labels": {"distinct": labels, "revealed": 2 * labels},
        "cost": {"tokens": {"sampled": tokens - 10, "trained": 10}, "flops": 1.0, "seconds": 1.0},
    }


def a_run(comparisons: list[dict[str, Any]], **arms: dict[str, Any]) -> Run:
    results = {"comparisons": comparisons, "arms": {name: {"seeds": {"0": seed}} for name, seed in arms.items()}}
    return Run(Path(), {}, "", {}, results, [], {}, {}, 0, [])


def said(row: dict[str, Any], **arms: dict[str, Any]) -> str:
    return sentence(a_run([row], **arms), row).text


def test_a_is_better():
    row = compared("bridge", "direct", 0.0814, 0.0196, num_seeds=5)
    assert said(row, bridge=bill(128, 2700), direct=bill(128, 1000)) == (
        "bridge beats direct by 8.1 points [6.2, 10.1] on chains at 128 labels, 5 seeds; it costs 2.7 times the tokens."
    )


def test_b_is_better_turns_the_sentence_round():
    row = compared("bridge", "direct", -0.03, 0.01)
    assert said(row, bridge=bill(128, 4000), direct=bill(128, 1000)) == (
        "direct beats bridge by 3.0 points [2.0, 4.0] on chains at 128 labels, 3 seeds; it costs 0.25 times the tokens."
    )


def test_not_distinguishable_is_said_in_words():
    row = compared("bridge", "direct", 0.038, 0.059)
    assert said(row, bridge=bill(32, 1000), direct=bill(32, 1010)) == (
        "bridge and direct are not distinguishable on chains at 32 labels, 3 seeds: the difference is +3.8 points "
        "[−2.1, +9.7]; bridge costs about as many tokens."
    )


def test_holm_can_overrule_an_interval_without_zero():
    row = compared("a", "b", 0.03, 0.01) | {"verdict": "not distinguishable"}
    assert said(row) == (
        "a and b are not distinguishable on chains, 3 seeds: the difference is +3.0 points [+2.0, +4.0]."
    )


def test_one_seed_speaks_of_problems_only():
    row = compared("bridge", "base student", 0.2, 0.01, num_seeds=1, over="problems")
    assert said(row, bridge=bill(128, 1000)) == (
        "bridge beats base student by 20.0 points [19.0, 21.0] on chains with 128 labels, 1 seed; "
        "over problems only: another training run could come out differently."
    )


def test_different_label_counts_are_both_named():
    row = compared("a", "b", 0.2, 0.01)
    assert " on chains with 64 labels against 1 label, 3 seeds" in said(row, a=bill(64, 100), b=bill(1, 5000))
    assert "it costs 0.02 times" in said(row, a=bill(64, 100), b=bill(1, 5000))
    assert "it costs 50 times" in said(row, a=bill(64, 5000), b=bill(1, 100))


@pytest.mark.parametrize(
    ("outcome", "difference", "why"),
    [
        ("confirmed", 0.0, "the data rule out a larger difference"),
        ("refuted", 0.1, "the data show a larger difference"),
        ("undecided", 0.02, "the data rule out neither; this confirms nothing"),
    ],
)
def test_predictions_are_answered_with_their_margin(outcome: str, difference: float, why: str):
    row = compared("a", "b", difference, 0.01, margin=0.02, outcome=outcome)
    assert prediction(row) == (
        f"Predicted: a − b is at most +2.0 points on chains. {outcome.capitalize()}: the difference is "
        f"{signed(difference)} points [{signed(difference - 0.01)}, {signed(difference + 0.01)}]; {why}."
    )


def test_no_margin_no_prediction():
    assert prediction(compared("a", "b", 0.1, 0.01)) is None
    assert prediction(compared("a", "b", 0.1, 0.01, margin=None, outcome=None)) is None


def test_the_first_pair_is_the_headline_on_every_task():
    rows = [
        compared("a", "b", 0.1, 0.01),
        compared("a", "b", 0.1, 0.2) | {"task": "words"},
        compared("a", "c", 0.1, 0.01),
    ]
    run = a_run(rows)
    assert [s.verdict for s in headlines(run)] == ["a better", "not distinguishable"]
    assert [s.lead for s in further(run)] == ["a beats c by 10.0 points"]
    assert headlines(a_run([])) == further(a_run([])) == []


def test_over_budgets_the_largest_one_is_the_headline():
    rows = [compared(f"bridge@{n}", f"direct@{n}", n / 1000, 0.005) for n in (16, 128, 64)]
    run = a_run([*rows, compared("bridge@128", "base student", 0.1, 0.01)])
    assert [s.lead for s in headlines(run)] == ["bridge@128 beats direct@128 by 12.8 points"]
    assert [s.lead.split(" by ")[0] for s in further(run)] == [
        "bridge@16 beats direct@16", "bridge@64 beats direct@64", "bridge@128 beats base student",
    ]  # fmt: skip  # a table: several entries a line


def test_numbers_read_well():
    assert (points(0.08149), points(-0.021), points(-0.0001)) == ("8.1", "−2.1", "0.0")
    assert (signed(0.038), signed(-0.021), signed(-0.0001), signed(0)) == ("+3.8", "−2.1", "+0.0", "+0.0")
    arm = {"seeds": {"0": bill(10, 100), "1": bill(20, 300)}}
    assert mean_over(list(arm["seeds"].values()), "labels", "revealed") == 30
    assert mean_over(list(arm["seeds"].values()), "cost", "tokens") == 200
