"""Forward-KL warmup: the frozen teacher's rollouts, sampled once, and its distributions on them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from headwater.config import Warmup
from headwater.models.language_model import LanguageModel, check_same_tokenizer
from headwater.rollouts import streams
from headwater.rollouts.batch import Batch, micro_batches
from headwater.run import StageRun
from headwater.scoring.log_probs import View, top_k_scores
from headwater.scoring.weights import token_weights
from headwater.stages.common import (
    DENSE,
    check_pool,
    count_scored,
    count_trained,
    dense_loss,
    rollout_metrics,
    scored_by,
    teacher_rollouts,
)
from headwater.stages.spans import Pair, aligned, span_loss, with_scores
from headwater.stages.watched import hold_out, looker, watched
from headwater.types import Grade, Problem
from headwater.update import AdamW, learning_rate, update


def train(
    settings: Warmup,
    *,
    student: LanguageModel,
    teacher: LanguageModel,
    problems: Sequence[Problem],
    seed: int,
    run: StageRun,
    grade: Grade | None = None,
) -> AdamW:
    """Train `student` in place towards the teacher's distributions on the teacher's own prefixes (arXiv:2605.12483,
    stage 2a).

    Answers are looked at only when `settings.keep` filters or a gate watches the score, which need `grade`. Returns the
    optimizer, whose masters are the result. Raises ValueError for different tokenizers or too few rollouts,
    NonFiniteError as `update` does.
    """
    problems, held = hold_out(settings, problems)
    check_pool(problems, 1, labelled=settings.keep != "all")
    pair = Pair.of(student, teacher) if settings.alignment == "spans" else None
    if pair is None:
        check_same_tokenizer(student, teacher)
    ex, mesh, per_step = run.execution, run.mesh, settings.sequences_per_step
    optimizer = AdamW(student, settings.optimizer)
    first = run.restore(optimizer)
    rollouts = teacher_rollouts(settings, teacher=teacher, problems=problems, grade=grade, seed=seed, run=run)
    pool = Batch.of(rollouts)
    if k := settings.stored_top_k:
        view = View(settings.temperature, ex.micro_batch_tokens, ex.chunk_tokens)
        if first == 0:
            count_scored(run, teacher, pool)
        with run.meter.timed("scored"):
            if pair is not None:
                pool = with_scores(pair, aligned(pair, rollouts, problems, sampled_by="teacher"), k, view)
            else:
                pool = top_k_scores(teacher, pool, k, view)

    look = looker(settings, held, student, run, seed, teacher=teacher, grade=grade)
    for step in watched(settings, look, run, first):
        rows = streams.epoch_order(range(len(pool)), step * per_step, per_step, "warmup", seed)
        batch = pool.take(rows)
        if pair is not None:
            denominator = float(sum(w.sum() for w in batch.fields["weights"]))
            loss = span_loss(settings, pair, denominator, run)
        else:
            weights, denominator = token_weights(torch.tensor(batch.lengths), "token")
            batch = batch.with_fields(weights=list(weights.split(batch.lengths)))
            loss = dense_loss(settings, None if k else teacher, student.vocab_size, denominator, run)
        micros = micro_batches(batch.shard(mesh), max_tokens=ex.micro_batch_tokens, device=student.device)
        with run.meter.timed("trained"), run.guarded():
            lr = learning_rate(settings.optimizer, step, settings.steps)
            clip = settings.optimizer.max_grad_norm
            before = scored_by(None if k or pair else teacher, run)
            metrics = update(student, optimizer, micros, loss, lr=lr, max_grad_norm=clip, mesh=mesh, before=before)
        count_trained(run, student, batch, micros, DENSE)
        if not k:
            count_scored(run, teacher, batch, micros)

        shown = [rollouts[r] for r in rows]
        run.log(step, settings.steps, {**rollout_metrics(shown), **metrics})
        run.show(step, shown)
        run.evaluate_if_due(step + 1)
        run.save_if_due(step + 1, settings.steps, optimizer)
    return optimizer
