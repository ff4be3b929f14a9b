"""The steps of a loop under observation: C2 is logged, and a gate may end the stage before its last step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

from headwater.config import GRPO, Distill, Method, Warmup
from headwater.models.language_model import LanguageModel
from headwater.monitors import gates
from headwater.monitors.closeness import by_problem, compare_rollouts, sample_for
from headwater.monitors.gates import Look
from headwater.monitors.trainability import mixed_share
from headwater.rollouts.sampler import Sampling
from headwater.run import StageRun
from headwater.scoring.log_probs import View
from headwater.stages.common import grade_sharded
from headwater.types import Grade, Problem, Rollout

Looker = Callable[[int], Look]


def hold_out(settings: Method, problems: Sequence[Problem]) -> tuple[Sequence[Problem], Sequence[Problem]]:
    """Problems to train on, and the last of the list, which the stage's gate looks at (none without a gate).

    Raises ValueError when nothing would be left to train on, and when a gate needs answers that are missing.
    """
    if settings.gate is None:
        return problems, []
    count = settings.gate.held_out(len(problems))
    if count >= len(problems):
        raise ValueError(f"gate.problems takes {count} of {len(problems)} problems: lower it or enlarge the pool")
    kept, held = problems[: len(problems) - count], problems[len(problems) - count :]
    if settings.gate.watch == "score" and any(p.answer is None for p in held):
        raise ValueError("gate: watch = 'score' needs problems with answers; watch = 'kl' needs prompts alone")
    # What a dense stage trains on stays without answers, also where a gate has some to look at.
    return [p.unlabelled() for p in kept] if isinstance(settings, Distill) else kept, held


def watched(settings: Method, look: Looker | None, run: StageRun, first: int) -> Iterator[int]:
    """Steps `first` to settings.steps - 1, fewer when the gate's looks say so; C2 is logged on the way.

    A look comes before every `gate.every`-th step. Looks are kept in gates.jsonl; those after the checkpoint that a
    stage resumes from are taken again and show the same, so it decides the same.
    """
    gate, reason = settings.gate, None
    looks = [Look.of(row) for row in run.kept("gates.jsonl")] if gate else []
    for step in range(first, settings.steps + 1):
        if gate and look and step % gate.every == 0 and step < settings.steps:
            looks.append(look(step))
            run.keep("gates.jsonl", asdict(looks[-1]))
            reason = gates.decide(gate, looks)
        ends = reason is not None or step == settings.steps
        run.monitor_if_due(step, last=ends)
        if ends:
            break
        yield step
    if looks:
        run.gate = gates.evidence(looks, reason)


def looker(
    settings: Method,
    held: Sequence[Problem],
    model: LanguageModel,
    run: StageRun,
    seed: int,
    *,
    teacher: LanguageModel | None = None,
    grade: Grade | None = None,
) -> Looker | None:
    """How the gate of a stage looks at `model`; None without a gate. Its tokens count as `evaluated`.

    Random streams are its own and the same at every look, so that differences are paired. ValueError when a teacher or
    a grader is missing.
    """
    gate = settings.gate
    if gate is None:
        return None
    sampling = Sampling(("gate", seed), gate.samples, settings.max_new_tokens, settings.temperature)
    if gate.watch == "kl":
        if teacher is None:
            raise ValueError("gate: watch = 'kl' compares with a teacher, which this stage does not have")
        return _kl_looker(settings, held, model, teacher, run, sampling)
    if grade is None:
        raise ValueError("gate: watch = 'score' needs a grader")
    return _score_looker(settings, held, model, teacher, grade, run, sampling)


def _score_looker(
    settings: Method,
    held: Sequence[Problem],
    model: LanguageModel,
    teacher: LanguageModel | None,
    grade: Grade,
    run: StageRun,
    sampling: Sampling,
) -> Looker:
    """Mean score of each problem; the answers are revealed at every look. A teacher is scored once, at step 0."""
    gate, size = settings.gate, sampling.group_size

    def scores(of: LanguageModel) -> list[list[float]]:
        with run.meter.timed("evaluated"):
            rollouts = _sample(of, held, sampling, run)
        with run.meter.timed("graded"):
            graded = grade_sharded(grade, [(held[i // size], r.text) for i, r in enumerate(rollouts)], run.mesh)
        return [[v.score for v in graded[i * size : (i + 1) * size]] for i in range(len(held))]

    def look(step: int) -> Look:
        run.ledger.reveal(step, [p.id for p in held])
        rows, mixed, judged = scores(model), (), None
        if gate and gate.min_mixed is not None and isinstance(settings, GRPO):
            mixed = tuple(mixed_share(row, settings.group_size) for row in rows)
        if teacher is not None:
            first = step == 0
            judged = (
                sum(map(sum, scores(teacher))) / (size * len(held)) if first else run.kept("gates.jsonl")[0]["teacher"]
            )
        return Look(step, tuple(sum(row) / size for row in rows), mixed, judged)

    return look


def _kl_looker(
    settings: Method,
    held: Sequence[Problem],
    model: LanguageModel,
    teacher: LanguageModel,
    run: StageRun,
    sampling: Sampling,
) -> Looker:
    """Mean KL per token of each problem: forward on the teacher's rollouts in a warmup, reverse on the student's own
    elsewhere. The teacher, which does not change, samples once."""
    ex, of_teacher, forward = run.execution, [], isinstance(settings, Warmup)
    view = View(settings.temperature, ex.micro_batch_tokens, ex.chunk_tokens)

    def look(step: int) -> Look:
        with run.meter.timed("evaluated"):
            if forward and not of_teacher:  # drawn again where a stage resumes: that work is not billed twice
                of_teacher.extend(_sample(teacher, held, sampling, run, billed=step == 0))
            rollouts = of_teacher or _sample(model, held, sampling, run)
            rows = compare_rollouts(model, teacher, rollouts, view, run.mesh, run.meter)
        values = by_problem(rows, rollouts, "forward_kl" if forward else "reverse_kl")
        return Look(step, tuple(values[p.id] for p in held))

    return look


def _sample(
    model: LanguageModel, held: Sequence[Problem], sampling: Sampling, run: StageRun, *, billed: bool = True
) -> list[Rollout]:
    meter = run.meter if billed else None
    return sample_for(model, held, sampling, max_tokens=run.execution.sampler_tokens, mesh=run.mesh, meter=meter)
