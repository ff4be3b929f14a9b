"""The checks in their order: the cheap ones before every run, all of them for `headwater doctor`."""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from headwater.config import GRPO, ModelConfig, Recipe, Served, arm_stages
from headwater.doctor import behaviour, data, prompts, weights
from headwater.doctor.finding import Finding, guarded, judge, refused
from headwater.doctor.prompts import Patient
from headwater.grading.pool import GraderPool
from headwater.models import template
from headwater.models.language_model import LanguageModel, wrap
from headwater.models.server import ask
from headwater.rollouts.batch import Batch
from headwater.rollouts.sampler import Sampling, TransformersSampler
from headwater.rollouts.synced import check_server
from headwater.scoring.log_probs import View, served_scores
from headwater.stages.node import model_directory
from headwater.store import Store
from headwater.tasks import load_task
from headwater.tasks.pool import draw_pool
from headwater.types import Problem, Task

MEASURED = 64
"""Prompts whose length is measured; half as many gold answers are graded."""


@dataclass(frozen=True)
class Material:
    """What the recipe names, opened: models without weights, the task, problems of the pool and of evaluations."""

    recipe: Recipe
    patients: dict[str, Patient]
    task: Task
    train: Sequence[Problem]
    test: Sequence[Problem]


def roles(recipe: Recipe) -> dict[str, ModelConfig]:
    """The student and every model that some arm learns from."""
    teachers = {arm.teacher_model for arm in recipe.arms.values() if arm.teacher != "none"}
    return {role: model for role, model in recipe.models.items() if role == "student" or role in teachers}


def checkup(recipe: Recipe) -> tuple[Material | None, list[Finding]]:
    """Tokenizers, templates, end tokens, data, gold answers: seconds, no weights.

    The answers that are looked at reveal nothing to training. Without material when a model or the data cannot be read.
    """
    name = "models and data can be read"
    try:
        got = _open(recipe)
    except (ValueError, OSError) as error:
        return None, [refused(name, error)]
    findings = [Finding("ok", name, ", ".join(m.source for m in roles(recipe).values()))]
    some = list(got.train[:MEASURED])
    for patient in got.patients.values():
        findings += guarded(patient.role, lambda p=patient: prompts.check_model(p, some))
        findings += guarded(f"{patient.role}: lengths", lambda p=patient: _lengths(got, p, some))
    for role, patient in got.patients.items():
        if role != "student":
            kinds = _alignments(recipe, role)
            pair = lambda p=patient, k=kinds: prompts.check_pair(got.patients["student"], p, some, k)  # noqa: E731 -- bound in the loop, called in `guarded`
            findings += [replace(f, name=f"student and {role}: {f.name}") for f in guarded("tokens", pair)]
            if recipe.execution.teacher is not None:
                findings += guarded(f"{role}: server", lambda p=patient: _server(recipe, p))
    if recipe.execution.sampler is not None:
        findings += guarded("student: sampler", lambda: _sampler(recipe, got.patients["student"]))
    counts = getattr(got.task, "counts", {})  # tasks from files have them
    findings += guarded("data", lambda: data.check_data(got.train, got.test, counts, golds=_has_golds(got)))
    findings += guarded("grader", lambda: _grader(got))
    return got, findings


def _open(recipe: Recipe) -> Material:
    patients = {role: Patient.open(role, m, model_directory(m.source)) for role, m in roles(recipe).items()}
    task = load_task(recipe.task)
    evaluated = [e for e in recipe.evaluations.values() if e.task in (None, recipe.task)]
    held_out = [p for e in evaluated for p in draw_pool(task.problems(e.split), e.problems, None)]
    return Material(recipe, patients, task, task.problems("train"), held_out)


def _alignments(recipe: Recipe, role: str) -> set[str]:
    """How the arms that this model teaches carry its scores to the student's tokens."""
    return {
        getattr(recipe.settings(name, stage), "alignment", "tokens")
        for name, arm in recipe.arms.items()
        for stage in arm_stages(arm)
        if arm.teacher != "none" and arm.teacher_model == role
        if stage not in ("teacher_rl", "teacher_sft", "student_rl")
    }


def _lengths(material: Material, patient: Patient, problems: Sequence[Problem]) -> Iterator[Finding]:
    recipe = material.recipe
    longest = max(len(template.encode(patient.tokenizer, patient.config, p.messages)) for p in problems)
    new = max(s.max_new_tokens for s in (*recipe.stages.values(), *recipe.evaluations.values()))
    room = patient.positions
    yield judge(
        f"{patient.role}: lengths",
        "error" if room and longest + new > room else "ok",
        f"the longest of {len(problems)} prompts has {longest} tokens, completions up to {new}; the context is {room}",
        "beyond its context a model writes noise",
        "lower max_new_tokens, leave long problems out, or take a model with a longer context",
    )


def _has_golds(material: Material) -> bool:
    """False for a data set or environment whose own scorer takes every valid answer and which names none."""
    own = material.task.grader.startswith(("headwater.tasks.procedural:", "headwater.tasks.environments:"))
    return not own or any(p.answer for p in material.train)


def _check_ids(served: Served, patient: Patient) -> None:
    text = "\n".join(prompts.TRICKY)
    theirs = ask(served, "/tokenize", {"prompt": text, "add_special_tokens": False}, lambda answer: answer["tokens"])
    if theirs != template.plain(patient.tokenizer, text):
        raise ValueError(
            f"the model at {served.url} has other ids for a text than the tokenizer of {patient.config.source}: serve "
            f"that model, or give the {patient.role} the source of the one that is served"
        )


def _sampler(recipe: Recipe, student: Patient) -> Iterator[Finding]:
    """That the server can take weights and spells as the tokenizer here does; of an interpreter, that it has vLLM."""
    served = recipe.execution.sampler
    assert served is not None
    if served.url:
        check_server(served, student.config.dtype)
        _check_ids(served, student)
    elif (tried := subprocess.run([served.python, "-c", "import vllm"], capture_output=True, text=True)).returncode:
        raise ValueError(f"{served.python} does not import vllm: {tried.stderr[-500:]}")
    yield Finding("ok", "student: sampler", f"{served.url or served.python} answers")


def _server(recipe: Recipe, teacher: Patient) -> Iterator[Finding]:
    """That it has the model, spells as the tokenizer here does, and sends as many log-probs as the stages ask for."""
    served = recipe.execution.teacher
    assert served is not None
    _check_ids(served, teacher)
    stages = [recipe.settings(name, stage) for name, arm in recipe.arms.items() for stage in arm_stages(arm)]
    k, probe = max(getattr(s, "stored_top_k", 0) for s in stages), template.plain(teacher.tokenizer, "12 + 34 = 46")
    try:
        served_scores(served, len(teacher.tokenizer), Batch([probe[:1]], [probe[1:]]), k, View(1.0, 1, 1))
    except ValueError as error:
        raise ValueError(f"{error}; stages ask for {k} log-probs a token: start it with --max-logprobs {k}") from None
    yield Finding("ok", f"{teacher.role}: server", f"{served.url} answers, with {k} log-probs a token")


def _grader(material: Material) -> Iterator[Finding]:
    labelled = [p for p in material.train if p.answer is not None][: MEASURED // 2]
    if labelled and _has_golds(material):
        grader = material.task.grader
        ours = grader.startswith("headwater.") and not grader.startswith("headwater.tasks.environments:")
        with _graders(material) as pool:
            yield from data.check_grader(labelled, pool.grade, ours=ours)


def _graders(material: Material) -> GraderPool:
    execution = material.recipe.execution
    limits = {"timeout_s": execution.grader_timeout_s, "memory_mb": execution.grader_memory_mb}
    return GraderPool(material.task.grader, workers=execution.grader_workers, **limits)


def examine(recipe: Recipe, store: Store, *, problems: int = 16, rewards: bool = True) -> list[Finding]:
    """All checks, with the real weights, on the first `problems` training problems.

    With `rewards` completions of these are graded, as a diagnostic that reveals their answers to whoever reads it.
    """
    got, findings = checkup(recipe)
    if got is None or any(f.level == "error" for f in findings):
        later = "weights and completions are looked at when these errors are gone"
        return [*findings, Finding("warning", "not looked at", later, "there may be more", "run the doctor again")]
    some = list(got.train[:problems])
    texts = [m.content for p in some for m in p.messages] + [p.answer or "" for p in some]
    models: dict[str, LanguageModel] = {}
    here = {r: p for r, p in got.patients.items() if r == "student" or recipe.execution.teacher is None}
    for role, patient in here.items():

        def check(role: str = role, patient: Patient = patient) -> Iterator[Finding]:
            loaded = weights.load(patient, recipe.execution)
            seen = list(weights.check_weights(patient, loaded, texts))
            yield from seen
            if all(f.level != "error" for f in seen):
                models[role] = wrap(loaded.module, patient.tokenizer, patient.config)

        findings += guarded(f"{role}: weights", check)
    if models.keys() != here.keys():
        return findings
    findings += guarded("room", lambda: weights.check_room(models, trained(recipe), recipe.execution, store.root))
    return findings + guarded("samples", lambda: _behave(got, models, some, rewards))


def trained(recipe: Recipe) -> dict[str, int]:
    """How many stages train each model, at most."""
    count: Counter[str] = Counter()
    for variant in recipe.variants.values():
        arm = recipe.arms[variant.arm]
        for stage in arm_stages(arm):
            count[arm.teacher_model if stage.startswith("teacher") else "student"] += len(recipe.seeds)
    return dict(count)


def _behave(got: Material, models: dict[str, LanguageModel], some: list[Problem], rewards: bool) -> Iterator[Finding]:
    recipe, drawn = got.recipe, {}
    used = {stage: recipe.stages[stage] for arm in recipe.arms.values() for stage in arm_stages(arm)}
    for role, model in models.items():
        own = [s for name, s in used.items() if name.startswith("teacher") == (role != "student")] or [*used.values()]
        settings = next((s for s in own if isinstance(s, GRPO)), own[0])
        size = settings.group_size if isinstance(settings, GRPO) else 4
        view = View(settings.temperature, recipe.execution.micro_batch_tokens, recipe.execution.chunk_tokens)
        sampling = Sampling(("doctor", role), size, settings.max_new_tokens, settings.temperature)
        sampler = TransformersSampler(model, max_tokens=recipe.execution.sampler_tokens)
        drawn[role] = sampler.sample(some, sampling)
        yield from behaviour.check_scores(role, model, drawn[role], view)
    for role in models.keys() - {"student"}:
        raw = any(arm.teacher == "raw" and arm.teacher_model == role for arm in recipe.arms.values())
        both = {"teacher": drawn[role], "student": drawn["student"]}
        yield from behaviour.check_closeness(models["student"], models[role], both, View(1.0, 16_384, 1024), raw=raw)
    if not rewards:
        return
    by_reward = {name.startswith("teacher") for name, s in used.items() if isinstance(s, GRPO)}
    with _graders(got) as pool:
        groups = {role: behaviour.graded(some, rows, pool.grade) for role, rows in drawn.items()}
        for role in groups:
            if (role != "student") in by_reward:
                yield from behaviour.check_rewards(role, some, groups[role], pool.grade)
    for role in groups.keys() - {"student"}:
        yield from behaviour.check_order(groups["student"], groups[role])
