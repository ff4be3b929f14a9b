"""Per-token loss weights: how tokens are averaged is only a choice of weights and of one denominator."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Aggregate = Literal["token", "sequence", "constant"]


def sequence_ids(lengths: Int[Tensor, " sequences"]) -> Int[Tensor, " tokens"]:
    """The sequence (0, 1, ...) of every token when sequences of these lengths lie one after the other."""
    return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)


def token_weights(
    lengths: Int[Tensor, " sequences"],
    aggregate: Aggregate,
    max_tokens: int | None = None,
    *,
    keep: Bool[Tensor, " sequences"] | None = None,
) -> tuple[Float[Tensor, " tokens"], float]:
    """Flat weights of the tokens of sequences with these lengths (in tokens), and the denominator of their sum.

    | aggregate | weight of a token | denominator | source |
    |---|---|---|---|
    | token | 1 | kept tokens | DAPO, arXiv:2503.14476, equation 12 |
    | sequence | 1 / length | kept sequences that have tokens | GRPO, arXiv:2402.03300, equation 3 |
    | constant | 1 / max_tokens | all sequences | Dr. GRPO, arXiv:2503.20783, section 3 |

    A sequence that `keep` masks gets weight 0. The denominator is of these sequences only: sum it over all
    micro-batches and ranks before dividing. Raises ValueError where `max_tokens` is missing, useless or exceeded.
    """
    if (aggregate == "constant") != (max_tokens is not None):
        raise ValueError(
            f'max_tokens goes with aggregate="constant" and only with it, got {max_tokens=} and {aggregate=}; '
            "give it there and leave it out elsewhere"
        )
    if max_tokens is not None and (max_tokens < 1 or bool((lengths > max_tokens).any())):
        raise ValueError(f"{max_tokens=} must be at least 1 and not below any length; the longest is {lengths.max()}")
    kept = lengths > 0 if keep is None else keep & (lengths > 0)
    divisor = {
        "token": torch.ones_like(lengths),
        "sequence": lengths,
        "constant": torch.full_like(lengths, max_tokens or 1),
    }[aggregate]
    weights = torch.where(kept, divisor.float().reciprocal(), 0.0).repeat_interleave(lengths)
    if aggregate == "token":
        return weights, float(lengths[kept].sum())
    return weights, float(kept.sum() if aggregate == "sequence" else len(lengths))


def soft_overlong_penalty(
    lengths: Int[Tensor, " sequences"], max_tokens: int, buffer: int
) -> Float[Tensor, " sequences"]:
    """What DAPO adds to the reward of a long completion (arXiv:2503.14476, equation 13); lengths in tokens.

    0 up to `max_tokens - buffer`, falling linearly to -1 at `max_tokens`, -1 beyond. Raises ValueError unless
    1 <= buffer <= max_tokens.
    """
    if not 1 <= buffer <= max_tokens:
        raise ValueError(f"buffer must lie between 1 and max_tokens ({max_tokens}), got {buffer}")
    return ((max_tokens - buffer - lengths).float() / buffer).clamp(-1.0, 0.0)
