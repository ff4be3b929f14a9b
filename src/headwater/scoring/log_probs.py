"""A frozen model's view of given tokens: log-probs for ratios, hidden states or top-k for distillation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headwater.config import Served
from headwater.losses.numerics import by_rows
from headwater.losses.projection import token_logprobs
from headwater.models.language_model import LanguageModel
from headwater.models.server import complete
from headwater.rollouts.batch import Batch, MicroBatch, micro_batches, states, unflatten
from headwater.scoring.scores import HiddenScores, TopKScores


@dataclass(frozen=True)
class View:
    """How a frozen model looks at tokens: temperature, padded tokens of a pass, tokens whose logits exist at once."""

    temperature: float
    max_tokens: int
    chunk_tokens: int


@torch.no_grad()
def score_tokens(model: LanguageModel, batch: Batch, view: View) -> list[Tensor]:
    """Log-probs of every row's completion tokens under `model`: float32, one tensor [tokens] per row."""
    if model.served is not None:
        return served_scores(model.served, model.vocab_size, batch, 0, view)[0]
    parts: list[tuple[MicroBatch, Tensor]] = []
    for micro in micro_batches(batch, max_tokens=view.max_tokens, device=model.device, share=model.shares_prefixes):
        hidden = states(model, micro)
        logprobs, _ = token_logprobs(
            hidden,
            model.padded_head,
            micro.targets,
            temperature=view.temperature,
            vocab_size=model.vocab_size,
            chunk_tokens=view.chunk_tokens,
        )
        parts.append((micro, logprobs))
    return unflatten(batch, parts)


@torch.no_grad()
def hidden_scores(teacher: LanguageModel, micro: MicroBatch) -> HiddenScores:
    """The teacher's distributions on the micro-batch's tokens, as hidden states and LM head (never logits)."""
    return HiddenScores(states(teacher, micro), teacher.padded_head.to(micro.ids.device))


@torch.no_grad()
def top_k_scores(teacher: LanguageModel, batch: Batch, k: int, view: View) -> Batch:
    """The batch with fields `teacher_ids`, `teacher_logprobs`, each [tokens, topk] a row: what a warmup may store and
    a server can send."""
    if teacher.served is not None:
        _, best, values = served_scores(teacher.served, teacher.vocab_size, batch, k, view)
        return batch.with_fields(teacher_ids=best, teacher_logprobs=values)
    ids: list[tuple[MicroBatch, Tensor]] = []
    logprobs: list[tuple[MicroBatch, Tensor]] = []
    for micro in micro_batches(batch, max_tokens=view.max_tokens, device=teacher.device, share=teacher.shares_prefixes):
        hidden = states(teacher, micro)
        chunks = [by_rows(_top, teacher.logits(c), (), k, view.temperature) for c in hidden.split(view.chunk_tokens)]
        ids.append((micro, torch.cat([best for _, best, _ in chunks])))
        logprobs.append((micro, torch.cat([values for _, _, values in chunks])))
    return batch.with_fields(teacher_ids=unflatten(batch, ids), teacher_logprobs=unflatten(batch, logprobs))


def _top(logits: Tensor, k: int, temperature: float) -> tuple[None, Tensor, Tensor]:
    logits = logits.float() / temperature
    values, best = logits.topk(k)
    return None, best, values - logits.logsumexp(1, keepdim=True)


def served_scores(
    served: Served, vocab_size: int, batch: Batch, k: int, view: View
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Of every row's completion tokens: log-probs [tokens], and the k likeliest ids and log-probs [tokens, k] there.

    vLLM's log-probs are of temperature 1 and normalised over all rows of the LM head. The mass of padding rows among
    the k is taken out; that of others stays in the tail. Raises ValueError for another temperature and when tokens are
    missing, else as `models.server.ask` does.
    """
    if view.temperature != 1:
        raise ValueError(f"a server's log-probs are of temperature 1, the stage's is {view.temperature}: set it to 1")
    rows = [p + c for p, c in zip(batch.prompts, batch.completions, strict=True)]

    def read(i: int, choices: list[dict[str, Any]]) -> tuple[Tensor, Tensor, Tensor]:
        places, start = choices[0]["prompt_logprobs"], len(batch.prompts[i])
        if len(places) != len(rows[i]):
            raise ValueError(f"{served.url} scored {len(places)} of {len(rows[i])} tokens: too few")
        return _likeliest(places[start:], rows[i][start:], k, vocab_size)

    asked = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": k}
    found = complete(served, [{"prompt": row, **asked} for row in rows], read)
    return [own for own, _, _ in found], [ids for _, ids, _ in found], [logprobs for _, _, logprobs in found]


def _likeliest(
    places: list[dict[str, dict[str, Any]]], tokens: list[int], k: int, vocab_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """A place has the k likeliest tokens, and the row's own wherever it ranks."""
    own = torch.tensor([place[str(token)]["logprob"] for place, token in zip(places, tokens, strict=True)])
    ranked = [sorted((e["rank"], float(i), e["logprob"]) for i, e in place.items())[:k] for place in places]
    filled = torch.tensor([best + [(0, 0.0, -math.inf)] * (k - len(best)) for best in ranked])
    ids, logprobs = filled.reshape(len(places), k, 3)[..., 1].long(), filled.reshape(len(places), k, 3)[..., 2]
    padding = ids >= vocab_size
    kept = torch.log1p(-torch.where(padding, logprobs.exp(), 0.0).sum(1))
    return own - kept, torch.where(padding, 0, ids), torch.where(padding, -math.inf, logprobs - kept[:, None])


def stored_scores(micro: MicroBatch, temperature: float) -> TopKScores:
    """The teacher scores that `top_k_scores` put into the batch."""
    return TopKScores(micro.fields["teacher_ids"], micro.fields["teacher_logprobs"], temperature)
