"""Every data set grades its own gold answers right, as models write them, and near misses wrong."""

import json
from collections import Counter
from pathlib import Path

import pytest
from golds import DATA_SETS, MATHS, NUMBER, DataSet, Gold, golds, near_misses, spellings

from headwater.grading.maths import grade_maths
from headwater.grading.pool import GraderPool
from headwater.grading.text import grade_number, parse_number
from headwater.types import Problem

# {data set: {reason: rows}}: gold answers that no completion can match, or that are no single number.
EXCEPTIONS = json.loads(Path(__file__).with_name("gold_exceptions.json").read_text())

# Of the forms that occur in the data sets; none is from them.
NUMBERS = ["18", "1,234", "0.5", "-3", "7.25", "12 (apples)", "2/3", "0"]
EXPRESSIONS = [
    r"\frac{7}{12}", r"\left( -3, \frac{\pi}{6} \right)", r"4\sqrt{5} - 1", "17,-6", r"(2,9]", "x^2 - 4xy + y^3",
    r"6\text{ cm}^2", r"\text{(B)}", r"\text{Monday}", r"3.50\%", r"\$12.75", "312_7", r"45^\circ", "2^{3000}",
    r"\begin{pmatrix} 1 & -2 \\ 0 & \frac{1}{3} \end{pmatrix}", r"(-\infty,-1)\cup(4,\infty)", r"\frac\pi 3",
]  # fmt: skip  # a table: several entries a line


@pytest.mark.parametrize("answer", NUMBERS)
def test_numbers_as_models_write_them(answer: str) -> None:
    for text in spellings(Gold(0, answer, None), NUMBER):
        assert grade_number(text, Problem((), answer)).correct, text
    for miss in near_misses(answer, NUMBER):
        assert not grade_number(f"\\boxed{{{miss}}}", Problem((), answer)).correct, miss


@pytest.mark.parametrize("answer", EXPRESSIONS)
def test_expressions_as_models_write_them(answer: str) -> None:
    for text in spellings(Gold(0, answer, None), MATHS):
        assert grade_maths(text, Problem((), answer)).correct, text
    for miss in near_misses(answer, MATHS):
        assert not grade_maths(f"\\boxed{{{miss}}}", Problem((), answer)).correct, miss


@pytest.mark.slow  # Minutes, and a download.
@pytest.mark.parametrize("data", DATA_SETS, ids=lambda d: d.name)
def test_a_data_set_grades_its_own_golds_right_and_near_misses_wrong(data: DataSet) -> None:
    excepted = {row for rows in EXCEPTIONS.get(data.name, {}).values() for row in rows}
    items: list[tuple[Gold, str, bool]] = []
    unusable = set()
    for gold in golds(data):
        if not gold.answer or (data.grader == NUMBER and parse_number(gold.answer) is None):
            unusable.add(gold.row)
            continue
        items += [(gold, text, True) for text in spellings(gold, data.grader)]
        items += [(gold, f"So \\boxed{{{miss}}}.", False) for miss in near_misses(gold.answer, data.grader)]
    with GraderPool(data.grader, workers=2, timeout_s=20.0) as pool:
        verdicts = pool.grade([(Problem((), gold.answer), text) for gold, text, _ in items])
    print(data.name, "excepted", len(unusable), "graded", Counter(wanted for *_, wanted in items))
    failed = [(g.row, text[-80:]) for (g, text, wanted), v in zip(items, verdicts, strict=True) if v.correct != wanted]
    assert unusable == excepted
    assert not failed
    assert not set(pool.counts) - {"correct", "wrong", "unparsed"}
