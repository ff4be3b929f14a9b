from collections.abc import Iterator

import pytest

from headwater.grading.maths import grade_maths
from headwater.grading.pool import GraderPool
from headwater.types import Problem

PMATRIX = r"\begin{pmatrix} %s \\ 9 \end{pmatrix}"

# Gold, then answers of the same value, then near misses.
CASES = [
    (r"\frac{1}{2}", ["0.5", r"\dfrac{2}{4}", r"\frac12", "1/2"], ["2", "1/3", "0.49"]),
    ("5", ["x=5", "5.0", r"5\text{ cm}", "$5$"], ["5,6", r"5 \text{ or } 6", "-5", "50", "x"]),
    ("1,-2", ["-2,1", r"\{1,-2\}"], ["1", "1,2", "1,-2,3"]),
    ("(3,4]", ["(3, 4]"], ["(3,4)", "[3,4]", "(4,3]"]),
    (r"\left( 3, \frac{\pi}{2} \right)", [r"(3,\pi/2)"], [r"(\pi/2, 3)", r"(3,\pi)"]),
    (r"\text{Evelyn}", ["Evelyn", r"\textbf{Evelyn}"], ["Eve", "Evelyna"]),
    (r"\text{(C)}", ["C", "(C)"], ["D", "AC"]),
    (r"90^\circ", ["90", r"90^{\circ}"], ["9", r"80^\circ"]),
    (r"\$32,\!348", ["32348", "32,348"], ["32", "348"]),
    (r"864 \mbox{ inches}^2", ["864"], ["86"]),
    (r"3\sqrt{13}", [r"\sqrt{117}"], [r"\sqrt{13}", "10.8167"]),
    (r"\pi", [], ["3.14", "3.14159"]),
    ("p - q", ["-q+p"], ["q-p", "p+q"]),
    ("(a+5)(b+2)", ["ab+2a+5b+10"], ["ab+2a+5b+11"]),
    ("y = 2x + 3", ["y=3+2x"], ["y=2x+4"]),
    (r"x \in [-2,7]", ["[-2,7]"], ["(-2,7)"]),
    (PMATRIX % "-2", [r"\begin{bmatrix}-2\\9\end{bmatrix}"], [PMATRIX % "2"]),
    ("$3 \\sqrt{6}$.", [r"3\sqrt 6", r"\sqrt{54}"], [r"6\sqrt 3"]),
    ("033", ["33", "033"], ["30", "0.33"]),
]


@pytest.mark.parametrize(("gold", "right", "wrong"), CASES, ids=[case[0] for case in CASES])
def test_values_decide_not_spellings(gold: str, right: list[str], wrong: list[str]) -> None:
    for answer in [gold, *right]:
        assert grade_maths(f"Thus \\boxed{{{answer}}}.", Problem((), gold)).reason == "correct", answer
        assert grade_maths(f"Work.\nAnswer: {answer}", Problem((), gold)).correct, answer
    for answer in wrong:
        assert grade_maths(f"{gold}, so \\boxed{{{answer}}}.", Problem((), gold)).reason == "wrong", answer


@pytest.mark.parametrize("text", ["", "no answer", r"5 \boxed{5", r"\boxed{}", "Answer: 5}", "####"])
def test_no_answer_is_unparsed_and_never_right(text: str) -> None:
    verdict = grade_maths(text, Problem((), "5"))
    assert (verdict.reason, verdict.parsed, verdict.score) == ("unparsed", False, 0.0)


def test_a_gold_that_cannot_be_read_rewards_nothing_but_itself() -> None:
    gold = r"\frac{"
    assert not grade_maths(r"\boxed{1}", Problem((), gold)).correct
    assert not grade_maths(r"\boxed{\frac}", Problem((), gold)).correct
    with pytest.raises(ValueError, match="no answer"):
        grade_maths("5", Problem(()))


@pytest.fixture(scope="module")
def pool() -> Iterator[GraderPool]:
    with GraderPool("headwater.grading.maths:grade_maths", workers=1, timeout_s=3.0) as pool:
        yield pool


def test_in_a_child_an_explosive_answer_costs_only_itself(pool: GraderPool) -> None:
    power = Problem((), "5")
    texts = [r"\boxed{5}", r"\boxed{9^{9^{9^{9}}}}", r"\boxed{\frac{10}{2}}", r"\boxed{6}"]
    reasons = [v.reason for v in pool.grade([(power, text) for text in texts])]
    assert reasons[0] == reasons[2] == "correct"
    assert reasons[1] in ("timeout", "memory", "wrong") and reasons[3] == "wrong"
