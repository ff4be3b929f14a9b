import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch

from headwater.config import ModelConfig
from headwater.models.language_model import check_same_tokenizer, load_model, wrap
from headwater.types import Message

IDS = torch.tensor([[5, 6, 7, 8, 9], [1, 2, 3, 4, 10]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_hidden_times_head_are_the_logits(make_model, dtype):
    model = make_model(0, dtype=dtype)
    logits = model.module(input_ids=IDS).logits
    assert logits.shape == (2, 5, 320) and model.head.shape == (275, 32)
    torch.testing.assert_close(model.hidden(IDS) @ model.head.T, logits[..., :275])


@pytest.mark.parametrize("left", [0, 1, 7])
def test_hidden_states_do_not_depend_on_padding(make_model, left):
    model = make_model(0, dtype=torch.float64)
    want = model.hidden(IDS)
    ids = torch.cat([torch.full((2, left), 3), IDS, torch.full((2, 2), 3)], 1)
    mask = torch.ones_like(ids)
    mask[:, :left] = 0
    mask[:, left + 5 :] = 0
    torch.testing.assert_close(model.hidden(ids, mask)[:, left : left + 5], want, rtol=0, atol=1e-12)
    if not left:
        torch.testing.assert_close(model.hidden(ids)[:, :5], want, rtol=0, atol=1e-12)
    assert not torch.allclose(model.hidden(ids.roll(1, 1))[:, left + 1 : left + 6], want)


def test_prompts(make_model):
    model = make_model(0)
    ask = [Message("user", "1+2=")]
    text = "<|im_start|>user\n1+2=<|im_end|>\n<|im_start|>assistant\n"
    assert model.tokenizer.decode(model.encode(ask)) == text
    said = replace(model, config=model.config.model_copy(update={"system": "Be brief"}))
    assert said.tokenizer.decode(said.encode(ask)) == "<|im_start|>system\nBe brief<|im_end|>\n" + text
    own = [Message("system", "Own"), *ask]
    assert said.encode(own) == model.encode(own)
    plain = make_model(0, template="none")
    assert plain.tokenizer.decode(plain.encode([*ask, Message("user", "3")])) == "1+2=\n3"
    with pytest.raises(ValueError, match="prompt is empty"):
        plain.encode([Message("user", "")])


def test_end_tokens_come_from_tokenizer_generation_config_and_settings(make_model):
    model = make_model(0, stops=("A", "B"))
    vocab = model.tokenizer.get_vocab()
    assert model.eos_ids == tuple(sorted([vocab["<|im_end|>"], vocab["A"], vocab["B"]]))
    module = copy.deepcopy(model.module)
    module.generation_config.eos_token_id = [vocab["C"], vocab["D"]]
    also = wrap(module, model.tokenizer, model.config)
    assert set(also.eos_ids) == {*model.eos_ids, vocab["C"], vocab["D"]}
    assert model.decode([vocab["x"], vocab["A"]]) == "x" and model.decode([vocab["x"], vocab["y"]]) == "xy"
    # Only the token that ended the completion goes.
    assert model.decode([vocab["A"], vocab["<|im_end|>"]]) == "A" and model.decode([]) == ""
    with pytest.raises(ValueError, match=r"stop token '<nonsense>' is not one token"):
        wrap(module, model.tokenizer, ModelConfig(source="x", stop_tokens=("<nonsense>",)))
    module.generation_config.eos_token_id = None
    bare = copy.deepcopy(model.tokenizer)
    bare.eos_token = None
    with pytest.raises(ValueError, match="names an end token; set stop_tokens"):
        wrap(module, bare, ModelConfig(source="x"))


def test_models_the_losses_would_misread_are_refused(make_model):
    model = make_model(0)
    bare = copy.deepcopy(model.tokenizer)
    bare.chat_template = None
    with pytest.raises(ValueError, match=r"no chat template.*template = 'none'"):
        wrap(model.module, bare, model.config)
    assert wrap(model.module, bare, model.config.model_copy(update={"template": "none"})).vocab_size == 275
    larger = copy.deepcopy(model.tokenizer)
    larger.add_tokens([f"<{i}>" for i in range(60)])
    with pytest.raises(ValueError, match="tokenizer has 335 tokens but the model only 320 rows"):
        wrap(model.module, larger, model.config)
    capped = copy.deepcopy(model.module)
    forward = capped.forward

    def soft_cap(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = 3 * torch.tanh(out.logits / 3)
        return out

    capped.forward = soft_cap  # pyright: ignore -- a patched method
    with pytest.raises(ValueError, match="not hidden states times LM head"):
        wrap(capped, model.tokenizer, model.config)


def test_tokenizers_must_agree(make_model):
    student, teacher = make_model(0), make_model(1, "48x2")
    check_same_tokenizer(student, teacher)
    changed = copy.deepcopy(teacher.tokenizer)
    changed.add_tokens(["<think>"])
    with pytest.raises(ValueError, match=r"1 tokens differ, for example '<think>' is 275 for the teacher and None"):
        check_same_tokenizer(student, replace(teacher, tokenizer=changed))


def test_loading(tiny_directory, problems):
    config = ModelConfig(source=f"file:{tiny_directory}", dtype="bfloat16")
    frozen, trained = load_model(config, tiny_directory), load_model(config, tiny_directory, trained=True)
    assert {p.dtype for p in frozen.module.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in trained.module.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in frozen.module.parameters())
    assert all(p.requires_grad for p in trained.module.parameters())
    assert not frozen.module.training and not trained.module.training
    assert frozen.num_parameters == trained.num_parameters == sum(p.numel() for p in trained.module.parameters())
    for a, b in zip(frozen.module.parameters(), trained.module.parameters(), strict=True):
        assert torch.equal(a, b.to(torch.bfloat16))


def test_checkpointed_activations_give_the_same_gradient(tiny_directory, tmp_path):
    shutil.copytree(tiny_directory, tmp_path, dirs_exist_ok=True)
    settings = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**settings, "attention_dropout": 0.5}), encoding="utf-8")
    config = ModelConfig(source=f"file:{tmp_path}")
    gradients = []
    for checkpointed in (False, True):
        model = load_model(config, tmp_path, trained=True, checkpoint_activations=checkpointed)
        assert model.checkpoint_activations == checkpointed
        model.module.train(checkpointed)
        model.hidden(IDS).square().sum().backward()
        gradients.append([p.grad for p in model.module.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
