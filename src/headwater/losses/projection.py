"""Hidden states and an LM head to log-probs of the target tokens, a chunk of logits at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, no_type_check

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from headwater.losses.numerics import (
    NO_MASS,
    Metrics,
    accurate_dtype,
    add_product,
    by_rows,
    first_rows,
    fused,
    matmul,
    matmul_dtype,
    merged,
    padded_rows,
    rows_and_chunk,
    with_columns,
)


def token_logprobs(
    hidden: Float[Tensor, "tokens hidden"],
    head: Float[Tensor, "rows hidden"],
    targets: Int[Tensor, " tokens"],
    *,
    vocab_size: int,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
    """Log-probs (nats) of `targets` under softmax(hidden @ head.T / temperature), and the detached entropy.

    At most chunk_tokens x vocab logits exist at a time, forward and backward; the backward recomputes them. Gradients
    reach hidden and head. Head rows from `vocab_size` on are padding and are cut off before the softmax. A token
    whose log-prob receives no gradient contributes none, even where its hidden state is not finite.
    Raises ValueError for targets outside the vocabulary and for sizes that are not positive.
    """
    rows, chunk_tokens = _rows(head, targets, vocab_size, temperature, chunk_tokens)
    logprobs, entropy = _TokenLogprobs.apply(hidden, head, targets, temperature, rows, chunk_tokens)
    return logprobs, entropy


def sum_over_logprobs(
    hidden: Float[Tensor, "tokens hidden"],
    head: Float[Tensor, "rows hidden"],
    targets: Int[Tensor, " tokens"],
    of: Callable[[Tensor, slice], tuple[Tensor, Metrics]],
    *,
    vocab_size: int,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
) -> tuple[Float[Tensor, ""], Metrics]:
    """Sum of `of(log-probs of the targets in a slice, slice)` over slices, and its metrics with `policy/entropy`.

    The same as a loss on `token_logprobs`, for losses that are sums over tokens: known a slice at a time, the gradient
    is taken in the forward pass, with three products of a token with the head where the other needs four.
    Raises ValueError as `token_logprobs` does.
    """
    rows, chunk_tokens = _rows(head, targets, vocab_size, temperature, chunk_tokens)
    out, learning = accurate_dtype(hidden), torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad)
    total, metrics = torch.zeros((), dtype=out, device=hidden.device), Metrics()

    def slopes(product: Tensor, part: slice) -> tuple[Tensor, Tensor] | None:
        how, ids = (rows, temperature, out), targets[part]
        _, normaliser, logprobs, entropy = by_rows(fused(_statistics, product), product, (ids,), *how)
        with torch.enable_grad():
            value, observed = of(logprobs.requires_grad_(), part)
        total.add_(value.detach())
        observed["policy/entropy"] = (entropy.sum(), entropy.new_tensor(len(entropy)))
        metrics.update(merged(metrics, observed))
        if not learning:
            return None
        (slope,) = torch.autograd.grad(value, logprobs)
        some = slope.nonzero()[:, 0]  # as in _TokenLogprobs.backward
        if len(some) < len(slope):
            product, ids, normaliser, slope = product[some], ids[some], normaliser[some], slope[some]
        return by_rows(fused(_slopes, product), product, (ids, normaliser, slope), *how)[0], some + part.start

    return summed(hidden, head, _slices(len(hidden), chunk_tokens), slopes, total, rows), metrics


def _slices(tokens: int, size: int) -> list[slice]:
    """At least one, so that no tokens have metrics too."""
    return [slice(start, start + size) for start in range(0, max(1, tokens), size)]


def _rows(head: Tensor, targets: Tensor, vocab_size: int, temperature: float, chunk_tokens: int) -> tuple[int, int]:
    """As `rows_and_chunk`, with the targets checked."""
    rows, chunk = rows_and_chunk(head, temperature, vocab_size, chunk_tokens)
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < rows:
        raise ValueError(
            f"targets lie in {int(targets.min())}..{int(targets.max())}, head and vocab_size allow 0..{rows - 1}; "
            "the tokenizer and the model disagree"
        )
    return rows, chunk


def summed(
    hidden: Tensor,
    head: Tensor,
    parts: Iterable[Any],
    slopes: Callable[[Tensor, Any], tuple[Tensor, Any] | None],
    total: Tensor,
    rows: int,
) -> Tensor:
    """`total`, to which `slopes`, as `gradients` calls it, adds a sum over tokens while it gives its gradient."""
    wants = [torch.is_grad_enabled() and x.requires_grad for x in (hidden, head)]
    return _Summed.apply(hidden, head, parts, slopes, total, rows, wants)


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, *given: Any) -> Tensor:
        parts, slopes, total, rows, wants = given
        ctx.save_for_backward(*gradients(hidden, head, parts, slopes, rows, matmul_dtype(hidden, head), wants))
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if g is None else (grads[0] * g).to(g.dtype) for g in ctx.saved_tensors), *(None,) * 5


def gradients(
    hidden: Tensor,
    head: Tensor,
    parts: Iterable[Any],
    slopes: Callable[[Tensor, Any], tuple[Tensor, Any] | None],
    rows: int,
    multiply: torch.dtype,
    wants: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients wanted with respect to hidden and head, from those with respect to the products of the two:
    `slopes(product of a part, part)` gives them, and the tokens they are of, or None for none."""
    wide = padded_rows(rows, head)
    cut = first_rows(head, wide, multiply)
    grad_hidden = torch.zeros_like(hidden) if wants[0] else None
    size, out = (max(len(head), wide), head.shape[1]), accurate_dtype(hidden)
    grad_head = head.new_zeros(size, dtype=out) if wants[1] else None
    for part in parts:
        found = slopes(matmul(hidden[part], cut.T, multiply), part)
        if found is None:
            continue
        grad, part = found
        if grad_hidden is not None:
            grad_hidden[part] = matmul(grad, cut, multiply).to(hidden.dtype)
        if grad_head is not None:
            add_product(grad_head[:wide], grad.T, hidden[part], multiply)
        del found, grad  # else two chunks would exist while the next one is multiplied
    return grad_hidden, None if grad_head is None else grad_head[: len(head)].to(head.dtype)


@no_type_check
def scaled(product: Tensor, bias: Tensor | None, rows: int, temperature: float, out: torch.dtype) -> Tensor:
    """Logits / temperature of the first `rows` tokens, from the product of hidden states and head."""
    logits = product[:, :rows].to(out)
    if bias is not None:
        logits = logits + bias.to(out)
    return logits if temperature == 1 else logits / temperature


@no_type_check
def _statistics(
    product: Tensor, targets: Tensor, rows: int, temperature: float, out: torch.dtype
) -> tuple[None, Tensor, Tensor, Tensor]:
    """Normaliser, log-prob of the target and entropy of every row of a product of hidden states and head."""
    logits = scaled(product, None, rows, temperature, out)
    top = logits.amax(1, keepdim=True)
    below = logits - top
    target = below.gather(1, targets[:, None])[:, 0]
    mass = below.exp()
    total = mass.sum(1)
    # H = log Z - E[logit - top]: two terms that are never negative, so nothing cancels.
    entropy = total.log() - (mass * below.clamp(min=NO_MASS)).sum(1) / total
    return None, top[:, 0] + total.log(), target - total.log(), entropy


@no_type_check
def _slopes(
    product: Tensor,
    targets: Tensor,
    normaliser: Tensor,
    grad: Tensor,
    rows: int,
    temperature: float,
    out: torch.dtype,
) -> tuple[Tensor]:
    """Gradient of the log-probs with respect to the product, in its shape and dtype."""
    logits = scaled(product, None, rows, temperature, out)
    slope = grad[:, None].to(out) / temperature
    slopes = (logits - normaliser[:, None]).exp_().mul_(-slope)
    if slopes.is_cuda:  # a scatter would keep the compiler from fusing
        slopes = torch.where(torch.arange(rows, device=slopes.device) == targets[:, None], slopes + slope, slopes)
    else:
        slopes.scatter_add_(1, targets[:, None], slope)
    return (with_columns(slopes, product.shape[1], product.dtype),)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        temperature: float,
        rows: int,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        multiply, out = matmul_dtype(hidden, head), accurate_dtype(hidden)
        normaliser, logprobs, entropy = (torch.empty(len(hidden), dtype=out, device=hidden.device) for _ in range(3))

        def keep(product: Tensor, part: slice) -> None:
            _, normaliser[part], logprobs[part], entropy[part] = by_rows(
                fused(_statistics, product), product, (targets[part],), rows, temperature, out
            )

        gradients(hidden, head, _slices(len(hidden), chunk_tokens), keep, rows, multiply, (False, False))
        ctx.save_for_backward(hidden, head, targets, normaliser)
        ctx.settings = (temperature, rows, chunk_tokens, multiply, out)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_logprobs = grads[0]
        hidden, head, targets, normaliser = ctx.saved_tensors
        temperature, rows, chunk_tokens, multiply, out = ctx.settings

        def slopes(product: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
            given = (targets[part], normaliser[part], grad_logprobs[part])
            return by_rows(fused(_slopes, product), product, given, rows, temperature, out)[0], part

        # Only rows with a gradient: a masked token's hidden state may hold NaN, and 0 * NaN would spread it.
        parts, wants = grad_logprobs.nonzero()[:, 0].split(chunk_tokens), ctx.needs_input_grad[:2]
        return *gradients(hidden, head, parts, slopes, rows, multiply, wants), *(None,) * 4
