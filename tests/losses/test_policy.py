import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from headwater.losses import clipped_policy_gradient, cross_entropy, reference_kl, sampled_reverse_kl

IDS = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2])
TOKENS = len(IDS)


def make(seed=0):
    """policy (with gradient), old, sampler and teacher log-probs, advantages, weights with one 0 inside a sequence."""
    generator = torch.Generator().manual_seed(seed)
    policy = -2 * torch.rand(TOKENS, generator=generator, dtype=torch.float64) - 0.1
    old, sampler, teacher = (
        policy + 0.4 * torch.randn(TOKENS, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    advantages = torch.randn(3, generator=generator, dtype=torch.float64)[IDS]
    weights = torch.rand(TOKENS, generator=generator, dtype=torch.float64) + 0.1
    weights[5] = 0
    return policy.requires_grad_(), old, sampler, teacher, advantages, weights


# Every loss as a function of the same arguments; `n` is the number of sequences.
LOSSES: dict[str, Callable[..., Any]] = {
    "token": lambda p, o, s, t, a, w, i, n: clipped_policy_gradient(
        p, a, w, old_logprobs=o, sampler_logprobs=s, sequence_ids=i, num_sequences=n
    ),
    "on-policy": lambda p, o, s, t, a, w, i, n: clipped_policy_gradient(
        p, a, w, sampler_logprobs=s, sequence_ids=i, num_sequences=n
    ),
    "sequence": lambda p, o, s, t, a, w, i, n: clipped_policy_gradient(
        p, a, w, old_logprobs=o, sampler_logprobs=s, sequence_ids=i, num_sequences=n, ratio="sequence"
    ),
    "reference": lambda p, o, s, t, a, w, i, n: reference_kl(p, t, w, old_logprobs=o),
    "reference-k3": lambda p, o, s, t, a, w, i, n: reference_kl(p, t, w, estimator="k3"),
    "opd-token": lambda p, o, s, t, a, w, i, n: sampled_reverse_kl(
        p, t, w, old_logprobs=o, sequence_ids=i, num_sequences=n
    ),
    "opd-sequence": lambda p, o, s, t, a, w, i, n: sampled_reverse_kl(
        p, t, w, old_logprobs=o, sequence_ids=i, num_sequences=n, horizon="sequence"
    ),
    "cross-entropy": lambda p, o, s, t, a, w, i, n: cross_entropy(p, w),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def grad(total, policy):
    return torch.autograd.grad(total, policy)[0]


@every_loss
def test_micro_batches_of_whole_sequences_add_up_in_any_order(loss):
    tensors = make()
    whole, weight, metrics = loss(*tensors, IDS, 3)
    for groups in ([[0], [1], [2]], [[2, 0], [1]], [[2, 1, 0]], [[1], [], [0, 2]]):
        total, count, parts = torch.zeros((), dtype=torch.float64), 0.0, []
        for sequences in groups:
            rows = torch.cat([torch.arange(TOKENS)[sequence == IDS] for sequence in sequences] or [torch.arange(0)])
            ids = torch.tensor([sequences.index(i) for i in IDS[rows].tolist()], dtype=torch.int64)
            value, w, m = loss(*(x[rows] for x in tensors), ids, max(len(sequences), 1))
            total, count, parts = total + value, count + w, [*parts, m]
        torch.testing.assert_close(total, whole, rtol=0, atol=1e-13)
        torch.testing.assert_close(
            grad(total, tensors[0]), grad(loss(*tensors, IDS, 3)[0], tensors[0]), rtol=0, atol=1e-13
        )
        torch.testing.assert_close(count, weight)
        for name, (total_metric, num) in metrics.items():
            reduce = max if name.endswith("_max") else sum
            torch.testing.assert_close(
                torch.as_tensor(reduce(m[name][0] for m in parts)), total_metric, rtol=0, atol=1e-13
            )
            assert name.endswith("_max") or sum(m[name][1] for m in parts) == num == TOKENS - 1


@every_loss
@pytest.mark.parametrize("poison", [float("nan"), -torch.inf, torch.inf])
def test_masked_tokens_may_hold_anything(loss, poison):
    clean = make()
    expected, _, metrics = loss(*clean, IDS, 3)
    dirty = [x.detach().clone() for x in clean]
    for x in dirty[:5]:
        x[5] = poison
    dirty[0].requires_grad_()
    value, _, dirty_metrics = loss(*dirty, IDS, 3)
    torch.testing.assert_close(value, expected, rtol=0, atol=0)
    torch.testing.assert_close(grad(value, dirty[0]), grad(expected, clean[0]), rtol=0, atol=0)
    assert dirty_metrics == metrics and grad(loss(*dirty, IDS, 3)[0], dirty[0])[5] == 0


@every_loss
@pytest.mark.parametrize("tokens", [0, TOKENS])
def test_no_members_is_a_differentiable_zero(loss, tokens):
    policy, *others, weights = (x.detach()[:tokens] for x in make())
    policy.requires_grad_()
    value, weight, metrics = loss(policy, *others, 0 * weights, IDS[:tokens], 3)
    value.backward()
    assert value == 0 and weight == 0 and policy.grad is not None and policy.grad.eq(0).all()
    assert all(total == 0 for total, _ in metrics.values())


@every_loss
def test_bf16_inputs_are_computed_in_float32(loss):
    low = [x.detach().bfloat16() for x in make()]
    low[0].requires_grad_()
    high = [x.detach().double() for x in low]
    value, _, _ = loss(*low, IDS, 3)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(loss(*high, IDS, 3)[0].item(), rel=1e-5)


def test_clipping_by_hand():
    # ratios 1.5, 1.5, 0.5, 0.5, 1.1 with advantages +, -, +, -, +: the first and the fourth are clipped
    log_ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1], dtype=torch.float64).log()
    policy = (log_ratio - 1).requires_grad_()
    advantages = torch.tensor([2.0, -2.0, 2.0, -2.0, 1.0], dtype=torch.float64)
    value, weight, metrics = clipped_policy_gradient(
        policy,
        advantages,
        torch.ones(5),
        old_logprobs=torch.full((5,), -1.0, dtype=torch.float64),
        sequence_ids=torch.zeros(5, dtype=torch.int64),
        num_sequences=1,
        clip_low=0.2,
        clip_high=0.28,
    )
    assert value.item() == pytest.approx(-(1.28 * 2 - 1.5 * 2 + 0.5 * 2 - 0.8 * 2 + 1.1), abs=1e-12)
    expected = torch.tensor([0, 3.0, -1.0, 0, -1.1], dtype=torch.float64)
    torch.testing.assert_close(grad(value, policy), expected, rtol=0, atol=1e-12)
    assert weight == 5
    assert metrics["policy/clip_frac_high"] == (1, 5) and metrics["policy/clip_frac_low"] == (1, 5)
    assert metrics["policy/ratio"][0].item() == pytest.approx(5.1, abs=1e-12)


def test_on_policy_is_the_plain_policy_gradient():
    policy, _, _, _, advantages, weights = make()
    value, _, metrics = clipped_policy_gradient(policy, advantages, weights, sequence_ids=IDS, num_sequences=3)
    torch.testing.assert_close(grad(value, policy), -weights * advantages, rtol=0, atol=1e-14)
    assert metrics["policy/ratio"] == (TOKENS - 1, TOKENS - 1)


def test_gspo_equals_the_sequence_objective():
    policy, old, _, _, advantages, _ = make()
    lengths = torch.bincount(IDS)
    kept, clip = torch.ones(TOKENS, dtype=torch.float64) / lengths[IDS], 0.2
    value, _, metrics = clipped_policy_gradient(
        policy, advantages, kept, old_logprobs=old, sequence_ids=IDS, num_sequences=3, ratio="sequence"
    )
    # equation 5 of the paper, sequence by sequence
    expected, num_high, ratios = torch.zeros((), dtype=torch.float64), 0, 0.0
    for i in range(3):
        s = (policy - old)[i == IDS].mean().exp()
        a = advantages[i == IDS][0]
        expected = expected - torch.minimum(s * a, s.clamp(1 - clip, 1 + clip) * a)
        num_high += int(lengths[i]) * bool(s > 1 + clip and a > 0)
        ratios += int(lengths[i]) * s.item()
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(grad(value, policy), grad(expected, policy), rtol=0, atol=1e-13)
    assert metrics["policy/clip_frac_high"][0] == num_high
    assert metrics["policy/ratio"][0].item() == pytest.approx(ratios, abs=1e-12)


def test_gspo_mean_skips_masked_tokens():
    policy = torch.tensor([0.1, 0.3, 5.0], dtype=torch.float64).requires_grad_()
    value = clipped_policy_gradient(
        policy,
        -torch.ones(3, dtype=torch.float64),
        torch.tensor([1.0, 1.0, 0.0]),
        old_logprobs=torch.zeros(3, dtype=torch.float64),
        sequence_ids=torch.zeros(3, dtype=torch.int64),
        num_sequences=1,
        ratio="sequence",
    )[0]
    assert value.item() == pytest.approx(2 * math.exp(0.2), abs=1e-12)


def test_truncated_importance_sampling_by_hand():
    # old / sampler = 3, 1/2 and 1 against a cap of 2; r = 1
    old = torch.full((3,), -2.0, dtype=torch.float64)
    sampler = old - torch.tensor([3.0, 0.5, 1.0], dtype=torch.float64).log()
    policy = old.clone().requires_grad_()
    arguments = (policy, torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64), torch.ones(3))
    options = {"sampler_logprobs": sampler, "sequence_ids": torch.zeros(3, dtype=torch.int64), "num_sequences": 1}
    value, _, metrics = clipped_policy_gradient(*arguments, old_logprobs=old, **options)
    torch.testing.assert_close(grad(value, policy), torch.tensor([-2.0, -0.5, 1.0], dtype=torch.float64))
    # k3 of KL(sampler || old): ratio - 1 - log ratio
    k3 = (3 - 1 - math.log(3)) + (0.5 - 1 - math.log(0.5))
    assert metrics["policy/sampler_mismatch_kl"][0].item() == pytest.approx(k3, abs=1e-12)
    assert metrics["policy/sampler_mismatch_max"][0].item() == pytest.approx(math.log(3), abs=1e-12)
    assert metrics["policy/sampler_weight"][0].item() == pytest.approx(3.5, abs=1e-12)
    free = clipped_policy_gradient(*arguments, **options, sampler_weight_cap=None)[0]
    torch.testing.assert_close(grad(free, policy), torch.tensor([-1.0, -1.0, 1.0], dtype=torch.float64))


def test_huge_ratios_stay_finite():
    policy = torch.tensor([-1.0, -1.0], requires_grad=True)
    value = clipped_policy_gradient(
        policy,
        torch.ones(2),
        torch.ones(2),
        old_logprobs=torch.tensor([-200.0, -1e4]),
        sequence_ids=torch.zeros(2, dtype=torch.int64),
        num_sequences=1,
    )[0]
    assert value.item() == pytest.approx(-2.4, abs=1e-5) and grad(value, policy).eq(0).all()


def test_reference_kl_by_hand():
    # policy 1/2, reference 1/4: k3 = 1/2 - 1 + log 2; gradient of k2 = log 2, of k3 = 1 - q/p = 1/2
    policy = torch.tensor([math.log(0.5)], dtype=torch.float64, requires_grad=True)
    reference, one = torch.tensor([math.log(0.25)], dtype=torch.float64), torch.ones(1)
    reverse = reference_kl(policy, reference, one)[0]
    forward = reference_kl(policy, reference, one, estimator="k3")[0]
    for value, slope in ((reverse, math.log(2)), (forward, 0.5)):
        assert value.item() == pytest.approx(math.log(2) - 0.5, abs=1e-12)
        assert grad(value, policy).item() == pytest.approx(slope, abs=1e-12)


def test_forbidden_by_the_teacher_is_floored_at_minus_100():
    policy = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    never, one, ids = torch.tensor([-torch.inf], dtype=torch.float64), torch.ones(1), torch.zeros(1, dtype=torch.int64)
    value = sampled_reverse_kl(policy, never, one, sequence_ids=ids, num_sequences=1)[0]
    assert value == 99 and grad(value, policy) == 99
    assert grad(reference_kl(policy, never, one)[0], policy) == 99


def test_sequence_horizon_sums_what_follows():
    # log(policy / teacher) = 1, 2, 4 | 8: costs to go 7, 6, 4 | 8
    policy = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    teacher = -torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    for ids, order in (([0, 0, 0, 1], [0, 1, 2, 3]), ([1, 0, 1, 1], [0, 3, 1, 2])):
        value = sampled_reverse_kl(
            policy, teacher[order], torch.ones(4), sequence_ids=torch.tensor(ids), num_sequences=2, horizon="sequence"
        )[0]
        assert value == 15
        assert grad(value, policy).tolist() == [[7.0, 6.0, 4.0, 8.0][i] for i in order]


def test_cross_entropy_by_hand():
    policy = torch.tensor([-1.0, -2.0], requires_grad=True)
    value, weight, metrics = cross_entropy(policy, torch.tensor([0.5, 2.0]))
    assert value == 4.5 and weight == 2.5 and metrics["policy/cross_entropy"] == (3, 2)
    assert grad(value, policy).tolist() == [-0.5, -2]


def test_constants_get_no_gradient():
    policy, *constants, weights = make()
    constants = [x.requires_grad_() for x in constants]
    for name, loss in LOSSES.items():
        value = loss(policy, *constants, weights, IDS, 3)[0]
        gradients = torch.autograd.grad(value, [policy, *constants], allow_unused=True)
        assert gradients[0] is not None and all(g is None for g in gradients[1:]), name


def test_errors():
    policy, _, _, teacher, advantages, weights = make()
    settings: list[dict[str, Any]] = [{"clip_low": 1.0}, {"clip_high": -0.1}, {"sampler_weight_cap": 0.0}]
    for bad in settings:
        with pytest.raises(ValueError, match="clip_low"):
            clipped_policy_gradient(policy, advantages, weights, sequence_ids=IDS, num_sequences=3, **bad)
    with pytest.raises(ValueError, match="num_sequences"):
        sampled_reverse_kl(policy, teacher, weights, sequence_ids=IDS, num_sequences=2, horizon="sequence")
    with pytest.raises(ValueError, match="num_sequences"):
        clipped_policy_gradient(policy, advantages, weights, sequence_ids=IDS, num_sequences=2, ratio="sequence")
