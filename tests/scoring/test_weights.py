import pytest
import torch

from headwater.scoring.weights import sequence_ids, soft_overlong_penalty, token_weights

LENGTHS = torch.tensor([2, 1, 4])
KEEP = torch.tensor([True, True, False])


def test_sequence_ids():
    assert sequence_ids(torch.tensor([2, 0, 3])).tolist() == [0, 0, 2, 2, 2]


@pytest.mark.parametrize(
    ("aggregate", "max_tokens", "keep", "weights", "denominator"),
    [
        ("token", None, None, [1, 1, 1, 1, 1, 1, 1], 7),
        ("token", None, KEEP, [1, 1, 1, 0, 0, 0, 0], 3),
        ("sequence", None, None, [0.5, 0.5, 1, 0.25, 0.25, 0.25, 0.25], 3),
        ("sequence", None, KEEP, [0.5, 0.5, 1, 0, 0, 0, 0], 2),
        ("constant", 8, None, [0.125] * 7, 3),
        ("constant", 8, KEEP, [0.125] * 3 + [0] * 4, 3),
    ],
)
def test_weights_and_denominator(aggregate, max_tokens, keep, weights, denominator):
    actual, total = token_weights(LENGTHS, aggregate, max_tokens, keep=keep)
    assert actual.tolist() == weights and total == denominator


def test_token_mean_differs_from_mean_of_means():
    # eight tokens of loss 1 and two of loss 3: token mean 1.4, mean over sequences 2
    lengths, losses = torch.tensor([8, 2]), torch.tensor([1.0] * 8 + [3.0] * 2)
    by_token, num_tokens = token_weights(lengths, "token")
    by_sequence, num_sequences = token_weights(lengths, "sequence")
    assert float((by_token * losses).sum()) / num_tokens == pytest.approx(1.4, rel=1e-6)
    assert float((by_sequence * losses).sum()) / num_sequences == pytest.approx(2.0, rel=1e-6)


def test_empty_sequences_and_batches():
    assert token_weights(torch.tensor([0, 2]), "sequence")[1] == 1
    nothing = torch.tensor([], dtype=torch.int64)
    for weights, denominator in (token_weights(nothing, "token"), token_weights(nothing, "constant", 3)):
        assert weights.shape == (0,) and denominator == 0


@pytest.mark.parametrize(
    ("aggregate", "max_tokens"), [("constant", None), ("token", 4), ("constant", 3), ("constant", 0)]
)
def test_max_tokens_errors(aggregate, max_tokens):
    with pytest.raises(ValueError, match="max_tokens"):
        token_weights(LENGTHS, aggregate, max_tokens)


def test_soft_overlong_penalty_follows_the_paper():
    # L_max 20, L_cache 4: 0 up to 16, then -1/4 a token, -1 from 20 on
    penalty = soft_overlong_penalty(torch.tensor([3, 16, 17, 19, 20, 25]), 20, 4)
    assert penalty.tolist() == [0, 0, -0.25, -0.75, -1, -1]
    with pytest.raises(ValueError, match="buffer"):
        soft_overlong_penalty(LENGTHS, 4, 5)
