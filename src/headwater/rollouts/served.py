"""Sampling from a model whose weights a vLLM server has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from headwater.config import Served
from headwater.mesh import Mesh
from headwater.models.language_model import LanguageModel
from headwater.models.server import complete
from headwater.models.template import stop_length
from headwater.rollouts import streams
from headwater.rollouts.sampler import Sampling, TransformersSampler
from headwater.types import Problem, Rollout

PLAIN = {"min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""Said, because a server's defaults are those of the model's generation_config.json."""


@dataclass(frozen=True)
class ServedSampler:
    """The distribution of `TransformersSampler` by the server's own random numbers, so other rollouts, and log-probs
    only where `scored`. Every prompt has a seed; what repeats under it is up to the server."""

    model: LanguageModel
    mesh: Mesh
    served: Served
    version: int = 0
    scored: bool = False
    """Ask for every token's log-prob: of the tempered distribution, where the server sends processed log-probs."""
    prefilled = decoded = None
    """What the server multiplied is not known: the meter counts what was needed."""

    def sample(self, problems: Sequence[Problem], sampling: Sampling) -> list[Rollout]:
        """`group_size` completions of every problem, in order; raises as `models.server.ask` does."""
        model, size = self.model, sampling.group_size
        asked: dict[str, Any] = {"n": size, "max_tokens": sampling.max_new_tokens, "return_token_ids": True, **PLAIN}
        asked |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        asked |= {"stop_token_ids": list(model.eos_ids), "ignore_eos": True}  # ends by these alone, and these texts:
        asked |= {"stop": list(model.config.stop), "skip_special_tokens": False}
        asked |= {"logprobs": 0} if self.scored else {}
        asked |= {"logit_bias": {str(i): -100.0 for i in range(model.vocab_size, model.padded_head.shape[0])}}
        mine = self.mesh.shard(range(len(problems)))
        bodies = [
            {**asked, "prompt": model.encode(p.messages), "seed": streams.key(*sampling.stream, p.id, i) >> 2}
            for i, p in zip(mine, map(problems.__getitem__, mine), strict=True)
        ]

        def read(i: int, choices: list[dict[str, Any]]) -> list[Rollout]:
            rows = [choice["token_ids"] for choice in choices]
            if len(rows) != size or not all(rows):
                raise ValueError(f"the server sent {len(rows)} of {size} completions, or one without tokens")
            rows = [ids[: stop_length(model.tokenizer, ids, model.config.stop)] for ids in rows]
            told = [choice["logprobs"]["token_logprobs"] if self.scored else [] for choice in choices]
            made = enumerate((ids, scores[: len(ids)]) for ids, scores in zip(rows, told, strict=True))
            problem, prompt, version = problems[mine[i]].id, bodies[i]["prompt"], self.version
            return [
                Rollout(problem, g, prompt, ids, scores, model.decode(ids), model.is_finished(ids), version)
                for g, (ids, scores) in made
            ]

        groups = self.mesh.gather(complete(self.served, bodies, read))
        return [rollout for group in groups for rollout in group]


def sampler_for(
    model: LanguageModel, *, max_tokens: int = 262_144, mesh: Mesh | None = None
) -> TransformersSampler | ServedSampler:
    """Who samples where the model's weights are."""
    if model.served is not None:
        return ServedSampler(model, mesh or Mesh(), model.served)
    return TransformersSampler(model, max_tokens=max_tokens, mesh=mesh)
