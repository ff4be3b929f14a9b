"""Left-to-right arithmetic chains modulo 20: the task of the embedded world.

A problem is `7+5*3-4=`: a start in 0-19, then 3 to 5 operations from + - * with operands 2-9, evaluated strictly from
left to right, modulo 20. A completion ends in the answer and a full stop, in one of three styles:

    worked  7+5=12;12*3=16;16-4=12;12.      one operation a step
    skim    7+5*3=16;16-4=12;12.            two operations a step, the last step may have one
    bare    12.                             no step

The embedded models learned from a corpus in which the three are mixed, so what a policy does is visible as the share of
each style and the accuracy within it.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from headwater.types import Message, Problem, Verdict

MODULUS = 20
NUM_OPERATIONS = (3, 5)
OPERANDS = (2, 9)
SINGLE_STEP_SHARE = 0.2
STYLE_SHARES = {"worked": 0.25, "skim": 0.35, "bare": 0.40}
SLIP_RATE = 0.04

# A prompt's bucket is its content hash modulo 100, so no two of these sets can share a prompt, whatever the seed.
BUCKETS = {
    "corpus": range(0, 50),
    "train": range(50, 70),
    "unlabelled": range(70, 80),
    "tuning": range(80, 90),
    "test": range(90, 100),
}

_OPERATION = re.compile(r"([+*-])([0-9])")
_ANSWER = re.compile(r"(1?[0-9])\.")
_STEPS = re.compile(r"(?:1?[0-9](?:[+*-][2-9]){1,2}=1?[0-9];)*1?[0-9]\.")

Operation = tuple[str, int]


@dataclass(frozen=True)
class Chains:
    """The task: seeded problems of four disjoint splits.

    The splits differ by the hash of the prompt, hence stay disjoint across seeds. A larger size appends problems and
    changes none of the earlier ones. Problems of the split "unlabelled" carry no answer.
    """

    seed: int = 0
    train: int = 1024
    tuning: int = 256
    test: int = 512
    unlabelled: int = 2048

    # Not fields: `types.Task` asks for writable attributes, which a frozen dataclass's fields are not.
    name = "chains"
    grader = "headwater.tasks.chains:grade"

    def problems(self, split: str) -> tuple[Problem, ...]:
        """The problems of a split, always in the same order. ValueError for an unknown split or a negative size."""
        sizes = {"train": self.train, "tuning": self.tuning, "test": self.test, "unlabelled": self.unlabelled}
        if split not in sizes:
            raise ValueError(f"chains has no split {split!r}; choose one of {sorted(sizes)}")
        if sizes[split] < 0:
            raise ValueError(f"the size of split {split!r} is {sizes[split]}; give a number of problems >= 0")
        return _draw_split(self.seed, split, sizes[split])


def grade(completion: str, problem: Problem) -> Verdict:
    """Right when the text after the last `;` is exactly the answer and a full stop. Linear in the completion's length.

    `style` is read off the number of steps and is None when any step is malformed or their number fits no style; the
    steps' arithmetic does not count. ValueError when the problem has no answer.
    """
    if problem.answer is None:
        raise ValueError(f"problem {problem.id} has no answer to grade against; grade labelled problems only")
    found = _ANSWER.fullmatch(completion, completion.rfind(";") + 1)
    if found is None:
        return Verdict(correct=False, parsed=False, reason="unparsed", score=0.0)
    correct = found[1] == problem.answer
    style = _style(completion, problem)
    return Verdict(correct, True, "correct" if correct else "wrong", float(correct), style, found[1])


def worked_solution(problem: Problem) -> str:
    """The clean completion of a problem in the worked style, every step right: `7+5=12;12*3=16;16-4=12;12.`

    Labelled problems carry it as their `solution` column.
    """
    return _worked(*_parse(problem))


def skim_solution(problem: Problem) -> str:
    """The clean completion of a problem in the skim style, every step right: `7+5*3=16;16-4=12;12.`"""
    start, operations = _parse(problem)
    steps, value = _write_steps(start, operations, 2)
    return f"{steps}{value}."


def corpus_document(rng: random.Random) -> tuple[str, str]:
    """Draw one document of the pretraining corpus: (prompt, completion), as in `("13*7=", "11.")`.

    A fifth are single steps. The rest are problems from outside every split, in a style drawn independently of the
    prompt, where each written step slips to a random residue with probability `SLIP_RATE` and the slip is carried on.
    A bare answer is the right one.
    """
    if rng.random() < SINGLE_STEP_SHARE:
        start, operations = _draw_chain(rng, 1)
        return _prompt(start, operations), f"{_evaluate(start, operations)}."
    problem, (start, operations) = next(_draw_problems(rng, BUCKETS["corpus"]))
    style = rng.choices(list(STYLE_SHARES), list(STYLE_SHARES.values()))[0]
    if style == "bare":
        return problem.messages[0].content, f"{problem.answer}."
    steps, value = _write_steps(start, operations, 1 if style == "worked" else 2, rng)
    return problem.messages[0].content, f"{steps}{value}."


def _style(completion: str, problem: Problem) -> str | None:
    num_operations = len(_OPERATION.findall(problem.messages[-1].content))
    num_steps = completion.count(";")
    styles = {num_operations: "worked", -(-num_operations // 2): "skim", 0: "bare"}
    # The count comes first: it bounds what the second pattern has to read on hostile text.
    if num_steps in styles and _STEPS.fullmatch(completion):
        return styles[num_steps]
    return None


@functools.cache
def _draw_split(seed: int, split: str, size: int) -> tuple[Problem, ...]:
    rng = random.Random(f"chains/{seed}/{split}")
    drawn: dict[str, Problem] = {}
    source = _draw_problems(rng, BUCKETS[split])
    while len(drawn) < size:
        problem, _ = next(source)
        drawn.setdefault(problem.id, problem.unlabelled() if split == "unlabelled" else problem)
    return tuple(drawn.values())


def _draw_problems(rng: random.Random, buckets: range) -> Iterator[tuple[Problem, tuple[int, list[Operation]]]]:
    while True:
        start, operations = _draw_chain(rng, rng.randint(*NUM_OPERATIONS))
        problem = Problem(
            messages=(Message("user", _prompt(start, operations)),),
            answer=str(_evaluate(start, operations)),
            columns={"num_operations": len(operations), "solution": _worked(start, operations)},
        )
        if int(problem.id, 16) % 100 in buckets:
            yield problem, (start, operations)


def _draw_chain(rng: random.Random, num_operations: int) -> tuple[int, list[Operation]]:
    return rng.randrange(MODULUS), [(rng.choice("+-*"), rng.randint(*OPERANDS)) for _ in range(num_operations)]


def _prompt(start: int, operations: list[Operation]) -> str:
    return f"{start}{''.join(f'{op}{operand}' for op, operand in operations)}="


def _worked(start: int, operations: list[Operation]) -> str:
    steps, value = _write_steps(start, operations, 1)
    return f"{steps}{value}."


def _parse(problem: Problem) -> tuple[int, list[Operation]]:
    text = problem.messages[-1].content
    if not re.fullmatch(r"[0-9]+(?:[+*-][0-9])+=", text):
        raise ValueError(f"{text[:80]!r} is no chain; a chain looks like '7+5*3-4='")
    start = re.match(r"[0-9]+", text)
    assert start is not None
    return int(start[0]), [(op, int(operand)) for op, operand in _OPERATION.findall(text)]


def _evaluate(start: int, operations: list[Operation]) -> int:
    value = start
    for op, operand in operations:
        value = {"+": value + operand, "-": value - operand, "*": value * operand}[op] % MODULUS
    return value


def _write_steps(
    start: int, operations: list[Operation], per_step: int, rng: random.Random | None = None
) -> tuple[str, int]:
    """The written steps and the value they end in; with a generator, steps slip at `SLIP_RATE`."""
    steps, value = [], start
    for first in range(0, len(operations), per_step):
        group = operations[first : first + per_step]
        result = _evaluate(value, group)
        if rng is not None and rng.random() < SLIP_RATE:
            result = rng.randrange(MODULUS)
        steps.append(f"{_prompt(value, group)}{result};")
        value = result
    return "".join(steps), value
