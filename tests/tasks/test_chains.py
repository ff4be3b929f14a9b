import random
import re
import time
from collections import Counter
from dataclasses import replace

import pytest

from headwater.tasks.chains import BUCKETS, Chains, corpus_document, grade, skim_solution, worked_solution
from headwater.types import Message, Problem, Task

PROBLEM = Problem((Message("user", "7+5*3-4="),), "12")
SMALL = Chains(train=60, tuning=40, test=40, unlabelled=40)


def slow_answer(prompt: str) -> int:
    """Python's own evaluation with explicit brackets, one reduction at the end: residues are a ring."""
    start, rest = re.fullmatch(r"(\d+)(.*)=", prompt).groups()  # pyright: ignore -- no match fails the test
    operations = re.findall(r"[+*-]\d", rest)
    return eval("(" * len(operations) + start + "".join(f"{operation})" for operation in operations)) % 20


def test_answers_are_left_to_right_modulo_20():
    assert slow_answer("7+5*3-4=") == 12
    for problem in SMALL.problems("train"):
        assert problem.answer == str(slow_answer(problem.messages[0].content))


@pytest.mark.parametrize(
    ("completion", "style"),
    [("7+5=12;12*3=16;16-4=12;12.", "worked"), ("7+5*3=16;16-4=12;12.", "skim"), ("12.", "bare")],
)
def test_the_three_styles_of_a_right_answer(completion: str, style: str):
    verdict = grade(completion, PROBLEM)
    assert (verdict.correct, verdict.parsed, verdict.reason, verdict.score) == (True, True, "correct", 1.0)
    assert verdict.style == style


def test_gold_answers_of_every_problem_grade_right_in_their_style():
    for problem in SMALL.problems("train"):
        for text, style in (
            (worked_solution(problem), "worked"),
            (skim_solution(problem), "skim"),
            (f"{problem.answer}.", "bare"),
        ):
            verdict = grade(text, problem)
            assert verdict.correct and verdict.style == style, (problem, text)
        wrong = (int(problem.answer or 0) + 1) % 20
        assert not grade(f"{wrong}.", problem).correct


@pytest.mark.parametrize("completion", ["13.", "2.", "7+5=12;12*3=16;16-4=12;11.", "0.", "1."])
def test_another_residue_is_wrong_but_parsed(completion: str):
    verdict = grade(completion, PROBLEM)
    assert (verdict.correct, verdict.parsed, verdict.reason, verdict.score) == (False, True, "wrong", 0.0)


@pytest.mark.parametrize(
    "completion",
    [
        "",
        ".",
        "12",
        "12..",
        "12.\n",
        " 12.",
        "012.",
        "32.",
        "20.",
        "-8.",
        "+12.",
        "12.0",
        "12.;",
        "=12.",
        "١٢.",
        "１２.",
        "12.<|im_end|>",
        "12.12.",
        "7+5=12;12*3=16;16-4=12",
        "7+5=12;12*3=16;16-4=12;",
        "7+5=12;12*3=16;16-4=12.",
    ],
)
def test_anything_else_after_the_last_semicolon_is_unparsed(completion: str):
    verdict = grade(completion, PROBLEM)
    assert (verdict.correct, verdict.parsed, verdict.reason, verdict.score) == (False, False, "unparsed", 0.0)
    assert verdict.style is None


@pytest.mark.parametrize(
    "completion", [";;;12.", "a;b;c;12.", "7+5=12;12.", "7+5=12;12*3=16;16-4=12;12=12;12.", "7+5*3-4=12;12.", ";12."]
)
def test_a_right_answer_after_other_steps_has_no_style(completion: str):
    verdict = grade(completion, PROBLEM)
    assert verdict.correct and verdict.style is None


def test_hostile_text_is_graded_in_linear_time():
    size = 4_000_000
    for unit in (";", "12.", "\0", "1+2", "7+5=12;", "9", "\ud800", "\u202e;"):
        began = time.perf_counter()
        verdict = grade(unit * (size // len(unit)), PROBLEM)
        assert not verdict.correct
        assert grade(unit * (size // len(unit)) + ";12.", PROBLEM).style is None
        assert time.perf_counter() - began < 2


def test_grading_without_an_answer_is_the_users_error():
    with pytest.raises(ValueError, match="labelled"):
        grade("12.", PROBLEM.unlabelled())


def test_solutions_are_written_exactly_so():
    assert worked_solution(PROBLEM) == "7+5=12;12*3=16;16-4=12;12."
    assert skim_solution(PROBLEM) == "7+5*3=16;16-4=12;12."
    five = Problem((Message("user", "19*9-2+7*8-9="),))
    assert worked_solution(five) == "19*9=11;11-2=9;9+7=16;16*8=8;8-9=19;19."
    assert skim_solution(five) == "19*9-2=9;9+7*8=8;8-9=19;19."
    with pytest.raises(ValueError, match="no chain"):
        worked_solution(Problem((Message("user", "what is 7+5?"),)))


def test_splits_are_disjoint_across_seeds_and_have_no_duplicates():
    ids = {split: set() for split in ("train", "tuning", "test", "unlabelled")}
    for seed in (0, 1):
        for split, seen in ids.items():
            drawn = [problem.id for problem in replace(SMALL, seed=seed).problems(split)]
            assert len(set(drawn)) == len(drawn) == getattr(SMALL, split)
            seen.update(drawn)
    assert sum(len(seen) for seen in ids.values()) == len(set.union(*ids.values()))
    buckets = [bucket for members in BUCKETS.values() for bucket in members]
    assert sorted(buckets) == list(range(100))


def test_asking_for_more_only_appends():
    for split in ("train", "tuning", "test", "unlabelled"):
        more = replace(SMALL, **{split: 90}).problems(split)
        assert more[: getattr(SMALL, split)] == SMALL.problems(split)
        assert len(more) == 90


def test_problems_are_pinned():
    """A change here is a change of world: the embedded models and every result would have to be made again."""
    one = Chains(train=1, tuning=1, test=1, unlabelled=1)
    first = [one.problems(split)[0].messages[0].content for split in ("train", "tuning", "test", "unlabelled")]
    assert first == ["4+6+2+8+9+9=", "15*4*8+4-4=", "7+2-4*6+8*2=", "4*6-7*6="]


def test_unlabelled_problems_carry_no_answer_and_labelled_ones_have_3_to_5_operations():
    assert all(problem.answer is None and not problem.columns for problem in SMALL.problems("unlabelled"))
    counts = Counter(problem.columns["num_operations"] for problem in Chains(train=300).problems("train"))
    assert set(counts) == {3, 4, 5} and min(counts.values()) > 70
    assert all(p.messages[0].role == "user" and len(p.messages) == 1 for p in SMALL.problems("train"))


def test_unknown_split_and_negative_size_are_refused():
    with pytest.raises(ValueError, match="validation"):
        Chains().problems("validation")
    with pytest.raises(ValueError, match="-1"):
        Chains(train=-1).problems("train")


def test_chains_is_a_task():
    task: Task = Chains()
    assert task.name == "chains" and task.grader == "headwater.tasks.chains:grade"


def test_corpus_keeps_its_shares_and_slips_and_holds_no_problem_of_a_split():
    rng = random.Random(0)
    documents = [corpus_document(rng) for _ in range(3000)]
    singles = [d for d in documents if len(re.findall(r"[+*-]", d[0])) == 1]
    assert abs(len(singles) / 3000 - 0.20) < 0.03
    assert all(completion == f"{slow_answer(prompt)}." for prompt, completion in singles)
    styles: Counter[str | None] = Counter()
    slips = steps = 0
    for prompt, completion in (d for d in documents if d not in singles):
        problem = Problem((Message("user", prompt),), "0")
        assert int(problem.id, 16) % 100 < 50
        styles[grade(completion, problem).style] += 1
        written = completion.split(";")[:-1]
        steps += len(written)
        slips += sum(slow_answer(step[: step.index("=") + 1]) != int(step.split("=")[1]) for step in written)
        # A slip is carried on: the answer is what the last step says.
        assert (
            completion == f"{slow_answer(prompt)}."
            if not written
            else completion.endswith(written[-1].split("=")[1] + ".")
        )
        assert len(completion) <= 43
    total = sum(styles.values())
    assert set(styles) == {"worked", "skim", "bare"}
    assert abs(styles["worked"] / total - 0.25) < 0.03 and abs(styles["skim"] / total - 0.35) < 0.03
    # A slip draws the right residue one time in twenty.
    assert abs(slips / steps - 0.04 * 0.95) < 0.01
