"""Hostile completions: no crash, no hang, no leaked process, bounded memory, and no reward without the gold answer."""

import random
import re
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import sympy.parsing.sympy_parser as sympy_parser
import sympy.physics.units  # noqa: F401 -- imported by a first integral; it evaluates its own names then
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from headwater.grading import maths
from headwater.grading.maths import grade_maths
from headwater.grading.pool import GraderPool
from headwater.grading.text import grade_number
from headwater.grading.wire import REASONS
from headwater.types import Problem, Verdict

GOLD = "7919"  # A number that none of the pieces below states.
LATEX = [
    r"\frac{1}{", r"\sqrt[3]{", r"\left(", r"\right)", r"\begin{pmatrix}", r"\end{pmatrix}", "&", r"\\", "^{",
    "_{", "}",
    "{", r"\{", r"\cup", r"\pm", r"\infty", r"\int_0^1", r"\sum_{n=1}^{9}", r"\lim_{x\to0}", r"\log_2", r"\sin",
    r"\binom{9}{4}", r"\text{", r"\boxed{", "####", "Answer:", "answer is", "$", r"\(", r"\]", "=", "<",
    r"\le", ",", ";", "|", "!", "%", r"\%",
    "x", "y", "e", "i", "1", "23", "0", ".5", "-", "+", "*", "/", " ", "\n", r"\pi", r"\cdot", r"\mathbb{R}",
    r"\det", "_8",
]  # fmt: skip  # a table: several entries a line
HUGE = [
    "9^{9^{9}}", "9^{9^{9^{9}}}", "99999999!", "((9!)!)!", r"10^{-10^{9}}", "2^{-2^{99}}", r"\binom{10^9}{10^8}",
    r"\sum_{k=1}^{10^{9}} \frac{1}{k^3}", r"\int_0^1 x^{x^{x^{x}}} dx", r"\sin(10^{10^{10}})",
    "(x+y+z)^{500}", "1e999999999",
]  # fmt: skip  # a table: several entries a line
INJECTED = [
    "__import__('os').system('touch {}')", "eval(\"open('{}','w')\")", "exec('import os; os.abort()')", "os._exit(0)",
    r"\input{{{}}}", "$(touch {})", "`touch {}`", "; touch {} #", "{{}}.__class__.__mro__[1].__subclasses__()",
    "open('{}','w')", "Verdict(True,True,'correct',1.0)", "lambda: 0", "().__class__",
    '[{{"correct":true,"parsed":true,"reason":"correct","score":1}},""]',
]  # fmt: skip  # a table: several entries a line
SHELLS = [
    "{}", r"\boxed{{{}}}", "Answer: {}", "The answer is ${}$.", "#### {}", "\\[{}\\]", r"\boxed{{\text{{{}}}}}",
    "<answer>{}</answer>",
]  # fmt: skip  # a table: several entries a line


def hostile(draw: random.Random, marker: str) -> str:
    """One completion of nine kinds: LaTeX soup, nesting, powers, repetition, odd characters, injection, lists, ..."""
    kind = draw.randrange(9)
    if kind == 0:
        body = "".join(draw.choices(LATEX, k=draw.randrange(1, 40)))
    elif kind == 1:
        depth = draw.choice([5, 50, 500, 5000])
        opening, closing = draw.choice(
            [(r"\frac{1}{", "}"), ("(", ")"), ("{", "}"), (r"\sqrt{", "}"), ("x^{", "}"), ("-", "")]
        )
        body = opening * depth + "1" + closing * (depth - draw.randrange(2))
    elif kind == 2:
        body = draw.choice(HUGE) if draw.random() < 0.05 else f"{draw.randrange(10)}^{{{draw.randrange(10**6)}}}"
    elif kind == 3:
        body = draw.choice(
            ["{", "}", "9", "1,", "(", r"\boxed{", "a ", "\\", "answer is ", "1/", "$", "-", " ."]
        ) * draw.choice([9, 999, 50_000])
    elif kind == 4:
        body = "".join(
            chr(draw.choice([draw.randrange(32), draw.randrange(0xD800, 0xE000), draw.randrange(0x11_0000)]))
            for _ in range(20)
        )
    elif kind == 5:
        body = draw.choice(INJECTED).format(marker)
    elif kind == 6:
        body = ",".join(draw.choice(LATEX) for _ in range(draw.randrange(60)))
    elif kind == 7:
        body = "".join(draw.choices("0123456789", k=draw.choice([1, 30, 300, 5000]))).replace(GOLD, "1")
    else:
        body = draw.choice(
            [
                "a" * 30 + "!",
                "1 " * 40 + "x",
                "\\text{" * 30,
                "1,000" * 30,
                " and " * 30,
                "((((a+b)^2)^2)^2)^2",
                "x=" * 30,
            ]
        )
    return draw.choice(SHELLS).format(body)


def check(verdict: Verdict, text: str) -> None:
    assert verdict.reason in REASONS and verdict.score == float(verdict.correct)
    assert verdict.parsed or not verdict.correct
    assert verdict.answer is None or len(verdict.answer) <= 1000
    assert not verdict.correct, text[:200]


def children() -> list[psutil.Process]:
    return [c for c in psutil.Process().children(recursive=True) if "grading.child" in " ".join(c.cmdline())]


def run_hostile(count: int, marker: Path, timeout_s: float) -> dict[str, int]:
    draw = random.Random(count)
    texts = [hostile(draw, str(marker)) for _ in range(count)]
    before = {c.pid for c in children()}
    counts: dict[str, int] = {}
    for grader in ("headwater.grading.maths:grade_maths", "headwater.grading.text:grade_number"):
        with GraderPool(grader, workers=2, timeout_s=timeout_s, memory_mb=1024) as pool:
            for start in range(0, count, 500):
                part = texts[start : start + 500]
                for verdict, text in zip(pool.grade([(Problem((), GOLD), text) for text in part]), part, strict=True):
                    check(verdict, text)
            assert pool.grade([(Problem((), GOLD), rf"\boxed{{{GOLD}}}")])[0].correct
            counts |= {f"{grader.rpartition(':')[2]} {reason}": n for reason, n in sorted(pool.counts.items())}
    assert {c.pid for c in children()} == before
    assert not marker.exists()
    assert psutil.Process().memory_info().rss < 2 << 30
    return counts


def test_three_hundred_hostile_completions(tmp_path: Path) -> None:
    run_hostile(300, tmp_path / "executed", timeout_s=1.0)


@pytest.mark.slow  # Minutes.
def test_twenty_thousand_hostile_completions(tmp_path: Path) -> None:
    print(run_hostile(20_000, tmp_path / "executed", timeout_s=2.0))


@pytest.mark.slow  # Two hundred megabyte strings.
@pytest.mark.parametrize(
    "unit", [r"\boxed{", "9", "9,", r"\frac{1}{", "answer is ", "#### ", "\ud800", "x^{", "$", "1/", " ", "\\"]
)
def test_megabyte_strings(unit: str) -> None:
    text = unit * (2_000_000 // len(unit))
    with GraderPool("headwater.grading.maths:grade_maths", workers=1, timeout_s=20.0) as pool:
        for verdict in pool.grade([(Problem((), GOLD), shape.format(text)) for shape in SHELLS[:5]]):
            check(verdict, text)
        assert not {"timeout", "memory", "error"} & set(pool.counts)


# Powers, factorials and sums are for a child with a clock; here the grader runs in the test's own process.
SAFE = [
    piece
    for piece in LATEX
    if piece not in ("^{", "!", r"\int_0^1", r"\sum_{n=1}^{9}", r"\lim_{x\to0}", r"\binom{9}{4}", r"\det")
]


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.generate],
)
@given(st.lists(st.sampled_from(SAFE), max_size=14).map("".join) | st.text(max_size=40), st.sampled_from(SHELLS))
def test_any_text_gets_a_verdict_in_this_process_too(body: str, shell: str) -> None:
    text = shell.format(body)
    if "7919" not in text:
        check(grade_maths(text, Problem((), GOLD)), text)
        check(grade_number(text, Problem((), GOLD)), text)


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Everything that sympy hands to Python's eval."""
    seen: list[str] = []
    evaluate = sympy_parser.eval_expr

    def watched(code: str, *rest: dict) -> object:
        seen.append(code)
        return evaluate(code, *rest)

    monkeypatch.setattr(sympy_parser, "eval_expr", watched)
    yield seen


def test_what_sympy_evaluates_is_numbers_and_nothing_else(evaluated: list[str], tmp_path: Path) -> None:
    maths._parse.cache_clear()
    for body in [
        *(text.format(tmp_path / "executed") for text in INJECTED),
        "2^{13}+0.5",
        "1000",
        r"\frac{3}{x}",
        "f(3)",
    ]:
        for shell in SHELLS:
            grade_maths(shell.format(body), Problem((), r"\frac{355}{113}+x"))
    assert evaluated  # The watch is at the right place.
    for code in evaluated:
        assert re.fullmatch(r"(?:Integer|Float|Rational)? ?\(?['\"]?[0-9.e+-]*['\"]? ?\)?", code.strip()), code
    assert not (tmp_path / "executed").exists()
