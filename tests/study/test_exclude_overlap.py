"""What overlaps with an evaluation is shown, and kept out of the pool when the recipe says so."""

import json
from pathlib import Path

import miniature
import pytest
from typer.testing import CliRunner

from headwater.cli import app
from headwater.config import Pool, load_recipe
from headwater.report.data import survey
from headwater.spec import StageSpec
from headwater.stages.node import select
from headwater.study.graph import plan
from headwater.tasks import benchmarks
from headwater.tasks.benchmarks import Benchmark


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half of the training problems differ from the test problems in numbers only."""
    path = miniature.write(tmp_path_factory.mktemp("overlap"))
    alike = [f"{a}+{b}*3=" for a in range(5) for b in range(10)]
    others = [f"{a}-{b}-7*2=" for a in range(5) for b in range(8)]
    (path.parent / "rows.jsonl").write_text(rows(alike[:30] + others))
    (path.parent / "test.jsonl").write_text(rows(alike[30:]))
    task = f'prompt_column = "question"\ntest_source = "file:{path.parent}/test.jsonl"\nfractions = {{ train = 1.0 }}'
    text = path.read_text().replace('prompt_column = "question"', task)
    path.write_text(text.replace("sizes = { train = 40, test = 8, tuning = 4 }\n", ""))
    return path


def rows(questions: list[str]) -> str:
    found = [{"question": q, "answer": "1", "solution": "1+1=2;2."} for q in questions]
    return "".join(json.dumps(row) + "\n" for row in found)


def test_overlapping_problems_leave_the_pool(recipe: Path):
    plain, careful = (plan(load_recipe(recipe, more)) for more in ([], ["pool.exclude_overlap=0.9"]))
    for graph, some in ((plain, True), (careful, False)):
        for key in graph.stages:
            node = graph.nodes[key]
            assert isinstance(node, StageSpec)
            assert any("+" in p.messages[0].content for p in select(node.problems)) is some
    assert not set(plain.stages) & set(careful.stages)
    with pytest.raises(ValueError, match="the split has 40"):
        plan(load_recipe(recipe, ["pool.exclude_overlap=0.9", "pool.labels=41"]))
    with pytest.raises(ValueError, match="exclude_overlap"):
        load_recipe(recipe, ["pool.exclude_overlap=0"])


def test_prompts_that_are_test_prompts_too_can_be_left_out(recipe: Path):
    (recipe.parent / "again.jsonl").write_text(rows([f"{a}-{b}-7*2=" for a in range(2) for b in range(4)]))
    loaded = load_recipe(recipe)
    task = {**loaded.task, "source": f"file:{recipe.parent}/again.jsonl", "fractions": {"test": 1.0}}
    del task["test_source"]
    again = loaded.evaluations["rows"].model_copy(update={"task": task, "problems": 8})
    doubled = loaded.model_copy(update={"evaluations": {"rows": again}})
    with pytest.raises(ValueError, match=r"8 of 70 training prompts are also test prompts.*exclude_overlap"):
        plan(doubled)
    careful = plan(doubled.model_copy(update={"pool": Pool(labels=8, exclude_overlap=1.0)}))
    assert careful.stages


def test_a_question_is_not_trained_on_in_another_prompt(recipe: Path, monkeypatch: pytest.MonkeyPatch):
    place = str(recipe.parent / "rows.jsonl")
    facts = {"test_source": place, "prompt_column": "question", "answer_column": "answer"}
    table = {name: Benchmark("words", 70, facts, divided=True) for name in ("sums", "more")}
    monkeypatch.setattr(benchmarks, "benchmarks", lambda: table)
    loaded = load_recipe(recipe)
    other = loaded.evaluations["rows"].model_copy(
        update={"task": {"name": "more", "template": "none"}, "split": "all", "problems": 70}
    )
    with pytest.raises(ValueError, match=r"training prompts are also test prompts"):
        plan(loaded.model_copy(update={"task": {"name": "sums"}, "evaluations": {"rows": other}}))
    test = other.model_copy(update={"split": "test", "problems": 4})
    plan(loaded.model_copy(update={"task": {"name": "sums"}, "evaluations": {"rows": test}}))


def test_survey_counts_and_shows(recipe: Path):
    found = survey(load_recipe(recipe), 0.9, examples=2)
    row = found["overlap"]["rows"]["train"]
    assert (row["problems"], row["numbers"]["count"]) == (70, 30)
    assert [pair["score"] for pair in row["numbers"]["examples"]] == [1.0, 1.0]
    prompts, solutions = found["lengths"]["train prompts"], found["lengths"]["solutions"]
    assert prompts["count"] == solutions["count"] == 70 and solutions["median"] == solutions["max"]
    assert sum(prompts["histogram"].values()) == 70 and prompts["median"] <= prompts["p95"] <= prompts["max"] <= 32
    assert found["limits"]["stages.teacher_rl"] == found["limits"]["evaluations.rows"] == 6

    done = CliRunner().invoke(app, ["overlap", str(recipe), "--threshold", "0.9", "--examples", "1"])
    assert done.exit_code == 0 and "rows: 30 of 70 train problems stand in it but for numbers" in done.output
    assert "<=    32" in done.output and "stages.teacher_rl 6" in done.output
    bad = CliRunner().invoke(app, ["overlap", str(recipe), "--threshold", "2"])
    assert bad.exit_code == 2 and "share in (0, 1]" in bad.output
