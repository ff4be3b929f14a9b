"""The same numbers on a CUDA device: losses against the float64 oracle, sampler against trainer, update invariances."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from headwater.config import GRPO, Execution, ModelConfig, Optimizer
from headwater.losses import oracle
from headwater.losses.dense import dense_divergence
from headwater.losses.projection import token_logprobs
from headwater.mesh import Mesh
from headwater.models.language_model import LanguageModel, compile_layers
from headwater.rollouts import sampler
from headwater.rollouts.batch import Batch, micro_batches
from headwater.rollouts.sampler import Sampling, TransformersSampler
from headwater.scoring.log_probs import View, score_tokens, top_k_scores
from headwater.scoring.scores import HiddenScores, TopKScores
from headwater.stages.grpo import policy_loss
from headwater.types import Message, Problem
from headwater.update import AdamW, update

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEVICE = "cuda"
ROWS, VOCAB = 1024, 1003
DTYPES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Tolerated norm of the difference over the norm: bfloat16 rounds every logit to 8 bits before the softmax."""


def relative(value: Tensor | None, exact: Tensor | None) -> float:
    assert value is not None and exact is not None
    exact = exact.detach()
    return float((value.detach().double().cpu() - exact).norm() / exact.norm())


def oracle_inputs(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The rounded values themselves in float64 on the CPU, so that only the computation is compared."""
    doubled = {n: t.detach().cpu().double() if t.is_floating_point() else t.cpu() for n, t in tensors.items()}
    for name in ("hidden", "head"):
        doubled[name].requires_grad_()
    return doubled


def loss_inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(0)
    x = {
        "hidden": torch.randn(77, 64),
        "head": torch.randn(ROWS, 64) / 4,
        "teacher_hidden": torch.randn(77, 96),
        "teacher_head": torch.randn(ROWS, 96) / 5,
    }
    x = {name: value.to(DEVICE, dtype) for name, value in x.items()}
    x |= {"weights": torch.rand(77).to(DEVICE), "targets": torch.randint(VOCAB, (77,)).to(DEVICE)}
    x["weights"][::7] = 0
    x["hidden"].requires_grad_(), x["head"].requires_grad_()  # pyright: ignore -- both for effect
    return x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("k", [0, 16])
def test_dense_divergence_and_gradients_equal_the_oracle(kind, k, dtype):
    x = loss_inputs(dtype)
    y = oracle_inputs(x)
    student = y["hidden"] @ y["head"].T
    log_p = (y["teacher_hidden"] @ y["teacher_head"].T)[:, :VOCAB].log_softmax(1)
    options = {"kind": kind, "vocab_size": VOCAB, "beta": 0.3}
    if k:
        top = log_p.topk(k)
        scores = TopKScores(top.indices.to(DEVICE), top.values.float().to(DEVICE))
        exact = oracle.topk_divergence_from_logits(student, top.indices, top.values, y["weights"], **options)
    else:
        scores = HiddenScores(x["teacher_hidden"], x["teacher_head"])
        exact = oracle.dense_divergence_from_logits(student, log_p, y["weights"], **options)
    value, _, _ = dense_divergence(x["hidden"], x["head"], scores, x["weights"], chunk_tokens=32, **options)
    value.backward(), exact.backward()  # pyright: ignore -- both for effect
    assert relative(value, exact) < DTYPES[dtype]
    for name in ("hidden", "head"):
        assert relative(x[name].grad, y[name].grad) < DTYPES[dtype], name
    assert x["head"].grad is not None and not x["head"].grad[VOCAB:].any()
    assert x["hidden"].grad is not None and not x["hidden"].grad[::7].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprobs_and_gradients_equal_the_oracle(temperature, dtype):
    x = loss_inputs(dtype)
    y = oracle_inputs(x)
    options = {"vocab_size": VOCAB, "temperature": temperature}
    logprobs, entropy = token_logprobs(x["hidden"], x["head"], x["targets"], chunk_tokens=32, **options)
    exact, exact_entropy = oracle.token_logprobs_from_logits(y["hidden"] @ y["head"].T, y["targets"], **options)
    (x["weights"] * logprobs).sum().backward(), (y["weights"] * exact).sum().backward()  # pyright: ignore -- likewise
    assert relative(logprobs, exact.detach()) < DTYPES[dtype]
    assert relative(entropy, exact_entropy.detach()) < DTYPES[dtype]
    for name in ("hidden", "head"):
        assert relative(x[name].grad, y[name].grad) < DTYPES[dtype], name


def tokens() -> PreTrainedTokenizerFast:
    """Reads "3 1 4" as these ids."""
    words = Tokenizer(WordLevel({str(i): i for i in range(61)}, unk_token="0"))
    words.pre_tokenizer = WhitespaceSplit()  # pyright: ignore -- a setter untyped
    return PreTrainedTokenizerFast(tokenizer_object=words)


def tiny(compute: str, weights: torch.dtype, *, trained: bool) -> LanguageModel:
    """A random Qwen3 of two layers on the device, tokens 0 and 1 ending a completion."""
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        head_dim=16,
        initializer_range=0.1,
        tie_word_embeddings=True,
    )
    config._attn_implementation = "sdpa"
    module = Qwen3ForCausalLM(config).eval().requires_grad_(trained).to(device=DEVICE, dtype=weights)  # pyright: ignore -- typed Module
    settings = ModelConfig(source="file:random", dtype=compute, template="none")  # pyright: ignore -- a parameter, a str
    return LanguageModel(module, tokens(), settings, (0, 1), 61)


TEXTS = ["7 8 9", "3", "5 6 7 8 9 10 11", "2 2 2 2 2", "40 41", "60 59 58 57 56 55 54 53 52"]
PROBLEMS = [Problem((Message("user", text),)) for text in TEXTS]
"""Of unequal length, so padded on the left."""


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-4), ("bfloat16", 0.08)])
def test_recomputed_log_probs_are_the_samplers(dtype, tolerance, compiled):
    """Rows that end early, temperature other than 1; nats."""
    model = tiny(dtype, getattr(torch, dtype), trained=False)
    model = compile_layers(model) if compiled else model
    rollouts = TransformersSampler(model).sample(PROBLEMS, Sampling(("gpu", 0), 8, 48, temperature=0.8))
    lengths = [len(r.completion_ids) for r in rollouts]
    assert min(lengths) < 16 and max(lengths) == 48
    again = score_tokens(model, Batch.of(rollouts), View(0.8, max_tokens=512, chunk_tokens=100))
    drawn = torch.cat([torch.tensor(r.sampler_logprobs) for r in rollouts])
    assert (torch.cat(again) - drawn).abs().max() < tolerance


@pytest.mark.parametrize(
    "how", [{}, {"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.9}, {"top_k": 5}, {"max_new_tokens": 1}]
)
@pytest.mark.parametrize("segment", [256, 7])
def test_graphs_draw_what_plain_decoding_draws(how, segment, monkeypatch):
    model = tiny("float32", torch.float32, trained=False)
    settings = Sampling(("gpu", 1), **{"group_size": 8, "max_new_tokens": 48} | how)
    monkeypatch.setattr(sampler, "SEGMENT", segment)
    monkeypatch.setattr(sampler, "CHECK", 4)
    replayed = TransformersSampler(model).sample(PROBLEMS, settings)
    monkeypatch.setattr(sampler, "_replayable", lambda *_: False)
    plain = TransformersSampler(model).sample(PROBLEMS, settings)
    assert [replace(r, sampler_logprobs=[]) for r in replayed] == [replace(r, sampler_logprobs=[]) for r in plain]
    for a, b in zip(replayed, plain, strict=True):
        assert a.sampler_logprobs == pytest.approx(b.sampler_logprobs, abs=2e-5)


def test_stored_top_k_is_that_of_the_tokens():
    model = tiny("float32", torch.float32, trained=False)
    batch = top_k_scores(model, training_batch(5), 4, View(0.7, max_tokens=60, chunk_tokens=7))
    for row, ids in enumerate(batch.prompts):
        whole = torch.tensor([ids + batch.completions[row]], device=DEVICE)
        logits = model.module(input_ids=whole).logits[0, len(ids) - 1 : -1, :61].double() / 0.7
        top = logits.log_softmax(1).topk(4)
        assert torch.equal(batch.fields["teacher_ids"][row].cpu(), top.indices.cpu())
        torch.testing.assert_close(
            batch.fields["teacher_logprobs"][row].double().cpu(), top.values.cpu(), rtol=0, atol=1e-4
        )


def training_batch(rows: int) -> Batch:
    generator = torch.Generator().manual_seed(2)
    sizes = [(3 + r % 4, 5 + 3 * r) for r in range(rows)]
    ids = [[torch.randint(61, (n,), generator=generator).tolist() for n in pair] for pair in sizes]
    batch = Batch([p for p, _ in ids], [c for _, c in ids])

    def draw(low: float, high: float) -> list[Tensor]:
        return [torch.rand(len(c), generator=generator) * (high - low) + low for _, c in ids]

    return batch.with_fields(weights=draw(0.5, 1.5), advantages=draw(-1, 1), sampler=draw(-6, -3))


def one_update(model: LanguageModel, max_tokens: int) -> tuple[AdamW, dict[str, float]]:
    batch, settings = training_batch(7), Optimizer(lr=1e-3)
    optimizer = AdamW(model, settings)
    recipe = GRPO(steps=1, max_new_tokens=64, problems_per_step=1, optimizer=settings)
    loss = policy_loss(recipe, Execution(chunk_tokens=13), model.vocab_size, float(sum(batch.lengths)))
    micros = micro_batches(batch, max_tokens=max_tokens, device=DEVICE)
    metrics = update(model, optimizer, micros, loss, lr=1e-3, max_grad_norm=0.1, mesh=Mesh())
    return optimizer, metrics | {"micro_batches": len(micros)}


@pytest.mark.parametrize("checkpoint", [False, True])
def test_update_does_not_depend_on_the_micro_batch_split(checkpoint):
    runs = []
    for max_tokens in (1, 60, 10_000):
        model = replace(tiny("float32", torch.float32, trained=True), checkpoint_activations=checkpoint)
        if checkpoint:
            model.module.gradient_checkpointing_enable({"use_reentrant": False})
        runs.append(one_update(model, max_tokens))
    assert [m["micro_batches"] for _, m in runs] == [7, 3, 1]
    whole, expected = runs[-1]
    for optimizer, metrics in runs[:-1]:
        for name in ("optim/loss", "optim/grad_norm", "policy/entropy", "policy/ratio"):
            assert metrics[name] == pytest.approx(expected[name], rel=1e-5), name
        # exp_avg is 0.1 x the clipped gradient; the weights would show its sign only.
        for name, value in optimizer.state().items():
            if name.startswith("exp_avg."):
                assert relative(value, whole.state()[name].double().cpu()) < 1e-5, name


def test_activations_are_recomputed_with_the_same_attention():
    """In bfloat16, where torch would choose cuDNN's when the backward pass runs the layers again."""
    gradients = []
    for checkpoint in (False, True):
        model = replace(tiny("bfloat16", torch.float32, trained=True), checkpoint_activations=checkpoint)
        if checkpoint:
            model.module.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer, _ = one_update(model, 60)
        gradients.append({n: v for n, v in optimizer.state().items() if n.startswith("exp_avg.")})
    for name, value in gradients[0].items():
        assert relative(gradients[1][name], value.double().cpu()) < 1e-6, name


@pytest.mark.parametrize("checkpoint", [False, True])
def test_compiled_layers_give_the_same_update(checkpoint):
    """Gradients of the first step, over rows of seven lengths, in which no length is compiled for."""
    expected, _ = one_update(tiny("float32", torch.float32, trained=True), 60)
    model = compile_layers(replace(tiny("float32", torch.float32, trained=True), checkpoint_activations=checkpoint))
    if checkpoint:
        model.module.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer, _ = one_update(model, 60)
    for name, value in optimizer.state().items():
        if name.startswith("exp_avg."):
            assert relative(value, expected.state()[name].double().cpu()) < 1e-4, name
    seen = []
    for length in range(20, 30):
        model.hidden(torch.zeros(3, length, dtype=torch.long, device=DEVICE)).sum().backward()
        seen.append(counters["stats"]["unique_graphs"])
    assert seen[1] > 0 and seen[-1] == seen[1]


def test_bfloat16_trains_float32_masters():
    model = tiny("bfloat16", torch.float32, trained=True)
    start = {n: p.detach().clone() for n, p in model.module.named_parameters()}
    optimizer = AdamW(model, Optimizer(lr=1e-3))
    name = "model.layers.0.mlp.up_proj.weight"
    weight, master = optimizer.weights[name], optimizer.masters[name]
    assert torch.equal(master, start[name]) and torch.equal(weight, start[name].bfloat16())

    ids, gradients = torch.arange(2, 22, device=DEVICE)[None], []
    direction = torch.randn(64, device=DEVICE)
    for scale in (1.0, 2**-10):
        (model.hidden(ids) @ (scale * direction).bfloat16()).sum().backward()
        assert weight.grad is None and master.grad is not None and master.grad.dtype == torch.float32
        gradients.append(master.grad.clone())
    # The second gradient, 2^-10 of the first, would be lost in a bfloat16 sum of 8 bits.
    assert relative(gradients[1], gradients[0].double().cpu() * (1 + 2**-10)) < 1e-6
    optimizer.zero()

    optimizer, _ = one_update(tiny("bfloat16", torch.float32, trained=True), 60)
    for key, master in optimizer.masters.items():
        assert master.dtype == torch.float32 and optimizer.inner.state[master]["exp_avg"].dtype == torch.float32
        assert optimizer.weights[key].dtype == torch.bfloat16
        assert torch.equal(optimizer.weights[key], master.bfloat16()), key
    assert not torch.equal(optimizer.masters[name], start[name])
