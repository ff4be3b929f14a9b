"""GRPO: the policy samples groups, a verifier rewards them, the clipped policy gradient follows the group advantage."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from headwater.config import GRPO, Execution
from headwater.evals.evaluate import mark_truncated
from headwater.losses.numerics import Metrics
from headwater.losses.policy import clipped_policy_gradient, reference_kl
from headwater.losses.projection import sum_over_logprobs, token_logprobs
from headwater.mesh import Mesh
from headwater.models.language_model import LanguageModel
from headwater.rollouts import streams
from headwater.rollouts.batch import Batch, MicroBatch, micro_batches
from headwater.rollouts.sampler import Sampling
from headwater.run import StageRun
from headwater.scoring.advantages import group_advantages
from headwater.scoring.log_probs import View, score_tokens
from headwater.scoring.weights import soft_overlong_penalty, token_weights
from headwater.stages.common import (
    DENSE,
    LOGITS,
    SPARSE,
    AnySampler,
    audit_metrics,
    check_pool,
    count_sampled,
    count_scored,
    count_trained,
    grade_sharded,
    rollout_metrics,
    rows_of,
    student_sampler,
)
from headwater.stages.watched import hold_out, looker, watched
from headwater.types import Grade, Problem, Rollout, Verdict
from headwater.update import AdamW, Loss, Term, learning_rate, update

Group = tuple[Problem, list[Rollout], list[Verdict]]


def train(
    settings: GRPO,
    *,
    policy: LanguageModel,
    problems: Sequence[Problem],
    grade: Grade,
    seed: int,
    run: StageRun,
    reference: LanguageModel | None = None,
    max_flops: float | None = None,
) -> AdamW:
    """Train `policy` in place on labelled problems; resumes from `run`'s newest checkpoint.

    Every problem whose answer a step used is written to the ledger before the weights change. `reference` is the KL
    anchor and needed when `settings.kl_coef` > 0. With `max_flops` the stage ends before `settings.steps`, after the
    first step that brings its FLOPs there. Returns the optimizer, whose masters are the result.
    Raises ValueError for problems without answers or fewer than a step needs, NonFiniteError as `update` does.
    """
    problems, held = hold_out(settings, problems)
    check_pool(problems, settings.problems_per_step, labelled=True)
    if (reference is not None) != (settings.kl_coef > 0):
        raise ValueError(
            f"kl_coef = {settings.kl_coef} and {'a' if reference else 'no'} reference: give both or neither"
        )
    sampler = student_sampler(policy, run)
    optimizer = AdamW(policy, settings.optimizer)

    look = looker(settings, held, policy, run, seed, grade=grade)
    for step in watched(settings, look, run, run.restore(optimizer)):
        if max_flops is not None and run.meter.flops >= max_flops:
            break
        sampler.load(None, step)
        drawn = streams.epoch_order(
            problems, step * settings.problems_per_step, settings.problems_per_step, "grpo", seed
        )
        groups, redrawn = _live_groups(settings, drawn, problems, sampler, grade, (seed, step), run)
        run.ledger.reveal(step, [p.id for p, _, _ in groups + redrawn])
        batch, rewards = group_batch(settings, groups)
        metrics = _update_epochs(settings, policy, optimizer, batch, reference, step, run)

        rollouts, verdicts = rows_of([g[1] for g in groups]), rows_of([g[2] for g in groups])
        steps = settings.steps if max_flops is None else steps_to_flops(step + 1, run.meter.flops, max_flops)
        observed = reward_metrics(rewards) | {"reward/groups_redrawn": float(len(redrawn))}
        observed |= audit_metrics(run, step, steps, groups)
        run.log(step, steps, {**observed, **rollout_metrics(rollouts, verdicts), **metrics})
        run.show(step, rollouts, verdicts)
        run.evaluate_if_due(step + 1)
        run.save_if_due(step + 1, settings.steps, optimizer)
    return optimizer


def reward_metrics(rewards: torch.Tensor) -> dict[str, float]:
    """Mean reward and the share of dead groups of rewards [problems, group]."""
    dead = (rewards.amax(1) == rewards.amin(1)).float()
    return {"reward/mean": float(rewards.mean()), "reward/frac_groups_zero_std": float(dead.mean())}


def steps_to_flops(done: int, flops: float, max_flops: float) -> int:
    """Steps in all of a stage that ends when its FLOPs are spent, as the steps so far foretell."""
    return max(done, math.ceil(done * max_flops / flops))


def policy_loss(settings: GRPO, execution: Execution, vocab_size: int, denominator: float) -> Loss:
    """The loss of one micro-batch with fields advantages, weights, sampler and, when needed, old and reference."""

    how = {"vocab_size": vocab_size, "temperature": settings.temperature, "chunk_tokens": execution.chunk_tokens}

    def of(logprobs: torch.Tensor, part: slice, micro: MicroBatch) -> tuple[torch.Tensor, Metrics]:
        fields = {name: field[part] for name, field in micro.fields.items()}
        total, _, metrics = clipped_policy_gradient(
            logprobs,
            fields["advantages"],
            fields["weights"],
            sequence_ids=micro.sequence_ids[part],
            num_sequences=micro.num_sequences,
            old_logprobs=fields.get("old"),
            sampler_logprobs=fields["sampler"],
            ratio=settings.ratio,
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            sampler_weight_cap=settings.sampler_weight_cap or None,
        )
        if "reference" in fields:
            penalty, _, observed = reference_kl(
                logprobs,
                fields["reference"],
                fields["weights"],
                old_logprobs=fields.get("old"),
                estimator=settings.kl_estimator or "reverse",
            )
            total, metrics = total + settings.kl_coef * penalty, metrics | observed
        return total, metrics

    def loss(hidden: torch.Tensor, head: torch.Tensor, micro: MicroBatch):
        if settings.ratio == "sequence":  # a sequence may lie in two chunks
            logprobs, entropy = token_logprobs(hidden, head, micro.targets, **how)
            total, metrics = of(logprobs, slice(None), micro)
            metrics["policy/entropy"] = (entropy.sum(), torch.tensor(float(len(entropy))))
        else:
            total, metrics = sum_over_logprobs(hidden, head, micro.targets, lambda x, part: of(x, part, micro), **how)
        return [Term(total, denominator)], metrics

    return loss


def _live_groups(
    settings: GRPO,
    drawn: list[Problem],
    pool: Sequence[Problem],
    sampler: AnySampler,
    grade: Grade,
    place: tuple[int, int],
    run: StageRun,
) -> tuple[list[Group], list[Group]]:
    """Groups to train on, and the dead ones that dynamic sampling replaced (DAPO, arXiv:2503.14476, section 3.2).

    What is still dead after the last round stays in the batch, where its advantages are 0.
    """
    groups = sample_groups(settings, drawn, sampler, grade, ("grpo", *place, 0), run)
    redrawn: list[Group] = []
    for round_ in range(1, settings.redraws + 1):
        dead = [g for g in groups if _is_dead(g)]
        seen = {p.id for p, _, _ in groups + redrawn}
        fresh = sorted(
            (p for p in pool if p.id not in seen), key=lambda p: streams.key("redraw", *place, round_, p.id)
        )[: len(dead)]
        if not fresh:
            break
        replaced, kept_dead = dead[: len(fresh)], dead[len(fresh) :]
        redrawn += replaced
        for _, rollouts, _ in replaced:
            sizes = Batch.of(rollouts).sizes
            run.meter.add("discarded", sampler.model.shape, [*sizes, (sizes[0][0], 0)])
        live = [g for g in groups if not _is_dead(g)]
        groups = live + kept_dead + sample_groups(settings, fresh, sampler, grade, ("grpo", *place, round_), run)
    return groups, redrawn


def sample_groups(
    settings: GRPO,
    problems: list[Problem],
    sampler: AnySampler,
    grade: Grade,
    stream: tuple[object, ...],
    run: StageRun,
) -> list[Group]:
    size = settings.group_size
    sampling = Sampling(stream, size, settings.max_new_tokens, settings.temperature)
    with run.meter.timed("sampled"):
        rollouts = sampler.sample(problems, sampling)
    count_sampled(run, sampler, rollouts, size)
    with run.meter.timed("graded"):
        pairs = [(problems[i // size], r.text) for i, r in enumerate(rollouts)]
        verdicts = mark_truncated(grade_sharded(grade, pairs, run.mesh), rollouts)
    run.meter.add("graded", sampler.model.shape, Batch.of(rollouts).sizes)
    return [
        (p, rollouts[i * size : (i + 1) * size], verdicts[i * size : (i + 1) * size]) for i, p in enumerate(problems)
    ]


def _is_dead(group: Group) -> bool:
    return len({v.score for v in group[2]}) == 1


def group_batch(settings: GRPO, groups: list[Group]) -> tuple[Batch, torch.Tensor]:
    """Rows with advantages and the sampler's log-probs; and the rewards [problems, group] before any penalty."""
    rollouts = rows_of([g[1] for g in groups])
    rewards = torch.tensor([[v.score for v in g[2]] for g in groups])
    lengths = torch.tensor([len(r.completion_ids) for r in rollouts])
    credited = rewards
    if settings.overlong == "penalty":
        penalty = soft_overlong_penalty(lengths, settings.max_new_tokens, settings.overlong_buffer)
        credited = rewards + penalty.view_as(rewards)
    advantages = group_advantages(credited, normalise=settings.advantage).flatten()
    counts, ended = lengths.tolist(), torch.tensor([r.finished for r in rollouts])
    sampler = torch.tensor([x for r in rollouts for x in r.sampler_logprobs])
    batch = Batch.of(
        rollouts,
        advantages=list(advantages.repeat_interleave(lengths).split(counts)),
        sampler=list(sampler.split(counts)),
        finished=list(ended.repeat_interleave(lengths).split(counts)),
    )
    return batch, rewards


def _update_epochs(
    settings: GRPO,
    policy: LanguageModel,
    optimizer: AdamW,
    batch: Batch,
    reference: LanguageModel | None,
    step: int,
    run: StageRun,
) -> dict[str, float]:
    """`updates_per_batch` optimizer steps on disjoint parts of the batch; metrics averaged over them.

    With one update the policy is its own old policy; with more, `old` is the trainer's view before the first of them.
    """
    ex = run.execution
    view = View(settings.temperature, ex.micro_batch_tokens, ex.chunk_tokens)
    whole = _parts(batch, settings)
    parts = [part.shard(run.mesh) for part in whole]
    with run.meter.timed("scored"):
        if settings.updates_per_batch > 1:
            parts = [part.with_fields(old=score_tokens(policy, part, view)) for part in parts]
            count_scored(run, policy, batch)
        if reference is not None:
            parts = [part.with_fields(reference=score_tokens(reference, part, view)) for part in parts]
            count_scored(run, reference, batch)
    lr = learning_rate(settings.optimizer, step, settings.steps)
    observed: list[dict[str, float]] = []
    with run.meter.timed("trained"), run.guarded():
        for part, of_all in zip(parts, whole, strict=True):
            part, denominator = weigh(part, settings, run.mesh)
            how = {"max_tokens": ex.micro_batch_tokens, "device": policy.device, "share": policy.shares_prefixes}
            live, still = (micro_batches(rows, **how) for rows in _live_and_still(part, settings))
            loss = policy_loss(settings, ex, policy.vocab_size, denominator)
            how = {"lr": lr, "max_grad_norm": settings.optimizer.max_grad_norm, "mesh": run.mesh}
            observed.append(update(policy, optimizer, live, loss, still=still, **how))
            learned, looked_at = _live_and_still(of_all, settings)
            count_trained(run, policy, learned, live, SPARSE if settings.ratio == "sequence" else DENSE)
            count_trained(run, policy, looked_at, still, LOGITS)
    return {
        name: max(m[name] for m in observed) if name.endswith("_max") else sum(m[name] for m in observed) / len(parts)
        for name in observed[0]
    }


def _live_and_still(batch: Batch, settings: GRPO) -> tuple[Batch, Batch]:
    """Rows with a gradient, and those of advantage 0, which have none unless a reference pulls at them too."""
    live = [settings.kl_coef > 0 or bool(advantages.any()) for advantages in batch.fields["advantages"]]
    rows = range(len(batch))
    return batch.take([r for r in rows if live[r]]), batch.take([r for r in rows if not live[r]])


def weigh(batch: Batch, settings: GRPO, mesh: Mesh) -> tuple[Batch, float]:
    """The batch with its token weights, and their denominator over all ranks."""
    lengths = torch.tensor(batch.lengths, dtype=torch.long)  # named, because a rank may have no rows
    finished = torch.tensor([bool(f.all()) for f in batch.fields["finished"]], dtype=torch.bool)
    keep = finished if settings.overlong == "mask" else None
    limit = settings.max_new_tokens if settings.aggregate == "constant" else None
    weights, denominator = token_weights(lengths, settings.aggregate, limit, keep=keep)
    total = float(mesh.all_sum(torch.tensor(denominator, dtype=torch.float64)))
    return batch.with_fields(weights=list(weights.split(batch.lengths))), total


def _parts(batch: Batch, settings: GRPO) -> list[Batch]:
    """Disjoint parts of whole groups, dealt out in turn."""
    count = settings.updates_per_batch
    return [batch.take([r for r in range(len(batch)) if (r // settings.group_size) % count == i]) for i in range(count)]
