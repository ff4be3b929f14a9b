"""FLOPs against torch's own counter, with eager attention: it counts fused attention on the CPU as nothing."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3Config

from headwater import flops
from headwater.config import GRPO, SFT, Distill, Execution, ModelConfig, Warmup
from headwater.flops import Work, completion_work, prompt_work, sequence_work, shape_of
from headwater.models.language_model import LanguageModel, Prefixes, wrap
from headwater.rollouts import decoding
from headwater.rollouts.sampler import Sampling, TransformersSampler
from headwater.run import StageRun
from headwater.stages import distill, grpo, sft, warmup
from headwater.types import Message, Problem, Verdict

SMALL: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 320}
CONFIGS = {
    "qwen3": Qwen3Config(
        **SMALL, num_key_value_heads=2, head_dim=16, intermediate_size=96, tie_word_embeddings=True, eos_token_id=1
    ),
    "llama": LlamaConfig(**SMALL, num_key_value_heads=1, intermediate_size=100, eos_token_id=1),
    "smollm2": LlamaConfig(
        **SMALL, num_key_value_heads=4, intermediate_size=128, tie_word_embeddings=True, eos_token_id=1
    ),
}
REAL = {
    "Qwen3 0.6B": Qwen3Config(
        hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
        intermediate_size=3072, vocab_size=151_936, tie_word_embeddings=True,
    ),
    "Llama 3.2 1B": LlamaConfig(
        hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, head_dim=64,
        intermediate_size=8192, vocab_size=128_256, tie_word_embeddings=True,
    ),
    "SmolLM2 135M": LlamaConfig(
        hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536,
        vocab_size=49_152, tie_word_embeddings=True,
    ),
}  # fmt: skip  # a table: several entries a line


def build(kind: str, tokenizer, seed: int = 0, *, trained: bool = False, checkpointing: bool = False) -> LanguageModel:
    torch.manual_seed(seed)
    module = AutoModelForCausalLM.from_config(CONFIGS[kind], attn_implementation="eager").eval()
    module.requires_grad_(trained)
    if checkpointing:
        module.gradient_checkpointing_enable({"use_reentrant": False})
    model = wrap(module, tokenizer, ModelConfig(source=f"random:{kind}"))
    return LanguageModel(**{**vars(model), "checkpoint_activations": checkpointing})


def mixed(problems) -> list[Problem]:
    """Prompts of unequal length, so that there is padding."""
    return [*problems[:6], Problem((Message("user", "1+2*3" * 9),)), Problem((Message("user", "7"),))]


@pytest.mark.parametrize("name", REAL)
def test_forward_and_backward_of_real_shapes(name: str):
    config = REAL[name]
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        ids = torch.zeros(2, 96, dtype=torch.long)
        shape, work = shape_of(config.to_dict()), Work(192, 2 * 96 * 96, 192)
        with FlopCounterMode(display=False) as forward:
            logits = module(ids).logits
        with FlopCounterMode(display=False) as backward:
            logits.sum().backward()
    counted = forward.get_total_flops()
    assert flops.forward_flops(shape, work) == pytest.approx(counted, rel=0.002)
    assert flops.training_flops(shape, work) == pytest.approx(counted + backward.get_total_flops(), rel=0.002)
    weights = sum(p.numel() for p in module.parameters() if p.ndim == 2)
    assert shape.parameters == weights


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    """torch counts products alone, and a decoder multiplies and sums few values otherwise."""
    monkeypatch.setattr(decoding, "FEW", 0)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_real_sampler(kind: str, tokenizer, problems):
    model = build(kind, tokenizer)
    sampler = TransformersSampler(model, max_tokens=700)
    with FlopCounterMode(display=False) as counter:
        rollouts = sampler.sample(mixed(problems), Sampling(("flops",), 3, 24))
    executed = flops.forward_flops(model.shape, sampler.prefilled) + flops.forward_flops(model.shape, sampler.decoded)
    assert executed == pytest.approx(counter.get_total_flops(), rel=0.005)
    assert len({len(r.completion_ids) for r in rollouts}) > 1
    needed = flops.total(completion_work(len(r.prompt_ids), len(r.completion_ids)) for r in rollouts)
    assert flops.forward_flops(model.shape, needed) < executed


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("divergence", ["reverse_kl", "constant", "sampled_token"])
def test_a_step_of_distillation_with_everything_in_it(kind: str, divergence, tokenizer, problems, tmp_path):
    """Sampling, scoring, dense or sparse loss, backward of the real update: what the meter says was executed."""
    student, teacher = build(kind, tokenizer, trained=True), build(kind, tokenizer, 1)
    settings = Distill.model_validate(
        {"steps": 2, "problems_per_step": 4, "group_size": 1, "max_new_tokens": 20, "optimizer": {"lr": 1e-3}}
        | {"divergence": divergence}
    )
    run = StageRun(tmp_path, execution=Execution(micro_batch_tokens=300, sampler_tokens=500, chunk_tokens=16))
    asked = None if divergence == "constant" else teacher
    with FlopCounterMode(display=False) as counter:
        distill.train(settings, student=student, teacher=asked, problems=mixed(problems), seed=0, run=run)
    bill = run.meter.state()
    executed = sum(row["executed_flops"] for row in bill.values())
    assert executed == pytest.approx(counter.get_total_flops(), rel=0.001)
    assert run.meter.flops < executed and bill["trained"]["padding"] > 0


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_a_step_of_grpo_where_some_groups_are_dead(kind: str, ratio, tokenizer, problems, tmp_path):
    model, pool = build(kind, tokenizer, trained=True), mixed(problems)
    dead = {p.id for p in pool[:4]}

    def grade(pairs: list[tuple[Problem, str]]) -> list[Verdict]:
        return [Verdict(False, True, "wrong", float(i % 2 and p.id not in dead)) for i, (p, _) in enumerate(pairs)]

    settings = GRPO.model_validate(
        {"steps": 2, "problems_per_step": 4, "group_size": 2, "max_new_tokens": 20, "optimizer": {"lr": 1e-3}}
        | {"ratio": ratio}
    )
    run = StageRun(tmp_path, execution=Execution(micro_batch_tokens=300, sampler_tokens=500, chunk_tokens=16))
    answered = [replace(p, answer="0") for p in pool]
    with FlopCounterMode(display=False) as counter:
        grpo.train(settings, policy=model, problems=answered, grade=grade, seed=0, run=run)
    executed = sum(row["executed_flops"] for row in run.meter.state().values())
    assert executed == pytest.approx(counter.get_total_flops(), rel=0.001)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(("method", "train"), [(Warmup, warmup.train), (SFT, sft.train)], ids=["warmup", "sft"])
def test_teacher_text_with_recomputed_activations(kind: str, method, train, tokenizer, problems, tmp_path):
    student, teacher = build(kind, tokenizer, trained=True, checkpointing=True), build(kind, tokenizer, 1)
    settings = method.model_validate(
        {"steps": 2, "sequences_per_step": 5, "max_new_tokens": 20, "optimizer": {"lr": 1e-3}}
    )
    run = StageRun(tmp_path, execution=Execution(micro_batch_tokens=300))
    with FlopCounterMode(display=False) as counter:
        train(settings, student=student, teacher=teacher, problems=mixed(problems), seed=0, run=run)
    bill = run.meter.state()
    assert sum(row["executed_flops"] for row in bill.values()) == pytest.approx(counter.get_total_flops(), rel=0.001)
    assert bill["trained"]["executed_flops"] > 1.2 * bill["trained"]["flops"]


def test_frozen_weights_under_adapters_get_no_gradient(tokenizer):
    """Rank-4 adapters on every matrix of every layer, embedding and head frozen."""
    config = CONFIGS["qwen3"]
    module = AutoModelForCausalLM.from_config(config, attn_implementation="eager").requires_grad_(False)
    count = 0
    for layer in module.base_model.layers:
        for matrix in [m for m in layer.modules() if isinstance(m, torch.nn.Linear)]:
            a = torch.nn.Parameter(torch.randn(4, matrix.in_features))
            b = torch.nn.Parameter(torch.randn(matrix.out_features, 4))
            count += a.numel() + b.numel()
            matrix.register_forward_hook(lambda _, x, y, a=a, b=b: y + x[0] @ a.T @ b.T)
    shape, work = shape_of(config.to_dict(), adapters=count), Work(60, 1200, 60)
    with FlopCounterMode(display=False) as counter:
        module(torch.randint(0, 300, (3, 20))).logits.sum().backward()
    # The adapters of the first layer that read the embeddings pass no gradient on either: 7 x 4 x 48 of `count`.
    assert flops.training_flops(shape, work) == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert shape.trained == count


def test_frozen_weights_on_long_prompts_that_rows_share(tokenizer):
    """Of the last layer a prefix gives keys and values alone, so nothing flows back through its attention."""
    model = build("qwen3", tokenizer)
    ids = torch.randint(0, 300, (1, 400))
    prefixes = Prefixes(ids[:, :399], torch.ones(1, 399, dtype=torch.long), torch.zeros(2, dtype=torch.long))
    for layer in model.base.layers:  # pyright: ignore -- a decoder has them
        layer.input_layernorm.weight.requires_grad_()  # as adapters do, makes gradients flow and costs no product
    with FlopCounterMode(display=False) as counter:
        model.hidden(ids[:, -1:].expand(2, 1), prefixes=prefixes).sum().backward()
    shape = replace(model.shape, adapters=1)
    counted = flops.training_flops(shape, Work(2, 2 * 400, 0), Work(399, 399 * 399))
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_a_model_that_cannot_be_counted_fails_before_its_first_completion(tokenizer):
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=len(tokenizer), eos_token_id=1)
    with pytest.raises(ValueError, match="'gpt2' has no 'num_attention_heads': FLOPs are counted for decoders"):
        wrap(AutoModelForCausalLM.from_config(config).eval(), tokenizer, ModelConfig(source="random:gpt2"))


def test_model_flops_by_hand():
    """1 layer, width 4, 2 heads of 2, 1 key-value head, MLP of 8, 10 tokens: prompt of 3, completion of 2."""
    shape = shape_of(
        {"num_hidden_layers": 1, "hidden_size": 4, "num_attention_heads": 2, "num_key_value_heads": 1}
        | {"intermediate_size": 8, "vocab_size": 10}
    )
    assert (shape.matrices, shape.head, shape.parameters) == (4 * (4 + 4 + 4) + 3 * 4 * 8, 40, 144 + 80)
    assert prompt_work(3) == Work(3, 6, 0) and completion_work(3, 2) == Work(1, 4, 2)
    assert sequence_work(3, 2) == Work(5, 15, 2)
    assert flops.forward_flops(shape, sequence_work(3, 2)) == 2 * (5 * 144 + 2 * 4 * 15 + 2 * 40)
    assert flops.training_flops(shape, sequence_work(3, 2)) == 3 * flops.forward_flops(shape, sequence_work(3, 2))
    with pytest.raises(ValueError, match="no 'num_attention_heads'"):
        shape_of({"model_type": "mamba"})
