"""The dense losses again from full logits, obvious and slow, differentiated by autograd. For tests only."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headwater.losses.dense import TAIL_FLOOR, Divergence
from headwater.losses.numerics import LOGPROB_FLOOR


def token_logprobs_from_logits(
    logits: Float[Tensor, "tokens rows"], targets: Int[Tensor, " tokens"], *, vocab_size: int, temperature: float = 1.0
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
    """`token_logprobs`: log-probs of the targets and the entropy, both in nats."""
    logprobs = (logits[:, :vocab_size] / temperature).log_softmax(1)
    entropy = -torch.where(logprobs > -torch.inf, logprobs.exp() * logprobs, 0.0).sum(1)
    return logprobs[torch.arange(len(targets)), targets], entropy


def dense_divergence_from_logits(
    student_logits: Float[Tensor, "tokens rows"],
    teacher_logits: Float[Tensor, "tokens teacher_rows"],
    weights: Float[Tensor, " tokens"],
    *,
    kind: Divergence,
    vocab_size: int,
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """`dense_divergence` with `HiddenScores`: the weighted sum."""
    vocab = min(vocab_size, student_logits.shape[1], teacher_logits.shape[1])
    log_q = (student_logits[:, :vocab] / temperature).log_softmax(1)
    log_p = (teacher_logits[:, :vocab] / temperature).log_softmax(1)
    return (weights * divergence(log_p, log_q, kind, beta)).sum()


def topk_divergence_from_logits(
    student_logits: Float[Tensor, "tokens rows"],
    ids: Int[Tensor, "tokens k"],
    logprobs: Float[Tensor, "tokens k"],
    weights: Float[Tensor, " tokens"],
    *,
    kind: Divergence,
    vocab_size: int,
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """`dense_divergence` with `TopKScores` of distinct ids and k < vocab: the weighted sum."""
    q = (student_logits[:, :vocab_size] / temperature).softmax(1)
    p_tail = (1 - logprobs.exp().sum(1, keepdim=True)).clamp(min=TAIL_FLOOR)
    rest = torch.ones_like(q).scatter(1, ids, 0.0)
    q_buckets = torch.cat([q.gather(1, ids), (q * rest).sum(1, keepdim=True)], 1)
    return (weights * divergence(torch.cat([logprobs, p_tail.log()], 1), q_buckets.log(), kind, beta)).sum()


def divergence(
    log_p: Float[Tensor, "tokens vocab"], log_q: Float[Tensor, "tokens vocab"], kind: Divergence, beta: float
) -> Float[Tensor, " tokens"]:
    """Per token the divergence of the teacher's P and the student's Q, term by term as the papers write it."""
    p, q = log_p.exp(), log_q.exp()
    if kind == "forward_kl":
        return torch.where(p > 0, p * (log_p.clamp(min=-1e30) - log_q), 0.0).sum(1)
    if kind == "reverse_kl":
        return (q * (log_q - log_p.clamp(min=LOGPROB_FLOOR))).sum(1)
    log_m = (beta * p + (1 - beta) * q).log()
    to_teacher = torch.where(p > 0, p * (log_p.clamp(min=-1e30) - log_m), 0.0).sum(1)
    return beta * to_teacher + (1 - beta) * (q * (log_q - log_m)).sum(1)
