"""On-policy distillation: the student samples, the frozen teacher scores its tokens, reverse KL pulls it over."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from headwater.config import Distill
from headwater.losses.policy import clipped_policy_gradient, sampled_reverse_kl
from headwater.losses.projection import token_logprobs
from headwater.methods import EXACT
from headwater.models.language_model import LanguageModel, check_same_tokenizer
from headwater.rollouts import streams
from headwater.rollouts.batch import Batch, MicroBatch, micro_batches
from headwater.rollouts.sampler import Sampling
from headwater.run import StageRun
from headwater.scoring.log_probs import View, score_tokens, top_k_scores
from headwater.scoring.weights import token_weights
from headwater.stages.common import (
    DENSE,
    SPARSE,
    check_pool,
    count_sampled,
    count_scored,
    count_trained,
    dense_loss,
    mismatch_metrics,
    rollout_metrics,
    scored_by,
    student_sampler,
)
from headwater.stages.spans import Pair, aligned, span_loss, with_scores
from headwater.stages.watched import hold_out, looker, watched
from headwater.types import Grade, Problem
from headwater.update import AdamW, Loss, Term, learning_rate, update


def train(
    settings: Distill,
    *,
    student: LanguageModel,
    teacher: LanguageModel | None,
    problems: Sequence[Problem],
    seed: int,
    run: StageRun,
    grade: Grade | None = None,
) -> AdamW:
    """Train `student` in place on its own rollouts; answers are never looked at, so prompts without any will do (but
    for those that a gate with watch = "score" holds out, which needs `grade`).

    The gradient goes through the student's distribution at the visited prefixes and not through the sampling
    (arXiv:2605.12483, stage 2b). Without a teacher (divergence = "constant", and only then) every drawn token has the
    advantage -1 instead. Returns the optimizer, whose masters are the result.
    Raises ValueError for different tokenizers or too few problems, NonFiniteError as `update` does.
    """
    problems, held = hold_out(settings, problems)
    check_pool(problems, settings.problems_per_step, labelled=False)
    if (teacher is None) != (settings.divergence == "constant"):
        raise ValueError(
            f"divergence = {settings.divergence!r} and {'a' if teacher else 'no'} teacher: give a teacher to all but "
            "'constant'"
        )
    pair = Pair.of(student, teacher) if teacher and settings.alignment == "spans" else None
    if teacher is not None and pair is None:
        check_same_tokenizer(student, teacher)
    ex, mesh, per_step = run.execution, run.mesh, settings.problems_per_step
    sampler = student_sampler(student, run)
    optimizer = AdamW(student, settings.optimizer)
    look = looker(settings, held, student, run, seed, teacher=teacher, grade=grade)

    for step in watched(settings, look, run, run.restore(optimizer)):
        sampler.load(None, step)
        drawn = streams.epoch_order(problems, step * per_step, per_step, "distill", seed)
        sampling = Sampling(("distill", seed, step), settings.group_size, settings.max_new_tokens, settings.temperature)
        with run.meter.timed("sampled"):
            rollouts = sampler.sample(drawn, sampling)
        count_sampled(run, sampler, rollouts, settings.group_size)

        batch = Batch.of(rollouts)
        differing = mismatch_metrics(settings, run, student, rollouts, step)
        weights, denominator = token_weights(torch.tensor(batch.lengths), "token")
        batch = batch.with_fields(weights=list(weights.split(batch.lengths)))
        mine, scored = batch.shard(mesh), batch
        dense = settings.divergence in EXACT
        view = View(settings.temperature, ex.micro_batch_tokens, ex.chunk_tokens)
        seen_whole = None  # the teacher whose hidden states the loss takes
        if pair is not None:
            rows = aligned(pair, rollouts, drawn, sampled_by="student")
            with run.meter.timed("scored"):
                mine = with_scores(pair, rows.take(mesh.shard(range(len(batch)))), settings.stored_top_k, view)
            denominator, scored = float(sum(rows.covered)), rows.teacher
            loss = span_loss(settings, pair, denominator, run)
        elif not dense:
            if teacher is not None:
                with run.meter.timed("scored"):
                    mine = mine.with_fields(teacher=score_tokens(teacher, mine, view))
            loss = sampled_loss(settings, student.vocab_size, denominator, ex.chunk_tokens)
        elif k := settings.stored_top_k:
            assert teacher is not None
            with run.meter.timed("scored"):
                mine = top_k_scores(teacher, mine, k, view)
            loss = dense_loss(settings, None, student.vocab_size, denominator, run)
        else:
            loss, seen_whole = dense_loss(settings, teacher, student.vocab_size, denominator, run), teacher
        share = student.shares_prefixes and (teacher is None or teacher.shares_prefixes)
        micros = micro_batches(mine, max_tokens=ex.micro_batch_tokens, device=student.device, share=share)
        with run.meter.timed("trained"), run.guarded():
            lr = learning_rate(settings.optimizer, step, settings.steps)
            clip = settings.optimizer.max_grad_norm
            before = scored_by(seen_whole, run)
            metrics = update(student, optimizer, micros, loss, lr=lr, max_grad_norm=clip, mesh=mesh, before=before)
        if teacher is not None:
            count_scored(run, teacher, scored, None if settings.stored_top_k or not dense else micros)
        count_trained(run, student, batch, micros, DENSE if dense else SPARSE)

        run.log(step, settings.steps, {**rollout_metrics(rollouts), **differing, **metrics})
        run.show(step, rollouts)
        run.evaluate_if_due(step + 1)
        run.save_if_due(step + 1, settings.steps, optimizer)
    return optimizer


def sampled_loss(settings: Distill, vocab_size: int, denominator: float, chunk_tokens: int) -> Loss:
    """Policy gradient on the drawn tokens: of the reverse KL with token horizon (discount 0) or over the whole
    sequence, or of the constant advantage -1, whose expectation is 0."""

    def loss(hidden: torch.Tensor, head: torch.Tensor, micro: MicroBatch):
        logprobs, entropy = token_logprobs(
            hidden,
            head,
            micro.targets,
            vocab_size=vocab_size,
            temperature=settings.temperature,
            chunk_tokens=chunk_tokens,
        )
        weights, sequences = micro.fields["weights"], (micro.sequence_ids, micro.num_sequences)
        if settings.divergence == "constant":
            total, _, metrics = clipped_policy_gradient(
                logprobs, -torch.ones_like(weights), weights, sequence_ids=sequences[0], num_sequences=sequences[1]
            )
        else:
            total, _, metrics = sampled_reverse_kl(
                logprobs,
                micro.fields["teacher"],
                weights,
                sequence_ids=sequences[0],
                num_sequences=sequences[1],
                horizon="token" if settings.divergence == "sampled_token" else "sequence",
            )
        metrics["policy/entropy"] = (entropy.sum(), torch.tensor(float(len(entropy))))
        return [Term(total, denominator)], metrics

    return loss
