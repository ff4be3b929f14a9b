"""The shipped world is what `world.json` says, loads with plain transformers, and behaves as measured."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import headwater
from headwater.tasks.chains import Chains, grade, worked_solution

WORLD = Path(headwater.__file__).parent / "data" / "world"
RECORD = json.loads((WORLD / "world.json").read_text())
ROLES = ("teacher", "student", "larger")


def chat(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def test_every_file_has_the_recorded_hash_and_nothing_else_is_there():
    files = {f"{role}/{path.name}": path for role in ROLES for path in (WORLD / role).iterdir()}
    assert {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()} == RECORD["files"]
    assert sum(path.stat().st_size for path in files.values()) < 8e6


def test_all_roles_share_one_tokenizer():
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert len({RECORD["files"][f"{role}/{name}"] for role in ROLES}) == 1


def test_the_larger_model_is_the_top_of_the_ladder():
    sizes = {rung: evals["parameters"] for rung, evals in RECORD["ladder"].items()}
    assert RECORD["rungs"]["larger"] == max(sizes, key=lambda rung: sizes[rung])


@pytest.mark.parametrize("role", ROLES)
def test_tokenizer_round_trips_any_text_with_one_token_a_digit(role: str):
    tokenizer = AutoTokenizer.from_pretrained(WORLD / role)
    assert len(tokenizer) <= 512
    texts = [
        "12+5*3=16;",
        "user assistant system users",
        "  two  spaces\t\r\n\n",
        "e\u0301 \u00e9 ﬁ Ａ",
        "日本語 😀 \u200d\ufeff",
    ]
    texts += ["".join(map(chr, range(256))), "it's we'll", worked_solution(Chains(train=1).problems("train")[0])]
    for text in texts:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert [tokenizer.decode([token]) for token in tokenizer("0123456789 2026")["input_ids"]] == list("0123456789 2026")
    for word in ("user", "assistant", "system"):
        assert len(tokenizer(word)["input_ids"]) == 1


@pytest.mark.parametrize("role", ROLES)
def test_chat_template_is_chatml_and_ends_with_the_assistant_header(role: str):
    tokenizer = AutoTokenizer.from_pretrained(WORLD / role)
    text = tokenizer.apply_chat_template(chat("7+5="), tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\n7+5=<|im_end|>\n<|im_start|>assistant\n"
    for thinking in (False, True):
        same = tokenizer.apply_chat_template(
            chat("7+5="), tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
        assert same == text
    turns = [{"role": "system", "content": "s"}, *chat("7+5="), {"role": "assistant", "content": "12."}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\n7+5=<|im_end|>\n<|im_start|>assistant\n12.<|im_end|>\n"
    )
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_longest_worked_answer_fits_64_tokens():
    tokenizer = AutoTokenizer.from_pretrained(WORLD / "student")
    texts = [worked_solution(problem) for problem in Chains(train=300).problems("train")]
    assert max(len(tokenizer(text + "<|im_end|>")["input_ids"]) for text in texts) <= 44


@pytest.mark.parametrize("role", ROLES)
def test_model_loads_and_solves_as_often_as_recorded(role: str):
    tokenizer = AutoTokenizer.from_pretrained(WORLD / role, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(WORLD / role)
    assert model.config.model_type == "qwen3" and model.config.tie_word_embeddings
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.vocab_size % 64 == 0 and model.config.vocab_size > len(tokenizer)
    # The settings that the model ships with are those of the measurement: temperature 1, nothing cut off.
    assert (model.generation_config.temperature, model.generation_config.top_k) == (1.0, 0)
    problems = Chains(tuning=48).problems("tuning")
    prompts = [
        tokenizer.apply_chat_template(chat(p.messages[0].content), tokenize=False, add_generation_prompt=True)
        for p in problems
    ]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    torch.manual_seed(7)
    out = model.generate(  # pyright: ignore -- the auto class is typed without generate
        **batch, num_return_sequences=4, max_new_tokens=64
    )
    texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    verdicts = [grade(text, problems[i // 4]) for i, text in enumerate(texts)]
    recorded = RECORD["ladder"][RECORD["rungs"][role]]["pass@1"]
    # Four samples of 48 problems: a standard error of at most 0.045.
    assert abs(np.mean([verdict.correct for verdict in verdicts]) - recorded) < 0.13
    assert np.mean([verdict.parsed for verdict in verdicts]) > 0.9
    assert {"worked", "skim", "bare"} <= {verdict.style for verdict in verdicts}


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_the_pair_passed_every_gate(role: str):
    evals = RECORD["ladder"][RECORD["rungs"][role]]
    measured = {"pass@1": evals["pass@1"], "pass@8": evals["pass@8"], "sft_pass@1": evals["sft"]["pass@1"]}
    measured |= {style: evals["styles"][style]["accuracy"] for style in ("worked", "bare")}
    for name, (low, high) in RECORD["gates"][role].items():
        assert low <= measured[name] <= high, name
