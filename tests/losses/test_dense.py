import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from headwater.losses import HiddenScores, TopKScores, dense_divergence, numerics
from headwater.losses.oracle import dense_divergence_from_logits, topk_divergence_from_logits

KINDS = ["forward_kl", "reverse_kl", "jsd"]
TOKENS, HIDDEN, ROWS, TEACHER_HIDDEN, TEACHER_ROWS, VOCAB = 9, 5, 13, 6, 11, 10


def make(tokens=TOKENS, rows=ROWS, teacher_rows=TEACHER_ROWS, seed=0, dtype=torch.float64):
    """Student hidden and head (with gradient), teacher hidden and head, weights with one 0."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (tokens, HIDDEN), (rows, HIDDEN), (tokens, TEACHER_HIDDEN), (teacher_rows, TEACHER_HIDDEN)
    hidden, head, t_hidden, t_head = (
        torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes
    )
    weights = torch.rand(tokens, generator=generator, dtype=torch.float64) + 0.1
    weights[tokens // 3] = 0
    return hidden.requires_grad_(), head.requires_grad_(), t_hidden, t_head, weights


def top_k(t_hidden, t_head, k, temperature=1.0, vocab=VOCAB):
    top = ((t_hidden @ t_head.T)[:, :vocab] / temperature).log_softmax(1).topk(k)
    return TopKScores(top.indices, top.values, temperature)


def assert_equal(actual, expected, inputs, atol=1e-9):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)
    for a, b in zip(torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.fixture(params=[3 * ROWS, numerics.CACHED], ids=["lots", "whole"])
def lots(request, monkeypatch):
    """Chunks are passed over three rows at a time, as those of a large vocabulary are, or at once."""
    monkeypatch.setattr(numerics, "CACHED", request.param)


@pytest.mark.usefixtures("lots")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_tokens", [1, 4, 100])
@pytest.mark.parametrize(("rows", "teacher_rows"), [(13, 11), (10, 12), (11, 10), (8, 12), (12, 8)])
def test_equals_full_logits_with_gradients(kind, temperature, chunk_tokens, rows, teacher_rows):
    hidden, head, t_hidden, t_head, weights = make(rows=rows, teacher_rows=teacher_rows)
    options = {"kind": kind, "beta": 0.3, "temperature": temperature, "vocab_size": VOCAB}
    actual, weight, _ = dense_divergence(
        hidden, head, HiddenScores(t_hidden, t_head), weights, chunk_tokens=chunk_tokens, **options
    )
    expected = dense_divergence_from_logits(hidden @ head.T, t_hidden @ t_head.T, weights, **options)
    assert_equal(actual, expected, (hidden, head))
    assert weight == weights.sum()


@pytest.mark.usefixtures("lots")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 4, 9])
def test_topk_equals_buckets_with_gradients(kind, k):
    hidden, head, t_hidden, t_head, weights = make()
    teacher = top_k(t_hidden, t_head, k, 0.7)
    options = {"kind": kind, "beta": 0.3, "temperature": 0.7, "vocab_size": VOCAB}
    actual, _, _ = dense_divergence(hidden, head, teacher, weights, chunk_tokens=4, **options)
    expected = topk_divergence_from_logits(hidden @ head.T, teacher.ids, teacher.logprobs, weights, **options)
    assert_equal(actual, expected, (hidden, head))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("teacher_form", ["hidden", "topk"])
def test_gradcheck(kind, teacher_form):
    hidden, head, t_hidden, t_head, weights = make(tokens=3, rows=7)
    teacher = HiddenScores(t_hidden, t_head) if teacher_form == "hidden" else top_k(t_hidden, t_head, 3, vocab=7)

    def function(hidden, head):
        return dense_divergence(hidden, head, teacher, weights, kind=kind, vocab_size=7, chunk_tokens=2)[0]

    assert torch.autograd.gradcheck(function, (hidden, head))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # P = (1/2, 1/4, 1/4), Q = (1/4, 1/4, 1/2)
        ("forward_kl", 0.5 * math.log(2) + 0.25 * math.log(0.5)),
        ("reverse_kl", 0.25 * math.log(0.5) + 0.5 * math.log(2)),
        # M = (3/8, 1/4, 3/8): KL(P||M) = KL(Q||M) = 1/2 log 4/3 + 1/4 log 2/3
        ("jsd", 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3)),
    ],
)
def test_hand_value(kind, expected):
    student, teacher = torch.tensor([[1.0], [1.0], [2.0]]).log(), torch.tensor([[2.0], [1.0], [1.0]]).log()
    one = torch.ones(1, 1)
    total, weight, _ = dense_divergence(
        one, student, HiddenScores(one, teacher), torch.tensor([2.0]), kind=kind, vocab_size=3
    )
    assert total.item() == pytest.approx(2 * expected, abs=1e-6) and weight == 2


def test_directions_are_not_swapped():
    # P = (0.8, 0.1, 0.1), Q uniform: KL(P||Q) = log 3 - H(P), KL(Q||P) = -log 3 - mean log P
    one, p = torch.ones(1, 1, dtype=torch.float64), torch.tensor([0.8, 0.1, 0.1], dtype=torch.float64)
    teacher, uniform = HiddenScores(one, p.log()[:, None]), torch.zeros(3, 1, dtype=torch.float64)
    forward = dense_divergence(one, uniform, teacher, torch.ones(1), kind="forward_kl", vocab_size=3)[0]
    reverse = dense_divergence(one, uniform, teacher, torch.ones(1), kind="reverse_kl", vocab_size=3)[0]
    assert forward.item() == pytest.approx(math.log(3) + float((p * p.log()).sum()), abs=1e-12)
    assert reverse.item() == pytest.approx(-math.log(3) - float(p.log().mean()), abs=1e-12)
    assert abs(forward - reverse) > 0.05


def test_metrics_are_unweighted_totals_over_members():
    hidden, head, t_hidden, t_head, weights = make()
    metrics = dense_divergence(hidden, head, HiddenScores(t_hidden, t_head), weights, kind="jsd", vocab_size=VOCAB)[2]
    member = (weights != 0).double()
    q, p = ((h @ w.T)[:, :VOCAB].softmax(1) for h, w in ((hidden, head), (t_hidden, t_head)))
    expected = {
        "teacher/forward_kl": (p * (p / q).log()).sum(1),
        "teacher/reverse_kl": (q * (q / p).log()).sum(1),
        "policy/entropy": -(q * q.log()).sum(1),
        "teacher/entropy": -(p * p.log()).sum(1),
    }
    assert metrics.keys() == expected.keys()
    for name, (total, count) in metrics.items():
        torch.testing.assert_close(total, (member * expected[name]).sum().detach(), rtol=0, atol=1e-12)
        assert count == TOKENS - 1 and not total.requires_grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("teacher_form", ["hidden", "topk"])
def test_any_split_and_order_gives_the_same_sum_and_gradient(kind, teacher_form):
    hidden, head, t_hidden, t_head, weights = make()
    scores = top_k(t_hidden, t_head, 3)

    def part(rows):
        if teacher_form == "hidden":
            return HiddenScores(t_hidden[rows], t_head)
        return TopKScores(scores.ids[rows], scores.logprobs[rows])

    def run(groups):
        return sum(
            dense_divergence(hidden[rows], head, part(rows), weights[rows], kind=kind, vocab_size=VOCAB)[0]
            for rows in groups
        )

    everything = torch.arange(TOKENS)
    for groups in (everything.split(2), everything.flip(0).split(4), everything.split(1)):
        assert_equal(run(groups), run([everything]), (hidden, head), atol=1e-12)


def test_head_gradient_accumulates_with_tied_embeddings():
    table, (_, _, t_hidden, t_head, weights) = (
        torch.randn(ROWS, HIDDEN, dtype=torch.float64, requires_grad=True),
        make(),
    )
    inputs = torch.arange(TOKENS) + 2
    full = dense_divergence_from_logits(
        table[inputs] @ table.T, t_hidden @ t_head.T, weights, kind="reverse_kl", vocab_size=VOCAB
    )
    expected = torch.autograd.grad(full / 7, table)[0]
    for rows in torch.arange(TOKENS).split(4):
        teacher = HiddenScores(t_hidden[rows], t_head)
        total = dense_divergence(
            table[inputs[rows]], table, teacher, weights[rows], kind="reverse_kl", vocab_size=VOCAB
        )[0]
        (total / 7).backward()
    torch.testing.assert_close(table.grad, expected, rtol=0, atol=1e-12)


def test_backward_twice_does_not_change_the_stored_gradient():
    hidden, head, t_hidden, t_head, weights = make()
    total = dense_divergence(hidden, head, HiddenScores(t_hidden, t_head), weights, kind="jsd", vocab_size=VOCAB)[0]
    first = torch.autograd.grad(3 * total, (hidden, head), retain_graph=True)
    second = torch.autograd.grad(total, (hidden, head))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, 3 * b, rtol=1e-14, atol=0)


def test_frozen_head_and_no_grad():
    hidden, head, t_hidden, t_head, weights = make()
    teacher, frozen = HiddenScores(t_hidden, t_head), head.detach()
    options = {"kind": "forward_kl", "vocab_size": VOCAB}
    total = dense_divergence(hidden, frozen, teacher, weights, **options)[0]
    (grad,) = torch.autograd.grad(total, hidden)
    expected = torch.autograd.grad(dense_divergence(hidden, head, teacher, weights, **options)[0], hidden)[0]
    torch.testing.assert_close(grad, expected, rtol=0, atol=0)
    with torch.no_grad():
        silent = dense_divergence(hidden, head, teacher, weights, **options)[0]
    assert silent == total and not silent.requires_grad


def forbidden_teacher():
    hidden, head, t_hidden, t_head, weights = make()
    bias = torch.zeros(TEACHER_ROWS, dtype=torch.float64)
    bias[[1, 7]] = -torch.inf
    return hidden, head, HiddenScores(t_hidden, t_head, bias), t_hidden @ t_head.T + bias, weights


@pytest.mark.parametrize("kind", KINDS)
def test_forbidden_teacher_tokens_are_finite_and_match_the_oracle(kind):
    hidden, head, teacher, t_logits, weights = forbidden_teacher()
    actual = dense_divergence(hidden, head, teacher, weights, kind=kind, vocab_size=VOCAB)[0]
    expected = dense_divergence_from_logits(hidden @ head.T, t_logits, weights, kind=kind, vocab_size=VOCAB)
    assert actual.isfinite()
    assert_equal(actual, expected, (hidden, head))


def test_forbidden_tokens_cost_100_nats_per_unit_of_student_mass():
    hidden, head, teacher, t_logits, weights = forbidden_teacher()
    allowed = [i for i in range(VOCAB) if i not in (1, 7)]
    log_q, log_p = (hidden @ head.T)[:, :VOCAB].log_softmax(1), t_logits[:, :VOCAB].log_softmax(1)
    q = log_q.exp()
    expected = (q * log_q).sum(1) - (q * log_p)[:, allowed].sum(1) + 100 * q[:, [1, 7]].sum(1)
    total = dense_divergence(hidden, head, teacher, weights, kind="reverse_kl", vocab_size=VOCAB)[0]
    torch.testing.assert_close(total, (weights * expected).sum(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_masked_tokens_may_hold_anything(kind, poison):
    hidden, head, t_hidden, t_head, weights = make()
    options = {"kind": kind, "vocab_size": VOCAB}
    clean = dense_divergence(hidden, head, HiddenScores(t_hidden, t_head), weights, **options)[0]
    expected = torch.autograd.grad(clean, (hidden, head))
    bad, t_bad = hidden.detach().clone(), t_hidden.clone()
    bad[TOKENS // 3], t_bad[TOKENS // 3] = poison, poison
    bad.requires_grad_()
    dirty = dense_divergence(bad, head, HiddenScores(t_bad, t_head), weights, **options)[0]
    for a, b in zip(torch.autograd.grad(dirty, (bad, head)), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [0, TOKENS])
def test_no_members_is_a_differentiable_zero(kind, tokens):
    hidden, head, t_hidden, t_head, weights = make()
    hidden = hidden.detach()[:tokens].requires_grad_()
    total, weight, metrics = dense_divergence(
        hidden, head, HiddenScores(t_hidden[:tokens], t_head), 0 * weights[:tokens], kind=kind, vocab_size=VOCAB
    )
    total.backward()
    assert total == 0 and weight == 0 and all(count == 0 for _, count in metrics.values())
    assert hidden.grad is not None and hidden.grad.eq(0).all() and head.grad is not None and head.grad.eq(0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_topk_padding_entries_fold_into_the_tail(kind):
    hidden, head, t_hidden, t_head, weights = make()
    two = top_k(t_hidden, t_head, 2)
    padding = torch.zeros(TOKENS, 3, dtype=torch.int64), torch.full((TOKENS, 3), -torch.inf, dtype=torch.float64)
    padded = TopKScores(torch.cat([two.ids, padding[0]], 1), torch.cat([two.logprobs, padding[1]], 1))
    options = {"kind": kind, "vocab_size": VOCAB}
    a = dense_divergence(hidden, head, two, weights, **options)[0]
    assert_equal(dense_divergence(hidden, head, padded, weights, **options)[0], a, (hidden, head), atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_topk_of_the_whole_vocabulary_is_exact(kind):
    hidden, head, t_hidden, t_head, weights = make()
    options = {"kind": kind, "vocab_size": VOCAB}
    exact = dense_divergence(hidden, head, HiddenScores(t_hidden, t_head), weights, **options)[0]
    buckets = dense_divergence(hidden, head, top_k(t_hidden, t_head, VOCAB), weights, **options)[0]
    assert_equal(buckets, exact, (hidden, head))


def test_topk_keeps_the_tail_from_draining():
    # A truncated sum over the teacher's top 2 falls when the student drains them; the bucket divergence rises.
    one, teacher = torch.ones(1, 1), TopKScores(torch.tensor([[0, 1]]), torch.tensor([[0.6, 0.3]]).log())

    def loss(q):
        head = torch.tensor(q).log()[:, None]
        return dense_divergence(one, head, teacher, torch.ones(1), kind="reverse_kl", vocab_size=4)[0].item()

    assert loss([0.6, 0.3, 0.05, 0.05]) == pytest.approx(0, abs=1e-6)
    drained = [0.02, 0.01, 0.9, 0.07]
    expected = 0.02 * math.log(0.02 / 0.6) + 0.01 * math.log(0.01 / 0.3) + 0.97 * math.log(0.97 / 0.1)
    assert loss(drained) == pytest.approx(expected, abs=1e-4) and expected > 1


def test_an_exhausted_tail_counts_as_1e_7():
    # The k tokens already sum to 1; the student has 0.2 elsewhere: 0.8 log(0.4/0.5) + 0.2 log(0.2/1e-7)
    one, teacher = torch.ones(1, 1), TopKScores(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]]).log())
    head = torch.tensor([0.4, 0.4, 0.1, 0.1]).log()[:, None].requires_grad_()
    total = dense_divergence(one, head, teacher, torch.ones(1), kind="reverse_kl", vocab_size=4)[0]
    assert total.item() == pytest.approx(0.8 * math.log(0.8) + 0.2 * math.log(2e6), abs=1e-5)
    assert torch.autograd.grad(total, head)[0].isfinite().all()


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(KINDS),
    temperature=st.floats(0.3, 3),
    beta=st.floats(0.05, 0.95),
    scale=st.floats(0, 20),
    k=st.integers(1, VOCAB - 1),
)
def test_divergence_bounds(seed, kind, temperature, beta, scale, k):
    hidden, head, t_hidden, t_head, weights = make(seed=seed)
    t_hidden = scale * t_hidden
    options = {"kind": kind, "beta": beta, "temperature": temperature, "vocab_size": VOCAB}
    exact = dense_divergence(hidden, head, HiddenScores(t_hidden, t_head), weights, **options)[0]
    bound = dense_divergence(hidden, head, top_k(t_hidden, t_head, k, temperature), weights, **options)[0]
    own = dense_divergence(hidden, head, HiddenScores(hidden.detach(), head.detach()), weights, **options)[0]
    assert abs(own.item()) < 1e-12 and all(g.abs().max() < 1e-12 for g in torch.autograd.grad(own, (hidden, head)))
    assert -1e-9 <= bound.item() <= exact.item() + 1e-4
    expected = dense_divergence_from_logits(hidden @ head.T, t_hidden @ t_head.T, weights, **options)
    assert_equal(exact, expected, (hidden, head))


def test_bf16_teacher_for_a_float32_student():
    hidden, head, t_hidden, t_head, weights = make(dtype=torch.float32)
    low = HiddenScores(t_hidden.bfloat16(), t_head.bfloat16())
    options = {"kind": "forward_kl", "vocab_size": VOCAB}
    actual = dense_divergence(hidden, head, low, weights, **options)[0]
    expected = dense_divergence_from_logits(
        hidden @ head.T, (low.hidden @ low.head.T).float(), weights.float(), **options
    )
    assert actual.dtype == torch.float32
    assert_equal(actual, expected, (hidden, head), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_student_is_reduced_in_float32(kind):
    low = make(dtype=torch.bfloat16)
    hidden, head, t_hidden, t_head = (x.detach().double() for x in low[:4])
    hidden, head = hidden.requires_grad_(), head.requires_grad_()
    options = {"kind": kind, "vocab_size": VOCAB}
    actual = dense_divergence(low[0], low[1], HiddenScores(low[2], low[3]), low[4], **options)[0]
    exact = dense_divergence(hidden, head, HiddenScores(t_hidden, t_head), low[4], **options)[0]
    assert actual.dtype == torch.float32 and actual.item() == pytest.approx(exact.item(), rel=0.02)
    actual.backward()
    for a, b in zip((low[0], low[1]), torch.autograd.grad(exact, (hidden, head)), strict=True):
        assert a.grad is not None and a.grad.dtype == torch.bfloat16
        torch.testing.assert_close(a.grad.double(), b, rtol=0.05, atol=0.03)


class LargestOutput(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize("teacher_form", ["hidden", "topk"])
def test_never_more_than_a_chunk_of_logits(teacher_form):
    hidden, head = torch.randn(64, 4, requires_grad=True), torch.randn(50, 4, requires_grad=True)
    teacher = HiddenScores(torch.randn(64, 3), torch.randn(50, 3))
    teacher = teacher if teacher_form == "hidden" else top_k(teacher.hidden, teacher.head, 3, vocab=50)
    with LargestOutput() as largest:
        dense_divergence(hidden, head, teacher, torch.ones(64), kind="jsd", vocab_size=50, chunk_tokens=8)[0].backward()
    assert largest.numel == 8 * 50


def test_errors():
    hidden, head, t_hidden, t_head, weights = make()
    full, top = HiddenScores(t_hidden, t_head), top_k(t_hidden, t_head, 3)

    def run(teacher: HiddenScores | TopKScores = full, **options: Any):
        dense_divergence(hidden, head, teacher, weights, **{"kind": "jsd", "vocab_size": VOCAB, **options})

    with pytest.raises(ValueError, match="beta"):
        run(beta=1.0)
    with pytest.raises(ValueError, match="positive"):
        run(temperature=0.0)
    with pytest.raises(ValueError, match="same loss tokens"):
        run(HiddenScores(t_hidden[1:], t_head))
    with pytest.raises(ValueError, match="temperature"):
        run(top, temperature=0.5)
    with pytest.raises(ValueError, match="ids reach"):
        run(TopKScores(top.ids + VOCAB, top.logprobs))
    with pytest.raises(ValueError, match="more than 1"):
        run(TopKScores(top.ids, top.logprobs + 1))
