import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from headwater.losses import numerics, token_logprobs
from headwater.losses.closeness import token_closeness
from headwater.losses.dense import dense_divergence
from headwater.losses.numerics import mean_metric, where_member
from headwater.losses.oracle import token_logprobs_from_logits
from headwater.losses.projection import sum_over_logprobs
from headwater.scoring.scores import HiddenScores

TOKENS, HIDDEN, ROWS, VOCAB = 11, 5, 13, 10


def make(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden, head = (torch.randn(n, HIDDEN, generator=generator, dtype=torch.float64) for n in (TOKENS, ROWS))
    targets = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    return *(x.to(dtype).requires_grad_() for x in (hidden, head)), targets


@pytest.mark.parametrize("cached", [3 * ROWS, numerics.CACHED], ids=["lots", "whole"])
@pytest.mark.parametrize("chunk_tokens", [1, 4, 64])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_equals_full_logits_with_gradients(chunk_tokens, temperature, cached, monkeypatch):
    monkeypatch.setattr(numerics, "CACHED", cached)  # three rows at a time, as with a large vocabulary, or all
    hidden, head, targets = make()
    upstream = torch.linspace(-1, 2, TOKENS, dtype=torch.float64)
    logprobs, entropy = token_logprobs(
        hidden, head, targets, vocab_size=VOCAB, temperature=temperature, chunk_tokens=chunk_tokens
    )
    expected, expected_entropy = token_logprobs_from_logits(
        hidden @ head.T, targets, vocab_size=VOCAB, temperature=temperature
    )
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(entropy, expected_entropy.detach(), rtol=0, atol=1e-12)
    assert not entropy.requires_grad
    grads = torch.autograd.grad((upstream * logprobs).sum(), (hidden, head))
    for actual, wanted in zip(grads, torch.autograd.grad((upstream * expected).sum(), (hidden, head)), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-12)
    assert grads[1][VOCAB:].eq(0).all()


def test_gradcheck():
    hidden, head, targets = make()

    def function(hidden, head):
        return token_logprobs(hidden, head, targets, vocab_size=VOCAB, temperature=0.7, chunk_tokens=4)[0]

    assert torch.autograd.gradcheck(function, (hidden, head))


def test_hand_value():
    # logits log 1, log 2, log 5 and a padding row that would dominate: probabilities 1/8, 2/8, 5/8
    head = torch.tensor([[1.0], [2.0], [5.0], [1e30]]).log()
    logprobs, entropy = token_logprobs(torch.ones(1, 1), head, torch.tensor([2]), vocab_size=3)
    p = torch.tensor([0.125, 0.25, 0.625])
    assert logprobs.item() == pytest.approx(torch.log(p[2]).item(), abs=1e-6)
    assert entropy.item() == pytest.approx(-(p * p.log()).sum().item(), abs=1e-6)


def test_gradient_accumulates_with_tied_embeddings():
    table, targets = torch.randn(ROWS, HIDDEN, dtype=torch.float64, requires_grad=True), make()[2]
    inputs = torch.arange(TOKENS) % ROWS
    expected = torch.autograd.grad(
        token_logprobs_from_logits(table[inputs] @ table.T, targets, vocab_size=VOCAB)[0].sum(), table
    )[0]
    for part in (slice(0, 3), slice(3, TOKENS)):
        token_logprobs(table[inputs[part]], table, targets[part], vocab_size=VOCAB)[0].sum().backward()
    torch.testing.assert_close(table.grad, expected, rtol=0, atol=1e-12)


def test_a_token_without_gradient_may_hold_nan():
    hidden, head, targets = make()
    with torch.no_grad():
        hidden[3] = float("nan")
    logprobs, _ = token_logprobs(hidden, head, targets, vocab_size=VOCAB, chunk_tokens=4)
    torch.where(torch.arange(TOKENS) == 3, 0.0, logprobs).sum().backward()
    assert hidden.grad is not None and head.grad is not None
    assert hidden.grad.isfinite().all() and hidden.grad[3].eq(0).all() and head.grad.isfinite().all()


def test_half_precision_is_normalised_in_float32():
    hidden, head, targets = make(torch.bfloat16)
    logprobs, entropy = token_logprobs(hidden, head, targets, vocab_size=VOCAB, chunk_tokens=3)
    assert logprobs.dtype == entropy.dtype == torch.float32
    logits = (hidden.detach() @ head.detach().T).float()
    torch.testing.assert_close(
        logprobs, token_logprobs_from_logits(logits, targets, vocab_size=VOCAB)[0], rtol=0, atol=1e-6
    )
    logprobs.sum().backward()
    exact = [x.detach().double().requires_grad_() for x in (hidden, head)]
    token_logprobs(exact[0], exact[1], targets, vocab_size=VOCAB)[0].sum().backward()
    for low, high in zip((hidden, head), exact, strict=True):
        assert low.grad is not None and high.grad is not None and low.grad.dtype == torch.bfloat16
        torch.testing.assert_close(low.grad.double(), high.grad, rtol=0.03, atol=0.03)


def test_autocast_decides_the_product_and_backward_agrees_with_forward():
    hidden, head, targets = make(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = token_logprobs(hidden, head, targets, vocab_size=VOCAB)[0]
    low = [x.detach().bfloat16().requires_grad_() for x in (hidden, head)]
    torch.testing.assert_close(inside, token_logprobs(low[0], low[1], targets, vocab_size=VOCAB)[0], rtol=0, atol=0)
    inside.sum().backward()
    assert head.grad is not None and head.grad.dtype == torch.float32


class LargestTensor(TorchDispatchMode):
    """The most elements any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


def test_never_more_than_a_chunk_of_logits():
    hidden, head = torch.randn(64, 4, requires_grad=True), torch.randn(50, 4, requires_grad=True)
    with LargestTensor() as largest:
        token_logprobs(hidden, head, torch.zeros(64, dtype=torch.int64), vocab_size=50, chunk_tokens=8)[
            0
        ].sum().backward()
    assert largest.numel == 8 * 50


@pytest.mark.parametrize("loss", ["token_logprobs", "sum_over_logprobs", "dense", "closeness"])
def test_a_chunk_of_logits_is_no_larger_than_the_head(loss):
    rows = 2**22  # at width 4 the head has 2^24 numbers, below which no chunk is bounded
    hidden, head = torch.randn(6, 4, requires_grad=True), torch.randn(rows, 4, requires_grad=True)
    targets = torch.zeros(6, dtype=torch.int64)
    teacher = HiddenScores(torch.randn(6, 2), torch.randn(rows, 2))
    with LargestTensor() as largest:
        if loss == "token_logprobs":
            token_logprobs(hidden, head, targets, vocab_size=rows)[0].sum().backward()
        elif loss == "sum_over_logprobs":
            sum_over_logprobs(hidden, head, targets, lambda x, _: (x.sum(), {}), vocab_size=rows)[0].backward()
        elif loss == "dense":
            dense_divergence(hidden, head, teacher, torch.ones(6), kind="reverse_kl", vocab_size=rows)[0].backward()
        else:
            token_closeness(hidden, head, teacher, targets, vocab_size=rows)
    assert largest.numel == head.numel()


@pytest.mark.parametrize(
    "most, rows, width, expected",
    [
        (1024, 50, 64, 1024),
        (1024, 151_936, 256, 128),
        (1024, 151_936, 2048, 1024),
        (64, 151_936, 256, 64),
        (1024, 49_152, 256, 341),
    ],
)
def test_chunks_are_bounded_by_the_head_and_2_to_the_24(most, rows, width, expected):
    assert numerics.rows_and_chunk(torch.empty(rows, width, device="meta"), 1.0, rows, most) == (rows, expected)


def test_products_are_added_some_rows_at_a_time(monkeypatch):
    total, a, b = torch.randn(23, 4), torch.randn(5, 23).T, torch.randn(5, 4)
    expected = total + a @ b
    monkeypatch.setattr(numerics, "CACHED", 5)  # five rows
    numerics.add_product(total, a, b, torch.float32)
    torch.testing.assert_close(total, expected)


def test_empty_batch():
    head = torch.randn(ROWS, HIDDEN, requires_grad=True)
    empty = torch.zeros(0, HIDDEN, requires_grad=True)
    logprobs, entropy = token_logprobs(empty, head, torch.zeros(0, dtype=torch.int64), vocab_size=VOCAB)
    logprobs.sum().backward()
    assert logprobs.shape == entropy.shape == (0,) and head.grad is not None and head.grad.eq(0).all()


def test_errors():
    hidden, head, targets = make()
    with pytest.raises(ValueError, match="targets"):
        token_logprobs(hidden, head, targets + VOCAB, vocab_size=VOCAB)
    for bad in ({"temperature": 0.0}, {"vocab_size": 0}, {"chunk_tokens": 0}):
        with pytest.raises(ValueError, match="positive"):
            token_logprobs(hidden, head, targets, **{"vocab_size": VOCAB, **bad})


@pytest.mark.parametrize("chunk_tokens", [1, 4, 64])
def test_a_sum_over_logprobs_is_the_loss_on_them_with_a_product_less(chunk_tokens):
    hidden, head, targets = make()
    with torch.no_grad():
        hidden[3] = float("nan")  # a masked token
    weights = torch.linspace(0.5, 2, TOKENS, dtype=torch.float64).index_fill(0, torch.tensor([3, 4]), 0.0)
    options = {"vocab_size": VOCAB, "temperature": 0.7, "chunk_tokens": chunk_tokens}

    def of(logprobs, part):
        nats = -(where_member(logprobs, weights[part] != 0, torch.float64) ** 3)
        worst = (nats.detach().max(), torch.ones(()))
        return (weights[part] * nats).sum(), {"nats": mean_metric(nats, weights[part] != 0), "nats_max": worst}

    found, counts = [], []
    for fused in (True, False):
        with FlopCounterMode(display=False) as counter:
            if fused:
                total, metrics = sum_over_logprobs(hidden, head, targets, of, **options)
            else:
                logprobs, entropy = token_logprobs(hidden, head, targets, **options)
                total, metrics = of(logprobs, slice(0, TOKENS))
                metrics["policy/entropy"] = (entropy.sum(), torch.tensor(TOKENS))
            found.append((total, *torch.autograd.grad(2.5 * total, (hidden, head))))
        found[-1] += tuple(x.double() for x in (*metrics["nats"], metrics["nats_max"][0], *metrics["policy/entropy"]))
        counts.append(counter.get_total_flops())
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12, equal_nan=True)
    assert found[0][1].isfinite().all() and found[0][2].isfinite().all()
    product = 2 * HIDDEN * VOCAB
    assert counts == [product * (TOKENS + 2 * (TOKENS - 2)), product * (TOKENS + 3 * (TOKENS - 2))]


def test_a_sum_over_logprobs_of_no_tokens_or_without_gradients():
    hidden, head, targets = make()

    def of(logprobs, part):
        return logprobs.sum(), {}

    total, metrics = sum_over_logprobs(hidden[:0], head, targets[:0], of, vocab_size=VOCAB)
    assert total.item() == 0 and metrics["policy/entropy"][1].item() == 0
    assert [g.abs().sum().item() for g in torch.autograd.grad(total, (hidden, head))] == [0, 0]
    with torch.no_grad():
        total, _ = sum_over_logprobs(hidden, head, targets, of, vocab_size=VOCAB, chunk_tokens=4)
    expected = token_logprobs(hidden, head, targets, vocab_size=VOCAB)[0].sum()
    torch.testing.assert_close(total, expected.detach(), rtol=0, atol=1e-12)
