"""Overlap of training and evaluation problems: known cases, and the index against all pairs."""

import random
from itertools import product

import pytest

from headwater.tasks import overlap
from headwater.tasks.overlap import overlaps
from headwater.types import Message, Problem


def problem(text: str) -> Problem:
    return Problem((Message("user", text),), "1")


APPLES = "Ann has {} apples and buys {} more apples at the market. How many apples does she have now?"


def test_other_numbers_are_found_and_other_stories_are_not():
    train = [
        problem(APPLES.format(3, 4)),
        problem("A train travels 60 miles in 2 hours. How fast does it go on average?"),
    ]
    test = [problem(APPLES.format(17, 1.5)), problem("Compute the square of the sum of the first ten primes.")]
    found = overlaps(train, test, 0.8)
    assert [(row.train, row.test, row.score) for row in found["numbers"]] == [(train[0].id, test[0].id, 1.0)]
    assert found["words"] == []
    changed = [problem(APPLES.format(3, 4).replace("apples", "pears"))]
    assert overlaps(train, changed, 0.8)["numbers"] == []


def test_the_same_words_are_found_inside_longer_ones_and_in_other_prompts():
    asked = "The sum of two numbers is twelve and their product is thirty five; find the larger of both."
    longer = "Recall the lemma we proved. " + asked + " Then show that it is unique among all of them."
    instruction = "\nPlease reason step by step, and put your final answer within the box."
    train = [problem(longer + instruction), problem("Prove it." + instruction)]
    (row,) = overlaps(train, [problem(asked)], 0.8)["words"]
    assert (row.train, row.score) == (train[0].id, 1.0)
    # What all prompts of a side have in common is no overlap.
    other = [problem("Count the ways." + instruction), problem("Solve for x." + instruction)]
    assert overlaps(train, other, 0.5) == {"words": [], "numbers": []}


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 1.0])
def test_the_index_misses_no_pair(threshold: float):
    """Against the comparison of all pairs, on texts that share stretches of words."""
    rng = random.Random(0)
    stretches = [" ".join(rng.choice("abcdefgh") for _ in range(6)) for _ in range(6)]
    texts = [" ".join(rng.choice(stretches) for _ in range(rng.randint(1, 5))) for _ in range(240)]
    train, test = (
        [problem(f"{side} {text}") for text in part] for side, part in (("t", texts[:160]), ("e", texts[160:]))
    )
    found = overlaps(train, test, threshold)
    for kind in overlap.NGRAMS:
        pieces = {p.id: overlap._shingles(p.messages[0].content, kind) for p in (*train, *test)}
        best: dict[str, float] = {}
        for a, b in product(train, test):
            score = overlap._score(pieces[a.id], pieces[b.id], kind)
            best[a.id] = max(score, best.get(a.id, 0.0))
        expected = {place: score for place, score in best.items() if score >= threshold}
        assert {row.train: row.score for row in found[kind]} == expected
    if threshold <= 0.5:
        assert found["words"] and found["numbers"]


def test_a_threshold_is_a_share():
    for threshold in (0.0, 1.1, -0.5):
        with pytest.raises(ValueError, match="share in"):
            overlaps([], [], threshold)
