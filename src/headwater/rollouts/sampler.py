"""Sampling from a transformers model: batched decoding with a KV cache, one counter-based random number per token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache

from headwater.mesh import Mesh
from headwater.models.language_model import LanguageModel
from headwater.rollouts import streams
from headwater.types import Problem, Rollout


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn. `stream` names the random numbers: (purpose, seed, step)."""

    stream: tuple[object, ...]
    group_size: int
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


class Sampler(Protocol):
    """Owns its weights; `load` brings them up to date before `sample`."""

    def load(self, weights: object, version: int) -> None: ...

    def sample(self, problems: Sequence[Problem], sampling: Sampling) -> list[Rollout]: ...


class TransformersSampler:
    """Samples from the very module that is trained, so `load` only notes the version.

    A rollout depends on (stream, problem, index) and the weights alone: not on the batch it was drawn in, nor on the
    ranks that share the work (each returns all rollouts).
    """

    def __init__(self, model: LanguageModel, *, max_tokens: int = 262_144, mesh: Mesh | None = None) -> None:
        self.model = model
        self.max_tokens = max_tokens
        self.mesh = mesh or Mesh()
        self.version = 0

    def load(self, weights: object, version: int) -> None:
        self.version = version

    @torch.no_grad()
    def sample(self, problems: Sequence[Problem], sampling: Sampling) -> list[Rollout]:
        """`group_size` completions of every problem, in order: problem by problem, index by index.

        Where a problem comes again its indices go on counting, so its rollouts differ.
        """
        prompts = [self.model.encode(p.messages) for p in problems]
        first, seen = [], Counter[str]()
        for problem in problems:
            first.append(seen[problem.id] * sampling.group_size)
            seen[problem.id] += 1
        mine = self.mesh.shard(range(len(problems)))
        by_length = sorted(mine, key=lambda i: -len(prompts[i]))
        groups: list[list[Rollout]] = [[] for _ in problems]
        while by_length:
            width = len(prompts[by_length[0]]) + sampling.max_new_tokens
            count = max(1, self.max_tokens // (width * sampling.group_size))
            chosen, by_length = by_length[:count], by_length[count:]
            places = [(problems[i].id, first[i] + g) for i in chosen for g in range(sampling.group_size)]
            rollouts = self._decode(places, [prompts[i] for i in chosen], sampling)
            for place, i in enumerate(chosen):
                groups[i] = rollouts[place * sampling.group_size : (place + 1) * sampling.group_size]
        return [rollout for group in self.mesh.gather([groups[i] for i in mine]) for rollout in group]

    def _decode(self, places: list[tuple[str, int]], prompts: list[list[int]], sampling: Sampling) -> list[Rollout]:
        """One completion for every place (problem, index); `group_size` consecutive places share a prompt."""
        model, group, limit = self.model, sampling.group_size, sampling.max_new_tokens
        device, rows = model.device, len(places)
        keys = np.array([streams.key(*sampling.stream, *place) for place in places], dtype=np.uint64)
        ids, mask, lengths = _pad_left(prompts, limit, device)
        width = ids.shape[1]

        cache = DynamicCache(config=model.module.config)
        hidden = _forward(model, ids, mask[:, :width], (mask[:, :width].cumsum(1) - 1).clamp(min=0), cache)
        cache.batch_repeat_interleave(group)
        hidden, mask = hidden.repeat_interleave(group, 0), mask.repeat_interleave(group, 0)
        lengths = lengths.repeat_interleave(group)

        eos = torch.tensor(model.eos_ids, device=device)
        tokens = torch.zeros(rows, limit, dtype=torch.long)
        logprobs = torch.zeros(rows, limit, dtype=torch.float32)
        count = torch.full((rows,), limit)
        alive = np.arange(rows)  # rows of the output that each row of the batch writes
        running = torch.ones(rows, dtype=torch.bool)
        for position in range(limit):
            uniform = streams.uniforms(keys[alive], np.full(len(alive), position))
            token, logprob = draw(
                hidden @ model.head.T.to(hidden),
                torch.from_numpy(uniform).to(device),
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
            )
            tokens[alive, position], logprobs[alive, position] = token.cpu(), logprob.cpu()
            ended = torch.isin(token, eos).cpu() & running[alive]
            count[alive[ended.numpy()]] = position + 1
            running[alive[ended.numpy()]] = False
            num_running = int(running.sum())
            if not num_running or position + 1 == limit:
                break
            # Leaving costs a copy of the cache: rows leave in lots of a quarter.
            if num_running <= 0.75 * len(alive):
                keep = running[alive]
                index = keep.nonzero().squeeze(1).to(device)
                alive, token, mask, lengths = alive[keep.numpy()], token[index], mask[index], lengths[index]
                cache.batch_select_indices(index)
            hidden = _forward(
                model, token[:, None], mask[:, : width + position + 1], (lengths + position)[:, None], cache
            )
        prompts = [prompt for prompt in prompts for _ in range(group)]
        return self._rollouts(places, prompts, tokens.tolist(), logprobs.tolist(), count.tolist())

    def _rollouts(
        self,
        places: list[tuple[str, int]],
        prompts: list[list[int]],
        tokens: list[list[int]],
        logprobs: list[list[float]],
        counts: list[int],
    ) -> list[Rollout]:
        ended = set(self.model.eos_ids)
        out = []
        for row, count in enumerate(counts):
            completion = tokens[row][:count]
            out.append(
                Rollout(
                    problem_id=places[row][0],
                    index=places[row][1],
                    prompt_ids=prompts[row],
                    completion_ids=completion,
                    sampler_logprobs=logprobs[row][:count],
                    text=self.model.decode(completion),
                    finished=completion[-1] in ended,
                    policy_version=self.version,
                )
            )
        return out


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
    else:
        logprobs = (logits.float() / temperature).log_softmax(-1)
        probs = logprobs.double().exp()
        if top_k or top_p < 1:
            probs = _truncate(probs, top_p, top_k)
        cumulative = probs.cumsum(-1)
        total = cumulative[:, -1:]
        # Scaled by the true sum and kept below it, so that rounding can never point past the last token with mass.
        point = torch.minimum(uniform.double()[:, None] * total, total.nextafter(torch.zeros_like(total)))
        token = torch.searchsorted(cumulative, point, right=True).squeeze(1)
    return token, logprobs.gather(1, token[:, None]).squeeze(1)


def _truncate(probs: Float[Tensor, "batch vocab"], top_p: float, top_k: int) -> Float[Tensor, "batch vocab"]:
    ordered, order = probs.sort(-1, descending=True)
    if top_k:
        ordered[:, top_k:] = 0
    # Top-p counts within what top-k left, as transformers and vLLM do.
    ordered = ordered / ordered.sum(-1, keepdim=True)
    keep = ordered.cumsum(-1) - ordered < top_p
    return torch.zeros_like(probs).scatter(1, order, ordered * keep)


def _pad_left(prompts: list[list[int]], extra: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.ones(len(prompts), width + extra, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, : width - len(prompt)] = 0
    return ids.to(device), mask.to(device), torch.tensor([len(p) for p in prompts], device=device)


# Not cuDNN's: it prepares every new shape, so every step, at a cost above the step's own (benchmarks/README.md).
_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def _forward(model: LanguageModel, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
    """Last hidden state of the last position, extending the cache."""
    with sdpa_kernel(_ATTENTION):
        out = model.base(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
    return out[0][:, -1].to(ids.device)
