import copy
from pathlib import Path

import pytest
from pydantic import ValidationError
from tokenizers.processors import TemplateProcessing

from headwater.config import ModelConfig
from headwater.models import template
from headwater.models.language_model import wrap
from headwater.types import Message

ASK = (Message("user", "1+2="),)
PLAIN = "<|im_start|>user\n1+2=<|im_end|>\n<|im_start|>assistant\n"
CHATML = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}TAIL{%- endif %}"
)
# As Qwen3 (a switch), DeepSeek-R1's distillates (always thinks), DeepSeek-V3.1 (another name for the switch).
SWITCH = CHATML.replace(
    "TAIL", "{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
)
ALWAYS = CHATML.replace("TAIL", "{{- '<think>\n' }}")
RENAMED = CHATML.replace("TAIL", "{%- if thinking %}{{- '<think>\n' }}{%- else %}{{- '</think>' }}{%- endif %}")
# As Qwen2.5: a system text of its own where the conversation has none.
DEFAULT = "{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\nBe Q.<|im_end|>\n' }}{%- endif %}" + CHATML
# As Gemma and Llama 2: the system text inside the user's turn, or no system message at all.
INSIDE = (
    "{{- '<s>[INST] ' }}{%- if messages[0].role == 'system' %}{{- '<<' + messages[0].content + '>> ' }}{%- endif %}"
    "{{- messages[-1].content + ' [/INST]' }}"
)
REFUSES = "{%- if messages[0].role == 'system' %}{{- raise_exception('no system role') }}{%- endif %}" + INSIDE


@pytest.fixture
def own(tokenizer):
    return copy.deepcopy(tokenizer)


def text(tokenizer, chat: str, **settings) -> str:
    tokenizer.chat_template = chat.replace("TAIL", "")
    config = ModelConfig(source="model", **settings)
    found = template.with_template(tokenizer, config)
    rendered = template.render(found, config, ASK)
    assert found.decode(template.encode(found, config, ASK)) == rendered
    return rendered


def test_thinking_is_what_the_recipe_says(own):
    empty = "<think>\n\n</think>\n\n"
    assert text(own, SWITCH) == PLAIN + empty and text(own, SWITCH, thinking=True) == PLAIN
    assert text(own, ALWAYS) == PLAIN + empty and text(own, ALWAYS, thinking=True) == PLAIN + "<think>\n"
    assert text(own, RENAMED) == PLAIN + "</think>" and text(own, RENAMED, thinking=True) == PLAIN + "<think>\n"
    assert text(own, CHATML) == PLAIN
    with pytest.raises(ValueError, match="thinking = true, but its chat template renders the same prompt"):
        text(own, CHATML, thinking=True)
    with pytest.raises(ValueError, match="thinking = true is an option of chat templates"):
        text(own, CHATML, thinking=True, template="none")


def test_a_default_system_text_is_seen_and_removable(own):
    def default(chat: str) -> str:
        own.chat_template = chat.replace("TAIL", "")
        return template.default_system(own, ModelConfig(source="model"))

    assert default(DEFAULT) == "Be Q."
    assert [default(chat) for chat in (CHATML, SWITCH, INSIDE, REFUSES)] == [""] * 4
    assert text(own, DEFAULT) == "<|im_start|>system\nBe Q.<|im_end|>\n" + PLAIN
    assert text(own, DEFAULT, system="Mine") == "<|im_start|>system\nMine<|im_end|>\n" + PLAIN
    assert text(own, DEFAULT, system="") == "<|im_start|>system\n<|im_end|>\n" + PLAIN
    # Nothing to remove, nothing added.
    assert text(own, CHATML, system="") == PLAIN and text(own, REFUSES, system="") == text(own, REFUSES)
    with pytest.raises(ValueError, match=r"refuses a conversation of \['system', 'user'\] \(no system role\)"):
        text(own, REFUSES, system="Mine")


def test_a_template_file(own, tmp_path: Path):
    path = tmp_path / "base.jinja"
    path.write_text("{%- for m in messages %}{{- m.content + '\n' }}{%- endfor %}")
    own.chat_template = None
    config = ModelConfig(source="model", template=str(path))
    found = template.with_template(own, config)
    assert found.decode(template.encode(found, config, ASK)) == "1+2=\n"
    assert found.chat_template == path.read_text()  # what an export will carry
    with pytest.raises(ValueError, match="does not exist"):
        template.with_template(own, config.model_copy(update={"template": "lost.jinja"}))
    path.write_text("{{- nonsense( }}")
    with pytest.raises(ValueError, match="its chat template refuses a conversation"):
        template.with_template(own, config)
    with pytest.raises(ValidationError, match=r"use 'chat', 'none' or the path of a \.jinja file"):
        ModelConfig(source="model", template="chatml")


def with_bos(tokenizer):
    """Puts <|endoftext|> before every text and <|im_end|> behind it."""
    bos, eos = "<|endoftext|>", "<|im_end|>"
    ids = [(t, tokenizer.convert_tokens_to_ids(t)) for t in (bos, eos)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A {eos}", special_tokens=ids)
    tokenizer.bos_token = bos
    return tokenizer, ids[0][1]


def test_bos_comes_once(own, tmp_path: Path):
    own, bos = with_bos(own)
    assert template.prefix(own) == [bos]

    def ids(chat: str, content: str = "1+2=", **settings) -> list[int]:
        own.chat_template = chat.replace("TAIL", "")
        config = ModelConfig(source="model", **settings)
        return template.encode(template.with_template(own, config), config, (Message("user", content),))

    bare = template.plain(own, "1+2=")
    assert ids(CHATML, template="none") == [bos, *bare]  # and no end token
    assert ids(CHATML, "<|endoftext|>1+2=", template="none") == [bos, *bare]
    assert ids(CHATML, "", template="none") == [bos]
    chat = template.plain(own, PLAIN)
    assert ids(CHATML) == chat  # as transformers and vLLM do; the doctor warns
    assert ids("{{- bos_token }}" + CHATML) == ids("{{- bos_token + bos_token }}" + CHATML) == [bos, *chat]
    path = tmp_path / "own.jinja"
    for written in (CHATML, "{{- bos_token }}" + CHATML):
        path.write_text(written.replace("TAIL", ""))
        assert ids("", template=str(path)) == [bos, *chat]
    # Whoever loads the exported tokenizer prompts alike.
    assert own.apply_chat_template([{"role": "user", "content": "1+2="}], add_generation_prompt=True)["input_ids"] == [
        bos,
        *chat,
    ]


def test_stop_strings_against_a_slow_obvious_version(own):
    own.add_tokens(["12", ";1", "\n\nQ", "é;"])
    texts = ["7+5=12;12*3=16;", "a\n\nQ1", "é;é", "1", "12;1", "日本\n\n\nQ", ""]
    for stop in ((";",), ("=16",), ("12*",), ("\n\n", ";"), ("é",), ("本",), ("none",), ("2;1", "+5=1")):
        for line in texts:
            for ids in (template.plain(own, line), [t for c in line for t in template.plain(own, c)]):
                prefixes = [n for n in range(1, len(ids) + 1) if any(s in own.decode(ids[:n]) for s in stop)]
                first = prefixes[0] if prefixes else None
                assert template.stop_length(own, ids, stop) == first
                ends = [n for n in range(1, len(ids) + 1) if template.ends_in_stop(own, ids[:n], stop)]
                assert (ends[0] if ends else None) == first
    assert template.cut("a;b\nc;", ("\n", ";")) == "a" and template.cut("abc", ()) == "abc"


def test_a_completion_is_read_up_to_its_stop_string(make_model):
    model = make_model(0, stops=())
    model = wrap(model.module, model.tokenizer, model.config.model_copy(update={"stop": (";1",)}))
    ids = template.plain(model.tokenizer, "7+5=12;1")
    assert model.decode(ids) == "7+5=12" and model.is_finished(ids)
    assert model.decode(ids[:-1]) == "7+5=12;" and not model.is_finished(ids[:-1])
    assert model.is_finished([*ids[:-1], model.eos_ids[0]])
    with pytest.raises(ValidationError, match="stop holds an empty text"):
        ModelConfig(source="model", stop=("",))
