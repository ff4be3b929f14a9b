"""`headwater eval` on benchmarks: what is asked, what is recorded, what lm-evaluation-harness would read."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from headwater.cli import app
from headwater.study.measure import of_benchmarks
from headwater.tasks import benchmarks
from headwater.tasks.benchmarks import Benchmark
from headwater.tasks.chains import Chains


@pytest.fixture
def sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A benchmark `sums`, without splits, of the world's own problems, and `plain` with an official test set."""
    rows = [{"q": p.messages[0].content, "a": p.answer} for p in Chains(seed=9, test=6).problems("test")]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    facts = {"test_source": str(path), "prompt_column": "q", "answer_column": "a"}
    table = {"sums": Benchmark("words", 6, facts, divided=True), "plain": Benchmark("words", 6, facts)}
    monkeypatch.setattr(benchmarks, "benchmarks", lambda: table)
    monkeypatch.setattr("headwater.study.measure.benchmarks", lambda: table)
    return tmp_path


def headwater(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_eval_of_benchmarks(sums: Path):
    command: list[Any] = ["eval", "world:student", "sums", "plain", "--samples", 2, "--max-new-tokens", 8]
    command += ["--template", "none", "--problems", 5, "--seed", 4, "--store", sums / "store"]
    done = headwater(*command, "--out", sums / "out", "--lm-eval", sums / "beside", "--set", "execution.threads=1")
    assert done.exit_code == 0, done.output
    assert "maj@k" in done.output and "samples.jsonl" in done.output
    found = json.loads((sums / "out" / "results.json").read_text())
    assert list(found) == ["sums", "plain"]
    row = found["sums"]
    protocol = row["protocol"]
    taken = {"samples": 2, "max_new_tokens": 8, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 4, "split": "all"}
    taken |= {"template": "none", "stop": ["\n\nQuestion:"], "system": None, "thinking": False, "benchmark": "sums"}
    taken |= {"model": "world:student", "dtype": "float32", "shots": 0, "test_source": str(sums / "rows.jsonl")}
    assert {name: protocol[name] for name in taken} == taken
    assert protocol["grader"].endswith("grade_number") and len(protocol["digest"]) == 20
    assert found["plain"]["protocol"]["split"] == "test"
    samples = [json.loads(line) for line in (sums / "out" / row["samples_file"]).read_text().splitlines()]
    assert len(samples) == 5 and all(len(sample["texts"]) == 2 for sample in samples)
    assert row["ci95"][0] <= row["avg@k"] <= row["ci95"][1]

    (results,) = sums.glob("beside/*/results_*.json")
    export = json.loads(results.read_text())
    assert export["results"]["sums"]["exact_match,none"] == row["avg@k"]
    assert export["results"]["sums"]["exact_match_stderr,none"] == row["standard_error"]
    assert {"pass@2,none", "maj@2,none"} < export["results"]["sums"].keys()
    assert export["n-samples"]["sums"] == {"original": 5, "effective": 5} and export["n-shot"] == {
        "sums": 0,
        "plain": 0,
    }
    config = export["configs"]["sums"]["generation_kwargs"]
    assert config["until"] == ["\n\nQuestion:"] and config["max_gen_toks"] == 8 and config["do_sample"]
    lines = [json.loads(line) for line in next(results.parent.glob("samples_sums_*.jsonl")).read_text().splitlines()]
    assert [line["doc_id"] for line in lines] == list(range(5))
    assert [line["resps"] for line in lines] == [[sample["texts"]] for sample in samples]
    assert sum(line["exact_match"] for line in lines) / 5 == pytest.approx(row["avg@k"])

    again = headwater(*command, "--format", "json")
    assert "2 done before, 0 to do" in again.output
    shown = json.loads(again.stdout)
    assert shown["plain"]["avg@k"] == found["plain"]["avg@k"]


def test_greedy_and_whole_by_default(sums: Path):
    recipe = of_benchmarks(["sums"], task={}, evaluation={"max_new_tokens": 4}, model={})
    settings = recipe.evaluations["sums"]
    assert (settings.samples, settings.temperature, settings.problems, settings.split) == (1, 0.0, 6, "all")
    assert recipe.models["student"].stop == () and recipe.models["student"].template == "chat"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gsm9k"], "no benchmark is called 'gsm9k'"),
        (["sums", "--set", "evaluations.sums.sample=3"], "did you mean 'samples'"),
        (["sums", "--set", "pool.labels=3"], "pool: unknown key"),
        (["sums", "--temperature", "0", "--samples", "2"], "temperature = 0 gives 2 equal samples"),
        (["sums", "--shots", "9"], "sums: shots = 9"),
        (["recipes/quickstart.toml", "sums"], "a recipe stands alone"),
        (["recipes/quickstart.toml", "--samples", "2"], "a recipe stands alone"),
        (["sums", "--format", "xml"], "'xml' is not one of 'text', 'json'"),
    ],
)
def test_bad_usage(sums: Path, arguments: list[str], message: str):
    done = headwater("eval", "world:student", *arguments, "--store", sums / "store")
    assert done.exit_code == 2
    assert message in done.output
