"""Condition C2 measured: how close a student is to its teacher on the prefixes that either of them visits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from headwater.losses.closeness import token_closeness
from headwater.mesh import Mesh
from headwater.meter import Meter
from headwater.models.language_model import LanguageModel, check_same_tokenizer
from headwater.rollouts.batch import Batch, MicroBatch, micro_batches, states, unflatten
from headwater.rollouts.sampler import Sampling
from headwater.rollouts.served import sampler_for
from headwater.scoring.log_probs import View, hidden_scores
from headwater.types import Problem, Rollout

Prefixes = Literal["teacher", "student"]
"""Whose rollouts the two are compared on."""
VIEW = View(temperature=1.0, max_tokens=16_384, chunk_tokens=1024)
TAIL = -5.0
"""A log-ratio below this (nats) is a token the teacher would hardly ever have written."""


@torch.no_grad()
def compare_rollouts(
    student: LanguageModel,
    teacher: LanguageModel,
    rollouts: Sequence[Rollout],
    view: View,
    mesh: Mesh | None = None,
    meter: Meter | None = None,
) -> list[dict[str, Tensor]]:
    """`token_closeness` of every rollout's completion: per rollout and name one CPU tensor [tokens].

    Ranks share the work and each returns all rollouts. With a meter the tokens of both models count as `evaluated`.
    """
    mesh = mesh or Mesh()
    if meter is not None:
        for model in (student, teacher):
            meter.add("evaluated", model.shape, Batch.of(rollouts).sizes, whole=True)
    batch = Batch.of(mesh.shard(rollouts))
    found: dict[str, list[tuple[MicroBatch, Tensor]]] = {}
    share = student.shares_prefixes and teacher.shares_prefixes
    for micro in micro_batches(batch, max_tokens=view.max_tokens, device=student.device, share=share):
        tokens = token_closeness(
            states(student, micro),
            student.padded_head,
            hidden_scores(teacher, micro),
            micro.targets,
            vocab_size=student.vocab_size,
            temperature=view.temperature,
            chunk_tokens=view.chunk_tokens,
        )
        for name, values in tokens.items():
            found.setdefault(name, []).append((micro, values))
    rows = {name: unflatten(batch, parts) for name, parts in found.items()}
    return mesh.gather([{name: values[i] for name, values in rows.items()} for i in range(len(batch))])


def summary(rows: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """Means over all completion tokens of the rollouts, and the tails of the log-ratio (docs/metrics.md)."""
    flat = {name: torch.cat([row[name] for row in rows]).double().numpy() for name in rows[0]}
    low, high = np.quantile(flat["log_ratio"], [0.01, 0.99])
    return {
        "forward_kl": float(flat["forward_kl"].mean()),
        "reverse_kl": float(flat["reverse_kl"].mean()),
        "overlap": float(flat["overlap"].mean()),
        "entropy_gap": float(flat["entropy_gap"].mean()),
        "entropy_gap_abs": float(np.abs(flat["entropy_gap"]).mean()),
        "log_ratio": float(flat["log_ratio"].mean()),
        "log_ratio_p01": float(low),
        "log_ratio_p99": float(high),
        "log_ratio_tail": float((flat["log_ratio"] < TAIL).mean()),
    }


def by_problem(rows: Sequence[dict[str, Tensor]], rollouts: Sequence[Rollout], name: str) -> dict[str, float]:
    """Mean of one quantity over the completion tokens of each problem: what paired differences are made of."""
    values: dict[str, list[Tensor]] = {}
    for row, rollout in zip(rows, rollouts, strict=True):
        values.setdefault(rollout.problem_id, []).append(row[name])
    return {problem: float(torch.cat(parts).double().mean()) for problem, parts in values.items()}


def sample_for(
    model: LanguageModel,
    problems: Sequence[Problem],
    sampling: Sampling,
    *,
    max_tokens: int = 262_144,
    mesh: Mesh | None = None,
    meter: Meter | None = None,
) -> list[Rollout]:
    """Rollouts to look at, never to train on; counted as `evaluated` where a meter is given."""
    sampler = sampler_for(model, max_tokens=max_tokens, mesh=mesh)
    rollouts = sampler.sample(problems, sampling)
    if meter is not None:
        sizes = Batch.of(rollouts).sizes
        meter.add("evaluated", model.shape, sizes, sampler.decoded)
        meter.add("evaluated", model.shape, [(p, 0) for p, _ in sizes[:: sampling.group_size]], sampler.prefilled)
    return rollouts


def closeness(
    student: LanguageModel,
    teacher: LanguageModel,
    problems: Sequence[Problem],
    *,
    on: Sequence[Prefixes] = ("teacher", "student"),
    samples: int = 1,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    view: View = VIEW,
    max_tokens: int = 262_144,
    mesh: Mesh | None = None,
    meter: Meter | None = None,
) -> dict[str, float]:
    """C2 on prompts (answers are not looked at): `c2/NAME@teacher` on the teacher's own rollouts, `c2/NAME@student` on
    the student's, with the names of `summary`.

    Both models are taken at `temperature`, which overrides the view's. The random numbers are of their own and depend
    on (seed, problem, sample) alone: a second call after training uses the same, so that differences are paired. With a
    meter all tokens of both models count as `evaluated`. Raises ValueError for different tokenizers.
    """
    check_same_tokenizer(student, teacher)
    view = View(temperature, view.max_tokens, view.chunk_tokens)
    found: dict[str, float] = {}
    for who in on:
        sampler = teacher if who == "teacher" else student
        sampling = Sampling(("closeness", who, seed), samples, max_new_tokens, temperature)
        rollouts = sample_for(sampler, problems, sampling, max_tokens=max_tokens, mesh=mesh, meter=meter)
        rows = compare_rollouts(student, teacher, rollouts, view, mesh, meter)
        found |= {f"c2/{name}@{who}": value for name, value in summary(rows).items()}
    return found
