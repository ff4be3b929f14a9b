import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwater.grading.text import (
    extract_marked,
    extract_tagged,
    grade_number,
    last_boxed,
    last_number,
    parse_number,
)
from headwater.types import Problem

MARKS = [*r"{}\$-/.%^=, 0x", *"\n\x00\ud800\u2212٣", "\\boxed", "\\fbox", "\\{", "####", "Answer:", "answer is", "12"]
MARKS += ["1,234", "\\frac", "<answer>", "</answer>"]
NOISE = st.text(st.characters(exclude_categories=())) | st.lists(st.sampled_from(MARKS)).map("".join)


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"\boxed{5}", "5"),
        (r"\boxed{1} and \boxed{2}", "2"),
        (r"so \boxed{\frac{1}{2}} holds", r"\frac{1}{2}"),
        (r"\boxed{\left\{1\right.}", r"\left\{1\right."),
        (r"\boxed {7}", "7"),
        (r"\fbox{x+1}", "x+1"),
        (r"$\boxed 5$", "5"),
        (r"\boxed{}", ""),
        (r"\boxed{1} then \boxed{2", None),
        (r"\boxed", None),
        ("nothing", None),
    ],
)
def test_the_last_box_counts_and_an_open_one_does_not_bring_back_an_earlier(text: str, box: str | None) -> None:
    assert last_boxed(text) == box


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("a\n#### 1,234\nmore", "1,234"),
        ("#### 3\n#### 4", "4"),
        ("The answer is 18.", "18"),
        ("**Answer:** $18$", "18"),
        ("**Final answer**: 18 apples.", "18 apples"),
        ("Answer: 3\nWait.\nThe answer is: 4", "4"),
        ("Answer = 7", "7"),
        (r"The answer is \boxed{9}. #### 3", "9"),
        ("#### 3\nThe answer is 4", "3"),
        (r"Answer: 3. Hence \boxed{", ""),
        ("My answers vary: 3", None),
        ("18", None),
        ("####", ""),
    ],
)
def test_marked_answers(text: str, answer: str | None) -> None:
    assert extract_marked(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>1</answer><answer> 2\n3 </answer>.", "2\n3"),
        ("<answer>1</answer> <answer>2", None),
        (r"so \boxed{4}", "4"),
        ("thinking\n\n42\n\n", "42"),
        ("", None),
        (" \n", None),
    ],
)
def test_tagged_answers(text: str, answer: str | None) -> None:
    assert extract_tagged(text) == answer


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("1,234.50", ["1234.5"]),
        ("$-3 and -$4 and \u22125", ["-3", "-4", "-5"]),
        ("10-3", ["10", "3"]),
        ("3/4, 2 1/2", ["3/4", "5/2"]),
        (r"\frac{3}{4} -\dfrac{1}{2} 1\frac{1}{2} \frac34", ["3/4", "-1/2", "3/2", "3/4"]),
        (r"10,\!080 and 1{,}000 and \$5", ["10080", "1000", "5"]),
        ("50% of .5", ["50", "1/2"]),
        ("x2 m^2 v1.5", ["5"]),
        ("1,2", ["1", "2"]),
        ("1234,567", ["1234", "567"]),
        ("7/0", []),
        ("9" * 61, []),
        ("9" * 60, ["9" * 60]),
        ("٣", []),
    ],
)
def test_numbers_are_found_exactly(text: str, numbers: list[str]) -> None:
    assert last_number(text) == (Fraction(numbers[-1]) if numbers else None)


@pytest.mark.parametrize(
    ("answer", "number"),
    [("18 dollars", 18), ("9 x 2 = $18", 18), ("18 or 19", None), ("18, that is 18.0", 18), ("many", None), ("", None)],
)
def test_an_answer_states_one_number(answer: str, number: int | None) -> None:
    assert parse_number(answer) == number


@pytest.mark.parametrize("gold", ["18", "18.0", "#18", "18 (dollars)", "36/2", "1.8e1 = 18"])
@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        (r"\boxed{18}", "correct"),
        ("9 * 2 = 18\n#### 18", "correct"),
        ("She makes $18.00 every day.", "correct"),
        ("The answer is 18 dollars.", "correct"),
        ("18%", "correct"),
        ("Answer: 36/2", "correct"),
        ("Answer: 17", "wrong"),
        ("Answer: 18.01", "wrong"),
        ("Answer: -18", "wrong"),
        ("Answer: 180", "wrong"),
        (r"18, no: \boxed{81}", "wrong"),
        ("Answer: 18 or 19", "unparsed"),
        (r"18 \boxed{18", "unparsed"),
        ("I do not know", "unparsed"),
        ("", "unparsed"),
    ],
)
def test_numeric_answers_are_graded_by_value(gold: str, completion: str, reason: str) -> None:
    verdict = grade_number(completion, Problem((), gold))
    assert verdict.reason == reason
    assert verdict.score == float(verdict.correct) == float(reason == "correct")
    assert (verdict.answer == "18") == verdict.correct and (verdict.answer is None) == (reason == "unparsed")
    assert verdict.parsed == (reason != "unparsed")


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        ("0.6666666667", "2/3", True),
        ("0.6666666667", "0.67", False),
        ("3.33333", "10/3", True),
        ("0.875", "0.8751", False),
        ("0.875", "7/8", True),
        ("3.14", "22/7", False),
    ],
)
def test_only_a_gold_of_five_decimals_counts_as_rounded(gold: str, answer: str, right: bool) -> None:
    assert grade_number(f"Answer: {answer}", Problem((), gold)).correct is right


@pytest.mark.parametrize("gold", [None, "", "yes", "3:4"])
def test_a_gold_that_is_no_number_is_an_error_and_never_right(gold: str | None) -> None:
    with pytest.raises(ValueError, match="not one number"):
        grade_number("", Problem((), gold))


@given(NOISE, st.integers(-(10**9), 10**9))
def test_no_text_breaks_the_extraction_and_a_final_mark_wins(text: str, number: int) -> None:
    for extract in (last_boxed, extract_marked, extract_tagged, last_number):
        extract(text)
    problem = Problem((), str(number))
    assert grade_number(text, problem).score in (0.0, 1.0)
    assert grade_number(f"{text}\\boxed{{{number}}}", problem).correct or text.endswith("\\")
    assert not grade_number(f"{text}\\boxed{{{number + 1}}}", problem).correct


@pytest.mark.parametrize(
    "unit", ["\\boxed{", "{", "}", "9", "1,", "answer", "answer: ", " ", "\\frac{", "####", "-", "$", "1/", "1 "]
)
def test_long_text_of_any_kind_is_graded_in_linear_time(unit: str) -> None:
    text = unit * (200_000 // len(unit))
    start = time.perf_counter()
    for completion in (text, f"answer{text}", f"\\boxed{text}", f"\\boxed{{{text}"):
        grade_number(completion, Problem((), "1"))
        extract_tagged(completion)
    assert time.perf_counter() - start < 5
