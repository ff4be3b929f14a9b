"""The single-file examples are an independent oracle of the package: same batch, same loss, same gradients."""

import importlib.util
import random
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from headwater.losses import HiddenScores, clipped_policy_gradient, dense_divergence, token_logprobs
from headwater.scoring.advantages import group_advantages
from headwater.scoring.weights import sequence_ids, token_weights

ROOT = Path(__file__).resolve().parents[1]
WORLD = ROOT / "src" / "headwater" / "data" / "world"
PAD, VOCAB, PROMPT_LEN = 0, 20, 4
LENGTHS = torch.tensor([5, 2, 3, 1, 5, 4])


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


grpo_loop, opd_loop = load("grpo_loop"), load("opd_loop")


def build_model(seed: int, width: int, rows: int) -> Qwen3ForCausalLM:
    """A random model in float64 whose head has padding rows beyond the vocabulary."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=rows,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        tie_word_embeddings=True,
        initializer_range=0.5,
    )
    return Qwen3ForCausalLM(config).double().eval()


def build_batch() -> torch.Tensor:
    """Prompts padded on the left, completions of LENGTHS padded on the right."""
    ids = torch.randint(1, VOCAB, (len(LENGTHS), PROMPT_LEN + 5), generator=torch.Generator().manual_seed(7))
    ids[1, :2] = ids[4, :1] = PAD
    ids[:, PROMPT_LEN:][torch.arange(5) >= LENGTHS[:, None]] = PAD
    return ids


def hidden_states(model: Qwen3ForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Flat over loss tokens, as the package wants them."""
    states = model.model(ids, attention_mask=(ids != PAD).long()).last_hidden_state
    assert states is not None
    return states[:, PROMPT_LEN - 1 : -1][ids[:, PROMPT_LEN:] != PAD]


def assert_equal_with_gradients(model: Qwen3ForCausalLM, actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    parameters = list(model.parameters())
    wanted = torch.autograd.grad(expected, parameters)
    assert max(g.abs().max() for g in wanted) > 1e-3
    for a, b in zip(torch.autograd.grad(actual, parameters), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_grpo_loss_equals_the_package():
    model, ids = build_model(0, 8, 24), build_batch()
    mask, targets = ids[:, PROMPT_LEN:] != PAD, ids[:, PROMPT_LEN:]
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    old = grpo_loop.completion_logprobs(build_model(0, 8, 24), ids, PROMPT_LEN, pad=PAD, vocab=VOCAB).detach()
    old = old + 0.3 * torch.randn(old.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    advantages = grpo_loop.group_advantages(rewards, 3)
    expected = grpo_loop.grpo_loss(model, ids, PROMPT_LEN, advantages, old, pad=PAD, vocab=VOCAB)

    package_advantages = group_advantages(rewards.view(2, 3)).flatten()
    torch.testing.assert_close(package_advantages, advantages, rtol=0, atol=1e-12)
    logprobs, _ = token_logprobs(
        hidden_states(model, ids), model.lm_head.weight, targets[mask], vocab_size=VOCAB, chunk_tokens=7
    )
    weights, denominator = token_weights(LENGTHS, "token")
    rows = sequence_ids(LENGTHS)
    total, _, metrics = clipped_policy_gradient(
        logprobs,
        package_advantages[rows],
        weights,
        old_logprobs=old[mask],
        sequence_ids=rows,
        num_sequences=len(LENGTHS),
    )
    assert metrics["policy/clip_frac_low"][0] > 0 and metrics["policy/clip_frac_high"][0] > 0
    assert_equal_with_gradients(model, total / denominator, expected)


def test_opd_loss_equals_the_package():
    student, teacher, ids = build_model(0, 8, 24), build_model(1, 12, 22), build_batch()
    expected = opd_loop.opd_loss(student, teacher, ids, PROMPT_LEN, pad=PAD, vocab=VOCAB)
    with torch.no_grad():
        scores = HiddenScores(hidden_states(teacher, ids), teacher.lm_head.weight.detach())
    weights, denominator = token_weights(LENGTHS, "token")
    total, _, _ = dense_divergence(
        hidden_states(student, ids),
        student.lm_head.weight,
        scores,
        weights,
        kind="reverse_kl",
        vocab_size=VOCAB,
        chunk_tokens=7,
    )
    assert_equal_with_gradients(student, total / denominator, expected)


@pytest.mark.parametrize("example", [grpo_loop, opd_loop], ids=["grpo", "opd"])
def test_sampling_stops_at_the_end_token_and_draws_no_padding(example):
    model, prompts = build_model(0, 8, 24).float(), build_batch()[:, :PROMPT_LEN]
    torch.manual_seed(0)
    ids = example.sample(model, prompts, max_tokens=30, eos=3, pad=PAD, vocab=VOCAB)
    assert ids.shape[1] <= PROMPT_LEN + 30 and ids.max() < VOCAB and torch.equal(ids[:, :PROMPT_LEN], prompts)
    for row in ids[:, PROMPT_LEN:].tolist():
        if 3 in row:
            assert set(row[row.index(3) + 1 :]) <= {PAD}


def test_grader_and_problems():
    grade = grpo_loop.grade
    assert grade("7+5=12;12*3=16;16-4=12;12.", "12") == grade("12.", "12") == 1
    assert grade("7+5=12;12*3=16;16-4=12;2.", "12") == grade("12", "12") == grade("12;", "12") == grade("", "12") == 0
    rng = random.Random(0)
    for _ in range(50):
        prompt, answer = grpo_loop.draw_problem(rng)
        value, text = 0, "+" + prompt.rstrip("=")
        for op, operand in re.findall(r"([+*-])(\d+)", text):
            value = {"+": value + int(operand), "-": value - int(operand), "*": value * int(operand)}[op] % 20
        assert str(value) == answer


@pytest.mark.parametrize("name", ["grpo_loop", "opd_loop"])
def test_examples_stand_alone_and_stay_short(name):
    text = (ROOT / "examples" / f"{name}.py").read_text()
    assert not re.search(r"^\s*(import|from) headwater", text, re.MULTILINE)
    assert len(text.splitlines()) <= 200


def test_grpo_example_learns(capsys):
    # Seeds 0, 1, 2 over 20 steps: first four .47 .39 .46, last four .72 .65 .77.
    rewards = grpo_loop.train(WORLD / "teacher", steps=20)
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.1
    assert capsys.readouterr().out.count("reward") == 20


def test_opd_example_learns(capsys):
    divergences = opd_loop.train(WORLD / "teacher", WORLD / "student", steps=12)
    assert sum(divergences[-3:]) < 0.8 * sum(divergences[:3])
    assert capsys.readouterr().out.count("KL(student || teacher)") == 12
