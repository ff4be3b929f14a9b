"""Checks of what the models do: they sample, score each other's completions, and are graded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import log, sqrt
from statistics import mean, stdev

import torch

from headwater.doctor.finding import Finding, judge
from headwater.models.language_model import LanguageModel
from headwater.models.template import plain
from headwater.monitors.closeness import compare_rollouts, summary
from headwater.rollouts.batch import Batch, micro_batches
from headwater.scoring.log_probs import View, score_tokens
from headwater.types import Grade, Problem, Rollout, Verdict

TOLERANCE = {"float32": (1e-4, 1e-3), "bfloat16": (1e-1, 1.0)}
"""Mean and largest difference of a token's log-prob between two ways to compute it."""


def check_scores(role: str, model: LanguageModel, rollouts: Sequence[Rollout], view: View) -> Iterator[Finding]:
    """Scoring twice, alone and in a batch, and sampling must give the same log-probs at the sampler's temperature."""
    few = rollouts[:: max(1, len(rollouts) // 16)]
    batch = Batch.of(few)
    together = torch.cat(score_tokens(model, batch, view))
    again = torch.cat(score_tokens(model, batch, view))
    alone = torch.cat(score_tokens(model, batch, View(view.temperature, 1, view.chunk_tokens)))
    sampled = torch.tensor([x for r in few for x in r.sampler_logprobs])
    gaps = {"again": together - again, "alone": together - alone, "sampler": together - sampled}
    means, worst = ({k: float(f(g.abs())) for k, g in gaps.items()} for f in (torch.mean, torch.max))
    limits = TOLERANCE[model.config.dtype]
    bad = worst["again"] > 0 or max(means.values()) > limits[0] or max(worst.values()) > limits[1]
    yield judge(
        f"{role}: log-probs",
        "error" if bad or not bool(together.isfinite().all()) else "ok",
        f"scored again {worst['again']:.1e}, alone {means['alone']:.1e} (largest {worst['alone']:.1e}), by the sampler "
        f"{means['sampler']:.1e} ({worst['sampler']:.1e}) apart, at temperature {view.temperature}",
        "the ratio of policy gradients and the teacher's scores would be of another model than the one that sampled",
        "report it with this line: on CUDA try dtype = 'float32' to see whether it is rounding",
    )
    micros = micro_batches(batch, max_tokens=view.max_tokens)
    lasts = [int(m.targets[m.sequence_ids == i][-1]) for m in micros for i in range(m.num_sequences)]
    learned = sum(token in model.eos_ids for token in lasts)
    finished = sum(r.completion_ids[-1] in model.eos_ids for r in few)
    ended, lengths = sum(r.finished for r in rollouts), [len(r.completion_ids) for r in rollouts]
    yield judge(
        f"{role}: endings",
        "error" if learned != finished else "warning" if ended <= 0.05 * len(rollouts) else "ok",
        f"{ended} of {len(rollouts)} completions end by themselves (mean length {mean(lengths):.0f}, longest "
        f"{max(lengths)}); of {len(few)} laid out for training {learned} have their end token as a target",
        "what is cut gets no reward and teaches no end; the end token may not be the one this model writes",
        "raise max_new_tokens, ask for brief answers, or correct stop_tokens and the template",
    )
    texts = [plain(model.tokenizer, model.decode(r.completion_ids)) for r in rollouts if not model.config.stop]
    whole = [list(r.completion_ids[: -1 if r.completion_ids[-1] in model.eos_ids else None]) for r in rollouts]
    kept = sum(a[: len(b) - 2] == b[:-2] for a, b in zip(texts, whole, strict=False))  # a cut may split a word
    entropy = -float(sampled.mean())
    yield judge(
        f"{role}: what it writes",
        "warning" if entropy > 0.6 * log(model.vocab_size) or (texts and kept < 0.5 * len(texts)) else "ok",
        f"{entropy:.2f} nats a token (uniform is {log(model.vocab_size):.2f}); {kept} of {len(texts)} completions get "
        "the same ids when read back",
        "weights that are scrambled write noise; a tokenizer with other merges than the model's cuts words otherwise",
        "use weights and tokenizer of one release",
    )


def check_closeness(
    student: LanguageModel, teacher: LanguageModel, rollouts: dict[str, Sequence[Rollout]], view: View, *, raw: bool
) -> Iterator[Finding]:
    """Each model on the other's completions. `raw`: some arm learns from the teacher as it is."""
    found = {who: summary(compare_rollouts(student, teacher, rows, view)) for who, rows in rollouts.items()}
    worst = max(found["teacher"]["forward_kl"], found["student"]["reverse_kl"])
    uniform, equal = log(student.vocab_size), worst < 1e-9
    yield judge(
        "student and teacher: distance",
        "error" if not worst < uniform else "warning" if worst > 0.4 * uniform or (equal and raw) else "ok",
        f"KL {found['teacher']['forward_kl']:.3f} nats a token on the teacher's completions, "
        f"{found['student']['reverse_kl']:.3f} on the student's (uniform against certain is {uniform:.1f})"
        + ("; the two have the same weights" if equal else ""),
        "models of one family are within a nat: one of them is damaged, reads other tokens, or is too far to teach; "
        "equal ones have nothing to teach before the teacher is trained",
        "sample both by hand; take weights, tokenizer and template of one release",
    )


def graded(
    problems: Sequence[Problem], rollouts: Sequence[Rollout], grade: Grade
) -> list[list[tuple[Rollout, Verdict]]]:
    """Completions with their verdicts, by problem."""
    size = len(rollouts) // len(problems)
    verdicts = grade([(problems[i // size], r.text) for i, r in enumerate(rollouts)])
    pairs = list(zip(rollouts, verdicts, strict=True))
    return [pairs[i : i + size] for i in range(0, len(pairs), size)]


def check_rewards(
    role: str, problems: Sequence[Problem], groups: Sequence[Sequence[tuple[Rollout, Verdict]]], grade: Grade
) -> Iterator[Finding]:
    """Reward must differ within groups and be earned by solving this problem, not any."""
    pairs = [pair for group in groups for pair in group]
    own = mean(v.correct for _, v in pairs)
    mixed = sum(len({v.score for _, v in group}) > 1 for group in groups)
    failed = sum(v.reason in ("timeout", "memory", "error") for _, v in pairs)
    ended = sum(r.finished for r, _ in pairs)
    unread = sum(r.finished and not v.parsed for r, v in pairs)
    yield judge(
        f"{role}: rewards",
        "error" if failed > 0.1 * len(pairs) else "warning" if not mixed or unread > 0.5 * len(pairs) else "ok",
        f"{own:.0%} right, {mixed} of {len(groups)} groups of {len(groups[0])} mixed, {unread} of {ended} whole "
        f"completions without an answer that the grader reads, {failed} failures of the grader (this looked at "
        f"{len(problems)} answers)",
        "groups with equal rewards have no gradient: GRPO learns nothing from them",
        "take easier or harder problems, a better starting model (warmup), larger groups, more max_new_tokens, or "
        "another answer format",
    )
    # Answers of other problems in place of their own.
    others = [
        (Problem(p.messages, q.answer, q.columns), r.text)
        for i, p in enumerate(problems)
        for q in (problems[(i + k) % len(problems)] for k in (1, 2, 3))
        if q.answer != p.answer
        for r, _ in groups[i]
    ]
    other = mean(v.correct for v in grade(others)) if others else 0.0
    yield judge(
        f"{role}: rewards are for this problem",
        "warning" if 0 < own <= 2 * other else "ok",
        f"{own:.1%} right by their own answer, {other:.1%} by that of another problem",
        "the reward is luck: answers and problems do not belong together, or the model guesses",
        "compare some rows by hand; read some completions",
    )


def check_order(
    student: Sequence[Sequence[tuple[Rollout, Verdict]]], teacher: Sequence[Sequence[tuple[Rollout, Verdict]]]
) -> Iterator[Finding]:
    """The teacher should not be the worse one."""
    right = [[mean(v.correct for _, v in group) for group in groups] for groups in (student, teacher)]
    gaps = [a - b for b, a in zip(*right, strict=True)]
    yield judge(
        "teacher against student",
        "warning" if mean(gaps) + 2 * stdev(gaps) / sqrt(len(gaps)) < 0 else "ok",
        f"{mean(right[1]):.0%} and {mean(right[0]):.0%} right",
        "a student does not learn from a teacher that knows less",
        "swap the two, or look for damage in the teacher",
    )
