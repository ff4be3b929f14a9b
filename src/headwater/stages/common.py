"""What the loops share: checking the pool, sampling teacher rollouts once, the dense loss, rollout metrics."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any, TypeVar

import torch

from headwater import checkpoint
from headwater.config import Distill, Joint, TeacherRollouts, Warmup
from headwater.losses.dense import dense_divergence
from headwater.mesh import Mesh
from headwater.methods import EXACT
from headwater.models.language_model import LanguageModel
from headwater.monitors.health import repetition
from headwater.rollouts.batch import Batch, MicroBatch, executed_work, micro_batches
from headwater.rollouts.sampler import Sampling, TransformersSampler
from headwater.rollouts.served import ServedSampler, sampler_for
from headwater.rollouts.synced import SyncedSampler
from headwater.run import StageRun
from headwater.scoring.log_probs import View, hidden_scores, score_tokens, stored_scores
from headwater.scoring.scores import HiddenScores
from headwater.types import Grade, Problem, Rollout, Verdict
from headwater.update import Loss, Term

T = TypeVar("T")
AnySampler = TransformersSampler | ServedSampler | SyncedSampler
GIVEN_UP = ("timeout", "memory", "error")
"""Reasons that say nothing about the completion."""
AUDITED = 32
"""Rollouts of a step that a second grader sees, at most."""
LOGITS, DENSE, SPARSE = 1, 3, 4
"""Products with the student's LM head: logits alone; and two gradients; `token_logprobs` makes the logits again."""


def rows_of(groups: Sequence[Sequence[T]]) -> list[T]:
    return [row for group in groups for row in group]


def check_pool(problems: Sequence[Problem], needed: int, *, labelled: bool) -> None:
    """ValueError when a step would need more problems than there are, or answers that are missing."""
    if len(problems) < needed:
        raise ValueError(
            f"a step needs {needed} problems but the pool has {len(problems)}: lower it or enlarge the pool"
        )
    if labelled and (missing := [p.id for p in problems if p.answer is None]):
        raise ValueError(f"{len(missing)} of {len(problems)} problems have no answer, for example {missing[0]}")


def rollout_metrics(rollouts: Sequence[Rollout], verdicts: Sequence[Verdict] | None = None) -> dict[str, float]:
    """Lengths, truncation, repetition; with verdicts, the share of each reason and style (docs/metrics.md)."""
    count = len(rollouts)
    metrics = {
        "completion/len_mean": sum(len(r.completion_ids) for r in rollouts) / count,
        "completion/frac_truncated": sum(not r.finished for r in rollouts) / count,
        "completion/repetition": sum(repetition(r.completion_ids) for r in rollouts) / count,
    }
    if verdicts is not None:
        metrics["reward/frac_correct"] = sum(v.correct for v in verdicts) / count
        metrics["reward/frac_parsed"] = sum(v.parsed for v in verdicts) / count
        for reason in GIVEN_UP:
            metrics[f"grader/frac_{reason}"] = sum(v.reason == reason for v in verdicts) / count
        for style, n in sorted(Counter(v.style for v in verdicts if v.style).items()):
            metrics[f"style/{style}"] = n / count
    return metrics


def audit_metrics(
    run: StageRun, step: int, steps: int, groups: Sequence[tuple[Problem, list[Rollout], list[Verdict]]]
) -> dict[str, float]:
    """What the second grader says of at most 32 evenly spaced rollouts of a logged step; {} where there is none.

    It influences nothing and is not metered; the step has revealed the answers already. Left out is what it gave up.
    """
    if run.audit is None or not run.logs(step, steps):
        return {}
    rows = [(p, r.text, v) for p, rollouts, verdicts in groups for r, v in zip(rollouts, verdicts, strict=True)]
    rows = rows[:: math.ceil(len(rows) / AUDITED)]
    seconds = grade_sharded(run.audit, [(p, text) for p, text, _ in rows], run.mesh)
    pairs = [(v, s) for (_, _, v), s in zip(rows, seconds, strict=True) if s.reason not in GIVEN_UP]
    if not pairs:
        return {}
    return {
        "audit/agreement": sum(v.correct == s.correct for v, s in pairs) / len(pairs),
        "audit/reward_gap": sum(v.score - s.score for v, s in pairs) / len(pairs),
    }


def student_sampler(model: LanguageModel, run: StageRun) -> TransformersSampler | SyncedSampler:
    """Who samples from the model that the stage trains."""
    if run.sampler is not None:
        return SyncedSampler(model, run.mesh, run.sampler, run.directory)
    return TransformersSampler(model, max_tokens=run.execution.sampler_tokens, mesh=run.mesh)


def mismatch_metrics(
    settings: Distill, run: StageRun, student: LanguageModel, rollouts: Sequence[Rollout], step: int
) -> dict[str, float]:
    """What `clipped_policy_gradient` says of the sampler where that is a server, for losses without that gradient: on
    at most 32 evenly spaced rollouts of a logged step, not metered; {} otherwise."""
    if run.sampler is None or not run.logs(step, settings.steps):
        return {}
    some = list(rollouts[:: math.ceil(len(rollouts) / AUDITED)])
    view = View(settings.temperature, run.execution.micro_batch_tokens, run.execution.chunk_tokens)
    ours = torch.cat(score_tokens(student, Batch.of(some), view))
    gap = ours - torch.tensor([x for r in some for x in r.sampler_logprobs])
    return {
        "policy/sampler_mismatch_kl": float((torch.expm1(gap) - gap).mean()),
        "policy/sampler_mismatch_max": float(gap.abs().max()),
    }


def grade_sharded(grade: Grade, completions: list[tuple[Problem, str]], mesh: Mesh) -> list[Verdict]:
    """Verdicts of all completions on every rank, each rank grading its share."""
    return mesh.gather(grade(mesh.shard(completions)))


def count_sampled(run: StageRun, sampler: AnySampler, rollouts: Sequence[Rollout], group_size: int) -> None:
    """Meter what was just sampled: completions, and each group's prompt once as prefilled."""
    shape, sizes = sampler.model.shape, Batch.of(rollouts).sizes
    run.meter.add("sampled", shape, sizes, sampler.decoded)
    run.meter.add("prefilled", shape, [(p, 0) for p, _ in sizes[::group_size]], sampler.prefilled)


def count_scored(run: StageRun, model: LanguageModel, batch: Batch, micros: Sequence[MicroBatch] | None = None) -> None:
    """Meter a frozen model's look at a batch: in these micro-batches, or in those that `score_tokens` makes;
    of one that is served elsewhere, no more than was needed."""
    if model.served is not None:
        return run.meter.add("scored", model.shape, batch.sizes)
    if micros is None:
        tokens, share = run.execution.micro_batch_tokens, model.shares_prefixes
        micros = micro_batches(batch.shard(run.mesh), max_tokens=tokens, share=share)
    run.meter.add("scored", model.shape, batch.sizes, *executed_work(micros, run.mesh))


def count_trained(
    run: StageRun, model: LanguageModel, batch: Batch, micros: Sequence[MicroBatch], projections: int
) -> None:
    """Meter an update on a batch in micro-batches; `projections`: products with the LM head that the loss makes."""
    again, executed = model.checkpoint_activations, executed_work(micros, run.mesh)
    run.meter.add("trained", model.shape, batch.sizes, *executed, projections=projections, recomputed=again)


def dense_loss(
    settings: Distill | Joint | Warmup,
    teacher: LanguageModel | None,
    vocab_size: int,
    denominator: float,
    run: StageRun,
) -> Loss:
    """Exact divergence from the teacher's hidden states, which `scored_by` adds to a micro-batch, or from stored top-k
    + tail when `teacher` is None."""
    kind = settings.divergence if isinstance(settings, Distill) else "reverse_kl"
    kind = "forward_kl" if isinstance(settings, Warmup) else kind
    beta = (settings.beta if isinstance(settings, Distill) else None) or 0.5
    if kind not in EXACT:
        raise ValueError(f"{kind} is a policy gradient on drawn tokens, not a divergence over the vocabulary")

    def loss(hidden: torch.Tensor, head: torch.Tensor, micro: MicroBatch):
        if teacher is None:
            scores = stored_scores(micro, settings.temperature)
        else:
            scores = HiddenScores(micro.fields["teacher_hidden"], teacher.padded_head.to(hidden.device))
        total, _, metrics = dense_divergence(
            hidden,
            head,
            scores,
            micro.fields["weights"],
            kind=kind,
            beta=beta,
            vocab_size=vocab_size,
            temperature=settings.temperature,
            chunk_tokens=run.execution.chunk_tokens,
        )
        return [Term(total, denominator)], metrics

    return loss


def scored_by(teacher: LanguageModel | None, run: StageRun) -> Callable[[MicroBatch], MicroBatch]:
    """Adds the teacher's hidden states to a micro-batch, as field `teacher_hidden`; without a teacher nothing."""

    def score(micro: MicroBatch) -> MicroBatch:
        if teacher is None:
            return micro
        with run.meter.timed("scored"):
            return replace(micro, fields={**micro.fields, "teacher_hidden": hidden_scores(teacher, micro).hidden})

    return score


def teacher_rollouts(
    settings: TeacherRollouts,
    *,
    teacher: LanguageModel,
    problems: Sequence[Problem],
    grade: Grade | None,
    seed: int,
    run: StageRun,
) -> list[Rollout]:
    """The teacher's rollouts on every problem, sampled once, filtered as `settings.keep` says, kept as token ids.

    A second call (after a crash) reads them back. Filtering reveals every answer at step 0.
    """
    path = run.directory / "rollouts.jsonl"
    if path.exists():
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if "sampled" not in run.meter.state():  # no checkpoint brought a later one
            run.meter.restore(rows[0]["meter"])
        return [Rollout(**row) for row in rows[1:]]
    group = settings.rollouts_per_problem
    sampler = sampler_for(teacher, max_tokens=run.execution.sampler_tokens, mesh=run.mesh)
    sampling = Sampling(("teacher", seed), group, settings.max_new_tokens, settings.temperature)
    with run.meter.timed("sampled"):
        rollouts = sampler.sample(problems, sampling)
    count_sampled(run, sampler, rollouts, group)
    if settings.keep != "all":
        if grade is None:
            raise ValueError(f"keep = {settings.keep!r} needs labelled problems and a grader")
        run.ledger.reveal(0, [p.id for p in problems])
        with run.meter.timed("graded"):
            verdicts = grade_sharded(grade, [(problems[i // group], r.text) for i, r in enumerate(rollouts)], run.mesh)
        run.meter.add("graded", teacher.shape, Batch.of(rollouts).sizes)
        wanted = settings.keep == "correct"
        rollouts = [r for r, v in zip(rollouts, verdicts, strict=True) if v.correct == wanted]
        if len(rollouts) < settings.sequences_per_step:
            raise ValueError(
                f"only {len(rollouts)} teacher rollouts are {settings.keep}, a step needs "
                f"{settings.sequences_per_step}: raise rollouts_per_problem or lower sequences_per_step"
            )
    header: dict[str, Any] = {"meter": run.meter.state()}
    if run.mesh.is_writer:
        checkpoint.write_atomically(path, "".join(json.dumps(row) + "\n" for row in [header, *map(asdict, rollouts)]))
    return rollouts
