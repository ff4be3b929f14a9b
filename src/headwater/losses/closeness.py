"""How close a student is to its teacher, token by token: what condition C2 is read off. No gradients."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headwater.losses.dense import _expect
from headwater.losses.numerics import (
    LOGPROB_FLOOR,
    NO_MASS,
    accurate_dtype,
    first_rows,
    matmul,
    matmul_dtype,
    padded_rows,
    rows_and_chunk,
)
from headwater.losses.projection import scaled
from headwater.scoring.scores import HiddenScores


@torch.no_grad()
def token_closeness(
    student_hidden: Float[Tensor, "tokens hidden"],
    student_head: Float[Tensor, "rows hidden"],
    teacher: HiddenScores,
    targets: Int[Tensor, " tokens"],
    *,
    vocab_size: int,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
    overlap: int = 16,
) -> dict[str, Float[Tensor, " tokens"]]:
    """Of teacher P and student Q, softmaxes of logits / temperature over the tokens both have, at every token (nats):

    - `forward_kl` KL(P||Q) and `reverse_kl` KL(Q||P), with log P floored at -100;
    - `overlap`: |TopK(P) ∩ TopK(Q)| / K with K = min(overlap, vocabulary) (arXiv:2604.13016);
    - `entropy_gap` H(P) - H(Q);
    - `log_ratio` log P - log Q of the target, log P floored at -100.

    At most chunk_tokens x vocab logits of each model exist at a time. Raises ValueError for sizes that are not
    positive.
    """
    rows, chunk_tokens = rows_and_chunk(student_head, temperature, vocab_size, chunk_tokens)
    rows = min(rows, len(teacher.head))
    wide, top, out = padded_rows(rows, student_head), min(overlap, rows), accurate_dtype(student_hidden)
    ours = first_rows(student_head, wide, matmul_dtype(student_hidden, student_head))
    theirs = first_rows(teacher.head, wide, matmul_dtype(teacher.hidden, teacher.head))
    bias = None if teacher.bias is None else teacher.bias[:rows]
    names = ("forward_kl", "reverse_kl", "overlap", "entropy_gap", "log_ratio")
    found = {name: torch.empty(len(targets), dtype=out, device=targets.device) for name in names}
    for start in range(0, len(targets), chunk_tokens):
        part = slice(start, start + chunk_tokens)
        own, other = (
            matmul(student_hidden[part], ours.T, ours.dtype),
            matmul(teacher.hidden[part], theirs.T, theirs.dtype),
        )
        log_q = scaled(own, None, rows, temperature, out).log_softmax(1)
        log_p = scaled(other, bias, rows, temperature, out).log_softmax(1).clamp(min=NO_MASS)
        floored, p, q = log_p.clamp(min=LOGPROB_FLOOR), log_p.exp(), log_q.exp()
        found["forward_kl"][part] = _expect(p, log_p - log_q)
        found["reverse_kl"][part] = _expect(q, log_q - floored)
        found["entropy_gap"][part] = _expect(q, log_q) - _expect(p, log_p)
        found["log_ratio"][part] = (floored - log_q).gather(1, targets[part, None])[:, 0]
        common = log_p.topk(top).indices[:, :, None] == log_q.topk(top).indices[:, None]
        found["overlap"][part] = common.any(2).sum(1).to(out) / top
    return found
