import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from headwater import checkpoint
from headwater.config import Execution, Optimizer
from headwater.flops import Shape
from headwater.run import StageRun, lease, save_model
from headwater.types import Rollout
from headwater.update import AdamW


def tensors(value: float) -> dict[str, torch.Tensor]:
    # A view with strides, an integer and a scalar too.
    return {"a": torch.full((2, 3), value).T, "b": torch.arange(3), "step.a": torch.tensor(value)}


def save(root: Path, *steps: int) -> None:
    for step in steps:
        checkpoint.save(root, step, tensors(float(step)), {"meter": {"n": step}})


def kept(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_round_trip_and_only_two_are_kept(tmp_path):
    assert checkpoint.load_newest(tmp_path / "none") is None
    root = tmp_path / "checkpoints"
    save(root, 5, 10, 15, 9, 15)
    assert kept(root) == ["00000010", "00000015"]
    found = checkpoint.load_newest(root)
    assert found is not None
    assert found[1] == {"step": 15, "meter": {"n": 15}}
    assert found[0].keys() == tensors(0).keys()
    assert all(torch.equal(found[0][name], t) for name, t in tensors(15.0).items())


@pytest.mark.parametrize("torn", ["save_file", "_sync", "sha256_file", "rename"])
def test_a_write_that_dies_at_any_point_leaves_the_old_one(tmp_path, monkeypatch, torn):
    save(tmp_path, 5, 10)

    def die(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if torn == "rename":
            patch.setattr(Path, "rename", die)
        elif torn == "save_file":
            patch.setattr(checkpoint, "save_file", lambda t, p: (p.write_bytes(b"half"), die()))
        else:
            patch.setattr(checkpoint, torn, die)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 15)
    found = checkpoint.load_newest(tmp_path)
    assert found is not None and found[1]["step"] == 10 and float(found[0]["step.a"]) == 10
    save(tmp_path, 15)
    found = checkpoint.load_newest(tmp_path)
    assert found is not None and found[1]["step"] == 15 and kept(tmp_path) == ["00000010", "00000015"]


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_corrupt_checkpoint_names_the_folder_and_the_fix(tmp_path, file, damage):
    save(tmp_path, 5, 10)
    path = tmp_path / "00000010" / file
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data if damage == "flip" else data[: len(data) // 2])
    message = r"00000010 is corrupt: .*delete that folder to resume from step 5"
    with pytest.raises(ValueError, match=message):
        checkpoint.load_newest(tmp_path)
    shutil.rmtree(tmp_path / "00000010")
    found = checkpoint.load_newest(tmp_path)
    assert found is not None and found[1]["step"] == 5
    (tmp_path / "00000005" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="from the start of the stage"):
        checkpoint.load_newest(tmp_path)


@pytest.mark.parametrize("how", ["safetensors", "errno", "quota"])
def test_a_full_disk_says_what_to_do_and_leaves_earlier_checkpoints(tmp_path, monkeypatch, how):
    save(tmp_path, 5, 10)

    def full(*args, **kwargs):
        if how == "safetensors":
            raise RuntimeError("I/O error: No space left on device (os error 28)")
        raise OSError(errno.ENOSPC if how == "errno" else errno.EDQUOT, "no")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(
            OSError, match=r"no space left for checkpoint 15 in .*MiB free.*free some.*--store.*resumes"
        ):
            save(tmp_path, 15)
    assert kept(tmp_path) == ["00000005", "00000010"]
    found = checkpoint.load_newest(tmp_path)
    assert found is not None and found[1]["step"] == 10


def test_other_errors_stay_what_they_are(tmp_path, monkeypatch):
    def denied(*args):
        raise PermissionError(errno.EACCES, "denied")

    monkeypatch.setattr(checkpoint, "save_file", denied)
    with pytest.raises(PermissionError):
        save(tmp_path, 1)


def test_atomic_text(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    checkpoint.write_atomically(path, "old")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_sync", lambda p: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        with pytest.raises(OSError, match=r"no space left for x\.json"):
            checkpoint.write_atomically(path, "new")
    assert path.read_text() == "old" and kept(tmp_path) == ["x.json"]
    checkpoint.write_atomically(path, "new")
    assert path.read_text() == "new" and kept(tmp_path) == ["x.json"]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_stage_goes_on_from_its_newest_checkpoint_with_the_rows_before_it(tmp_path, make_model):
    execution = Execution(save_every=2, eval_every=1)
    optimizer = AdamW(make_model(0), Optimizer(lr=1e-3))
    run = StageRun(tmp_path, execution=execution, evaluate=lambda done: {"score": float(done)})
    assert run.restore(optimizer) == 0
    rollout = Rollout("p", 0, [1], [2], [0.0], "text", True, 0)
    for step in range(5):
        run.meter.add("trained", Shape(1, 1, 1, 1, 1, 0, 3), [(4, 6)])
        run.ledger.reveal(step, [f"p{step}"])
        with torch.no_grad():
            optimizer.masters["model.norm.weight"].fill_(step)
        run.log(step, 6, {"x": float(step)})
        run.show(step, [rollout] * 9)
        run.evaluate_if_due(step + 1)
        run.save_if_due(step + 1, 6, optimizer)
    assert [row["ledger/labels"] for row in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "ti')

    model = make_model(0)
    other = AdamW(model, Optimizer(lr=1e-3))
    again = StageRun(tmp_path, execution=execution)
    assert again.restore(other) == 4
    assert torch.equal(model.module.get_parameter("model.norm.weight"), torch.full((32,), 3.0))
    assert again.meter.state()["trained"]["tokens"] == 40
    assert [row["step"] for row in lines(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]
    assert [(row["step"], row["updates"]) for row in lines(tmp_path / "evals.jsonl")] == [(i, i + 1) for i in range(4)]
    assert [row["step"] for row in lines(tmp_path / "samples.jsonl")] == [0] * 4 + [2] * 4
    # The ledger keeps what was revealed, and a row counts what was revealed up to its step.
    assert again.ledger.revealed == 5
    again.log(3, 6, {})
    assert lines(tmp_path / "metrics.jsonl")[-1]["ledger/labels"] == 4


def test_a_full_disk_under_a_log_says_what_to_do(tmp_path, monkeypatch):
    run = StageRun(tmp_path)
    monkeypatch.setattr(Path, "open", lambda *a, **k: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match=r"no space left for metrics\.jsonl"):
        run.log(0, 1, {})


def test_saved_models_are_float32_masters_whole_or_absent(tmp_path, make_model, monkeypatch):
    model = make_model(0, compute="bfloat16")
    optimizer = AdamW(model, Optimizer(lr=1e-3))
    want = {name: master.detach().clone() for name, master in optimizer.masters.items()}
    target = tmp_path / "model"
    with monkeypatch.context() as patch:
        patch.setattr(type(model.tokenizer), "save_pretrained", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            save_model(model, optimizer, target)
    assert not target.exists()
    # Twice: a crash after the first left a model whose stage was not yet recorded as finished.
    for _ in range(2):
        save_model(model, optimizer, target)
    loaded = AutoModelForCausalLM.from_pretrained(target)
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == torch.float32 and torch.equal(parameter, want[name])
    assert AutoTokenizer.from_pretrained(target).get_vocab() == model.tokenizer.get_vocab()
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_one_writer_at_a_time(tmp_path):
    with lease(tmp_path), pytest.raises(BlockingIOError, match=r"is being trained by process \d+ on "), lease(tmp_path):
        pass
    with lease(tmp_path):
        pass
