"""A token a row by `Decoder` against transformers' own modules: padding, shared heads, every kind of the family."""

from typing import Any

import pytest
import torch
from families import SIZES, random_module  # pyright: ignore -- pytest puts it on the path
from transformers import DynamicCache

from headwater.config import LoRA
from headwater.models.language_model import adapt, wrap
from headwater.rollouts.caches import RoomyLayer
from headwater.rollouts.decoding import FAMILY, FEW, Decoder
from headwater.rollouts.sampler import Sampling, TransformersSampler, _bias, _forward, _Modules

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def random_model(like: Any, kind: str, *, dtype: str = "float32", **settings: Any) -> Any:
    module = random_module(kind, getattr(torch, dtype), **settings).requires_grad_(False)
    return wrap(module, like.tokenizer, like.config.model_copy(update={"dtype": dtype}))


def prefilled(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> Any:
    cache: Any = DynamicCache(config=model.module.config)
    cache.layers = [RoomyLayer() for _ in cache.layers]
    _forward(model, ids, mask, (mask.cumsum(1) - 1).clamp(min=0), cache)
    return cache


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("qwen2", {"head_dim": 8}),
        ("qwen3", {}),
        ("qwen3", {"num_key_value_heads": 4}),
    ],
)
@pytest.mark.parametrize(("dtype", "near"), [("float32", 2e-5), ("float64", 1e-5)])
@torch.inference_mode()
def test_tokens_one_by_one_are_those_of_the_modules(make_model, kind, settings, dtype, near):
    """Three prompts of unlike lengths, three rows each; rows leave, and then all of one prompt."""
    model = random_model(make_model(0), kind, dtype=dtype, **settings)
    assert Decoder.fits(model)
    group, width, steps = 3, 7, 40
    assert steps > FEW
    mask = torch.ones(3, width, dtype=torch.long)
    mask[0, :3], mask[2, :6] = 0, 0
    ids = torch.randint(0, 300, (3, width))
    decoder = Decoder(model, prefilled(model, ids, mask), mask, group, steps)
    whole = torch.cat([mask, mask.new_ones(3, steps)], 1).repeat_interleave(group, 0)
    cache = prefilled(model, ids, mask)
    cache.batch_repeat_interleave(group)
    bias, lengths = _bias(whole, getattr(torch, dtype)), mask.sum(1).repeat_interleave(group)
    modules = _Modules(model, cache, bias, lengths, width)
    rows, leaving = 3 * group, {6: [0, 1, 4, 6, 7, 8], 12: [0, 1, 3, 5], 18: [3], 24: [0]}
    for step in range(steps):
        if step in leaving:
            for reader in (decoder, modules):
                reader.keep(torch.tensor(leaving[step]))
            rows = len(leaving[step])
        token = torch.randint(0, 300, (rows,))
        ours, theirs = decoder.step(token), modules.step(token)
        assert ours.dtype == theirs.dtype and theirs.abs().max() > 1
        assert (ours - theirs).abs().max() / theirs.abs().max() < near


def test_a_prompt_is_kept_once_for_all_of_its_rows(make_model):
    model = random_model(make_model(0), "qwen3")
    mask = torch.ones(2, 5, dtype=torch.long)
    decoder = Decoder(model, prefilled(model, torch.randint(0, 300, (2, 5)), mask), mask, 4, 8)
    decoder.step(torch.arange(8))
    heads, width = SIZES["num_key_value_heads"], SIZES["head_dim"]
    assert decoder.prompts[0][0].shape == (2 * heads, 5, width)
    decoder.keep(torch.tensor([5, 6]))
    assert decoder.prompts[0][0].shape == (heads, 5, width) and len(decoder.own[0].keys) == 2  # pyright: ignore -- None until the first token


def test_what_the_decoder_does_not_compute_is_left_to_the_modules(make_model):
    like = make_model(0)
    assert Decoder.fits(random_model(like, "llama")) and "mistral" not in FAMILY
    assert not Decoder.fits(random_model(like, "mistral", sliding_window=None))
    assert not Decoder.fits(random_model(like, "llama", attention_bias=True))
    assert not Decoder.fits(random_model(like, "llama", mlp_bias=True))
    assert not Decoder.fits(random_model(like, "llama", dtype="bfloat16"))
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0}
    assert not Decoder.fits(random_model(like, "llama", rope_parameters=dynamic))
    assert not Decoder.fits(random_model(like, "llama", vocab_size=1 << 20, hidden_size=64, num_attention_heads=2))
    pytest.importorskip("peft", reason="adapters need the extra 'lora'")
    assert not Decoder.fits(adapt(random_model(like, "llama"), LoRA(rank=2), 0))


def test_samples_are_those_of_the_modules(make_model, problems, monkeypatch):
    model = make_model(0, trained=False)
    sampling, calls = Sampling(("test", 0), 4, 24), []
    step = Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda *args: calls.append(1) or step(*args))
    ours = TransformersSampler(model).sample(problems[:6], sampling)
    assert len(calls) > 12
    monkeypatch.setattr(Decoder, "fits", staticmethod(lambda model: False))
    theirs = TransformersSampler(model).sample(problems[:6], sampling)
    assert [r.completion_ids for r in ours] == [r.completion_ids for r in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.sampler_logprobs == pytest.approx(other.sampler_logprobs, abs=1e-5)
