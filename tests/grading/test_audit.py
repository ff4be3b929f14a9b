import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from headwater.cli import app
from headwater.grading.audit import Sample, agreement, audit, grade_by_spelling, read_samples, second_grader
from headwater.grading.maths import grade_maths
from headwater.tasks.benchmarks import GRADERS
from headwater.types import Problem, Verdict

GOLDS = ["5", r"\frac{1}{2}", "x+1"]
TEXTS = [r"\boxed{5}", r"\boxed{\frac{1}{2}}", r"\boxed{1+x}"]  # The last one only by algebra.


def row(gold: str, *texts: str) -> dict[str, object]:
    verdicts = [grade_maths(text, Problem((), gold)) for text in texts]
    return {
        "problem": "p",
        "prompt": [{"role": "user", "content": "What?"}],
        "answer": gold,
        "correct": [v.correct for v in verdicts],
        "reasons": [v.reason for v in verdicts],
        "texts": list(texts),
    }


def test_agreement_by_hand() -> None:
    # 10 samples, 7 agreed; right: 6 and 5 of 10; by chance .6 * .5 + .4 * .5 = .5; kappa = (.7 - .5) / .5 = .4.
    first = [True] * 6 + [False] * 4
    second = [True] * 4 + [False] * 2 + [True] + [False] * 3
    found = agreement(first, second)
    assert (found.samples, found.agree, found.only_first, found.only_second) == (10, 7, 2, 1)
    assert found.rate == 0.7 and found.kappa == pytest.approx(0.4)
    assert agreement([True, True], [True, True]).kappa is None
    assert agreement([True, False], [False, True]).kappa == -1
    with pytest.raises(ValueError, match="not 0 and 0"):
        agreement([], [])


def test_a_monitor_can_audit_samples_without_files() -> None:
    samples = [Sample(Problem((), g), 0, t, True, "correct") for g, t in zip(GOLDS, TEXTS, strict=True)]
    found, disputed = audit(samples, lambda pairs: [grade_by_spelling(t, p) for p, t in pairs])
    assert found.agree == 2 and found.only_first == 1 and found.only_second == 0
    assert [(s.text, v) for s, v in disputed] == [(TEXTS[2], Verdict(False, True, "wrong", 0.0, answer="1+x"))]


@pytest.mark.parametrize(
    ("gold", "completion", "reason"),
    [
        ("18", "She has 18 left.", "correct"),
        ("1,234", "#### 1234", "correct"),
        ("1234", r"The answer is \$1,234.", "correct"),
        ("0.5", r"\boxed{\frac12}", "correct"),
        (r"\sqrt{2}", r"\boxed{\sqrt2}", "correct"),
        (r"5\text{ cm}", r"\boxed{5}", "correct"),
        ("9 (apples)", "The answer is 9 apples.", "correct"),
        ("5", r"\boxed{4} and \boxed{5}", "correct"),
        ("5", r"\boxed{5} and \boxed{4}", "wrong"),
        ("5", "5 or maybe 6", "wrong"),
        ("(1,2)", r"\boxed{(2,1)}", "wrong"),
        ("5", r"\boxed{5", "unparsed"),
        ("5", "", "unparsed"),
    ],
)
def test_the_second_grader(gold: str, completion: str, reason: str) -> None:
    assert grade_by_spelling(completion, Problem((), gold)).reason == reason


def test_the_command_lists_disagreements(tmp_path: Path) -> None:
    for key, rows in {"a": [row(g, t, "no") for g, t in zip(GOLDS, TEXTS, strict=True)], "b": [row("7", "7")]}.items():
        (tmp_path / "nodes" / key).mkdir(parents=True)
        text = "".join(json.dumps(r) + "\n" for r in rows)
        (tmp_path / "nodes" / key / "samples.jsonl").write_text(text)
    (tmp_path / "nodes" / "c").mkdir()
    (tmp_path / "nodes" / "c" / "samples.jsonl").write_text(json.dumps({"step": 1, "text": "a rollout"}) + "\n")
    evals = {
        "seeds": {"0": {"evals": {"hard": {"per_problem": "evals/a.json"}, "easy": {"per_problem": "evals/b.json"}}}}
    }
    (tmp_path / "results.json").write_text(json.dumps({"arms": {"x": evals}}))
    assert len(read_samples(tmp_path)) == 7 and len(read_samples(tmp_path, "easy")) == 1
    out = tmp_path / "disputed.jsonl"
    result = CliRunner().invoke(app, ["audit-grader", str(tmp_path), "--task", "hard", "--out", str(out)])
    assert result.exit_code == 0, result.output
    # 3 right for the first, 2 for the second, of 6: by chance 1/2 * 1/3 + 1/2 * 2/3 = 1/2; (5/6 - 1/2) / (1/2) = 2/3.
    assert "6 samples, agreement 83.33%, Cohen's kappa 0.667" in result.output
    (said,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert said["gold"] == "x+1" and said["recorded"]["correct"] and said["second"]["answer"] == "1+x"
    assert CliRunner().invoke(app, ["audit-grader", str(tmp_path), "--task", "none"]).exit_code == 2
    own = CliRunner().invoke(app, ["audit-grader", str(tmp_path), "--against", "headwater.grading.maths:grade_maths"])
    assert "agreement 100.00%" in own.output


def test_the_directory_of_an_evaluation_alone(tmp_path: Path) -> None:
    for name, golds in (("gsm8k", "56"), ("svamp", "7")):
        (tmp_path / f"samples_{name}.jsonl").write_text("".join(json.dumps(row(g, g)) + "\n" for g in golds))
    found = {name: {"avg@k": 1.0, "per_problem": {"p": 1.0}} for name in ("gsm8k", "svamp")}
    (tmp_path / "results.json").write_text(json.dumps(found))
    assert len(read_samples(tmp_path)) == 3 and len(read_samples(tmp_path, "gsm8k")) == 2


def test_who_has_a_second_grader_without_being_asked() -> None:
    # A grader that is renamed must not lose its second.
    assert {second_grader(grader) for grader in GRADERS.values()} == {"headwater.grading.audit:grade_by_spelling"}
    assert second_grader("headwater.tasks.chains:grade") is None is second_grader(None)
