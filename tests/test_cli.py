"""The commands, as a user types them."""

import json
import subprocess
from pathlib import Path
from typing import Any

import miniature
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from typer.testing import CliRunner, Result

from headwater.cli import app
from headwater.stages.node import Job
from headwater.store import Store

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--set", "evaluations.rows.problems=2"]


def headwater(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return miniature.write(tmp_path_factory.mktemp("cli"))


@pytest.fixture(scope="module")
def ran(recipe: Path) -> Path:
    """A finished run: `out` and `store` beside the recipe."""
    root = recipe.parent
    done = headwater("run", recipe, "--out", root / "out", "--store", root / "store", *SMALL)
    assert done.exit_code == 0, done.output
    (root / "output.txt").write_text(done.output)
    return root


def test_version_and_help():
    assert headwater("--version").output.startswith("headwater 0.")
    for command in ("run", "resume", "eval", "export"):
        assert command in headwater("--help").output
        assert headwater(command, "--help").exit_code == 0


def test_run_prints_progress_and_results(ran: Path):
    output = (ran / "output.txt").read_text()
    assert "miniature: 12 nodes, 0 done before, 12 to do (5 distinct stages for 8 asked for by the arms)" in output
    assert "[12/12]" in output and "bridge \N{MINUS SIGN} direct on rows:" in output and "over problems" in output
    assert output.count("done in") == 12


def test_the_same_command_and_resume_train_nothing(ran: Path):
    before = (ran / "out" / "results.json").read_text()
    commands: list[list[Any]] = [
        ["run", ran / "recipe.toml", "--out", ran / "out", *SMALL],
        ["resume", ran / "out"],
        ["resume", ran / "out", "--on", "local:2"],
    ]
    for command in commands:
        done = headwater(*command, "--store", ran / "store")
        assert done.exit_code == 0, done.output
        assert "12 nodes, 12 done before, 0 to do" in done.output and "done in" not in done.output
        assert (ran / "out" / "results.json").read_text() == before


def test_a_changed_recipe_may_not_take_the_directory(ran: Path):
    done = headwater("run", ran / "recipe.toml", "--out", ran / "out", "--store", ran / "store", "--set", "seeds=[5]")
    assert done.exit_code == 2 and "holds a run of another recipe (seeds, evaluations differ)" in done.output


def test_dry_run_trains_nothing(recipe: Path, tmp_path: Path):
    done = headwater("run", recipe, "--dry-run", "--store", tmp_path / "store", "--out", tmp_path / "out")
    assert done.exit_code == 0 and "to do: 5 stages and 7 evaluations" in done.output
    assert list(tmp_path.iterdir()) == []


def test_dry_run_shows_what_is_done(ran: Path):
    done = headwater("run", ran / "recipe.toml", "--dry-run", "--store", ran / "store", *SMALL)
    assert "to do: 0 stages and 0 evaluations" in done.output


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda p: p.stem)
def test_dry_run_of_shipped_recipes(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = headwater("run", path, "--dry-run", "--store", tmp_path / "store")
    assert done.exit_code == 0, done.output
    assert "nodes over" in done.output and list(tmp_path.iterdir()) == []


def test_sources_out_of_reach_are_named_by_a_dry_run(recipe: Path, tmp_path: Path):
    task = ["--set", "task.name=hub", "--set", "task.source=hf:owner/name#train"]
    done = headwater("run", recipe, "--dry-run", "--store", tmp_path, *task)
    assert done.exit_code == 0, done.output
    assert "not checked here: data of hf:owner/name#train" in " ".join(done.output.split())
    assert headwater("run", recipe, "--store", tmp_path, "--out", tmp_path / "out", *task).exit_code == 2


def test_stage_runs_a_node_from_its_specification(ran: Path, tmp_path: Path):
    """In a process of its own, in another store: the same weights."""
    results = json.loads((ran / "out" / "results.json").read_text())
    key = results["arms"]["direct"]["seeds"]["0"]["stages"][0]
    spec = Store(ran / "store").path(key) / "spec.json"
    assert Job.from_json(spec.read_text()).to_json() == spec.read_text()
    command = [*miniature.HEADWATER, "stage", str(spec), "--store", str(tmp_path)]
    subprocess.run(command, check=True, env=miniature.environment(), capture_output=True)
    ours, theirs = (Store(root).model(key) / "model.safetensors" for root in (tmp_path, ran / "store"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_eval_prints_json(ran: Path, tmp_path: Path):
    """The trained student's number is the one in the results."""
    results = json.loads((ran / "out" / "results.json").read_text())
    row = results["arms"]["direct"]["seeds"]["0"]
    model = Store(ran / "store").model(row["stages"][-1])
    command = [*miniature.HEADWATER, "eval", str(model), str(ran / "recipe.toml"), "--store", str(tmp_path), *SMALL]
    command += ["--format", "json"]
    done = subprocess.run(command, check=True, env=miniature.environment(), capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert set(found) == {"rows"} and found["rows"]["avg@k"] == row["evals"]["rows"]["avg@k"]
    assert found["rows"]["num_problems"] == 2 and len(found["rows"]["per_problem"]) == 2


@pytest.fixture(scope="module")
def exported(ran: Path) -> Path:
    to = ran / "exported"
    done = headwater("export", ran / "out", "finished", to, "--store", ran / "store")
    assert done.exit_code == 0, done.output
    return to


def test_exported_student_loads_with_plain_transformers(ran: Path, exported: Path):
    results = json.loads((ran / "out" / "results.json").read_text())
    key = results["arms"]["finished"]["seeds"]["0"]["stages"][-1]
    model: Any = AutoModelForCausalLM.from_pretrained(exported)
    assert model.dtype == torch.bfloat16
    trained = AutoModelForCausalLM.from_pretrained(Store(ran / "store").model(key))
    assert trained.dtype == torch.float32
    for (name, ours), (other, theirs) in zip(model.named_parameters(), trained.named_parameters(), strict=True):
        assert name == other and torch.equal(ours, theirs.to(torch.bfloat16))
    tokenizer = AutoTokenizer.from_pretrained(exported)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "3+4*3="}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert model.generate(**prompt, max_new_tokens=3).shape[1] > prompt["input_ids"].shape[1]


def test_exported_student_has_a_card_and_samples_as_measured(exported: Path):
    generation = GenerationConfig.from_pretrained(exported)
    assert (generation.do_sample, generation.temperature, generation.top_p) == (True, 1.0, 1.0)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    ends = generation.eos_token_id
    assert tokenizer.eos_token_id in (ends if isinstance(ends, list) else [ends])
    card = (exported / "README.md").read_text()
    results = json.loads((exported.parent / "out" / "results.json").read_text())
    row = results["arms"]["finished"]["seeds"]["0"]
    assert card.startswith("---\nlibrary_name: transformers") and "# miniature: finished, seed 0" in card
    assert f"Labels: {row['labels']['distinct']} distinct, {row['labels']['revealed']} reveals" in card
    assert f"| rows | {row['evals']['rows']['avg@k']:.4f} | 2 | 2 |" in card
    assert not (exported.parent / ".exported").exists()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["direkt", "to"], "no arm 'direkt'"),
        (["direct", "to", "--seed", "7"], "no seed 7 in arm 'direct'; there are ['0']"),
        (["direct", "to", "--dtype", "int8"], "dtype 'int8': use float32 or bfloat16"),
        (["direct", "."], "exists: choose a directory that does not"),
        (["direct", "to", "--store", "elsewhere"], "is not in the store elsewhere: name the one it was run with"),
    ],
)
def test_export_refuses(ran: Path, arguments: list[str], part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    store = [] if "--store" in arguments else ["--store", ran / "store"]
    done = headwater("export", ran / "out", *arguments, *store)
    assert done.exit_code == 2 and part in " ".join(done.output.split())
    assert list(tmp_path.iterdir()) == []


def test_export_of_an_unfinished_run_says_how_to_finish_it(tmp_path: Path):
    done = headwater("export", tmp_path, "direct", tmp_path / "to")
    assert done.exit_code == 2 and f"headwater resume {tmp_path}" in " ".join(done.output.split())
