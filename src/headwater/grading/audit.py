"""Grade recorded samples a second time with another grader, and find where the two disagree."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from headwater.types import Grade, Message, Problem, Verdict

SECOND_GRADER = "headwater.grading.audit:grade_by_spelling"
_OF_MATHS = ("headwater.grading.text:grade_number", "headwater.grading.maths:grade_maths")


def second_grader(grader: str | None) -> str | None:
    """The grader that can check this one without being asked to: there is one for the graders of maths."""
    return SECOND_GRADER if grader in _OF_MATHS else None


@dataclass(frozen=True)
class Sample:
    """One recorded completion and what the run's own grader said of it."""

    problem: Problem
    index: int
    text: str
    correct: bool
    reason: str


@dataclass(frozen=True)
class Agreement:
    """How often two graders say the same. `kappa` (Cohen 1960) is None where both say one thing of everything.

    `only_first`, `only_second`: samples that one of them alone calls right.
    """

    samples: int
    agree: int
    only_first: int
    only_second: int
    kappa: float | None

    @property
    def rate(self) -> float:
        return self.agree / self.samples


def agreement(first: Sequence[bool], second: Sequence[bool]) -> Agreement:
    """Of two graders' verdicts on the same samples. Raises ValueError when there is none, or their numbers differ."""
    if not first or len(first) != len(second):
        raise ValueError(f"agreement needs the same samples twice, not {len(first)} and {len(second)} verdicts")
    count, agree = len(first), sum(a == b for a, b in zip(first, second, strict=True))
    right = sum(first) / count, sum(second) / count
    chance = right[0] * right[1] + (1 - right[0]) * (1 - right[1])
    kappa = None if chance == 1 else (agree / count - chance) / (1 - chance)
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    return Agreement(count, agree, only_first, count - agree - only_first, kappa)


def audit(samples: Sequence[Sample], grade: Grade) -> tuple[Agreement, list[tuple[Sample, Verdict]]]:
    """How far the recorded verdicts agree with a second grader's, and the samples on which they differ."""
    verdicts = grade([(s.problem, s.text) for s in samples])
    pairs = list(zip(samples, verdicts, strict=True))
    found = agreement([s.correct for s in samples], [v.correct for v in verdicts])
    return found, [(s, v) for s, v in pairs if s.correct != v.correct]


def read_samples(path: Path, task: str | None = None) -> list[Sample]:
    """The samples of one file of evaluation records, or of every evaluation of a run directory or of `eval --out`.

    `task` keeps the evaluations of one name, as the directory's results.json has it. Raises ValueError when there is
    no record with a gold answer.
    """
    files = [path] if path.is_file() else sorted({*path.rglob("samples.jsonl"), *path.rglob("samples_*.jsonl")})
    if task is not None:
        kept = set(_nodes_of(json.loads((path / "results.json").read_text("utf-8")), task)) if path.is_dir() else set()
        files = [file for file in files if file.parent.name in kept or file.name == f"samples_{task}.jsonl"]
    samples = [sample for file in files for sample in _samples(file)]
    if not samples:
        of = f" of the task {task!r}" if task else ""
        raise ValueError(f"{path} holds no graded evaluation samples{of}; give a samples.jsonl or a run directory")
    return samples


def _nodes_of(results: object, task: str) -> Iterator[str]:
    """Keys of the nodes that evaluated a task, from anywhere in a results.json."""
    if isinstance(results, dict):
        for name, value in results.items():
            if name == task and isinstance(value, dict) and isinstance(value.get("per_problem"), str):
                yield PurePosixPath(value["per_problem"]).stem
            else:
                yield from _nodes_of(value, task)


def _samples(file: Path) -> Iterator[Sample]:
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "texts" not in row or row.get("answer") is None:
            continue  # Rollouts of a training stage: they name no gold answer.
        problem = Problem(tuple(Message(**turn) for turn in row["prompt"]), row["answer"], row.get("columns", {}))
        for index, (text, correct, reason) in enumerate(zip(row["texts"], row["correct"], row["reasons"], strict=True)):
            yield Sample(problem, index, text, correct, reason)


def as_row(sample: Sample, verdict: Verdict, *, tail: int = 400) -> dict[str, object]:
    """A disagreement for a person: problem, gold, the end of the completion, both verdicts."""
    return {
        "problem": sample.problem.id,
        "sample": sample.index,
        "prompt": sample.problem.messages[-1].content if sample.problem.messages else "",
        "gold": sample.problem.answer,
        "completion_tail": sample.text[-tail:],
        "recorded": {"correct": sample.correct, "reason": sample.reason},
        "second": {"correct": verdict.correct, "reason": verdict.reason, "answer": verdict.answer},
    }


_MARK = re.compile(r"\\(?:boxed|fbox)\s*\{|####|answer\s*(?:is|:|=)[\s:*]*|<answer>", re.IGNORECASE)
_DECORATION = re.compile(
    r"\\left|\\right|\\[!,;: ]|\\\$|\$|\\\(|\\\)|\\%|%|\^\{?\\circ\}?|\\displaystyle|[*`\s]"
    r"|(?<=[0-9]),(?=[0-9]{3}(?![0-9]))"
)
_NUMERAL = re.compile(r"-?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)")


def grade_by_spelling(completion: str, problem: Problem) -> Verdict:
    """A second opinion that shares no code with the others: the last mark, simple rewriting, equal text or float.

    After the rules of the MATH paper's `is_equiv` (Hendrycks et al. 2021, arXiv:2103.03874): no symbolic algebra, so it
    calls many right expressions wrong and hardly a wrong one right.
    """
    if problem.answer is None:
        raise ValueError(f"problem {problem.id} has no answer to grade against; audit labelled samples only")
    marks = list(_MARK.finditer(completion[-20_000:]))
    if marks:
        said = _until_closed(completion[-20_000:][marks[-1].end() :], braced=marks[-1][0].endswith("{"))
    else:
        said = (_NUMERAL.findall(completion[-20_000:].replace(",", "")) or [""])[-1]
    gold, answer = _rewrite(problem.answer), _rewrite(said)
    value = _as_float(gold)
    right = bool(answer) and (gold == answer or (value is not None and value == _as_float(answer)))
    reason = "correct" if right else "wrong" if answer else "unparsed"
    return Verdict(right, bool(answer), reason, float(right), answer=answer)


def _until_closed(text: str, *, braced: bool) -> str:
    """Up to the brace that closes the box, or the end of the line or sentence."""
    if not braced:
        return re.split(r"\n|</answer>|\.(?:\s|$)", text, maxsplit=1)[0]
    depth = 1
    for place, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:place]
    return ""


def _rewrite(answer: str) -> str:
    text = re.sub(r"\\(?:text|mbox|mathrm|textbf)\s*\{([^{}]*)\}", r"\1", answer)
    text = re.sub(r"(?<=[0-9}])\s+[A-Za-z(][A-Za-z .()]*$", "", text.strip().rstrip("."))
    text = _DECORATION.sub("", re.sub(r"\\[dt]frac", r"\\frac", text)).rstrip(".")
    text = re.sub(r"\\frac(\w)(\w)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\sqrt(\w)", r"\\sqrt{\1}", text)
    text = re.sub(r"^(-?)([0-9]+)/([0-9]+)$", r"\1\\frac{\2}{\3}", text)
    return re.sub(r"^[A-Za-z]=", "", text)


def _as_float(text: str) -> float | None:
    """The value of a numeral or of a fraction of two; None for all else."""
    if found := re.fullmatch(r"(-?)\\frac\{(-?[0-9]{1,18})\}\{(-?[0-9]{1,18})\}", text):
        return float(f"{found[1]}1") * int(found[2]) / int(found[3]) if int(found[3]) else None
    return float(text) if _NUMERAL.fullmatch(text) else None
