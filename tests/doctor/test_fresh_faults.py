"""Faults planted by somebody who had not read the doctor: what converting, copying and editing does to files."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_doctor_faults import WORLD, recipe, trouble, write_rows
from torch import Tensor

from headwater.doctor.checkup import checkup, examine
from headwater.doctor.finding import Finding
from headwater.store import Store

Plant = Callable[[Path], None]
Weights = dict[str, Tensor]


def edit_json(path: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_tokenizer(directory: Path, change: Callable[[Any], None]) -> None:
    edit_json(directory / "tokenizer.json", change)


def edit_config(directory: Path, **values: object) -> None:
    edit_json(directory / "config.json", lambda config: config.update(values))


def edit_weights(directory: Path, change: Callable[[Weights], object]) -> None:
    path = directory / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file({name: weight.contiguous() for name, weight in weights.items()}, path, {"format": "pt"})


def edit_template(directory: Path, old: str, new: str) -> None:
    path = directory / "chat_template.jinja"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def edit_rows(directory: Path, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    path = directory / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in change(rows)))


# Tokenizers.


def prefix_space_added(directory: Path) -> None:
    """A slow tokenizer converted with the legacy default."""
    edit_tokenizer(directory, lambda t: t["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True))


def merges_lost(directory: Path) -> None:
    """merges.txt was not copied: every word falls into letters."""
    edit_tokenizer(directory, lambda t: t["model"].update(merges=[]))


def added_tokens_reordered(directory: Path) -> None:
    """added_tokens.json was made anew in another order: two special tokens change ids."""

    def swap(t: Any) -> None:
        t["added_tokens"][1]["content"], t["added_tokens"][2]["content"] = "<|im_end|>", "<|im_start|>"

    edit_tokenizer(directory, swap)


def eos_of_the_base_model(directory: Path) -> None:
    """The base model's tokenizer_config and generation_config beside a chat model: answers end with another token."""
    edit_json(directory / "tokenizer_config.json", lambda c: c.update(eos_token="<|endoftext|>"))
    edit_json(directory / "generation_config.json", lambda c: c.update(eos_token_id=272))
    edit_config(directory, eos_token_id=272)


def truncation_saved(directory: Path) -> None:
    """Saved after a call with truncation=True, which a tokenizers file remembers."""
    truncation = {"direction": "Right", "max_length": 12, "strategy": "LongestFirst", "stride": 0}
    edit_tokenizer(directory, lambda t: t.update(truncation=truncation))


def decoder_lost(directory: Path) -> None:
    """No decoder after a conversion: decoded tokens are joined with spaces."""
    edit_tokenizer(directory, lambda t: t.update(decoder=None))


def vocabulary_sorted(directory: Path) -> None:
    """vocab.json written anew with sorted tokens and new ids."""

    def sort(t: Any) -> None:
        names = sorted(t["model"]["vocab"], key=lambda token: token[::-1])
        t["model"]["vocab"] = {name: i for i, name in enumerate(names)}

    edit_tokenizer(directory, sort)


# Templates and configs.


def newline_stripped(directory: Path) -> None:
    """An editor or a template tag took the newline after the assistant's header."""
    edit_template(directory, "assistant\\n' }}", "assistant' }}")


def no_generation_prompt(directory: Path) -> None:
    edit_template(directory, "{%- if add_generation_prompt %}", "{%- if false %}")


def system_prompt_injected(directory: Path) -> None:
    """The template of a model that speaks of itself when no system text is given."""
    path = directory / "chat_template.jinja"
    path.write_text("{{- '<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' }}\n" + path.read_text())


def template_drops_the_turn_end(directory: Path) -> None:
    edit_template(directory, "+ '<|im_end|>' + '\\n'", "+ '\\n'")


def rope_theta_changed(directory: Path) -> None:
    edit_config(directory, rope_parameters={"rope_theta": 1000000.0, "rope_type": "default"})


def rope_scaling_left_on(directory: Path) -> None:
    edit_config(directory, rope_parameters={"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0})


def untied_without_a_head(directory: Path) -> None:
    """tie_word_embeddings false, as a config class's default may say, and no lm_head in the file: a random head."""
    edit_config(directory, tie_word_embeddings=False)


def config_of_fewer_layers(directory: Path) -> None:
    layers = json.loads((directory / "config.json").read_text())["num_hidden_layers"] - 1
    edit_config(directory, num_hidden_layers=layers, layer_types=["full_attention"] * layers)


def sliding_window_on(directory: Path) -> None:
    layers = json.loads((directory / "config.json").read_text())["num_hidden_layers"]
    edit_config(
        directory,
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=0,
        layer_types=["sliding_attention"] * layers,
    )


def activation_changed(directory: Path) -> None:
    edit_config(directory, hidden_act="relu")


# Weights.


def shard_missing(directory: Path) -> None:
    """The tensors of one shard are gone, and loading draws them at random."""

    def remove(weights: Weights) -> None:
        for name in [n for n in weights if n.startswith("model.layers.1.mlp")]:
            del weights[name]

    edit_weights(directory, remove)


def rotary_halves_interleaved(directory: Path) -> None:
    """Queries and keys permuted for the other rotary layout."""

    def permute(weights: Weights) -> None:
        for name in [n for n in weights if n.endswith(("q_proj.weight", "k_proj.weight"))]:
            rows, width = weights[name].shape
            weights[name] = weights[name].view(rows // 16, 2, 8, width).transpose(1, 2).reshape(rows, width)
        for name in [n for n in weights if n.endswith(("q_norm.weight", "k_norm.weight"))]:
            weights[name] = weights[name].view(2, 8).T.reshape(16)

    edit_weights(directory, permute)


def nan_in_padding_rows(directory: Path) -> None:
    """The embedding was enlarged with memory that nobody wrote to."""
    edit_weights(directory, lambda w: w["model.embed_tokens.weight"][300:].fill_(float("nan")))


def overflow_in_one_weight(directory: Path) -> None:
    """Saved in float16 by way of bfloat16: one entry became infinite."""
    edit_weights(directory, lambda w: w["model.layers.0.mlp.down_proj.weight"][3, 5].fill_(float("inf")))


def end_of_file_zeros(directory: Path) -> None:
    """A sparse copy: the last third of the file was never written."""
    path = directory / "model.safetensors"
    content = path.read_bytes()
    kept = 2 * len(content) // 3
    path.write_bytes(content[:kept] + bytes(len(content) - kept))


def quantised_to_two_bits(directory: Path) -> None:
    """Rounded to four levels a row and written back as float32."""

    def rounded(weights: Weights) -> None:
        for name in [n for n in weights if n.endswith("proj.weight")]:
            scale = weights[name].abs().amax(1, keepdim=True) / 1.5
            weights[name] = ((weights[name] / scale - 0.5).round().clamp(-2, 1) + 0.5) * scale

    edit_weights(directory, rounded)


def adapter_merged_with_wrong_scale(directory: Path) -> None:
    """A LoRA update of rank 4 merged at its norm times the weights' own."""

    def merge(weights: Weights) -> None:
        generator = torch.Generator().manual_seed(0)
        for name in [n for n in weights if n.endswith(("q_proj.weight", "v_proj.weight"))]:
            rows, columns = weights[name].shape
            update = torch.randn(rows, 4, generator=generator) @ torch.randn(4, columns, generator=generator)
            weights[name] += update * (weights[name].norm() / update.norm())

    edit_weights(directory, merge)


def layers_out_of_order(directory: Path) -> None:
    """Sorted as text, layer 10 comes before layer 2."""

    def swap(weights: Weights) -> None:
        for name in [n for n in weights if n.startswith("model.layers.1.")]:
            other = name.replace(".1.", ".2.")
            weights[name], weights[other] = weights[other], weights[name]

    edit_weights(directory, swap)


def gate_and_up_swapped(directory: Path) -> None:
    """A fused projection split in the wrong order."""

    def swap(weights: Weights) -> None:
        for name in [n for n in weights if "gate_proj" in n]:
            other = name.replace("gate", "up")
            weights[name], weights[other] = weights[other], weights[name]

    edit_weights(directory, swap)


def norms_stored_less_one(directory: Path) -> None:
    """Gemma's convention, where the norm multiplies by 1 + w."""

    def less_one(weights: Weights) -> None:
        for name in [n for n in weights if n.endswith("norm.weight")]:
            weights[name] -= 1

    edit_weights(directory, less_one)


def square_weights_transposed(directory: Path) -> None:
    """Conv1D's layout; only square matrices load without a complaint."""

    def transpose(weights: Weights) -> None:
        for name in [n for n in weights if n.endswith("o_proj.weight")]:
            weights[name] = weights[name].T

    edit_weights(directory, transpose)


def random_weights_uploaded(directory: Path) -> None:
    """The upload was made before the checkpoint was loaded."""

    def draw(weights: Weights) -> None:
        generator = torch.Generator().manual_seed(0)
        for name in [n for n in weights if weights[n].ndim == 2]:
            weights[name] = 0.02 * torch.randn(weights[name].shape, generator=generator)

    edit_weights(directory, draw)


# Weaker ones.


def activation_approximated(directory: Path) -> None:
    edit_config(directory, hidden_act="gelu_pytorch_tanh")


def epsilon_rounded_up(directory: Path) -> None:
    edit_config(directory, rms_norm_eps=1e-2)


def two_digits_swapped(directory: Path) -> None:
    """One pair of ids changed places: a merge of two vocabularies."""

    def swap(t: Any) -> None:
        vocab = t["model"]["vocab"]
        vocab["3"], vocab["7"] = vocab["7"], vocab["3"]

    edit_tokenizer(directory, swap)


def quantised_to_four_bits(directory: Path) -> None:
    def rounded(weights: Weights) -> None:
        for name in [n for n in weights if n.endswith("proj.weight")]:
            scale = weights[name].abs().amax(1, keepdim=True) / 7
            weights[name] = (weights[name] / scale).round() * scale

    edit_weights(directory, rounded)


def one_norm_left_new(directory: Path) -> None:
    """A renamed vector was not found by a converter and got its initial value."""
    edit_weights(directory, lambda w: w["model.layers.1.post_attention_layernorm.weight"].fill_(1.0))


def adapter_merged_too_weakly_scaled(directory: Path) -> None:
    """As adapter_merged_with_wrong_scale, at a tenth of the norm."""

    def merge(weights: Weights) -> None:
        generator = torch.Generator().manual_seed(0)
        for name in [n for n in weights if n.endswith(("q_proj.weight", "v_proj.weight"))]:
            rows, columns = weights[name].shape
            update = torch.randn(rows, 4, generator=generator) @ torch.randn(4, columns, generator=generator)
            weights[name] += update * (0.1 * weights[name].norm() / update.norm())

    edit_weights(directory, merge)


# Data.


def answers_shifted(directory: Path) -> None:
    """A join that is off by one row."""

    def shift(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**row, "answer": other["answer"]} for row, other in zip(rows, rows[1:] + rows[:1], strict=True)]

    edit_rows(directory, shift)


def answer_in_the_prompt(directory: Path) -> None:
    edit_rows(directory, lambda rows: [{**row, "question": row["question"] + row["answer"] + "."} for row in rows])


def questions_cut(directory: Path) -> None:
    """Exported through a column of limited width."""
    edit_rows(directory, lambda rows: [{**row, "question": row["question"][:6]} for row in rows])


def evaluation_questions_in_train(directory: Path) -> None:
    """The test questions with a space more, which no exact comparison finds."""
    test = [json.loads(line) for line in (directory / "test.jsonl").read_text().splitlines()]
    edit_rows(directory, lambda rows: rows + [{**row, "question": row["question"] + " "} for row in test])


def answers_filled_with_zero(directory: Path) -> None:
    edit_rows(directory, lambda rows: [{**row, "answer": "0"} for row in rows])


def answers_not_numbers(directory: Path) -> None:
    """A third of the answers were lost and written as text."""
    chance = random.Random(0)
    edit_rows(directory, lambda rows: [{**r, "answer": "nan" if chance.random() < 0.33 else r["answer"]} for r in rows])


def questions_templated_twice(directory: Path) -> None:
    """The column already holds the chat template's text."""
    edit_rows(
        directory, lambda rows: [{**r, "question": f"<|im_start|>user\n{r['question']}<|im_end|>\n"} for r in rows]
    )


def some_answers_shifted(directory: Path) -> None:
    """A tenth of the rows: one part of several was joined wrongly."""

    def shift(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        part = len(rows) // 10
        return [{**r, "answer": rows[(i + 1) % part]["answer"]} if i < part else r for i, r in enumerate(rows)]

    edit_rows(directory, shift)


def questions_twice_with_other_answers(directory: Path) -> None:
    """Two annotators: a fifth of the questions are there again, before their right row, with another answer."""

    def again(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        wrong = [{**row, "answer": str((int(row["answer"]) + 1) % 20)} for row in rows[: len(rows) // 5]]
        return wrong + rows

    edit_rows(directory, again)


def operators_typeset(directory: Path) -> None:
    """A word processor's characters for those that the models know."""
    edit_rows(directory, lambda rows: [{**r, "question": r["question"].replace("*", "\u00d7")} for r in rows])


PAIR = ("teacher", "student")
TEACHER, STUDENT = PAIR[:1], PAIR[1:]
DATA = ("",)
FILES: list[tuple[Plant, tuple[str, ...], str]] = [
    (prefix_space_added, STUDENT, "same ids"),
    (added_tokens_reordered, PAIR, "end tokens"),
    (eos_of_the_base_model, PAIR, "turns of the template"),
    (decoder_lost, PAIR, "survives its tokenizer"),
    (no_generation_prompt, PAIR, "turns of the template"),
    (system_prompt_injected, TEACHER, "same prompt"),
    (template_drops_the_turn_end, PAIR, "turns of the template"),
    (answer_in_the_prompt, DATA, "answers"),
    (evaluation_questions_in_train, DATA, "rows"),
    (answers_filled_with_zero, DATA, "answers"),
    (answers_not_numbers, DATA, "answers"),
    (questions_templated_twice, DATA, "prompts"),
    (questions_twice_with_other_answers, DATA, "rows"),
    (operators_typeset, DATA, "same characters"),
]
"""What is damaged where, and which check sees it without weights."""
LOADED: list[tuple[Plant, tuple[str, ...], str]] = [
    (untied_without_a_head, STUDENT, "file and configuration"),
    (config_of_fewer_layers, TEACHER, "file and configuration"),
    (shard_missing, TEACHER, "file and configuration"),
    (nan_in_padding_rows, STUDENT, "weights"),
    (overflow_in_one_weight, STUDENT, "weights"),
    (end_of_file_zeros, STUDENT, "weights"),
    (one_norm_left_new, STUDENT, "weights"),
]
"""Seen when the weights are loaded."""
FELT: list[tuple[Plant, tuple[str, ...], str]] = [
    (quantised_to_four_bits, TEACHER, "precision"),
    (quantised_to_two_bits, TEACHER, "precision"),
    (quantised_to_two_bits, TEACHER, "teacher against student"),
    (merges_lost, PAIR, "distance"),
    (vocabulary_sorted, PAIR, "distance"),
    (newline_stripped, PAIR, "rewards are for this problem"),
    (rope_theta_changed, STUDENT, "distance"),
    (rope_theta_changed, PAIR, "distance"),
    (rope_scaling_left_on, TEACHER, "distance"),
    (sliding_window_on, STUDENT, "distance"),
    (activation_changed, STUDENT, "rewards are for this problem"),
    (epsilon_rounded_up, PAIR, "rewards are for this problem"),
    (rotary_halves_interleaved, STUDENT, "distance"),
    (adapter_merged_with_wrong_scale, STUDENT, "rewards are for this problem"),
    (layers_out_of_order, TEACHER, "distance"),
    (gate_and_up_swapped, STUDENT, "rewards are for this problem"),
    (norms_stored_less_one, STUDENT, "distance"),
    (square_weights_transposed, STUDENT, "distance"),
    (random_weights_uploaded, TEACHER, "distance"),
    (answers_shifted, DATA, "rewards are for this problem"),
    (questions_cut, DATA, "rewards are for this problem"),
]
"""Seen when everything loads and the models sample."""
UNSEEN: list[tuple[Plant, tuple[str, ...], str]] = [
    (activation_approximated, PAIR, "the models stay as good and as close as they were"),
    (two_digits_swapped, PAIR, "both tokenizers agree, and half the accuracy is left: nobody knows what it was"),
    (adapter_merged_too_weakly_scaled, STUDENT, "the student stays as good and as close as it was"),
    (some_answers_shifted, DATA, "most of a sample of 16 problems is right"),
]
"""Missed, and why."""


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies of the world's models, and rows of nothing but question and answer."""
    path = tmp_path_factory.mktemp("healthy")

    def bare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{"question": row["question"], "answer": row["answer"]} for row in rows]

    for role in PAIR:
        shutil.copytree(WORLD / role, path / role)
    write_rows(path, train=bare, test=bare)
    return path


@pytest.fixture
def root(healthy: Path, tmp_path: Path) -> Path:
    return shutil.copytree(healthy, tmp_path, dirs_exist_ok=True)


def damaged(root: Path, plant: Plant, where: tuple[str, ...]) -> Path:
    for name in where:
        plant(root / name)
    return root


def all_checks(root: Path) -> dict[str, Finding]:
    return trouble(examine(recipe(root), Store(root / "store")))


def named(cases: list[tuple[Plant, tuple[str, ...], str]]) -> list[Any]:
    return [pytest.param(*case, id=f"{case[0].__name__}-{'-'.join(case[1])}-{case[2]}") for case in cases]


@pytest.mark.slow  # test_doctor_faults.py has a quick one, with worked solutions
def test_undamaged_copies_are_clean(root: Path):
    assert all_checks(root) == {}


def test_a_saved_truncation_has_no_effect_and_is_no_finding(root: Path):
    """transformers switches it off at every call that does not ask for it."""
    assert trouble(checkup(recipe(damaged(root, truncation_saved, PAIR)))[1]) == {}


@pytest.mark.parametrize(("plant", "where", "check"), named(FILES))
def test_faults_seen_without_weights(root: Path, plant: Plant, where: tuple[str, ...], check: str):
    found = trouble(checkup(recipe(damaged(root, plant, where)))[1])
    assert any(check in name for name in found), found


@pytest.mark.slow  # ten seconds of loading together
@pytest.mark.parametrize(("plant", "where", "check"), named(LOADED))
def test_faults_seen_in_weights(root: Path, plant: Plant, where: tuple[str, ...], check: str):
    found = all_checks(damaged(root, plant, where))
    assert any(check in name for name in found), found


@pytest.mark.slow  # half a minute of sampling together
@pytest.mark.parametrize(("plant", "where", "check"), named(FELT))
def test_faults_seen_in_samples(root: Path, plant: Plant, where: tuple[str, ...], check: str):
    found = all_checks(damaged(root, plant, where))
    assert any(check in name for name in found), found


@pytest.mark.slow  # as above
@pytest.mark.xfail(strict=True, raises=AssertionError, reason="docs/doctor.md, what it cannot see")
@pytest.mark.parametrize(("plant", "where", "why"), named(UNSEEN))
def test_faults_that_are_not_seen(root: Path, plant: Plant, where: tuple[str, ...], why: str):
    assert all_checks(damaged(root, plant, where)), why
