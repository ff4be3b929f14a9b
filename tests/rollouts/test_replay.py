"""The segments that CUDA graphs replay, step by step on the CPU: the same rollouts as plain decoding gives."""

from dataclasses import replace

import pytest

from headwater.rollouts import sampler
from headwater.rollouts.sampler import Sampling, TransformersSampler
from headwater.types import Message, Problem

SAMPLING = Sampling(("replay", 0), group_size=3, max_new_tokens=12, temperature=0.8)


@pytest.mark.parametrize(("segment", "check"), [(256, 32), (4, 2), (1, 1), (5, 1)])
@pytest.mark.parametrize("sampling", [SAMPLING, replace(SAMPLING, top_k=3, max_new_tokens=1)])
@pytest.mark.parametrize("stop", [(), ("a", "0")])
def test_segments_draw_what_plain_decoding_draws(make_model, problems, monkeypatch, segment, check, sampling, stop):
    """Prompts of unequal length, rows that end in every segment; a slot or position off by one changes the tokens."""
    model = make_model(0, trained=False)
    model = replace(model, config=model.config.model_copy(update={"stop": stop}))
    mixed = [*problems[:4], Problem((Message("user", "1+2*3" * 9),)), Problem((Message("user", "1"),))]
    plain = TransformersSampler(model).sample(mixed, sampling)
    monkeypatch.setattr(sampler, "SEGMENT", segment)
    monkeypatch.setattr(sampler, "CHECK", check)
    monkeypatch.setattr(sampler, "_replayable", lambda *_: True)
    replayed = TransformersSampler(model).sample(mixed, sampling)
    assert [replace(r, sampler_logprobs=[]) for r in replayed] == [replace(r, sampler_logprobs=[]) for r in plain]
    for a, b in zip(replayed, plain, strict=True):
        assert a.sampler_logprobs == pytest.approx(b.sampler_logprobs, abs=1e-5)
    if sampling.max_new_tokens > 1:
        assert len({len(r.completion_ids) for r in plain}) > 4
