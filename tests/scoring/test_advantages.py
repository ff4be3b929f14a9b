import pytest
import torch

from headwater.scoring.advantages import group_advantages


def test_std_is_the_sample_deviation_plus_eps():
    # rewards 1, 0, 0, 0: mean 1/4, sample variance (9/16 + 3/16) / 3 = 1/4, deviation 1/2
    advantages = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=torch.float64))
    expected = torch.tensor([[0.75, -0.25, -0.25, -0.25]], dtype=torch.float64) / (0.5 + 1e-6)
    torch.testing.assert_close(advantages, expected, rtol=1e-14, atol=0)


def test_mean_only_centres():
    advantages = group_advantages(torch.tensor([[2.0, 0.0], [1.0, 0.5]]), normalise="mean")
    torch.testing.assert_close(advantages, torch.tensor([[1.0, -1.0], [0.25, -0.25]]))


@pytest.mark.parametrize("normalise", ["std", "mean"])
def test_dead_groups_are_exactly_zero(normalise):
    # In float32 the mean of eight times 0.3 is not 0.3: without the exact test the advantage would be 0.03
    rewards = torch.tensor([[0.3] * 8, [0.7] * 8, [1.0, 0.0] * 4])
    assert (rewards[0] - rewards[0].mean()).ne(0).any()
    advantages = group_advantages(rewards, normalise=normalise)
    assert advantages[:2].eq(0).all() and advantages[2].ne(0).all()


def test_groups_are_independent_and_half_precision_is_reduced_in_float32():
    rewards = torch.tensor([[1.0, 0.0, 0.0], [5.0, 3.0, 1.0]], dtype=torch.bfloat16)
    both = group_advantages(rewards)
    assert both.dtype == torch.float32
    torch.testing.assert_close(both[1:], group_advantages(rewards[1:]), rtol=0, atol=0)
    torch.testing.assert_close(both[1], torch.tensor([1.0, 0.0, -1.0]), rtol=1e-6, atol=0)


def test_errors():
    with pytest.raises(ValueError, match="at least 2"):
        group_advantages(torch.ones(3, 1))
    with pytest.raises(ValueError, match="finite"):
        group_advantages(torch.tensor([[1.0, float("nan")]]))
