"""An evaluation that is stopped between two batches goes on to the same numbers; what they depend on is recorded."""

import json
from pathlib import Path

import pytest

from headwater.config import Evaluation
from headwater.evals.evaluate import evaluate
from headwater.meter import Meter
from headwater.models.language_model import LanguageModel
from headwater.tasks.chains import Chains, grade
from headwater.types import Problem, Verdict

PROBLEMS = Chains(seed=3, test=130).problems("test")
SETTINGS = Evaluation(problems=130, samples=3, max_new_tokens=32)


class Grader:
    """Grades; in the place of batch number `fails` it stands for a crash."""

    def __init__(self, fails: int | None = None) -> None:
        self.fails, self.seen = fails, 0

    def __call__(self, pairs: list[tuple[Problem, str]]) -> list[Verdict]:
        self.seen += 1
        if self.seen == self.fails:
            raise KeyboardInterrupt
        return [grade(text, problem) for problem, text in pairs]


@pytest.fixture(scope="module")
def world_student(load_world) -> LanguageModel:
    return load_world("student")


def run(model: LanguageModel, grader: Grader, directory: Path | None) -> tuple[dict, Meter, list[int]]:
    meter, told = Meter(), []
    found = evaluate(
        SETTINGS,
        model=model,
        problems=PROBLEMS,
        grade=grader,
        seed=5,
        meter=meter,
        directory=directory,
        on_batch=lambda done, metrics: told.append(done),
    )
    return found, meter, told


def test_a_kill_between_batches_changes_nothing(
    world_student: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(f"{evaluate.__module__}.EVALUATED_AT_ONCE", 64 * SETTINGS.samples)
    whole, meter, told = run(world_student, Grader(), None)
    assert told == [64, 128, 130]
    with pytest.raises(KeyboardInterrupt):
        run(world_student, Grader(fails=2), tmp_path)
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 64
    resumed, again, told = run(world_student, Grader(), tmp_path)
    assert resumed == whole and told == [128, 130]
    assert (again.tokens, again.flops) == (meter.tokens, meter.flops)
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [row["problem"] for row in rows] == [p.id for p in PROBLEMS]
    assert all(len(row["texts"]) == len(row["answers"]) == len(row["correct"]) == 3 for row in rows)


def test_majority_is_counted_from_the_rows(world_student: LanguageModel, tmp_path: Path):
    found, _, _ = run(world_student, Grader(), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]

    def by_hand(row: dict) -> float:
        """Of three votes: two or three equal ones win; else each answer has an equal chance."""
        pairs = [(a, c) for a, c in zip(row["answers"], row["correct"], strict=True) if a is not None]
        equal = [c for a, c in pairs if sum(a == other for other, _ in pairs) >= 2]
        return float(equal[0]) if equal else sum(c for _, c in pairs) / len(pairs) if pairs else 0.0

    assert found["maj@k"] == pytest.approx(sum(map(by_hand, rows)) / len(rows))
    assert found["avg@k"] < found["maj@k"] < found["pass@k"]["3"]
