import builtins
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwater.grading.pool import GraderPool
from headwater.tasks import load_task
from headwater.tasks.splits import SPLITS, SplitTask, check_disjoint, distinct, split_of, take
from headwater.types import Message, Problem

NUMBER = "headwater.grading.text:grade_number"


def write(path: Path, rows: list) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), "utf-8")
    return str(path)


def sums(numbers: range) -> list:
    return [{"q": f"{n}+{n}", "a": f"{n} twice is\n#### {2 * n}", "level": n % 2} for n in numbers]


def load(source: str, **spec) -> SplitTask:
    base = {"name": "jsonl", "source": source, "prompt_column": "q", "answer_column": "a", "grader": NUMBER}
    task = load_task({**base, **spec})
    assert isinstance(task, SplitTask)
    return task


def prompts(task: SplitTask, split: str) -> set[str]:
    return {problem.messages[-1].content for problem in task.problems(split)}


def ask(text: str) -> Problem:
    return Problem((Message("user", text),), "1")


def test_rows_become_problems_with_the_gold_after_the_hashes(tmp_path: Path) -> None:
    task = load(
        write(tmp_path / "d.jsonl", [*sums(range(100)), ""]), title="sums", template="Add: {prompt}", system="Be."
    )
    problems = [p for split in SPLITS for p in task.problems(split)]
    assert (task.name, task.grader, len(problems)) == ("sums", NUMBER, 100)
    for problem in problems:
        question = problem.messages[1].content.removeprefix("Add: ")
        n = int(question.partition("+")[0])
        assert problem.messages == (Message("system", "Be."), Message("user", f"Add: {n}+{n}"))
        assert problem.answer == str(2 * n)
        assert problem.columns == {"a": f"{n} twice is\n#### {2 * n}", "level": n % 2}
    with GraderPool(task.grader, workers=1) as pool:
        verdicts = pool.grade([(p, f"#### {p.answer}") for p in problems])
    assert all(v.correct for v in verdicts)


def test_splits_depend_on_content_alone_and_cover_every_problem_once(tmp_path: Path) -> None:
    rows = sums(range(1000))
    one = load(write(tmp_path / "a.jsonl", rows))
    two = load(write(tmp_path / "b.jsonl", [*sums(range(1000, 1500)), *reversed(rows)]))
    assert sum(len(one.problems(split)) for split in SPLITS) == 1000
    for split, share in {"train": 0.7, "tuning": 0.1, "test": 0.2, "unlabelled": 0.0}.items():
        assert abs(len(one.problems(split)) - 1000 * share) < 50
        assert prompts(one, split) <= prompts(two, split)
    less = load(str(tmp_path / "a.jsonl"), fractions={"test": 0.2, "train": 0.3, "unlabelled": 0.3})
    assert less.problems("test") == one.problems("test")
    assert all(p.answer is None and not p.columns for p in less.problems("unlabelled"))
    assert len(less.problems("unlabelled")) > 200


def test_sizes_are_nested_and_a_split_too_small_is_an_error(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", sums(range(300)))
    small, large = (load(source, sizes={"train": n}).problems("train") for n in (20, 100))
    assert large[:20] == small and len(large) == 100
    with pytest.raises(ValueError, match=r"split 'train' has \d+ problems and its size is given as 300"):
        load(source, sizes={"train": 300})


def test_repeated_prompts_and_test_prompts_are_taken_out_and_counted(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", [*sums(range(50)), *sums(range(40, 60))])
    test = write(tmp_path / "b.jsonl", [*sums(range(55, 80)), *sums(range(79, 80))])
    task = load(train, test_source=test)
    assert task.counts == {"rows": 96, "unmatched": 0, "duplicates": 11, "contradictions": 0, "in_test": 5}
    assert prompts(task, "test") == {f"{n}+{n}" for n in range(55, 80)}
    assert len(task.problems("train")) + len(task.problems("tuning")) == 55
    for split in ("train", "tuning"):
        check_disjoint(task.problems(split), task.problems("test"))
    with pytest.raises(ValueError, match=r"2 of 3 training prompts are also test prompts, for example \w{16} \('b'\)"):
        check_disjoint([ask("a"), ask("b"), ask("c")], [ask("b"), ask("c"), ask("d")])


def test_prompts_without_answers_are_unlabelled_only(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [*sums(range(50)), *({"q": f"?{n}", "a": None} for n in range(30))])
    more = write(tmp_path / "b.jsonl", [{"q": f"+{n}"} for n in range(20)] + [{"q": "0+0"}])
    task = load(source, unlabelled_source=more)
    assert prompts(task, "unlabelled") == {f"?{n}" for n in range(30)} | {f"+{n}" for n in range(20)}
    assert all(p.answer is not None for split in ("train", "tuning", "test") for p in task.problems(split))
    task = load_task({"name": "jsonl", "source": more, "prompt_column": "q"})
    assert [len(task.problems(split)) for split in SPLITS] == [0, 0, 0, 21]


def test_conversations_are_kept_as_they_are(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    source = write(tmp_path / "a.jsonl", [{"messages": turns, "a": 1.5}])
    task = load(source, prompt_column="messages", fractions={"test": 1.0})
    assert task.problems("test") == (Problem((Message("system", "s"), Message("user", "u")), "1.5", {"a": 1.5}),)
    for setting in ({"template": "{prompt}!"}, {"system": "t"}):
        with pytest.raises(ValueError, match="cannot be applied"):
            load(source, prompt_column="messages", **setting)
    with pytest.raises(ValueError, match="a conversation is a list"):
        load(write(tmp_path / "b.jsonl", [{"q": [{"role": "user"}], "a": 1}]))


def test_answer_patterns_filters_and_joined_columns(tmp_path: Path) -> None:
    rows = [{"q": "Body.", "r": f"Q{n}?", "a": f"{n} (apples)", "kind": n % 2} for n in range(20)]
    rows += [{"q": "Who?", "r": "", "a": "Mary", "kind": 0}]
    source = write(tmp_path / "a.jsonl", rows)
    task = load(source, prompt_column=["q", "r"], answer_pattern=r"^\d+", where={"kind": 0}, fractions={"train": 1.0})
    assert task.counts == {"rows": 11, "unmatched": 1, "duplicates": 0, "contradictions": 0, "in_test": 0}
    assert {(p.messages[0].content, p.answer) for p in task.problems("train")} == {
        (f"Body. Q{n}?", str(n)) for n in range(0, 20, 2)
    }
    source = write(tmp_path / "b.jsonl", [{"q": "1", "a": r"So \boxed{\frac{1}{2}}."}])
    assert load(source, answer_pattern="boxed", fractions={"train": 1.0}).problems("train")[0].answer == r"\frac{1}{2}"


def test_strange_text_in_a_row_survives(tmp_path: Path) -> None:
    text = "a\u2028b\x85\ud800\x00c"
    task = load(write(tmp_path / "a.jsonl", [{"q": text, "a": "1"}]), fractions={"train": 1.0})
    assert task.problems("train")[0].messages[0].content == text


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"answer_column": "gold"}, r"row 1 of .* has no column \['gold'\]; it has \['a', 'level', 'q'\]"),
        ({"prompt_column": "question"}, r"has no column \['question'\]"),
        ({"where": {"kind": 1}}, r"has no column \['kind'\]"),
        ({"where": {"level": 7}}, r"holds no problem with \{'level': 7\}"),
        ({"prompt_column": "level"}, "a prompt is a text or a list of messages"),
        ({"prompts": "q"}, r"jsonl has no \['prompts'\]; it takes \['answer_column'"),
        ({"template": "Solve."}, "has no {prompt} in it"),
        ({"answer_pattern": "("}, "is no regular expression"),
        ({"grader": ""}, "has answers but no grader"),
        ({"fractions": {"train": 0.8, "test": 0.5}}, "sum of at most 1"),
        ({"fractions": {"dev": 0.5}}, "shares >= 0 of"),
        ({"sizes": {"dev": 5}}, "sizes are those of"),
        ({"test_source": "x", "fractions": {"test": 0.1}}, "take 'test' out of the fractions"),
    ],
)
def test_what_cannot_be_done_is_said(tmp_path: Path, spec: dict, message: str) -> None:
    source = write(tmp_path / "a.jsonl", sums(range(9)))
    with pytest.raises(ValueError, match=message):
        load(source, **spec)


def test_unreadable_sources_are_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"line 2 of .* is not JSON"):
        load(write(tmp_path / "a.jsonl", [{"q": "1", "a": "1"}, "{"]))
    with pytest.raises(ValueError, match="is not a JSON object"):
        load(write(tmp_path / "b.jsonl", ["[1]"]))
    with pytest.raises(ValueError):
        load(str(tmp_path / "c.jsonl"))
    for name in ("gsm9k", None, "chains:x", "reasoning-gym", "reasoning-gym:"):
        with pytest.raises(ValueError, match="no task is called"):
            load_task({"name": name})
    with pytest.raises(ValueError, match=r"jsonl needs \['prompt_column', 'source'\]"):
        load_task({"name": "jsonl"})


def test_parquet_rows_read_as_json_rows(tmp_path: Path) -> None:
    why = "an extra of the package"
    arrow, parquet = (pytest.importorskip(name, reason=why) for name in ("pyarrow", "pyarrow.parquet"))
    rows = sums(range(30))
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    one = load(write(tmp_path / "a.jsonl", rows), title="t")
    assert load(str(tmp_path / "a.parquet"), name="parquet", title="t") == one


def test_a_hub_data_set_needs_its_extra_and_a_full_name(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_datasets(name: str, *rest, **more):
        if name == "datasets":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without_datasets)
    with pytest.raises(ValueError, match="needs the extra 'hub'"):
        load("hf:openai/gsm8k/main#train", name="hub")
    with pytest.raises(ValueError, match="does not name a data set"):
        load("openai/gsm8k", name="hub")


@given(st.lists(st.text(max_size=3), unique=True), st.integers(0, 10), st.integers(0, 10))
def test_every_prompt_falls_into_one_split_and_growth_at_the_end_moves_none(texts: list[str], a: int, b: int) -> None:
    few = {"test": a / 20, "tuning": b / 20}
    many = {**few, "train": 1 - (a + b) / 20}
    for problem in map(ask, texts):
        split = split_of(problem, many)
        assert split in SPLITS
        assert split_of(problem, few) == (split if split in few else None)


def test_a_labelled_repeat_takes_the_place_of_an_unlabelled() -> None:
    kept, repeats = distinct([ask("a").unlabelled(), ask("b"), ask("a"), ask("b").unlabelled()])
    assert (kept, repeats) == ([ask("a"), ask("b")], 2)
    assert take("t", "train", kept, 1)[0].id == min(p.id for p in kept)


def test_chains_load_and_grade_in_a_child_that_starts_fast_and_without_torch() -> None:
    task = load_task({"name": "chains", "seed": 3, "sizes": {"train": 8, "test": 4}})
    problems = task.problems("train")
    assert (len(problems), len(task.problems("test"))) == (8, 4)
    with GraderPool(task.grader, workers=1) as pool:
        assert all(v.correct for v in pool.grade([(p, f"{p.answer}.") for p in problems]))
        assert not any(v.correct for v in pool.grade([(p, f"{p.answer}0.") for p in problems]))
    code = "import headwater.grading.child, headwater.tasks.chains, sys; sys.exit('torch' in sys.modules)"
    start = time.perf_counter()
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ}, check=False).returncode == 0
    assert time.perf_counter() - start < 1.5  # 0.1 s alone; torch would take more than this.
    with pytest.raises(ValueError, match=r"chains has no \['length'\]"):
        load_task({"name": "chains", "length": 3})
