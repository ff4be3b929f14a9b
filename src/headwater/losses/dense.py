"""Divergences between a student and a teacher over the whole vocabulary, with the gradient taken in the forward pass.

Per chunk of tokens the logits of both are made, the divergence and its gradient with respect to the student's logits
written down in closed form, and only the gradients with respect to hidden state and head kept: nothing of size
tokens x vocab outlives a chunk. Liger's fused linear losses (arXiv:2410.10989) do the same.
"""

from __future__ import annotations

import math
from typing import Literal, no_type_check

import torch
from jaxtyping import Float
from torch import Tensor

from headwater.losses.numerics import (
    LOGPROB_FLOOR,
    NO_MASS,
    Loss,
    accurate_dtype,
    by_rows,
    first_rows,
    fused,
    matmul,
    matmul_dtype,
    padded_rows,
    rows_and_chunk,
    with_columns,
)
from headwater.losses.projection import scaled, summed
from headwater.scoring.scores import HiddenScores, TopKScores

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]

TAIL_FLOOR = 1e-7
"""The least mass a top-k teacher's tail can have: 1 - sum cannot tell less from nothing in float32."""


def dense_divergence(
    student_hidden: Float[Tensor, "tokens hidden"],
    student_head: Float[Tensor, "rows hidden"],
    teacher: HiddenScores | TopKScores,
    weights: Float[Tensor, " tokens"],
    *,
    kind: Divergence,
    vocab_size: int,
    beta: float = 0.5,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
) -> Loss:
    """Weighted sum over tokens of the divergence of two next-token distributions, in nats.

    P is the teacher, Q the student, both softmaxes of logits / temperature (there is no temperature^2 factor) over the
    shared prefix of min(student rows, teacher rows, vocab_size) tokens, each normalised there.

    - "forward_kl": KL(P||Q) = sum P log(P/Q). A token the teacher forbids (-inf) adds 0.
    - "reverse_kl": KL(Q||P) = sum Q log(Q/P), with log P floored at -100: student mass on a forbidden token costs
      100 nats per unit and is driven out by a finite gradient.
    - "jsd": beta KL(P||M) + (1 - beta) KL(Q||M), M = beta P + (1 - beta) Q, 0 < beta < 1: the generalised
      Jensen-Shannon divergence of GKD (arXiv:2306.13649, equation 1). It is not rescaled, so it vanishes at both ends.

    With `TopKScores` both distributions are first summed into k + 1 buckets: the k tokens and one tail. By the
    data-processing inequality the result is a lower bound of the exact divergence, and unlike a truncated sum it is a
    divergence: the student cannot lower it by draining mass from the k tokens.

    Gradients reach student_hidden and student_head; tokens of weight 0 are never computed. Metrics: both
    KL directions and the student's entropy (`policy/entropy`), with hidden states the teacher's entropy, with top-k
    `teacher/topk_mass`. Raises ValueError for misaligned tokens, ids outside the vocabulary, top-k mass above 1 and
    top-k log-probs taken at another temperature, which cannot be re-tempered since the tail is unknown.
    """
    rows, chunk_tokens = rows_and_chunk(student_head, temperature, vocab_size, chunk_tokens)
    if kind == "jsd" and not 0 < beta < 1:
        raise ValueError(f'jsd needs 0 < beta < 1, got {beta}; for the ends use kind="forward_kl" or "reverse_kl"')
    rows = min(rows, teacher.head.shape[0]) if isinstance(teacher, HiddenScores) else rows
    _check_teacher(teacher, len(student_hidden), rows, temperature)
    if isinstance(teacher, HiddenScores):
        teacher_cut = first_rows(teacher.head, padded_rows(rows, student_head), teacher.head.dtype)
    weights, out = weights.detach(), accurate_dtype(student_hidden)
    total, statistics = torch.zeros((), dtype=out, device=weights.device), weights.new_zeros(4, dtype=out)

    def slopes(product: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
        scale = weights[part].to(out)
        if isinstance(teacher, HiddenScores):
            other = matmul(teacher.hidden[part], teacher_cut.T, matmul_dtype(teacher.hidden, teacher.head))
            teacher_bias = None if teacher.bias is None else teacher.bias[:rows]
            of, given, rest = fused(_from_products, product), (other, scale), (teacher_bias,)
        else:
            of, given, rest = _from_top_k, (teacher.ids[part], teacher.logprobs[part], scale), ()
        grad, value, metrics = by_rows(of, product, given, *rest, rows, temperature, kind, beta)
        total.add_((scale * value).sum())
        statistics.add_(metrics.sum(0))
        return grad, part

    parts = weights.nonzero()[:, 0].split(chunk_tokens)
    total = summed(student_hidden, student_head, parts, slopes, total, rows)
    names = ["teacher/forward_kl", "teacher/reverse_kl", "policy/entropy"]
    names.append("teacher/entropy" if isinstance(teacher, HiddenScores) else "teacher/topk_mass")
    count = (weights != 0).sum()
    return total, weights.sum(), {name: (statistics[i], count) for i, name in enumerate(names)}


def _check_teacher(teacher: HiddenScores | TopKScores, tokens: int, rows: int, temperature: float) -> None:
    scored = len(teacher.hidden) if isinstance(teacher, HiddenScores) else len(teacher.ids)
    if scored != tokens:
        raise ValueError(f"the teacher scored {scored} tokens, the student {tokens}; score the same loss tokens")
    if isinstance(teacher, HiddenScores) or not tokens:
        return
    if teacher.temperature != temperature:
        raise ValueError(
            f"top-k log-probs were taken at temperature {teacher.temperature}, the loss runs at {temperature}; "
            "score again at the loss's temperature"
        )
    if not 0 <= int(teacher.ids.min()) <= int(teacher.ids.max()) < rows:
        raise ValueError(f"top-k ids reach {int(teacher.ids.max())}, allowed are 0..{rows - 1}; check the tokenizers")
    if bool((teacher.logprobs.double().exp().sum(1) > 1.01).any()):
        raise ValueError(
            "top-k log-probs sum to more than 1 at some token; they must be normalised over the vocabulary"
        )


@no_type_check
def _from_products(
    product: Tensor,
    other: Tensor,
    scale: Tensor,
    other_bias: Tensor | None,
    rows: int,
    temperature: float,
    kind: Divergence,
    beta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """From products of hidden states and heads, of student and teacher: gradient, value and metrics of every row."""
    log_q = scaled(product, None, rows, temperature, scale.dtype).log_softmax(1)
    log_p = scaled(other, other_bias, rows, temperature, scale.dtype).log_softmax(1)
    value, grad, metrics = _value_and_gradient(log_p, log_q, kind, beta)
    return _to_product(grad, scale / temperature, product), value, metrics


@no_type_check
def _from_top_k(
    product: Tensor,
    ids: Tensor,
    log_top: Tensor,
    scale: Tensor,
    rows: int,
    temperature: float,
    kind: Divergence,
    beta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_from_products`, from the teacher's top k."""
    log_q = scaled(product, None, rows, temperature, scale.dtype).log_softmax(1)
    value, grad, metrics = _bucketed(ids, log_top.to(log_q.dtype), log_q, kind, beta)
    return _to_product(grad, scale / temperature, product), value, metrics


@no_type_check
def _to_product(grad: Tensor, scale: Tensor, product: Tensor) -> Tensor:
    """A gradient times `scale` [tokens], in shape and dtype of the product."""
    grad *= scale[:, None]
    return with_columns(grad, product.shape[1], product.dtype)


@no_type_check
def _expect(probability: Tensor, values: Tensor) -> Tensor:
    """Row sums of probability * values; both are finite, so what has no mass adds 0, as in the limit of p log p."""
    return (probability * values).sum(1)


@no_type_check
def _value_and_gradient(log_p: Tensor, log_q: Tensor, kind: Divergence, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Per row the divergence, its gradient with respect to the logits whose log-softmax is log_q, and four metrics."""
    p, q = log_p.exp(), log_q.exp()
    log_p, log_q = log_p.clamp(min=NO_MASS), log_q.clamp(min=NO_MASS)
    student_entropy, teacher_entropy = -_expect(q, log_q), -_expect(p, log_p)
    excess = log_q - log_p.clamp(min=LOGPROB_FLOOR)
    forward, reverse = -teacher_entropy - _expect(p, log_q), _expect(q, excess)
    metrics = torch.stack([forward, reverse, student_entropy, teacher_entropy], 1)
    if kind == "forward_kl":
        return forward, q - p, metrics
    if kind == "reverse_kl":
        return reverse, q * (excess - reverse[:, None]), metrics
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    mixed = _expect(q, log_q - log_m)
    value = beta * _expect(p, log_p - log_m) + (1 - beta) * mixed
    return value, (1 - beta) * q * (log_q - log_m - mixed[:, None]), metrics


def _bucketed(
    ids: Tensor, log_top: Tensor, log_q: Tensor, kind: Divergence, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`_value_and_gradient` of the k + 1 buckets, carried to the vocabulary.

    A bucket's logit gradient G_b reaches the logit i in it as G_b q_i / Q_b: all of it for a single token.
    """
    valid = log_top > -math.inf
    outside = log_q.scatter_reduce(1, ids, torch.where(valid, -math.inf, math.inf).to(log_q.dtype), "amin")
    log_rest = outside.logsumexp(1, keepdim=True)
    mass = log_top.exp().sum(1, keepdim=True)
    log_tail = torch.where(log_rest > -math.inf, (1 - mass).clamp(min=TAIL_FLOOR).log(), -math.inf)
    log_q_top = log_q.gather(1, ids).masked_fill(~valid, -math.inf)
    value, grad, metrics = _value_and_gradient(
        torch.cat([log_top, log_tail], 1), torch.cat([log_q_top, log_rest], 1), kind, beta
    )
    metrics[:, 2], metrics[:, 3] = -_expect(log_q.exp(), log_q.clamp(min=NO_MASS)), mass[:, 0]
    spread = (outside - log_rest.clamp(min=NO_MASS)).exp_().mul_(grad[:, -1:])
    return value, spread.scatter_add_(1, ids, torch.where(valid, grad[:, :-1], 0.0)), metrics
