import math

import pytest
import torch

from headwater.losses.closeness import token_closeness
from headwater.losses.dense import dense_divergence
from headwater.scoring.scores import HiddenScores

TOKENS, VOCAB = 9, 23


def models(seed=0, dtype=torch.float64):
    """Hidden states and heads of both (the student's with two padding rows), and drawn tokens."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (TOKENS, 5), (VOCAB + 2, 5), (TOKENS, 6), (VOCAB, 6)
    tensors = [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return *tensors, torch.randint(VOCAB, (TOKENS,), generator=generator)


def enumerated(hidden, head, t_hidden, t_head, targets, temperature, k):
    """Every quantity term by term in Python floats."""
    rows = {name: [] for name in ("forward_kl", "reverse_kl", "overlap", "entropy_gap", "log_ratio")}
    for i in range(TOKENS):
        both = (hidden, head), (t_hidden, t_head)
        log_q, log_p = (((h[i] @ w[:VOCAB].T) / temperature).log_softmax(0).tolist() for h, w in both)
        pairs = list(zip(log_p, log_q, strict=True))
        rows["forward_kl"].append(sum(math.exp(p) * (p - q) for p, q in pairs))
        rows["reverse_kl"].append(sum(math.exp(q) * (q - p) for p, q in pairs))
        entropy = [-sum(math.exp(x) * x for x in logs) for logs in (log_p, log_q)]
        rows["entropy_gap"].append(entropy[0] - entropy[1])
        rows["log_ratio"].append(log_p[targets[i]] - log_q[targets[i]])
        best = [set(sorted(range(VOCAB), key=lambda v, x=logs: -x[v])[:k]) for logs in (log_p, log_q)]
        rows["overlap"].append(len(best[0] & best[1]) / k)
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in rows.items()}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_tokens", [1, 4, 100])
def test_equals_the_enumerated_values(temperature, chunk_tokens):
    hidden, head, t_hidden, t_head, targets = models()
    found = token_closeness(
        hidden,
        head,
        HiddenScores(t_hidden, t_head),
        targets,
        vocab_size=VOCAB,
        temperature=temperature,
        chunk_tokens=chunk_tokens,
        overlap=7,
    )
    for name, values in enumerated(hidden, head, t_hidden, t_head, targets, temperature, 7).items():
        torch.testing.assert_close(found[name], values, rtol=0, atol=1e-12)


def test_agrees_with_the_metrics_of_the_dense_loss():
    hidden, head, t_hidden, t_head, targets = models(1)
    teacher, weights = HiddenScores(t_hidden, t_head), torch.ones(TOKENS, dtype=torch.float64)
    _, _, metrics = dense_divergence(hidden, head, teacher, weights, kind="reverse_kl", vocab_size=VOCAB)
    found = token_closeness(hidden, head, teacher, targets, vocab_size=VOCAB)
    for name in ("forward_kl", "reverse_kl"):
        torch.testing.assert_close(found[name].sum(), metrics[f"teacher/{name}"][0])
    gap = metrics["teacher/entropy"][0] - metrics["policy/entropy"][0]
    torch.testing.assert_close(found["entropy_gap"].sum(), gap)


def test_equal_models_are_as_close_as_can_be():
    hidden, head, _, _, targets = models(2)
    found = token_closeness(hidden, head, HiddenScores(hidden, head), targets, vocab_size=VOCAB)
    for name, value in {"forward_kl": 0, "reverse_kl": 0, "overlap": 1, "entropy_gap": 0, "log_ratio": 0}.items():
        torch.testing.assert_close(
            found[name], torch.full((TOKENS,), float(value), dtype=torch.float64), rtol=0, atol=1e-12
        )


def test_a_forbidden_token_costs_a_hundred_nats_at_most():
    hidden, head, t_hidden, t_head, targets = models(3)
    bias = torch.zeros(VOCAB, dtype=torch.float64)
    bias[int(targets[0])] = -math.inf
    found = token_closeness(hidden, head, HiddenScores(t_hidden, t_head, bias), targets, vocab_size=VOCAB)
    assert all(torch.isfinite(values).all() for values in found.values())
    log_q = float((hidden[0] @ head[:VOCAB].T).log_softmax(0)[targets[0]])
    assert math.isclose(float(found["log_ratio"][0]), -100 - log_q, abs_tol=1e-9)
