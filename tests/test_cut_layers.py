"""A model without some of its layers: what is left computes what it computed, from memory and from disk."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from miniature import ROOT, world_script
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cut_layers", ROOT / "scripts" / "cut_layers.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCRIPT, TOKENIZER = script(), world_script().build_tokenizer()
IDS = torch.arange(24).reshape(2, 12)


@pytest.fixture
def model() -> Any:
    """Five layers, of which 1 and 3 write nothing."""
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 5}
    made: Any = LlamaForCausalLM(LlamaConfig(vocab_size=len(TOKENIZER), tie_word_embeddings=True, **sizes)).eval()
    with torch.no_grad():
        for place in (1, 3):
            layer = made.model.layers[place]
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        for p in made.parameters():
            p.mul_(5)
    return made


def test_layers_that_write_nothing_can_go(model: Any):
    small = SCRIPT.cut(model, [3, 1])
    assert torch.equal(small(IDS).logits, model(IDS).logits)
    assert small.config.num_hidden_layers == 3 and model.config.num_hidden_layers == 5
    assert small.model.layers[1].self_attn.q_proj.weight is model.model.layers[2].self_attn.q_proj.weight
    assert SCRIPT.divergence(model, small, list(IDS)) == 0
    assert SCRIPT.divergence(model, SCRIPT.cut(model, [2]), list(IDS)) > 1e-3


def test_the_cache_has_a_place_for_every_layer(model: Any):
    small = SCRIPT.cut(model, [0, 3])
    cached = small.generate(IDS, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(cached, small.generate(IDS, max_new_tokens=8, do_sample=False, pad_token_id=0, use_cache=False))


def test_the_directory_loads_with_plain_transformers(model: Any, tmp_path: Path):
    model.save_pretrained(tmp_path / "whole")
    TOKENIZER.save_pretrained(tmp_path / "whole")
    SCRIPT.main([str(tmp_path / "whole"), "--drop", "1,3-4", "--to", str(tmp_path / "small")])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert loaded.config.num_hidden_layers == 2
    assert torch.allclose(loaded(IDS).logits, SCRIPT.cut(model, [1, 3, 4])(IDS).logits, atol=1e-6)


def test_texts_say_what_a_cut_costs(model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"question": "1+2*3="}\n{"question": "7*8-9="}\n')
    SCRIPT.main([str(tmp_path), "--drop", "1", "--drop", "2", "--texts", str(tmp_path / "rows.jsonl")])
    kept, lost = (line.rpartition(":")[2].split()[0] for line in capsys.readouterr().out.splitlines())
    assert float(kept) == 0 and float(lost) > 0


@pytest.mark.parametrize(("text", "layers"), [("3", [3]), ("3,8-10", [3, 8, 9, 10]), ("0-1,5", [0, 1, 5])])
def test_layer_numbers(text: str, layers: list[int]):
    assert SCRIPT.layer_numbers(text) == layers


@pytest.mark.parametrize("text", ["", "a", "3-", "4-3", "1,1", "1-2-3"])
def test_what_names_no_layers(text: str):
    with pytest.raises(ValueError, match="3,8-10"):
        SCRIPT.layer_numbers(text)


@pytest.mark.parametrize("drop", [[5], [0, 1, 2, 3, 4], [-1]])
def test_layers_that_cannot_go(model: Any, drop: list[int]):
    with pytest.raises(ValueError, match="must keep one"):
        SCRIPT.cut(model, drop)
