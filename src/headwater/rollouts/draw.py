"""One token a row from logits and a random number."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

SMALL_VOCAB, BLOCK, CACHED = 4096, 128, 1 << 19
"""Tokens up to which all are summed at once; tokens of a block; logits of a pass on a CPU."""


def draw(
    logits: Float[Tensor, "batch vocab"],
    uniform: Float[Tensor, " batch"],
    *,
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
) -> tuple[Int[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Draw one token a row by inverting the cumulative distribution at `uniform`; also its log-prob.

    The log-prob is that of the tempered distribution before any truncation; temperature 0 takes the most likely token
    (log-prob at temperature 1). A token of probability 0 is never drawn.
    """
    if temperature == 0:
        logprobs = logits.float().log_softmax(-1)
        token = logprobs.argmax(-1)
        return token, logprobs.gather(1, token[:, None]).squeeze(1)
    if top_k or top_p < 1:
        logprobs = (logits.float() / temperature).log_softmax(-1)
        probs = _truncate(logprobs.double().exp(), top_p, top_k)
        token = _invert(probs.cumsum(-1), uniform.double()[:, None])
        return token.squeeze(1), logprobs.gather(1, token).squeeze(1)
    # On a CPU some rows at a time, so that each pass finds them in the cache.
    lot = CACHED // logits.shape[1] + 1 if logits.device.type == "cpu" else len(logits)
    if len(logits) <= lot:
        return _draw(logits, uniform, temperature)
    drawn = [_draw(*part, temperature) for part in zip(logits.split(lot), uniform.split(lot), strict=True)]
    return torch.cat([token for token, _ in drawn]), torch.cat([logprob for _, logprob in drawn])


def _draw(
    logits: Float[Tensor, "batch vocab"], uniform: Float[Tensor, " batch"], temperature: float
) -> tuple[Int[Tensor, " batch"], Float[Tensor, " batch"]]:
    """As `draw`, with float64 only for sums: of all tokens where they are few, else of blocks of them and within the
    block that is hit."""
    top = logits.amax(1, keepdim=True).float()
    weights = logits.float() - top
    weights = (weights if temperature == 1 else weights.div_(temperature)).exp_()
    share = uniform.double()[:, None]
    if logits.shape[1] <= SMALL_VOCAB:
        ends = weights.cumsum(1, dtype=torch.float64)
        token, total = _invert(ends, share), ends[:, -1:]
    else:
        weights = pad(weights, (0, -weights.shape[1] % BLOCK)).view(len(weights), -1, BLOCK)
        ends = weights.sum(2).double().cumsum(1)
        block, total = _invert(ends, share), ends[:, -1:]
        before = torch.where(block > 0, ends.gather(1, (block - 1).clamp(min=0)), 0.0)
        inside = weights.gather(1, block[:, :, None].expand(-1, -1, BLOCK))[:, 0].double().cumsum(1)
        token = block * BLOCK + _invert(inside, (share * total - before) / inside[:, -1:])
    logprob = (logits.gather(1, token).float() - top).double() / temperature - total.log()
    return token[:, 0], logprob[:, 0].float()


def _invert(cumulative: Float[Tensor, "batch places"], uniform: Float[Tensor, "batch 1"]) -> Int[Tensor, "batch 1"]:
    """The place that `uniform`, a share of the last sum, falls into; never one without mass."""
    total = cumulative[:, -1:]
    # Scaled by the true sum and kept below it, so that rounding can never point past the last place with mass.
    point = torch.minimum(uniform * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, point, right=True)


def _truncate(probs: Float[Tensor, "batch vocab"], top_p: float, top_k: int) -> Float[Tensor, "batch vocab"]:
    ordered, order = probs.sort(-1, descending=True)
    if top_k:
        ordered[:, top_k:] = 0
    # Top-p counts within what top-k left, as transformers and vLLM do.
    ordered = ordered / ordered.sum(-1, keepdim=True)
    keep = ordered.cumsum(-1) - ordered < top_p
    return torch.zeros_like(probs).scatter(1, order, ordered * keep)
