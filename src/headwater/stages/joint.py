"""Reward and teacher at once: the student samples groups; verifier and teacher both judge the same tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from headwater.config import Joint
from headwater.models.language_model import LanguageModel, check_same_tokenizer
from headwater.rollouts import streams
from headwater.rollouts.batch import MicroBatch, micro_batches
from headwater.run import StageRun
from headwater.scoring.weights import token_weights
from headwater.stages.common import (
    DENSE,
    SPARSE,
    audit_metrics,
    check_pool,
    count_scored,
    count_trained,
    dense_loss,
    rollout_metrics,
    rows_of,
    scored_by,
    student_sampler,
)
from headwater.stages.grpo import group_batch, policy_loss, reward_metrics, sample_groups, weigh
from headwater.stages.watched import watched
from headwater.types import Grade, Problem
from headwater.update import AdamW, Loss, Term, learning_rate, update


def train(
    settings: Joint,
    *,
    student: LanguageModel,
    teacher: LanguageModel,
    problems: Sequence[Problem],
    grade: Grade,
    seed: int,
    run: StageRun,
) -> AdamW:
    """Train `student` in place on (1 - lambda) KL(student || teacher) + lambda policy gradient, lambda = reward_weight.

    This is the axis J_lambda of arXiv:2605.12483 v1, of which the paper uses the ends alone. The KL is a mean over
    tokens, the policy gradient is divided as `settings.aggregate` says. Every answer used is written to the ledger
    before the weights change. Returns the optimizer, whose masters are the result.
    Raises ValueError for different tokenizers, problems without answers or fewer than a step needs, NonFiniteError as
    `update` does.
    """
    check_pool(problems, settings.problems_per_step, labelled=True)
    check_same_tokenizer(student, teacher)
    ex, mesh, per_step = run.execution, run.mesh, settings.problems_per_step
    sampler = student_sampler(student, run)
    optimizer = AdamW(student, settings.optimizer)

    for step in watched(settings, None, run, run.restore(optimizer)):
        sampler.load(None, step)
        drawn = streams.epoch_order(problems, step * per_step, per_step, "joint", seed)
        groups = sample_groups(settings, drawn, sampler, grade, ("joint", seed, step), run)
        run.ledger.reveal(step, [p.id for p, _, _ in groups])
        batch, rewards = group_batch(settings, groups)

        dense_weights, tokens = token_weights(torch.tensor(batch.lengths), "token")
        batch = batch.with_fields(dense=list(dense_weights.split(batch.lengths)))
        part, denominator = weigh(batch.shard(mesh), settings, mesh)
        dense = dense_loss(settings, teacher, student.vocab_size, tokens, run)
        sparse = policy_loss(settings, ex, student.vocab_size, denominator)
        share = student.shares_prefixes and teacher.shares_prefixes
        micros = micro_batches(part, max_tokens=ex.micro_batch_tokens, device=student.device, share=share)
        with run.meter.timed("trained"), run.guarded():
            lr = learning_rate(settings.optimizer, step, settings.steps)
            clip = settings.optimizer.max_grad_norm
            loss = joint_loss(dense, sparse, settings.reward_weight)
            before = scored_by(teacher, run)
            metrics = update(student, optimizer, micros, loss, lr=lr, max_grad_norm=clip, mesh=mesh, before=before)
        count_scored(run, teacher, batch, micros)
        count_trained(run, student, batch, micros, DENSE + (SPARSE if settings.ratio == "sequence" else DENSE))

        rollouts, verdicts = rows_of([g[1] for g in groups]), rows_of([g[2] for g in groups])
        observed = reward_metrics(rewards) | audit_metrics(run, step, settings.steps, groups)
        run.log(step, settings.steps, {**observed, **rollout_metrics(rollouts, verdicts), **metrics})
        run.show(step, rollouts, verdicts)
        run.evaluate_if_due(step + 1)
        run.save_if_due(step + 1, settings.steps, optimizer)
    return optimizer


def joint_loss(dense: Loss, sparse: Loss, reward_weight: float) -> Loss:
    """Both losses of one micro-batch, each with its own token weights and denominator."""

    def loss(hidden: torch.Tensor, head: torch.Tensor, micro: MicroBatch):
        of_teacher = MicroBatch(**{**vars(micro), "fields": {**micro.fields, "weights": micro.fields["dense"]}})
        terms, metrics = dense(hidden, head, of_teacher)
        rewarded, observed = sparse(hidden, head, micro)
        scaled = [Term(t.total, t.denominator, (1 - reward_weight) * t.coef) for t in terms]
        scaled += [Term(t.total, t.denominator, reward_weight * t.coef) for t in rewarded]
        return scaled, {**observed, **metrics}

    return loss
