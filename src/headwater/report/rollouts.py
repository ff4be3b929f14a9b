"""The same problems answered before and after, and what went wrong; model output is passed on as it is, unescaped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

from headwater.report.directory import Run, read_json
from headwater.report.headline import plural
from headwater.report.tables import Table, count, share, when

GIVING_OUT = ("timeout", "memory", "error")
SHOWN_PROBLEMS, SHOWN_SAMPLES, SHOWN_CHARACTERS = 12, 3, 1500


@dataclass(frozen=True)
class Sample:
    text: str
    verdict: str
    correct: bool
    cut: int
    """Characters left out."""


@dataclass(frozen=True)
class Answers:
    """One model's completions of a problem; `right` of `total` samples are right, the first few are shown."""

    model: str
    right: int
    total: int
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class Case:
    """A problem with everybody's answers."""

    problem: str
    prompt: str
    answer: str
    answers: tuple[Answers, ...]


@dataclass(frozen=True)
class Cases:
    task: str
    seed: str
    models: tuple[str, ...]
    cases: tuple[Case, ...]
    total: int


def cases(run: Run, task: str) -> Cases | None:
    """The first problems of an evaluation, as base student, trained teacher and every arm answered them in one seed."""
    files = _evaluations(run, task)
    seed = next((seed for _, by_seed in files for seed in by_seed), None)
    if seed is None:
        return None
    answered = {}
    for model, by_seed in files:
        if seed in by_seed and (rows := run.rows(by_seed[seed], "samples.jsonl")):
            answered[model] = {row["problem"]: row for row in rows}
    problems: dict[str, Mapping[str, Any]] = {}
    for rows in answered.values():
        for problem, row in rows.items():
            problems.setdefault(problem, row)
    shown = [
        Case(
            problem,
            "\n\n".join(message["content"] for message in row["prompt"]),
            row["answer"],
            tuple(_answers(model, rows[problem]) for model, rows in answered.items() if problem in rows),
        )
        for problem, row in list(problems.items())[:SHOWN_PROBLEMS]
    ]
    return Cases(task, seed, tuple(answered), tuple(shown), len(problems)) if shown else None


def _evaluations(run: Run, task: str) -> list[tuple[str, dict[str, str]]]:
    """(name, seed -> evaluation's key), in the order in which they are shown."""
    models, arms = run.results.get("models", {}), run.results.get("arms", {})
    base = [(row["role"], row["evals"]) for row in models.values() if row["role"] == "base student"]
    taught = [row["evals"] for row in models.values() if row["role"] == "trained teacher"]
    first = {seed: evals for by_seed in reversed(taught) for seed, evals in by_seed.items()}
    ends = [(name, {seed: row["evals"] for seed, row in arm["seeds"].items()}) for name, arm in arms.items()]
    return [
        (name, {seed: PurePosixPath(evals[task]["per_problem"]).stem for seed, evals in by_seed.items()})
        for name, by_seed in [*base, ("trained teacher", first), *ends]
    ]


def _answers(model: str, row: Mapping[str, Any]) -> Answers:
    samples = []
    shown = zip(row["texts"], row["reasons"], row["styles"], row["finished"], row["correct"], strict=True)
    for text, reason, style, finished, correct in islice(shown, SHOWN_SAMPLES):
        words = [reason, *([style] if style else []), *([] if finished else ["cut by the length limit"])]
        left = max(0, len(text) - SHOWN_CHARACTERS)
        samples.append(Sample(text[:SHOWN_CHARACTERS], ", ".join(words), correct, left))
    return Answers(model, sum(row["correct"]), len(row["texts"]), tuple(samples))


def failures(run: Run) -> list[tuple[str, str]]:
    """(title, error) of every failed node."""
    return [(node.title, node.error or "no message") for node in run.nodes.values() if node.state == "failed"]


def unfinished(run: Run) -> list[str]:
    """Arms of the recipe that results.json does not hold."""
    return [name for name in run.arms if name not in run.results.get("arms", {})]


def interruptions(run: Run) -> list[str]:
    """Invocations in words, when one of several did not come to its end: a run that was stopped and resumed says so."""
    begun = [event for event in run.events if event.get("kind") == "run"]
    ends = sum(event.get("kind") == "end" for event in run.events)
    if len(begun) < 2 or ends >= len(begun):
        return []
    times = ", ".join(when(event.get("time")) for event in begun)
    return [f"{plural(len(begun), 'invocation')} wrote here (begun {times}); {ends} came to an end by themselves."]


def grading(run: Run) -> Table | None:
    """How often grading itself gave out, seeds together: samples of evaluations, and shares of stages' rollouts."""
    counted: dict[str, list[Mapping[str, int]]] = {}
    logged: dict[str, list[Mapping[str, float]]] = {}
    for key, node in run.nodes.items():
        title = node.title.partition(", seed ")[0]
        result = read_json(run.root / "nodes" / key / "done.json").get("result", {})
        counted.setdefault(title, []).append(result.get("reasons", {}))
        logged.setdefault(title, []).extend(r for r in run.rows(key, "metrics.jsonl") if "grader/frac_timeout" in r)
    rows = []
    for title, found in counted.items():
        bad = [sum(counts.get(reason, 0) for counts in found) for reason in GIVING_OUT]
        if any(bad):
            rows.append((title, *map(count, bad), f"{count(sum(sum(c.values()) for c in found))} samples"))
    for title, found in logged.items():
        means = [sum(row.get(f"grader/frac_{why}", 0) for row in found) / len(found) for why in GIVING_OUT if found]
        if any(means):
            rows.append((title, *(f"{share(mean)} %" for mean in means), "rollouts, mean over steps"))
    head = ("node", "timeouts", "memory", "errors", "of")
    return Table("Gradings that gave out; they count as wrong", head, tuple(rows)) if rows else None
