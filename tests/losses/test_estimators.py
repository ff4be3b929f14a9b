"""Each sampled loss against the enumerated gradient of what it is named after, in float64.

Giving every possible token its probability as loss weight turns the sampled loss into its exact expectation.
"""

import itertools
from typing import Any

import pytest
import torch

from headwater.losses import HiddenScores, clipped_policy_gradient, dense_divergence, reference_kl, sampled_reverse_kl

VOCAB = 7
ONE_SEQUENCE = torch.zeros(VOCAB, dtype=torch.int64)
EXACT: dict[str, Any] = {"rtol": 0, "atol": 1e-14}


@pytest.fixture
def logits():
    """Policy logits (with gradient), and the log-probs of an old policy, a teacher and a sampler."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(4, VOCAB, generator=generator, dtype=torch.float64)
    rows[1] = rows[0] + 0.3 * rows[1]
    return rows[0].clone().requires_grad_(), *rows[1:].log_softmax(1)


def kl(log_a, log_b):
    return (log_a.exp() * (log_a - log_b)).sum()


def grad(value, logits):
    return torch.autograd.grad(value, logits)[0]


def reverse_kl_losses(policy, teacher, weights, old):
    yield sampled_reverse_kl(policy, teacher, weights, old_logprobs=old, sequence_ids=ONE_SEQUENCE, num_sequences=1)[0]
    yield reference_kl(policy, teacher, weights, old_logprobs=old)[0]


@pytest.mark.parametrize("on_policy", [True, False])
def test_reverse_kl_estimators_have_the_value_and_gradient_of_the_reverse_kl(logits, on_policy):
    z, old, teacher, _ = logits
    policy = z.log_softmax(0)
    expected = kl(policy, teacher)
    expected_grad = torch.autograd.grad(expected, z, retain_graph=True)[0]
    weights = policy.detach().exp() if on_policy else old.exp()
    for loss in reverse_kl_losses(policy, teacher, weights, None if on_policy else old):
        torch.testing.assert_close(loss, expected, **EXACT)
        torch.testing.assert_close(torch.autograd.grad(loss, z, retain_graph=True)[0], expected_grad, **EXACT)


def test_dense_reverse_kl_is_the_same_loss_without_noise(logits):
    z, _, teacher, _ = logits
    policy = z.log_softmax(0)
    sampled = next(reverse_kl_losses(policy, teacher, policy.detach().exp(), None))
    one = torch.ones(1, 1, dtype=torch.float64)
    scores = HiddenScores(one, teacher[:, None])
    dense = dense_divergence(one, z[:, None], scores, torch.ones(1), kind="reverse_kl", vocab_size=VOCAB)[0]
    torch.testing.assert_close(grad(sampled, z), grad(dense, z), **EXACT)


@pytest.mark.parametrize("on_policy", [True, False])
def test_k3_as_loss_has_the_forward_gradient(logits, on_policy):
    z, old, reference, _ = logits
    policy = z.log_softmax(0)
    weights = policy.detach().exp() if on_policy else old.exp()
    loss = reference_kl(policy, reference, weights, old_logprobs=None if on_policy else old, estimator="k3")[0]
    torch.testing.assert_close(loss, kl(policy, reference), **EXACT)
    gradient, policy = grad(loss, z), z.log_softmax(0)
    torch.testing.assert_close(gradient, grad(kl(reference, policy), z), **EXACT)
    assert (gradient - grad(kl(z.log_softmax(0), reference), z)).abs().max() > 0.01


def test_differentiating_the_sampled_log_ratio_would_teach_nothing(logits):
    z, _, teacher, _ = logits
    policy = z.log_softmax(0)
    naive = (policy.detach().exp() * (policy - teacher)).sum()
    assert grad(naive, z).abs().max() < 1e-15


def surrogate(policy, rewards, weights, **options):
    return clipped_policy_gradient(policy, rewards, weights, sequence_ids=ONE_SEQUENCE, num_sequences=1, **options)[0]


def test_policy_gradient_is_the_gradient_of_expected_reward(logits):
    z, old, rewards, sampler = logits
    expected = -grad((z.softmax(0) * rewards).sum(), z)
    wide: dict[str, Any] = {"clip_low": 0.99, "clip_high": 100.0}
    on_policy = surrogate(z.log_softmax(0), rewards, z.softmax(0).detach())
    off_policy = surrogate(z.log_softmax(0), rewards, old.exp(), old_logprobs=old, **wide)
    for engine in (
        surrogate(z.log_softmax(0), rewards, sampler.exp(), sampler_logprobs=sampler, sampler_weight_cap=1e9),
        surrogate(
            z.log_softmax(0),
            rewards,
            sampler.exp(),
            old_logprobs=old,
            sampler_logprobs=sampler,
            sampler_weight_cap=1e9,
            **wide,
        ),
        on_policy,
        off_policy,
    ):
        torch.testing.assert_close(grad(engine, z), expected, **EXACT)


def test_sequence_ratio_on_policy_is_the_gradient_of_expected_reward(logits):
    z, _, rewards, _ = logits
    loss = clipped_policy_gradient(
        z.log_softmax(0),
        rewards,
        z.softmax(0).detach(),
        sequence_ids=torch.arange(VOCAB),
        num_sequences=VOCAB,
        ratio="sequence",
    )[0]
    torch.testing.assert_close(grad(loss, z), -grad((z.softmax(0) * rewards).sum(), z), **EXACT)


# Sequences over {0 = end, 1, 2} of at most three tokens: a table of logits for each prefix is a language model.
PREFIXES = [(), (1,), (2,), (1, 1), (1, 2), (2, 1), (2, 2)]
SEQUENCES = [(0,), *itertools.product((1, 2), (0,)), *itertools.product((1, 2), (1, 2), (0, 1, 2))]


def tree_logprobs(table):
    """Log-probs of every token of every sequence, flat, and the sequence of each token."""
    rows = [(PREFIXES.index(y[:t]), y[t]) for y in SEQUENCES for t in range(len(y))]
    ids = torch.tensor([i for i, y in enumerate(SEQUENCES) for _ in y])
    prefix, token = torch.tensor(rows).T
    return table.log_softmax(1)[prefix, token], ids


def sequence_sums(values, ids):
    return torch.zeros(len(SEQUENCES), dtype=values.dtype).index_add(0, ids, values)


def tree():
    generator = torch.Generator().manual_seed(5)
    policy, teacher, drift = (torch.randn(len(PREFIXES), 3, generator=generator, dtype=torch.float64) for _ in range(3))
    teacher, ids = tree_logprobs(teacher)
    old, _ = tree_logprobs(policy + 0.3 * drift)
    return policy.requires_grad_(), old, teacher, ids


def test_the_tree_is_complete():
    policy, _, _, ids = tree()
    assert len(SEQUENCES) == 15
    assert sequence_sums(tree_logprobs(policy)[0], ids).exp().sum().item() == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("on_policy", [True, False])
def test_sequence_horizon_has_the_gradient_of_the_sequence_kl(on_policy):
    table, old, teacher, ids = tree()
    policy, _ = tree_logprobs(table)
    log_p, log_q = sequence_sums(policy, ids), sequence_sums(teacher, ids)
    expected = kl(log_p, log_q)
    drawn_from = policy.detach() if on_policy else old
    weights = sequence_sums(drawn_from, ids).exp()[ids]
    loss = sampled_reverse_kl(
        policy,
        teacher,
        weights,
        old_logprobs=None if on_policy else old,
        sequence_ids=ids,
        num_sequences=len(SEQUENCES),
        horizon="sequence",
    )[0]
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-13)
    gradient = torch.autograd.grad(loss, table, retain_graph=True)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, table)[0], rtol=0, atol=1e-13)


def test_token_horizon_is_the_kl_at_visited_prefixes_and_nothing_later():
    table, _, teacher, ids = tree()
    policy, _ = tree_logprobs(table)
    weights = sequence_sums(policy.detach(), ids).exp()[ids]
    loss = sampled_reverse_kl(policy, teacher, weights, sequence_ids=ids, num_sequences=len(SEQUENCES))[0]
    gradient = torch.autograd.grad(loss, table)[0]
    visits = torch.zeros(len(PREFIXES), dtype=torch.float64)
    teacher_table = torch.full((len(PREFIXES), 3), -torch.inf, dtype=torch.float64)
    position = 0
    for y in SEQUENCES:
        for t in range(len(y)):
            visits[PREFIXES.index(y[:t])] += weights[position]
            teacher_table[PREFIXES.index(y[:t]), y[t]] = teacher[position]
            position += 1
    local = torch.stack([kl(table[i].log_softmax(0), teacher_table[i]) for i in range(len(PREFIXES))]) @ visits
    torch.testing.assert_close(gradient, torch.autograd.grad(local, table)[0], rtol=0, atol=1e-13)
    whole = kl(*(sequence_sums(x, ids) for x in (tree_logprobs(table)[0], teacher)))
    torch.testing.assert_close(loss, whole, rtol=0, atol=1e-13)
    assert (gradient - torch.autograd.grad(whole, table)[0]).abs().max() > 0.01


def test_a_constant_advantage_has_no_expected_gradient(logits):
    """On-policy, so the control without a teacher moves by noise alone; a drawn token alone is pushed down."""
    z, *_ = logits
    policy = z.log_softmax(0)
    shared = {"sequence_ids": ONE_SEQUENCE, "num_sequences": 1}
    advantages = -torch.ones(VOCAB, dtype=torch.float64)
    expected = clipped_policy_gradient(policy, advantages, policy.detach().exp(), **shared)[0]
    torch.testing.assert_close(grad(expected, z), torch.zeros_like(z), **EXACT)
    drawn = torch.eye(VOCAB, dtype=torch.float64)[2]
    one = clipped_policy_gradient(z.log_softmax(0), advantages, drawn, **shared)[0]
    torch.testing.assert_close(grad(one, z), drawn - policy.detach().exp(), **EXACT)
