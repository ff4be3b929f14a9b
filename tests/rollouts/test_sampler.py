import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from headwater.config import LoRA
from headwater.models.language_model import LanguageModel
from headwater.rollouts import streams
from headwater.rollouts.batch import Batch
from headwater.rollouts.draw import draw
from headwater.rollouts.sampler import Sampling, TransformersSampler
from headwater.scoring.log_probs import View, score_tokens
from headwater.types import Message, Problem, Rollout

SAMPLING = Sampling(("test", 0), group_size=3, max_new_tokens=12)
LAST = 1 - 2.0**-53
INF = math.inf


@pytest.fixture(scope="module")
def model(make_model) -> LanguageModel:
    return make_model(0, trained=False)


@pytest.fixture(scope="module")
def mixed(problems) -> list[Problem]:
    """Prompts of very different lengths."""
    long = [Problem((Message("user", "1+2*3" * n),)) for n in (1, 9, 20)]
    return [*problems[:5], *long, *problems[5:8]]


@pytest.fixture(scope="module")
def rollouts(model, mixed) -> list[Rollout]:
    return TransformersSampler(model).sample(mixed, SAMPLING)


def assert_same(a: list[Rollout], b: list[Rollout]) -> None:
    """Bit-equal but for the log-probs, whose rounding depends on the shapes of the batch."""
    assert [replace(r, sampler_logprobs=[]) for r in a] == [replace(r, sampler_logprobs=[]) for r in b]
    for x, y in zip(a, b, strict=True):
        assert x.sampler_logprobs == pytest.approx(y.sampler_logprobs, abs=1e-5)


def test_order_and_shape_of_the_result(rollouts, mixed, model):
    assert [(r.problem_id, r.index) for r in rollouts] == [(p.id, g) for p in mixed for g in range(3)]
    for r, p in zip(rollouts, (p for p in mixed for _ in range(3)), strict=True):
        assert r.prompt_ids == model.encode(p.messages) and r.policy_version == 0
        assert 1 <= len(r.completion_ids) == len(r.sampler_logprobs) <= 12
        assert r.text == model.decode(r.completion_ids)
    assert len({tuple(r.completion_ids) for r in rollouts}) > 0.9 * len(rollouts)
    # The lengths vary, so rows left the batch at different times.
    assert len({len(r.completion_ids) for r in rollouts}) > 6 and 3 < sum(r.finished for r in rollouts) < 33


def test_rollouts_do_not_depend_on_the_batch(rollouts, mixed, model):
    for max_tokens in (1, 300):
        assert_same(TransformersSampler(model, max_tokens=max_tokens).sample(mixed, SAMPLING), rollouts)
    order = np.random.default_rng(0).permutation(len(mixed))
    shuffled = TransformersSampler(model).sample([mixed[i] for i in order], SAMPLING)
    assert_same(shuffled, [rollouts[3 * i + g] for i in order for g in range(3)])
    assert_same(TransformersSampler(model).sample(mixed[6:7], SAMPLING), rollouts[18:21])
    smaller = TransformersSampler(model).sample(mixed, replace(SAMPLING, group_size=2))
    assert_same(smaller, [r for r in rollouts if r.index < 2])
    shorter = TransformersSampler(model).sample(mixed, replace(SAMPLING, max_new_tokens=5))
    assert [r.completion_ids for r in shorter] == [r.completion_ids[:5] for r in rollouts]


def test_streams_and_repeated_problems_give_other_rollouts(rollouts, mixed, model):
    other = TransformersSampler(model).sample(mixed, replace(SAMPLING, stream=("test", 1)))
    assert sum(a.completion_ids == b.completion_ids for a, b in zip(other, rollouts, strict=True)) < 8
    twice = TransformersSampler(model).sample([mixed[0], mixed[1], mixed[0]], SAMPLING)
    assert_same(twice[:6], rollouts[:6])
    assert [r.index for r in twice] == [0, 1, 2, 0, 1, 2, 3, 4, 5]
    assert len({tuple(r.completion_ids) for r in twice if r.problem_id == mixed[0].id}) == 6
    # Asking for six at once is the same as asking twice for three.
    assert_same(TransformersSampler(model).sample(mixed[:1], replace(SAMPLING, group_size=6)), twice[:3] + twice[6:])


@pytest.mark.parametrize("lora", [None, LoRA(rank=4)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("max_tokens", [100_000, 100])
def test_sampler_and_trainer_agree_on_log_probs(make_model, mixed, lora, temperature, max_tokens):
    model = make_model(0, trained=False, lora=lora)
    drawn = TransformersSampler(model).sample(mixed, replace(SAMPLING, temperature=temperature))
    scored = score_tokens(model, Batch.of(drawn), View(temperature, max_tokens, chunk_tokens=7))
    gap = max(float((torch.tensor(r.sampler_logprobs) - s).abs().max()) for r, s in zip(drawn, scored, strict=True))
    assert gap < 1e-5
    if lora:
        model = replace(model, without_adapters=True)
        temperature -= 0.1  # the adapters alone make the difference
    wrong = score_tokens(model, Batch.of(drawn), View(temperature + 0.1, max_tokens, 7))
    assert (
        max(float((torch.tensor(r.sampler_logprobs) - s).abs().max()) for r, s in zip(drawn, wrong, strict=True)) > 0.1
    )


def test_log_probs_are_those_of_the_whole_module(rollouts, model):
    for r in rollouts[::5]:
        logits = model.module(input_ids=torch.tensor([r.prompt_ids + r.completion_ids])).logits[
            0, :, : model.vocab_size
        ]
        logprobs = logits.double().log_softmax(-1)[len(r.prompt_ids) - 1 : -1]
        want = logprobs[torch.arange(len(r.completion_ids)), torch.tensor(r.completion_ids)]
        assert r.sampler_logprobs == pytest.approx(want.tolist(), abs=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_first_tokens_follow_the_softmax(mixed, model, temperature):
    """20,000 draws of the counter-based numbers against exact probabilities, rare tokens put together."""
    hidden = model.hidden(torch.tensor([model.encode(mixed[0].messages)]))[:, -1]
    logits = hidden @ model.head.T
    keys = np.array([streams.key("frequency", i) for i in range(20_000)], dtype=np.uint64)
    uniform = torch.from_numpy(streams.uniforms(keys, np.zeros(20_000, dtype=int)))
    token, logprob = draw(logits.expand(20_000, -1), uniform, temperature=temperature)
    probs = (logits[0].double() / temperature).softmax(-1)
    torch.testing.assert_close(logprob.double(), probs.log()[token], rtol=0, atol=1e-5)
    counts = torch.bincount(token, minlength=len(probs)).numpy()
    expected = probs.numpy() * 20_000
    common = expected >= 10
    assert common.sum() > 15
    observed = [*counts[common], counts[~common].sum()]
    assert chisquare(observed, [*expected[common], expected[~common].sum()]).pvalue > 1e-3


def test_whole_rollouts_follow_the_model(mixed, model):
    """Second tokens too: their mean log-prob is minus the entropy at the prefixes visited."""
    drawn = TransformersSampler(model).sample(mixed[:1], replace(SAMPLING, group_size=600, max_new_tokens=2))
    seconds = [r for r in drawn if len(r.completion_ids) == 2]
    ids = torch.tensor([r.prompt_ids + r.completion_ids[:1] for r in seconds])
    logprobs = (model.hidden(ids)[:, -1] @ model.head.T).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    surprise = -torch.tensor([r.sampler_logprobs[1] for r in seconds])
    error = (surprise - entropy).std() / math.sqrt(len(seconds))
    assert len(seconds) > 300 and abs(float((surprise - entropy).mean())) < 4 * float(error)


def test_padding_rows_of_the_head_are_never_sampled(make_model, mixed, model, rollouts):
    padded = make_model(0, trained=False)
    rows = padded.module.get_output_embeddings().weight
    assert len(rows) == 320 and padded.vocab_size == 275
    with torch.no_grad():
        rows[padded.vocab_size :] = 50 * rows[: 320 - padded.vocab_size]
    ids = torch.tensor([padded.encode(mixed[0].messages)])
    assert int(padded.module(input_ids=ids).logits[0, -1].argmax()) >= padded.vocab_size
    assert_same(TransformersSampler(padded).sample(mixed, SAMPLING), rollouts)


def test_any_end_token_ends_and_only_the_last_token_is_one(rollouts, model):
    ends = set(model.eos_ids)
    assert len(ends) > 20 and len({r.completion_ids[-1] for r in rollouts} & ends) > 2
    for r in rollouts:
        assert not ends & set(r.completion_ids[:-1])
        assert r.finished == (r.completion_ids[-1] in ends)
        assert r.finished or len(r.completion_ids) == 12
    finished, cut = (next(r for r in rollouts if r.finished is f) for f in (True, False))
    decode = model.tokenizer.decode
    assert finished.text == decode(finished.completion_ids[:-1]) and cut.text == decode(cut.completion_ids)


def test_greedy_equals_transformers(make_model, mixed):
    model = make_model(3, trained=False, stops=())
    greedy = Sampling(("greedy",), group_size=1, max_new_tokens=15, temperature=0.0)
    for rollout in TransformersSampler(model).sample(mixed, greedy):
        ids = torch.tensor([rollout.prompt_ids])
        # A copy of the head without padding rows, which generate would sample.
        out = model.module.generate(  # pyright: ignore -- typed without generate
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=15,
            suppress_tokens=list(range(model.vocab_size, 320)),
            eos_token_id=list(model.eos_ids),
        )
        assert rollout.completion_ids == out[0, ids.shape[1] :].tolist()


def drawn(logits: list[float], uniform: list[float], **settings) -> list[int]:
    rows = torch.tensor([logits] * len(uniform))
    arguments: dict[str, Any] = {"temperature": 1.0} | settings
    return draw(rows, torch.tensor(uniform, dtype=torch.float64), **arguments)[0].tolist()


def test_draw_inverts_the_cumulative_distribution():
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().tolist()
    assert drawn(logits, [0, 0.09, 0.11, 0.29, 0.31, 0.59, 0.61, LAST]) == [0, 0, 1, 1, 2, 2, 3, 3]
    # Temperature 0.5 squares the odds: 1, 4, 9, 16 of 30.
    assert drawn(logits, [0.03, 0.04, 0.16, 0.17, 0.46, 0.47], temperature=0.5) == [0, 1, 1, 2, 2, 3]


def test_tokens_of_no_probability_are_never_drawn():
    assert drawn([-INF, 0, -INF, 0, -INF], [0, 0.49, 0.5, 0.51, LAST, 1.0]) == [1, 1, 3, 3, 3, 3]
    assert drawn([-INF] * 3 + [5.0] + [-INF] * 3, [0, 0.5, LAST]) == [3, 3, 3]
    # float32 log-probs of many tokens add up to a little more or less than 1.
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        logits = 4 * torch.randn(3000, generator=generator)
        logits[2000:] = -INF
        logits[:10] = -INF
        low, high = drawn(logits.tolist(), [0.0, LAST])
        assert 10 <= low <= high < 2000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_large_vocabulary_is_inverted_block_by_block(dtype: torch.dtype, temperature: float):
    """5,000 tokens, the first and last and a block within without mass: as by one exact sum, whatever the batch."""
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(300, 5000, generator=generator)).to(dtype)
    logits[:, 100:300] += 6.0  # of the first two blocks, too, some tokens are drawn
    for nothing in (slice(0, 100), slice(1280, 1410), slice(4800, 5000)):
        logits[:, nothing] = -INF
    uniform = torch.rand(300, dtype=torch.float64, generator=generator)
    uniform[:2] = torch.tensor([0.0, LAST])
    token, logprob = draw(logits, uniform, temperature=temperature)
    exact = (logits.double() / temperature).log_softmax(1)
    assert exact.gather(1, token[:, None]).isfinite().all()
    torch.testing.assert_close(logprob.double(), exact.gather(1, token[:, None])[:, 0], rtol=0, atol=2e-6)
    ends = exact.exp().cumsum(1)
    after = ends.gather(1, token[:, None])[:, 0]
    before = after - exact.exp().gather(1, token[:, None])[:, 0]
    assert (before - 1e-6 < uniform).all() and (uniform < after + 1e-6).all()
    single = [draw(logits[i : i + 1], uniform[i : i + 1], temperature=temperature) for i in (0, 7, 299)]
    assert [(int(t), float(p)) for t, p in single] == [(int(token[i]), float(logprob[i])) for i in (0, 7, 299)]


def test_a_small_vocabulary_is_summed_in_float64():
    """Of 4,000 tokens float32 sums are off by more than this."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 4000, generator=generator).expand(20_000, -1)
    uniform = torch.rand(20_000, dtype=torch.float64, generator=generator)
    token, _ = draw(logits, uniform, temperature=1.0)
    ends = logits[0].double().softmax(0).cumsum(0)
    after, before = ends[token], ends[token] - logits[0].double().softmax(0)[token]
    assert (before - 5e-9 < uniform).all() and (uniform < after + 5e-9).all()


def test_truncation_by_hand():
    # Probabilities .1 .4 .2 .3: in order of probability the tokens 1, 3, 2, 0.
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log().tolist()
    many = [(i + 0.5) / 1000 for i in range(1000)]

    def shares(**settings) -> list[float]:
        return (np.bincount(drawn(logits, many, **settings), minlength=4) / 1000).tolist()

    assert shares() == pytest.approx([0.1, 0.4, 0.2, 0.3], abs=2e-3)
    assert shares(top_k=1) == [0, 1, 0, 0]
    assert shares(top_k=2) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=2e-3)
    assert shares(top_k=9) == shares()
    assert shares(top_p=0.3) == [0, 1, 0, 0]
    # The token that crosses the threshold stays in.
    assert shares(top_p=0.45) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=2e-3)
    assert shares(top_p=0.75) == pytest.approx([0, 4 / 9, 2 / 9, 3 / 9], abs=2e-3)
    # After top-k the first token has 4/7 > 0.55 of what is left.
    assert shares(top_p=0.55, top_k=2) == [0, 1, 0, 0]
    assert shares(top_p=0.6, top_k=2) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=2e-3)
    # The log-prob is that of the whole distribution.
    rows = torch.tensor([logits])
    _, logprob = draw(rows, torch.zeros(1), temperature=1.0, top_k=1)
    assert float(logprob) == pytest.approx(math.log(0.4), abs=1e-6)


def test_what_all_prompts_begin_with_is_read_once(model, mixed, monkeypatch):
    """Worked examples in front of every prompt: the rollouts of each prompt alone, for the prefill of one."""
    sampler = TransformersSampler(model)
    worked = [Problem((Message("user", "7+5=12;12*3=16;" * 3 + p.messages[0].content),)) for p in mixed]
    alone = [rollout for problem in worked for rollout in sampler.sample([problem], SAMPLING)]
    assert_same(sampler.sample(worked, SAMPLING), alone)
    lengths = [len(model.encode(p.messages)) for p in worked]
    tokens = sampler.prefilled.tokens
    assert tokens < max(lengths) + len(worked) * (max(lengths) - 45) and tokens > max(lengths)
    # The same prompt in all but one token: each keeps a token of its own.
    assert_same(sampler.sample(worked[:1] * 2, SAMPLING)[:3], alone[:3])
    assert sampler.prefilled.tokens == lengths[0] + 1
    monkeypatch.setattr("headwater.rollouts.sampler.SHARED_FROM", max(lengths))
    sampler.sample(worked, SAMPLING)
    assert sampler.prefilled.tokens == len(worked) * max(lengths)


def test_windows_see_no_padding_between_tokens(make_model, mixed):
    """Layers with a window count the slots of the cache, so their prompts are read whole."""
    model = make_model(0, trained=False)
    config = copy.deepcopy(model.module.config)
    config.use_sliding_window, config.sliding_window = True, 8
    config.layer_types = ["sliding_attention"] * config.num_hidden_layers
    narrow = type(model.module)(config).eval()
    narrow.load_state_dict(model.module.state_dict())
    model = replace(model, module=narrow)
    worked = [Problem((Message("user", "7+5=12;12*3=16;" * 3 + p.messages[0].content),)) for p in mixed[2:7]]
    drawn = TransformersSampler(model).sample(worked, SAMPLING)
    scored = score_tokens(model, Batch.of(drawn), View(1.0, 100_000, 1000))
    for rollout, want in zip(drawn, scored, strict=True):
        assert rollout.sampler_logprobs == pytest.approx(want.tolist(), abs=1e-4)


def test_rollouts_carry_the_version_of_the_weights(model, mixed):
    sampler = TransformersSampler(model, max_tokens=1)
    sampler.load(None, 7)
    out = sampler.sample(mixed[:2], replace(SAMPLING, max_new_tokens=1))
    assert [r.policy_version for r in out] == [7] * 6


def stopping(model: LanguageModel, *stop: str) -> LanguageModel:
    return replace(model, config=model.config.model_copy(update={"stop": stop}))


@pytest.mark.parametrize("stop", [("a",), ("b", "0"), ("no such text",)])
def test_a_stop_string_only_cuts(rollouts, mixed, model, stop):
    """What is drawn until then is what is drawn without it; it counts up to the token that completes it."""
    stopped = TransformersSampler(stopping(model, *stop)).sample(mixed, SAMPLING)
    for short, whole in zip(stopped, rollouts, strict=True):
        ids, decode = whole.completion_ids, model.tokenizer.decode
        first = next((n for n in range(1, len(ids)) if any(s in decode(ids[:n]) for s in stop)), len(ids))
        assert short.completion_ids == ids[:first]
        assert short.sampler_logprobs == pytest.approx(whole.sampler_logprobs[:first], abs=1e-5)
        assert short.finished == (whole.finished or any(s in decode(ids) for s in stop))
        assert not any(s in short.text for s in stop) and whole.text.startswith(short.text)
    assert (stopped == rollouts) == (stop == ("no such text",))
