"""Prompts: messages in, token ids out. The one place that applies chat templates and looks for stop strings."""

from __future__ import annotations

import bisect
import re
from collections.abc import Sequence
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from headwater.assets import fetch
from headwater.methods import ModelConfig
from headwater.types import Message

_OPEN_THINK = re.compile(r"<think>\s*\Z")
PROBE = "\ue000"
"""A text (private use) that is in no template."""


def with_template(tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer with the chat template that `config` asks for; a file's takes the place of its own.

    A file's template that forgets the BOS gets it, so that whoever loads the exported student prompts it alike.
    Raises ValueError when there is no template, when it cannot be rendered, and for `thinking` that it does not know.
    """
    if config.template == "none":
        if config.thinking:
            raise ValueError(f"{config.source}: thinking = true is an option of chat templates, and template = 'none'")
        return tokenizer
    if config.template != "chat":
        tokenizer.chat_template = fetch(config.template).read_text(encoding="utf-8")
        bos = tokenizer.decode(prefix(tokenizer))
        if not render(tokenizer, config, (Message("user", "?"),)).startswith(str(bos)):
            tokenizer.chat_template = "{{- bos_token }}" + tokenizer.chat_template
    if not tokenizer.chat_template:
        raise ValueError(
            f"{config.source} has no chat template: a base model needs template = 'none' or a file "
            "(template = 'PATH.jinja'); or use the instruct model's tokenizer"
        )
    if config.thinking and not knows_thinking(tokenizer, config):
        raise ValueError(
            f"{config.source}: thinking = true, but its chat template renders the same prompt with and without "
            "enable_thinking: remove the setting, or give a template that knows it (template = 'PATH.jinja')"
        )
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerBase, config: ModelConfig, messages: Sequence[Message]) -> list[int]:
    """Token ids of a prompt, ready for the completion to follow; ValueError when there are none.

    Without a template, what the tokenizer puts before every text (BOS) is put there once; what it would put behind it
    is not, since the prompt goes on.
    """
    text = render(tokenizer, config, messages)
    ids = plain(tokenizer, text)
    before = prefix(tokenizer)
    while before and ids[: 2 * len(before)] == before * 2:
        ids = ids[len(before) :]
    if config.template == "none" and ids[: len(before)] != before:
        ids = before + ids
    if not ids:
        raise ValueError("a prompt is empty, so nothing predicts its first token: drop it, or set a system text")
    return ids


def render(tokenizer: PreTrainedTokenizerBase, config: ModelConfig, messages: Sequence[Message]) -> str:
    """The prompt as text.

    A template that opens `<think>` by itself is answered with the empty thought when `config.thinking` is off: what
    Qwen3's template writes for enable_thinking = False. Raises ValueError for messages that the template refuses.
    """
    own = any(m.role == "system" for m in messages)
    if config.system is not None and not own and (config.system or default_system(tokenizer, config)):
        messages = [Message("system", config.system), *messages]
    if config.template == "none":
        return "\n".join(m.content for m in messages)
    text = _apply(tokenizer, config, messages, config.thinking)
    return text if config.thinking or not _OPEN_THINK.search(text) else text.rstrip() + "\n\n</think>\n\n"


def default_system(tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> str:
    """The system text that the template puts in when a conversation has none, as Qwen2.5's does; "" for none.

    Where the text of a given system message stands, something else stands without one.
    """
    if config.template == "none":
        return ""
    ask = Message("user", "?")
    silent = _apply(tokenizer, config, [ask], False)
    try:
        given = _apply(tokenizer, config, [Message("system", PROBE), ask], False)
    except ValueError:  # knows no system messages
        return ""
    before, found, after = given.partition(PROBE)
    inside = len(silent) - len(before) - len(after)
    if found and inside > 0 and silent.startswith(before) and silent.endswith(after):
        return silent[len(before) : len(before) + inside]
    return ""


def knows_thinking(tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> bool:
    """Whether the template has a switch for thinking, or always opens a thought."""
    on, off = (_apply(tokenizer, config, [Message("user", "?")], value) for value in (True, False))
    return on != off or _OPEN_THINK.search(on) is not None


def _apply(tokenizer: PreTrainedTokenizerBase, config: ModelConfig, messages: Sequence[Message], think: bool) -> str:
    # Any, since the errors that a template raises are jinja's, Python's, or its own.
    try:
        return str(
            tokenizer.apply_chat_template(
                [{"role": m.role, "content": m.content} for m in messages],
                add_generation_prompt=True,
                enable_thinking=think,
                thinking=think,
                tokenize=False,
            )
        )
    except Exception as error:
        roles = [m.role for m in messages]
        raise ValueError(
            f"{config.source}: its chat template refuses a conversation of {roles} ({error}): change the messages, or "
            "give another template (template = 'PATH.jinja')"
        ) from error


def plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text and of nothing else."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])  # pyright: ignore -- typed for batches too


@lru_cache(maxsize=8)
def prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that the tokenizer puts before every text: the BOS, where it has that habit."""
    ids, bare = list(tokenizer("a")["input_ids"]), plain(tokenizer, "a")  # pyright: ignore -- as above
    starts = (n for n in range(len(ids)) if ids[n : n + len(bare)] == bare)
    return ids[: next(starts, 0)]


def cut(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop string."""
    return text[: min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))]


def ends_in_stop(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stop: Sequence[str]) -> bool:
    """Whether a stop string stands at the end of these tokens; looks at no more of them than it needs."""
    longest, count = max(map(len, stop)), 4
    while True:
        # The first token of a window may be half a character, or lose its space.
        text = str(tokenizer.decode(list(ids[-count:])))
        if count >= len(ids) or len(text) > 2 * longest + 8:
            return any(s in text for s in stop)
        count *= 2


def stop_length(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stop: Sequence[str]) -> int | None:
    """How many of the tokens it takes until their text has a stop string; None when it has none."""

    def has(count: int) -> bool:
        text = str(tokenizer.decode(list(ids[:count])))
        return any(s in text for s in stop)

    return bisect.bisect_left(range(len(ids)), True, key=has) if stop and has(len(ids)) else None
