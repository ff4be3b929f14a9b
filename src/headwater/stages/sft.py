"""Supervised fine-tuning: cross-entropy on the teacher's tokens, or on a file's worked solutions."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from headwater.config import SFT
from headwater.losses.numerics import Metrics
from headwater.losses.policy import cross_entropy
from headwater.losses.projection import sum_over_logprobs
from headwater.models.language_model import LanguageModel, check_same_tokenizer
from headwater.rollouts import streams
from headwater.rollouts.batch import Batch, MicroBatch, micro_batches
from headwater.run import StageRun
from headwater.scoring.weights import token_weights
from headwater.stages.common import DENSE, check_pool, count_trained, rollout_metrics, teacher_rollouts
from headwater.stages.watched import watched
from headwater.types import Grade, Problem, Rollout
from headwater.update import AdamW, Loss, Term, learning_rate, update


def train(
    settings: SFT,
    *,
    student: LanguageModel,
    problems: Sequence[Problem],
    seed: int,
    run: StageRun,
    teacher: LanguageModel | None = None,
    grade: Grade | None = None,
) -> AdamW:
    """Train `student` in place on hard tokens.

    With tokens = "teacher": rollouts of `teacher`, filtered as `settings.keep` says. With "solutions": the `solution`
    column of the problems; using one reveals that problem's answer. Returns the optimizer, whose masters are the
    result.
    Raises ValueError for a missing teacher or column, different tokenizers, too few sequences.
    """
    check_pool(problems, 1, labelled=settings.keep != "all")
    ex, mesh, per_step = run.execution, run.mesh, settings.sequences_per_step
    optimizer = AdamW(student, settings.optimizer)
    first = run.restore(optimizer)
    if settings.tokens == "solutions":
        rollouts = solutions(student, problems, settings.max_new_tokens)
    elif teacher is None:
        raise ValueError("tokens = 'teacher' needs a teacher")
    else:
        check_same_tokenizer(student, teacher)
        rollouts = teacher_rollouts(settings, teacher=teacher, problems=problems, grade=grade, seed=seed, run=run)

    for step in watched(settings, None, run, first):
        drawn = streams.epoch_order(rollouts, step * per_step, per_step, "sft", seed)
        if settings.tokens == "solutions":
            run.ledger.reveal(step, [r.problem_id for r in drawn])
        batch = Batch.of(drawn)
        weights, denominator = token_weights(torch.tensor(batch.lengths), "token")
        batch = batch.with_fields(weights=list(weights.split(batch.lengths)))
        micros = micro_batches(batch.shard(mesh), max_tokens=ex.micro_batch_tokens, device=student.device)
        with run.meter.timed("trained"), run.guarded():
            lr = learning_rate(settings.optimizer, step, settings.steps)
            clip = settings.optimizer.max_grad_norm
            loss = token_loss(student.vocab_size, denominator, ex.chunk_tokens)
            metrics = update(student, optimizer, micros, loss, lr=lr, max_grad_norm=clip, mesh=mesh)
        count_trained(run, student, batch, micros, DENSE)

        run.log(step, settings.steps, {**rollout_metrics(drawn), **metrics})
        run.show(step, drawn)
        run.evaluate_if_due(step + 1)
        run.save_if_due(step + 1, settings.steps, optimizer)
    return optimizer


def token_loss(vocab_size: int, denominator: float, chunk_tokens: int) -> Loss:
    """Cross-entropy at temperature 1 of one micro-batch."""

    def loss(hidden: torch.Tensor, head: torch.Tensor, micro: MicroBatch):
        def of(logprobs: torch.Tensor, part: slice) -> tuple[torch.Tensor, Metrics]:
            total, _, metrics = cross_entropy(logprobs, micro.fields["weights"][part])
            return total, metrics

        how = {"vocab_size": vocab_size, "chunk_tokens": chunk_tokens}
        total, metrics = sum_over_logprobs(hidden, head, micro.targets, of, **how)
        return [Term(total, denominator)], metrics

    return loss


def solutions(student: LanguageModel, problems: Sequence[Problem], max_new_tokens: int) -> list[Rollout]:
    """Worked solutions as rollouts that end in the end token; those that are too long are cut and so do not teach an
    end."""
    if missing := [p.id for p in problems if not isinstance(p.columns.get("solution"), str)]:
        raise ValueError(f"tokens = 'solutions' needs a text column 'solution': {len(missing)} problems have none")
    end = student.tokenizer.eos_token_id
    rollouts = []
    for problem in problems:
        text = problem.columns["solution"]
        ids = [*student.tokenizer(text, add_special_tokens=False)["input_ids"], end]  # pyright: ignore -- one text
        cut = ids[:max_new_tokens]
        rollouts.append(
            Rollout(
                problem.id, 0, student.encode(problem.messages), cut, [], text, len(cut) == len(ids), policy_version=0
            )
        )
    return rollouts
