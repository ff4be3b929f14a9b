"""A token a row by `Decoder` against transformers' own modules: padding, shared heads, every kind of the family."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from headwater.config import LoRA
from headwater.models.decoding import FAMILY, Decoder
from headwater.models.language_model import adapt, wrap
from headwater.rollouts.caches import RoomyLayer
from headwater.rollouts.sampler import Sampling, TransformersSampler, _bias, _forward

SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def random_model(like: Any, kind: str, *, dtype: str = "float32", **settings: Any) -> Any:
    """With norms and biases that are not those of a fresh model, 1 and 0."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **settings}, eos_token_id=2)
    module = AutoModelForCausalLM.from_config(config, attn_implementation="headwater_cpu")
    with torch.no_grad():
        for weight in module.parameters():
            weight.normal_(1.0 if weight.ndim == 1 else 0.0, 0.3)
    module = module.to(getattr(torch, dtype)).eval().requires_grad_(False)
    return wrap(module, like.tokenizer, like.config.model_copy(update={"dtype": dtype}))


def roomy(model: Any) -> Any:
    cache: Any = DynamicCache(config=model.module.config)
    cache.layers = [RoomyLayer() for _ in cache.layers]
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
    model = random_model(make_model(0), kind, dtype=dtype, **settings)
    assert Decoder.fits(model)
    rows, width, steps = 5, 7, 12
    mask = torch.ones(rows, width + steps, dtype=torch.long)
    mask[1, :3], mask[4, :6] = 0, 0
    ids, bias = torch.randint(0, 300, (rows, width)), _bias(mask, getattr(torch, dtype))
    caches, lengths = [], mask[:, :width].sum(1)
    for _ in range(2):
        cache = roomy(model)
        places = (mask[:, :width].cumsum(1) - 1).clamp(min=0)
        _forward(model, ids, mask[:, :width], places, cache)
        caches.append(cache)
    decoder = Decoder(model, int(lengths.max()) + steps)
    for step in range(steps):
        if step == 6:  # rows leave
            kept = torch.tensor([0, 1, 4])
            bias, lengths = bias[kept], lengths[kept]
            for cache in caches:
                cache.batch_select_indices(kept)
        token, seen = torch.randint(0, 300, (len(lengths),)), bias[..., : width + step + 1]
        ours = decoder.step(token, lengths + step, seen, caches[0])
        theirs = _forward(model, token[:, None], seen, (lengths + step)[:, None], caches[1])
        assert ours.dtype == theirs.dtype and theirs.abs().max() > 1
        assert (ours - theirs).abs().max() / theirs.abs().max() < near
    for mine, other in zip(caches[0].layers, caches[1].layers, strict=True):
        assert torch.allclose(mine.keys, other.keys, atol=near) and torch.allclose(mine.values, other.values, atol=near)


def test_weights_are_read_where_they_are(make_model):
    """So an optimizer's step needs no new decoder to be seen."""
    model = random_model(make_model(0), "qwen3")
    decoder, one, bias = Decoder(model, 8), torch.zeros(1, dtype=torch.long), torch.zeros(1, 1, 1, 1)
    before = decoder.step(one, one, bias, roomy(model))
    for layer in model.module.model.layers:
        layer.mlp.down_proj.weight.mul_(2)
    assert not torch.allclose(before, decoder.step(one, one, bias, roomy(model)))


def test_what_the_decoder_does_not_compute_is_left_to_the_modules(make_model):
    like = make_model(0)
    assert Decoder.fits(random_model(like, "llama")) and "mistral" not in FAMILY
    assert not Decoder.fits(random_model(like, "mistral", sliding_window=None))
    assert not Decoder.fits(random_model(like, "llama", attention_bias=True))
    assert not Decoder.fits(random_model(like, "llama", mlp_bias=True))
    assert not Decoder.fits(random_model(like, "llama", dtype="bfloat16"))
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0}
    assert not Decoder.fits(random_model(like, "llama", rope_parameters=dynamic))
    pytest.importorskip("peft")
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
