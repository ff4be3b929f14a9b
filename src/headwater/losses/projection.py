"""Hidden states and an LM head to log-probs of the target tokens, a chunk of logits at a time."""

from __future__ import annotations

from typing import Any, no_type_check

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from headwater.losses.numerics import (
    NO_MASS,
    accurate_dtype,
    add_product,
    by_rows,
    check_projection,
    first_rows,
    fused,
    matmul,
    matmul_dtype,
    padded_rows,
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
    bias: Float[Tensor, " rows"] | None = None,
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
    """Log-probs (nats) of `targets` under softmax(hidden @ head.T / temperature), and the detached entropy.

    At most chunk_tokens x vocab logits exist at a time, forward and backward; the backward recomputes them. Gradients
    reach hidden, head and bias. Head rows from `vocab_size` on are padding and are cut off before the softmax. A token
    whose log-prob receives no gradient contributes none, even where its hidden state is not finite.
    Raises ValueError for targets outside the vocabulary and for sizes that are not positive.
    """
    check_projection(temperature, vocab_size, chunk_tokens)
    rows = min(vocab_size, head.shape[0])
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < rows:
        raise ValueError(
            f"targets lie in {int(targets.min())}..{int(targets.max())}, head and vocab_size allow 0..{rows - 1}; "
            "the tokenizer and the model disagree"
        )
    logprobs, entropy = _TokenLogprobs.apply(hidden, head, bias, targets, temperature, rows, chunk_tokens)
    return logprobs, entropy


@no_type_check
def scaled(product: Tensor, bias: Tensor | None, rows: int, temperature: float, out: torch.dtype) -> Tensor:
    """Logits / temperature of the first `rows` tokens, from the product of hidden states and head."""
    logits = product[:, :rows].to(out)
    if bias is not None:
        logits = logits + bias.to(out)
    return logits if temperature == 1 else logits / temperature


@no_type_check
def _statistics(
    product: Tensor, targets: Tensor, bias: Tensor | None, rows: int, temperature: float, out: torch.dtype
) -> tuple[None, Tensor, Tensor, Tensor]:
    """Normaliser, log-prob of the target and entropy of every row of a product of hidden states and head."""
    logits = scaled(product, bias, rows, temperature, out)
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
    bias: Tensor | None,
    rows: int,
    temperature: float,
    out: torch.dtype,
) -> tuple[Tensor]:
    """Gradient of the log-probs with respect to the product, in its shape and dtype."""
    logits = scaled(product, bias, rows, temperature, out)
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
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        rows: int,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        multiply, out = matmul_dtype(hidden, head), accurate_dtype(hidden)
        cut = first_rows(head, padded_rows(rows, head), multiply)
        cut_bias = None if bias is None else bias[:rows]
        normaliser, logprobs, entropy = (torch.empty(len(hidden), dtype=out, device=hidden.device) for _ in range(3))
        for start in range(0, len(hidden), chunk_tokens):
            part = slice(start, start + chunk_tokens)
            product = matmul(hidden[part], cut.T, multiply)
            _, normaliser[part], logprobs[part], entropy[part] = by_rows(
                fused(_statistics, product), product, (targets[part],), cut_bias, rows, temperature, out
            )
        ctx.save_for_backward(hidden, head, bias, targets, normaliser)
        ctx.settings = (temperature, rows, chunk_tokens, multiply, out)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_logprobs = grads[0]
        hidden, head, bias, targets, normaliser = ctx.saved_tensors
        temperature, rows, chunk_tokens, multiply, out = ctx.settings
        wide = padded_rows(rows, head)
        cut, cut_bias = first_rows(head, wide, multiply), None if bias is None else bias[:rows]
        wants_hidden, wants_head, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden) if wants_hidden else None
        grad_head = head.new_zeros(max(len(head), wide), head.shape[1], dtype=out) if wants_head else None
        grad_bias = torch.zeros_like(bias, dtype=out) if bias is not None and wants_bias else None
        # Only rows with a gradient: a masked token's hidden state may hold NaN, and 0 * NaN would spread it.
        for part in grad_logprobs.nonzero()[:, 0].split(chunk_tokens):
            product = matmul(hidden[part], cut.T, multiply)
            given = (targets[part], normaliser[part], grad_logprobs[part])
            (slopes,) = by_rows(fused(_slopes, product), product, given, cut_bias, rows, temperature, out)
            if grad_bias is not None:
                grad_bias[:rows] += slopes[:, :rows].sum(0, dtype=out)
            if grad_hidden is not None:
                grad_hidden[part] = matmul(slopes, cut, multiply).to(hidden.dtype)
            if grad_head is not None:
                add_product(grad_head[:wide], slopes.T, hidden[part], multiply)
        return (
            grad_hidden,
            None if grad_head is None else grad_head[: len(head)].to(head.dtype),
            None if bias is None or grad_bias is None else grad_bias.to(bias.dtype),
            *(None,) * 4,
        )
