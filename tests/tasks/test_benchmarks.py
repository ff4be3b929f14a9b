"""Benchmarks by name; the quick tests read made-up rows, the slow ones the real files."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from headwater.assets import fetch
from headwater.grading.maths import grade_maths
from headwater.grading.text import grade_number, parse_number
from headwater.tasks import benchmarks, load_task
from headwater.tasks.benchmarks import EXAMPLES, GRADERS, Benchmark, provenance
from headwater.types import Message, Problem


def word_problem(n: int) -> dict[str, str]:
    worked = f"{n}+{n + 1} = <<{n}+{n + 1}={2 * n + 1}>>{2 * n + 1}\n#### {2 * n + 1}"
    return {"question": f"Ann has {n} pens and buys {n + 1}. How many?", "answer": worked}


def contest_problem(n: int, answer: str) -> dict[str, str]:
    return {"question": f"Find {n}.", "expected": answer, "solution": f"\\boxed{{{n}}}, so \\boxed{{{answer}}}"}


WORDS = [word_problem(n) for n in range(40)]
CONTEST = [contest_problem(n, answer) for n, answer in enumerate(["025", "7", "385", "000"])]


def bare_id(question: str) -> str:
    return Problem((Message("user", question),)).id


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Made-up GSM8K (30 training, 10 test problems), AIME and SVAMP in the places of the real ones."""

    def write(name: str, rows: list) -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    columns = {"prompt_column": "question", "answer_column": "answer"}
    gsm8k = {"train_source": write("train", WORDS[:30]), "test_source": write("test", WORDS[30:]), **columns}
    real = benchmarks.benchmarks()
    pattern = real["aime24"].wheel["answer_pattern"]
    aime = {"prompt_column": "question", "answer_column": "expected", "answer_pattern": pattern}
    table = {
        "gsm8k": Benchmark("words", 10, gsm8k, 30),
        "aime24": Benchmark("maths", 4, {"test_source": write("aime", CONTEST), **aime}),
        "svamp": Benchmark("words", 40, {"test_source": write("all", WORDS), **columns}, divided=True),
    }
    monkeypatch.setattr(benchmarks, "benchmarks", lambda: table)
    shown = [bare_id(row["question"]) for row in WORDS[:8]]
    monkeypatch.setattr(benchmarks, "EXAMPLES", {"words": ("gsm8k", " ".join(shown)), "maths": ("gsm8k", "")})
    return table


def test_every_fact_is_pinned():
    table = benchmarks.benchmarks()
    parts = ["multiarith", "singleop", "singleeq", "addsub"]
    assert list(table) == ["gsm8k", "math", "math500", "aime24", "aime25", "svamp", "asdiv", "mawps", *parts]
    for name, facts in table.items():
        for rows, pin in ((facts.wheel, r"#sha256=[0-9a-f]{64}$"), (facts.hub, r"@[0-9a-f]{40}[/#]")):
            sources = [rows[key] for key in ("test_source", "train_source") if key in rows] if rows else []
            assert all(re.search(pin, source) for source in sources), name
            assert not rows or len(sources) == 1 + bool(facts.num_train), name
        assert provenance({"name": name})["test_source"] == facts.wheel["test_source"]
    assert provenance({"name": "chains"}) == {}
    for of, ids in EXAMPLES.values():
        assert table[of].num_train and all(re.fullmatch("[0-9a-f]{16}", place) for place in ids.split())


def test_official_splits_hold(made):
    task = load_task({"name": "gsm8k"})
    assert task.grader == GRADERS["words"]
    numbers = {s: {int(p.answer or "") // 2 for p in task.problems(s)} for s in ("train", "tuning", "test")}
    assert numbers["test"] == set(range(30, 40))
    assert numbers["train"] | numbers["tuning"] == set(range(30))
    assert not numbers["train"] & numbers["tuning"]
    moved = load_task({"name": "gsm8k", "prompt": "few-shot", "shots": 2})
    assert {p.answer for p in moved.problems("tuning")} <= {p.answer for p in task.problems("tuning")}
    assert load_task({"name": "aime24"}).problems("train") == ()
    with pytest.raises(ValueError, match="no split 'all'"):
        task.problems("all")
    whole = load_task({"name": "svamp"})
    assert len(whole.problems("all")) == 40 == sum(len(whole.problems(s)) for s in ("train", "tuning", "test"))


def test_chat_prompt_and_worked_solution(made):
    problem = next(p for p in load_task({"name": "gsm8k", "system": "Be brief."}).problems("test") if p.answer == "61")
    assert problem.messages == (
        Message("system", "Be brief."),
        Message(
            "user",
            'Ann has 30 pens and buys 31. How many?\nSolve it step by step. End with "The answer is" and the number.',
        ),
    )
    assert problem.columns["solution"] == "30+31 = 61\nThe answer is 61."
    assert grade_number(problem.columns["solution"], problem).correct


def test_few_shot_as_turns_and_as_text(made):
    turns = load_task({"name": "gsm8k", "prompt": "few-shot", "shots": 2})
    asked = next(p for p in turns.problems("test") if p.answer == "61")
    assert [m.role for m in asked.messages] == ["user", "assistant", "user", "assistant", "user"]
    assert asked.messages[:2] == (
        Message("user", "Ann has 0 pens and buys 1. How many?"),
        Message("assistant", "0+1 = 1\nThe answer is 1."),
    )
    # An example is asked in no problem of its own benchmark: its answer would stand in the prompt.
    trained = [p for split in ("train", "tuning") for p in turns.problems(split)]
    assert len(trained) == 28 and not {"1", "3"} & {p.answer for p in trained}
    text = load_task({"name": "gsm8k", "shots": 1, "template": "none"})
    asked = next(p for p in text.problems("test") if p.answer == "61")
    assert asked.messages == (
        Message(
            "user",
            "Question: Ann has 0 pens and buys 1. How many?\nAnswer: 0+1 = 1\nThe answer is 1.\n\n"
            "Question: Ann has 30 pens and buys 31. How many?\nAnswer:",
        ),
    )
    sized = load_task({"name": "gsm8k", "prompt": "few-shot", "sizes": {"train": 5}})
    assert len(sized.problems("train")) == 5 and len(sized.problems("test")[0].messages) == 17


def test_aime_gold_answers_are_plain_numbers_from_the_answer_column(made):
    gold = {p.messages[0].content.split(".")[0]: p for p in load_task({"name": "aime24"}).problems("test")}
    assert {name: p.answer for name, p in gold.items()} == {
        "Find 0": "25",
        "Find 1": "7",
        "Find 2": "385",
        "Find 3": "0",
    }
    for text, right in ((r"\boxed{025}", True), (r"\boxed{25}", True), (r"\boxed{0}", False), (r"\boxed{250}", False)):
        assert grade_maths(text, gold["Find 0"]).correct is right


def test_an_answer_with_units_or_latex_is_refused(made):
    rows = [*CONTEST[:3], {**CONTEST[3], "expected": "25 degrees"}]
    Path(made["aime24"].wheel["test_source"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"aime24 has 3 problems with an answer .* but 4 are known"):
        load_task({"name": "aime24"})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "gsm8k", "source": "hub"}, r"use one of \['wheel'\]"),
        ({"name": "gsm8k", "prompt": "cot"}, "'chat' or 'few-shot'"),
        ({"name": "gsm8k", "template": "jinja"}, "'chat' or 'none'"),
        ({"name": "gsm8k", "prompt": "few-shot", "shots": 9}, "'few-shot' 1 to 8"),
        ({"name": "gsm8k", "prompt": "chat", "shots": 2}, "'chat' has 0"),
        ({"name": "gsm8k", "sizes": {"dev": 2}}, "sizes are those of"),
        ({"name": "gsm8k", "sizes": {"train": 99}}, "99"),
        ({"name": "aime24", "fractions": {"train": 1.0}}, "aime24 has no"),
        ({"name": "gsm9k"}, "no task is called 'gsm9k'.*gsm8k"),
    ],
)
def test_bad_settings(made, spec, message):
    with pytest.raises(ValueError, match=message):
        load_task(spec)


@pytest.mark.slow  # downloads two wheels
def test_the_real_files_are_what_is_known():
    distinct = {"svamp": 1000, "asdiv": 2091, "mawps": 1981, "multiarith": 580, "singleop": 531, "singleeq": 508}
    for name, facts in benchmarks.benchmarks().items():
        task = load_task({"name": name})
        problems = [p for split in ("train", "tuning", "test") for p in task.problems(split)]
        assert len(problems) == distinct.get(name, facts.num_train + facts.num_test)
        assert all(p.answer if facts.style == "maths" else parse_number(p.answer or "") is not None for p in problems)
        assert len(task.problems("all" if facts.divided else "test")) == distinct.get(name, facts.num_test)
    few = load_task({"name": "svamp", "prompt": "few-shot"}).problems("all")[0].messages
    assert [m.role for m in few] == ["user", "assistant"] * 8 + ["user"]
    text = load_task({"name": "math500", "prompt": "few-shot", "template": "none"}).problems("test")[0].messages
    assert len(text) == 1 and text[0].content.count("Answer:") == 5


@pytest.mark.slow  # downloads a wheel
def test_aime_answers_differ_from_the_solutions_first_box():
    """Why the answer column alone is read: the same file's worked solutions mislead for a third of the problems."""
    task = load_task({"name": "aime24"})
    answers = {p.columns["id"]: p.answer for p in task.problems("test")}
    assert answers["aime24-26"] == "385"  # 2024 I 12: early copies of the set say 384
    rows = map(
        json.loads, fetch(benchmarks.benchmarks()["aime24"].wheel["test_source"]).read_text("utf-8").splitlines()
    )
    boxed = {
        r["id"]: re.search(r"\\boxed\{([^{}]*)\}", r["reference_solution"] or "") for r in rows if r["id"] in answers
    }
    same = Counter(bool(found and found[1] == answers[place]) for place, found in boxed.items())
    assert same == {True: 19, False: 11}
