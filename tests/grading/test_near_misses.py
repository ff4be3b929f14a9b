"""Hand-made answers that look like the gold one and are not, and rules that docs/grading.md states."""

import pytest

from headwater.grading.maths import grade_maths
from headwater.grading.text import grade_number
from headwater.types import Problem

WRONG = {
    # off by one, sign, scale, truncated and rounded digits
    "42": ["43", "41", "-42", "420", "4.2", "4", "24", "42.1", "41.999", "42x", "42i", r"\sqrt{42}", "42!"],
    "0": ["1", "-1", "0.1", r"\frac{1}{10^{9}}", "x"],
    "3.14": ["3.1", "3", "3.141", r"\pi", r"\frac{22}{7}"],
    "1,000,000": ["1,000", "1", "10^5", "100,000", r"(1,000,000)"],
    "2^{-98}": ["2^{-97}", "0", "0.0", "-2^{-98}"],
    "2^{4950}": ["2^{4951}", "2^{4950}+1", "0"],
    r"\frac{1}{10000000}": ["0.0", "0", r"\frac{1}{1000000}"],
    # fractions: swapped, near, cut decimals
    r"\frac{2}{3}": [r"\frac{3}{2}", r"-\frac{2}{3}", "0.66", "0.67", "0.666666", "2", "3", "2,3", r"\frac{2}{3}x"],
    r"2\frac{1}{2}": [r"\frac{1}{2}", "1", r"\frac{21}{2}", "2"],
    # percentages are numbers of percent
    r"50\%": ["0.5", r"\frac{1}{2}", r"5\%", "500"],
    "0.5": [r"0.5x", "50", r"50\%", "5"],
    # a factor of the unit
    r"5\text{ m}": ["500", r"500\text{ cm}", "0.005", r"5x"],
    r"90^\circ": [r"\frac{\pi}{2}", "9", r"91^\circ"],
    # letters are no units
    "3t": ["3", "3s", "t", "t+3"],
    "5m": ["5", "5n", "m"],
    # lists, sets, 'or' answers
    "1,2": ["1,3", "1", "2", "1,2,3", "1,-2", "1,1", "12"],
    r"3 \text{ or } 5": ["3", "5", "4", r"3 \text{ or } -5", "3,5,7"],
    "5": ["5, 6", r"5 \text{ or } 6", "5 or 6", r"\{5,6\}", "x>5", "(5,6)", "5 = 6"],
    r"1\pm\sqrt{2}": [r"1+\sqrt{2}", r"2\pm\sqrt{2}", r"1\pm\sqrt{3}", r"-1\pm\sqrt{2}"],
    # pairs and intervals
    "(5,2)": ["(2,5)", "(4,3)", "(5,2,1)", "[5,2]", "2,5", "(5,-2)", "(2,5]", "5"],
    "(1,2]": ["[1,2)", "(1,2)", "[1,2]", "(2,1]", r"(1,2] \cup (3,4]", r"\{1,2\}"],
    r"(-\infty,2)\cup(3,\infty)": [r"(-\infty,3)\cup(2,\infty)", r"(-\infty,2]\cup(3,\infty)", "(2,3)", r"(-\infty,2)"],
    r"x \le 3": ["x<3", "x \\ge 3", "3", r"x \le 4"],
    # expressions
    "x^2+1": ["x^2", "x^2-1", "x^3+1", "2x+1", "y^2+1", "(x+1)^2", "x^2+1.1"],
    r"\sqrt{12}": [r"\sqrt{11}", r"3\sqrt{2}", r"-2\sqrt{3}", "12", "3.46"],
    "y = 2x + 3": ["y = 2x - 3", "y = 3x + 2", "x = 2y + 3", "2x+4"],
    "a-b": ["b-a", "a+b", "ab", r"\frac{a}{b}"],
    r"\frac{1}{x}": ["x", r"-\frac{1}{x}", r"\frac{1}{x^2}"],
    "i": ["-i", "1", "2i"],
    "2+3i": ["2-3i", "3+2i", "-2+3i", "2+3"],
    r"\begin{pmatrix}1&2\\3&4\end{pmatrix}": [r"\begin{pmatrix}1&3\\2&4\end{pmatrix}", "1,2,3,4", "(1,2,3,4)"],
    # words, names, bases, times
    r"\text{Evelyn}": ["Evely", "Evelyna", "Eve", "not Evelyn"],
    r"\text{AB}": ["BA", "A", "ABC"],
    "52_8": ["52_9", "53_8", "42", "-52_8"],
    "9:30": ["9:31", "930", "9.5"],
    # what two readings would make equal
    "0.56 = 56\\%": ["1.56 = 56", "1 = 2"],
    r"2007 + \frac\pi 2": ["2007", r"2008 + \frac\pi 2"],
}

RIGHT = {
    "42": [
        "42.0",
        "042",
        r"\mathbf{42}",
        "+42",
        r"\frac{84}{2}",
        "6 \\cdot 7",
        "42 apples",
        "42\\text{ units}",
        "x = 42",
    ],
    r"\frac{2}{3}": ["2/3", r"\tfrac23", r"\frac{4}{6}", "0.666667", r"\frac 2 3", r"\frac{2}{3}."],
    r"50\%": ["50", "50 percent", r"50\,\%"],
    "1,000,000": ["1000000", r"1{,}000{,}000", r"1,\!000,\!000", "10^6"],
    "1,2": ["2, 1", r"\{2,1\}", r"1 \text{ and } 2", "x=1, x=2"],
    r"1\pm\sqrt{2}": [r"1-\sqrt{2}, 1+\sqrt{2}"],
    "(5,2)": [r"\left(5,\ 2\right)", r"(5.0, \frac{4}{2})", "x=5, y=2"],
    r"(-\infty,2)\cup(3,\infty)": [r"(3,\infty)\cup(-\infty,2)", r"(-\infty, 2) \cup (3, +\infty)"],
    "3t": ["t \\cdot 3", "3 t"],
    "52_8": ["52_{8}", "52"],
    "x^2+1": ["1+x**2", "(x+1)^2-2x"],
    "2+3i": ["3i+2"],
    r"\text{Evelyn}": ["evelyn", r"\mathrm{Evelyn}"],
}


@pytest.mark.parametrize("gold", WRONG)
def test_near_misses_are_wrong(gold: str) -> None:
    for answer in WRONG[gold]:
        assert grade_maths(f"{gold}? No:\n$\\boxed{{{answer}}}$", Problem((), gold)).reason == "wrong", answer


@pytest.mark.parametrize("gold", RIGHT)
def test_other_spellings_are_right_and_have_one_canonical_answer(gold: str) -> None:
    verdicts = [grade_maths(f"$\\boxed{{{answer}}}$", Problem((), gold)) for answer in [gold, *RIGHT[gold]]]
    assert [v.reason for v in verdicts] == ["correct"] * len(verdicts), RIGHT[gold]
    assert len({v.answer for v in verdicts}) == 1


def test_wrong_answers_that_are_equal_are_one_vote() -> None:
    texts = ["7", "7.0", r"\frac{14}{2}", "7 apples", r"x = 7"]
    said = [grade_maths(f"\\boxed{{{text}}}", Problem((), "8")).answer for text in texts]
    assert said[:4] == ["7"] * 4


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("Final Answer: The final answer is $\\frac{1}{2}$. I hope it is correct.", True),
        ("The answer is $\\frac{1}{2}$. Therefore 7 is not.", True),
        ("The answer is $\\frac{1}{2}$ dollars", True),
        ("Hence\n$$\\frac{1}{2}$$", True),
        ("Hence\n\\[ \\frac{1}{2} \\]", True),
        ("Hence 0.5", True),
        ("$\\frac{1}{2}$ is not it, but $2$", False),
        ("Hence $\\frac{1}{2}$ or so\n3", False),
        ("$\\frac{1}{2}$", True),
        (r"\boxed{\frac{1}{2}} and \boxed{2}", False),
        (r"The answer is \frac{1}{2}. But \boxed{3}", False),
    ],
)
def test_which_part_of_a_completion_is_the_answer(completion: str, right: bool) -> None:
    assert grade_maths(completion, Problem((), r"\frac{1}{2}")).correct is right


def test_a_wrong_number_is_wrong_for_word_problems_too() -> None:
    for answer in ("17", "19", "-18", "180", "1.8", "18.5", "81", "1", "18%, no 19", "18/2", "1,800"):
        assert not grade_number(f"18 minus 0.\nThe answer is {answer}.", Problem((), "18")).correct, answer
