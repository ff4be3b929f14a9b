"""What a user can get wrong: an exit code, one message that says what to do, no traceback, nothing lost."""

import builtins
import errno
import json
from pathlib import Path
from typing import Any

import miniature
import pytest
import safetensors.torch
from transformers import AutoTokenizer
from typer.testing import CliRunner, Result

from headwater import checkpoint
from headwater.cli import app
from headwater.store import Store


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return miniature.write(tmp_path_factory.mktemp("bad"))


def run(recipe: Path, root: Path, *changes: str, on: str = "inline", store: Path | None = None) -> Result:
    sets = [word for change in changes for word in ("--set", change)]
    command = ["run", str(recipe), "--out", str(root / "out"), "--store", str(store or root / "store"), "--on", on]
    return CliRunner().invoke(app, [*command, *sets])


def refused(done: Result, *parts: str, code: int = 2) -> str:
    """The message, after checking that it is one."""
    assert done.exit_code == code, done.output
    assert isinstance(done.exception, SystemExit), "an exception got out"
    message = " ".join(done.stderr.split())
    assert message.startswith("error: ") and message.count("error: ") == 1
    assert "Traceback" not in done.output and len(message) < 1200
    for part in parts:
        assert part in message, message
    return message


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (["pool.lables=3"], ["pool.lables: unknown key", "did you mean 'labels'", "given: 3"]),
        (["stages.warmup.steps=many"], ["stages.warmup.steps", "integer", "'many'"]),
        (["pool"], ["--set 'pool'", "write key=value"]),
        (["models.student.source=file:/nowhere/x"], ["'/nowhere/x' does not exist", "nearest existing parent", "hf:"]),
        (["models.student.source=world:pupil"], ["world:pupil", "available:"]),
        (["task.source=nowhere.jsonl"], ["'nowhere.jsonl' does not exist"]),
        (["task.answer_column=reply"], ["no column ['reply']", "it has ['answer', 'question']"]),
        (["task.grader=headwater.grading.text"], ["does not name a grader", "package.module:function"]),
        (["task.grader=lost.py:grade"], ["'lost.py:grade' is in a file that does not exist"]),
        (["task.sizes.train=400"], ["'train' has", "size is given as 400", "ask for fewer"]),
        (["pool.labels=100"], ["100 problems asked for", "has 40", "lower the number or add data"]),
        (["pool.max_reveals=1"], ["up to 4 answers", "max_reveals = 1", "raise the budget"]),
        (["evaluations.rows.split=train"], ["training prompts are also test prompts", "remove them from one side"]),
        (["execution.device=gpu"], ["execution.device = 'gpu'", "this machine has ['cpu'"]),
        (["stages.warmup.lora.targets=['wq']"], ["lora.targets ['wq'] are not in this model", "'q_proj'"]),
        (["models.student.stop_tokens=['no such token']"], ["stop token 'no such token'"]),
    ],
)
def test_refused_before_any_training(recipe: Path, tmp_path: Path, changes: list[str], parts: list[str]):
    refused(run(recipe, tmp_path, *changes), *parts)
    assert not list(tmp_path.glob("store/nodes/*/metrics.jsonl")) and not (tmp_path / "out" / "results.json").exists()


def test_missing_recipe_and_missing_run(recipe: Path, tmp_path: Path):
    refused(run(recipe.with_name("recpie.toml"), tmp_path), "no recipe at", "there are ['recipe.toml']")
    refused(CliRunner().invoke(app, ["resume", str(tmp_path)]), "no recipe at", "no recipes")


@pytest.mark.parametrize("on", ["inline", "local:2"])
def test_a_foreign_teacher_is_refused_before_its_training(recipe: Path, tmp_path: Path, on: str):
    """With a vocabulary of its own every token-level target would mean something else."""
    foreign = tmp_path / "foreign"
    script = miniature.world_script()
    tokenizer = script.build_tokenizer()
    tokenizer.add_tokens(["<think>"])
    script.build_model("32x2", tokenizer, 0).save_pretrained(foreign)
    tokenizer.save_pretrained(foreign)
    assert len(AutoTokenizer.from_pretrained(foreign)) > len(AutoTokenizer.from_pretrained(recipe.parent / "student"))
    done = run(recipe, tmp_path, f"models.teacher.source=file:{foreign}", on=on)
    parts = ["different tokenizers", "1 tokens differ", "'<think>'", str(foreign), "teacher of the student's family"]
    refused(done, *parts)
    assert not list(tmp_path.glob("store/nodes/*"))
    spans = [f"stages.{s}.{key}" for s in ("warmup", "distill") for key in ("alignment=spans", "stored_top_k=8")]
    assert "have the same tokenizer" in refused(run(recipe, tmp_path / "same", *spans, on=on))
    assert not list(tmp_path.glob("**/nodes/*"))
    if on == "inline":  # spans are for this teacher
        done = run(recipe, tmp_path / "spans", f"models.teacher.source=file:{foreign}", *spans)
        assert done.exit_code == 0, done.output
    direct = ["models.teacher.source=file:" + str(foreign), "arms.bridge.bridge=none"]
    assert "if and only if" in refused(run(recipe, tmp_path, *direct))


def test_a_store_that_cannot_be_written(recipe: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    done = run(recipe, tmp_path, store=tmp_path / "file" / "store")
    refused(done, f"the store {tmp_path}/file/store cannot be written", "--store or $HEADWATER_STORE")
    command = ["run", str(recipe), "--store", str(tmp_path / "store"), "--out", str(tmp_path / "file" / "out")]
    refused(CliRunner().invoke(app, command), f"{tmp_path}/file/out cannot be made", "choose another --out")


def test_a_model_directory_without_a_model(recipe: Path, tmp_path: Path):
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(run(recipe, tmp_path, f"models.student.source=file:{empty}"), f"{empty} has no config.json")
    assert not list(tmp_path.glob("store/nodes/*"))


def without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Make a package look as if it were not installed."""
    import importlib.util

    plain, find = builtins.__import__, importlib.util.find_spec

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == package:
            raise ImportError(f"No module named {name!r}")
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else find(name, *a))


def test_missing_extras_are_named(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(64))
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    with monkeypatch.context() as patch:
        without(patch, "gguf")
        done = run(recipe, tmp_path, f"models.teacher.source=file:{tmp_path}/model.gguf")
        refused(done, "reading model.gguf needs gguf", "pip install 'headwater[gguf]'")
    with monkeypatch.context() as patch:
        without(patch, "pyarrow")
        done = run(recipe, tmp_path, "task.name=parquet", f"task.source={tmp_path}/rows.parquet")
        refused(done, "Parquet needs the extra 'parquet'", "pip install 'headwater[parquet]'")
    with monkeypatch.context() as patch:
        without(patch, "datasets")
        done = run(recipe, tmp_path, "task.name=hub", "task.source=hf:owner/name#train")
        refused(done, "needs the extra 'hub'", "pip install 'headwater[hub]'")
    with monkeypatch.context() as patch:
        without(patch, "peft")
        done = run(recipe, tmp_path / "peft", "stages.warmup.lora.rank=4")
        refused(done, "lora needs peft: pip install 'headwater[lora]'")


class Crash(KeyboardInterrupt):
    """Stands for any death of the process."""


def crash_after(monkeypatch: pytest.MonkeyPatch, saves: int) -> None:
    """Let the process die at the end of its `saves`th checkpoint."""
    whole, count = checkpoint.save, [0]

    def save(*args: Any, **kwargs: Any) -> None:
        whole(*args, **kwargs)
        count[0] += 1
        if count[0] == saves:
            raise Crash

    monkeypatch.setattr(checkpoint, "save", save)


STEPS = "stages.student_rl.steps=5"


def half_done(recipe: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Checkpoints of a stage that crashed after its second one."""
    with monkeypatch.context() as patch:
        crash_after(patch, 2)
        assert run(recipe, root, STEPS).exit_code != 0
    (folder,) = (root / "store" / "nodes").glob("*/checkpoints")
    assert [path.name for path in sorted(folder.iterdir())] == ["00000001", "00000002"]
    return folder


def test_a_corrupt_checkpoint_is_named_and_the_one_before_it_still_works(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = half_done(recipe, tmp_path, monkeypatch)
    broken = folder / "00000002" / "tensors.safetensors"
    data = bytearray(broken.read_bytes())
    data[-1] ^= 1
    broken.write_bytes(data)
    message = refused(run(recipe, tmp_path, STEPS), f"checkpoint {folder / '00000002'} is corrupt: tensors.safetensors")
    assert "delete that folder to resume from step 1" in message
    assert (folder / "00000001").exists() and broken.exists(), "nothing is deleted on the user's behalf"
    for path in sorted((folder / "00000002").iterdir()):
        path.unlink()
    (folder / "00000002").rmdir()
    metrics = folder.parent / "metrics.jsonl"
    done = run(recipe, tmp_path, STEPS)
    assert done.exit_code == 0, done.output
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(range(5))


@pytest.mark.parametrize("place", ["checkpoint", "metrics", "model"])
def test_a_full_disk_stops_with_advice_and_loses_nothing(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
):
    folder = half_done(recipe, tmp_path, monkeypatch)
    kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    full = OSError(errno.ENOSPC, "No space left on device")

    def no_space(*args: Any, **kwargs: Any) -> None:
        raise full

    plain = Path.open

    def no_metrics(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if path.name == "metrics.jsonl" and "a" in mode:
            raise full
        return plain(path, mode, *args, **kwargs)

    with monkeypatch.context() as patch:
        if place == "checkpoint":
            patch.setattr(checkpoint, "save_file", no_space)
        elif place == "metrics":
            patch.setattr(Path, "open", no_metrics)
        else:
            patch.setattr(checkpoint, "save", lambda *args, **kwargs: None)
            patch.setattr(safetensors.torch, "save_file", no_space)
            patch.setattr("transformers.modeling_utils.safe_save_file", no_space)
        done = run(recipe, tmp_path, STEPS)
    refused(done, "no space left for", "MiB free", "free some space, or move the store", "run the same command", code=1)
    assert all(path.read_bytes() == data for path, data in kept.items())
    assert not list(folder.glob(".*")), "no half-written checkpoint"
    done = run(recipe, tmp_path, STEPS)
    assert done.exit_code == 0, done.output
    direct = json.loads((tmp_path / "out" / "results.json").read_text())["arms"]["direct"]["seeds"]["0"]
    assert direct["labels"]["revealed"] == 10 and Store(tmp_path / "store").is_done(direct["stages"][0])


def test_a_run_that_blows_up_is_a_failure_and_not_bad_input(recipe: Path, tmp_path: Path):
    """Weights that training made infinite: exit code 1, and the traceback is in a file."""
    done = run(recipe, tmp_path, "stages.student_rl.optimizer.lr=1e38")
    refused(done, "see error.txt of its node", code=1)
    notes = list((tmp_path / "store" / "nodes").glob("*/error.txt"))
    assert notes and all("Traceback" in path.read_text() for path in notes)


def test_weights_that_are_not_finite(recipe: Path, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    student = tmp_path / "student"
    student.mkdir()
    for path in (recipe.parent / "student").iterdir():
        (student / path.name).write_bytes(path.read_bytes())
    tensors = load_file(student / "model.safetensors")
    tensors["model.norm.weight"][:] = float("nan")
    save_file(tensors, student / "model.safetensors", metadata={"format": "pt"})
    refused(run(recipe, tmp_path, f"models.student.source=file:{student}"), "logits are not finite", "doctor")


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"spec": {"kind": "stage"}, "execution": {}, "monitor": null}'])
def test_what_is_no_specification(tmp_path: Path, text: str):
    (tmp_path / "spec.json").write_text(text)
    done = CliRunner().invoke(app, ["stage", str(tmp_path / "spec.json"), "--store", str(tmp_path / "store")])
    refused(done, "not a job", "give the spec.json of a node")


@pytest.mark.parametrize("on", ["inline", "local:1"])
def test_a_grader_without_its_function(recipe: Path, tmp_path: Path, on: str):
    done = run(recipe, tmp_path, f"task.grader={recipe.parent}/grader.py:score", on=on)
    assert done.exit_code in (1, 2) and "Traceback" not in done.stdout
    assert "score" in done.stderr and "grader.py" in done.stderr
