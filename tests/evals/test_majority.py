"""maj@k on hand-made votes."""

import pytest

from headwater.evals.statistics import majority


@pytest.mark.parametrize(
    ("answers", "correct", "expected"),
    [
        (["7", "7", "3"], [True, True, False], 1.0),
        (["7", "3", "3"], [True, False, False], 0.0),
        (["7", "3"], [True, False], 1 / 2),
        (["7", "3", "5"], [True, False, False], 1 / 3),
        (["7", "7", "3", "3", "5"], [True, True, False, False, False], 1 / 2),
        ([None, None, "7"], [False, False, True], 1.0),  # no answer is no vote
        ([None, None, "3"], [False, False, False], 0.0),
        ([None, None], [False, False], 0.0),
        (["7", "7"], [True, False], 1 / 2),  # one spelling, two verdicts
        (["7"], [True], 1.0),
    ],
)
def test_majority(answers, correct, expected):
    assert majority(answers, correct) == pytest.approx(expected)
    assert majority(answers[::-1], correct[::-1]) == pytest.approx(expected)


def test_majority_needs_samples():
    for answers, correct in (([], []), (["7"], [])):
        with pytest.raises(ValueError, match="one of each for every sample"):
            majority(answers, correct)
