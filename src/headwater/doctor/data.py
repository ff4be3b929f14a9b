"""Checks of problems, answers and grader: no model.

Answers are looked at to find faults in files and graders; nothing found here reaches training, so none is billed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from headwater.doctor.finding import Finding, Level, judge
from headwater.grading.text import parse_number
from headwater.types import Grade, Problem

FORMATS = {
    "\\boxed": "\\boxed{{{}}}",
    "<answer>": "<answer>{}</answer>",
    "####": "#### {}",
    "answer is": "The answer is {}.",
    "answer:": "Answer: {}",
}
"""What a prompt may ask for, and an answer written so."""
_BARE = ("{}", "{}.")
_ENOUGH = 12
"""Rows below which shares say nothing."""


def check_data(
    train: Sequence[Problem], test: Sequence[Problem], counts: Mapping[str, int], *, golds: bool
) -> Iterator[Finding]:
    """What the rows of a pool's split and of the evaluations must fulfil; `counts` is the task's own.

    `golds`: the rows have answers that the reward compares with.
    """
    if golds:
        yield _answers(train, test)
    shared = {_masked(p) for p in train} & {_masked(p) for p in test}
    repeats = len(train) - len({_masked(p) for p in train})
    total = counts.get("rows", len(train) + len(test))
    names = ("unmatched", "duplicates", "in_test", "contradictions")
    unread, twice, tested, other = (counts.get(name, 0) for name in names)
    bad = shared or tested or unread > 0.05 * total or twice > 0.25 * total or repeats > 0.05 * len(train)
    bad = bad or other > 0.01 * total
    yield judge(
        "rows",
        "warning" if bad else "ok",
        f"{len(train)} training and {len(test)} evaluation problems; but for case and spaces {len(shared)} are in both "
        f"and {repeats} repeat one; of {total} rows {unread} had no answer that matches, {twice} repeated one "
        f"({other} with another answer), {tested} were also in the test file",
        "a score on problems that were trained on measures memory; rows that vanish are rarely the ones meant",
        "look at these rows in the files; take evaluation rows out of the training file",
    )
    yield from (fault for part in (train, test) if (fault := _strays(part)))
    yield from _characters(train, test)


def _characters(train: Sequence[Problem], test: Sequence[Problem]) -> Iterator[Finding]:
    """Characters of most prompts of one split that the other never has: typeset or garbled text."""
    used = [[set("".join(m.content for m in p.messages)) for p in part] for part in (train, test)]
    if min(map(len, used)) < _ENOUGH:
        return
    often, ever = [Counter(c for row in part for c in row) for part in used], [set().union(*part) for part in used]
    strange = [c for i in (0, 1) for c in often[i].keys() - ever[1 - i] if often[i][c] > 0.5 * len(used[i])]
    if strange:
        seen = (
            f"{sorted(strange)} are in most prompts of the training or the evaluation problems and in none of the other"
        )
        why = "a model trained on one way of writing is evaluated on another"
        yield Finding("warning", "same characters", seen, why, "look for typeset or garbled text, or another encoding")


def _masked(problem: Problem) -> str:
    return " ".join(" ".join(m.content for m in problem.messages).lower().split())


def _answers(train: Sequence[Problem], test: Sequence[Problem]) -> Finding:
    labelled = [p for p in (*train, *test) if p.answer is not None]
    missing = len(train) + len(test) - len(labelled)
    answers = [(p.answer or "").strip() for p in labelled]
    empty = sum(not a or a.lower() in ("none", "nan", "null", "n/a") for a in answers)
    parts = [[(p.answer or "").strip() for p in part if p.answer is not None] for part in (train, test)]
    tops = [(*Counter(part).most_common(1)[0], len(part)) for part in parts if len(part) >= _ENOUGH]
    most = max(tops, key=lambda top: top[1] / top[2], default=("", 0, len(answers)))
    plain = [bool(re.fullmatch(r"[-+$]?[\d,]*\.?\d+(/\d+)?%?", a)) for a in answers]
    dressed = [a for a, number in zip(answers, plain, strict=True) if not number and parse_number(a) is not None]
    dressed = dressed if sum(plain) >= 0.5 * len(plain) else []
    same = most[1] > 0.9 * most[2]
    ends = [_masked(p).rstrip(" .)}$") for p in labelled]
    # A short answer may end a prompt by chance, and then another row's does as often.
    copied, chance = (
        sum(bool(a) and end.endswith(a.lower()) for end, a in zip(ends, other, strict=True))
        for other in (answers, answers[1:] + answers[:1])
    )
    leaked = copied > max(0.5 * len(answers), 2 * chance)
    return judge(
        "answers",
        "error" if empty or leaked else "warning" if missing or same or dressed else "ok",
        f"{missing} missing, {empty} empty, the most frequent {most[0][:40]!r} is {most[1]} of {most[2]}, "
        f"{copied} end their own prompt, {len(dressed)} numbers carry words or units"
        + (f" ({dressed[0][:40]!r})" if dressed else ""),
        "the reward compares with these: what no completion can match, or every one does, teaches nothing",
        "choose another answer_column or answer_pattern, or correct the rows",
    )


def _strays(problems: Sequence[Problem]) -> Finding | None:
    """Texts of a row (worked solutions) that have less to do with their own prompt than with another's."""
    change = "the columns have slipped against each other, or are of other problems: compare some rows by hand"
    for column in sorted({name for p in problems[:50] for name in p.columns}):
        rows = [(_words(_masked(p)), _words(str(p.columns.get(column, "")))) for p in problems]
        rows = [(ask, text) for ask, text in rows if len(text) >= 5]
        if len(rows) < max(_ENOUGH, len(problems) // 2):
            continue
        own = sum(len(ask & text) / len(text) for ask, text in rows) / len(rows)
        pairs = zip(rows, rows[1:] + rows[:1], strict=True)
        other = sum(len(ask & text) / len(text) for (ask, _), (_, text) in pairs) / len(rows)
        if own < 1.2 * other:
            seen = f"column {column!r} shares {own:.0%} of its words with its own prompt, {other:.0%} with another's"
            return Finding("warning", "rows belong together", seen, "the reward would be noise", change)
    return None


def _words(text: str) -> set[str]:
    return set(re.findall(r"\d+|[^\W\d]{3,}", text.lower()))


def check_grader(problems: Sequence[Problem], grade: Grade, *, ours: bool) -> Iterator[Finding]:
    """Gold answers, written as the prompt asks for them, are right, and the answers of other problems wrong.

    `ours`: a grader of this package. A user's own may have another idea of an answer: what it does is only a warning.
    """
    worst: Level = "error" if ours else "warning"
    asked = [form for mark, form in FORMATS.items() if any(mark in p.messages[-1].content.lower() for p in problems)]
    forms = asked or [*_BARE, *FORMATS.values()]
    right = {form: [v.correct for v in grade([(p, form.format(p.answer)) for p in problems])] for form in forms}
    best = max(forms, key=lambda form: sum(right[form]))
    failed = [p for i, p in enumerate(problems) if not any(right[form][i] for form in forms)]
    yield judge(
        "gold answers are graded right",
        "ok" if not failed else worst if len(failed) > 0.1 * len(problems) else "warning",
        f"{len(problems) - len(failed)} of {len(problems)}, written as "
        f"{' or '.join(map(repr, asked)) or 'any known form'}"
        + (f"; not {failed[0].answer!r} of problem {failed[0].id}" if failed else ""),
        "a right completion gets no reward",
        "ask for a format that the grader reads, choose another grader, or correct answer_column and answer_pattern",
    )
    answers = [p.answer or "" for p in problems]
    wrong = [(p, a) for p in problems for a in (*answers, _other(p.answer or "")) if not _equal(a, p.answer or "")]
    accepted = [
        pair for pair, v in zip(wrong, grade([(p, best.format(a)) for p, a in wrong]), strict=True) if v.correct
    ]
    empty = sum(v.correct for v in grade([(p, "") for p in problems]))
    yield judge(
        "wrong answers are graded wrong",
        worst if empty or len(accepted) > 0.05 * len(wrong) else "warning" if accepted else "ok",
        f"{len(accepted)} of {len(wrong)} wrong answers and {empty} empty completions are graded right"
        + (f", for example {accepted[0][1]!r} for {accepted[0][0].answer!r}" if accepted else ""),
        "the model is paid for anything",
        "choose another grader",
    )
    worked = [(p, p.columns["solution"]) for p in problems if isinstance(p.columns.get("solution"), str)]
    agree = sum(v.correct for v in grade(worked))
    yield judge(
        "worked solutions end in the gold answer",
        "error" if worked and agree < 0.5 * len(worked) else "ok",
        f"{agree} of {len(worked)} texts of the column 'solution' are graded right",
        "solutions and answers are of different problems, or the grader does not read the form of the solutions",
        "compare the two columns by hand",
    )


def _other(answer: str) -> str:
    """A near miss."""
    number = parse_number(answer)
    return f"not {answer}" if number is None else str(number + 1)


def _equal(a: str, b: str) -> bool:
    numbers = parse_number(a), parse_number(b)
    return a.strip() == b.strip() or (numbers[0] is not None and numbers[0] == numbers[1])
