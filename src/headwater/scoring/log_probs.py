"""A frozen model's view of given tokens: log-probs for ratios, hidden states or top-k for distillation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headwater.losses.projection import token_logprobs
from headwater.models.language_model import LanguageModel
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
    """The batch with fields `teacher_ids`, `teacher_logprobs`, each [tokens, topk] a row: what a warmup may store."""
    ids: list[tuple[MicroBatch, Tensor]] = []
    logprobs: list[tuple[MicroBatch, Tensor]] = []
    for micro in micro_batches(batch, max_tokens=view.max_tokens, device=teacher.device, share=teacher.shares_prefixes):
        hidden = states(teacher, micro)
        top = [
            (teacher.logits(chunk).float() / view.temperature).log_softmax(-1).topk(k)
            for chunk in hidden.split(view.chunk_tokens)
        ]
        ids.append((micro, torch.cat([t.indices for t in top])))
        logprobs.append((micro, torch.cat([t.values for t in top])))
    return batch.with_fields(teacher_ids=unflatten(batch, ids), teacher_logprobs=unflatten(batch, logprobs))


def stored_scores(micro: MicroBatch, temperature: float) -> TopKScores:
    """The teacher scores that `top_k_scores` put into the batch."""
    return TopKScores(micro.fields["teacher_ids"], micro.fields["teacher_logprobs"], temperature)
