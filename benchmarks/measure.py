"""What the measurements share: models of real shapes with random weights, timing, tables."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from headwater.config import ModelConfig
from headwater.models.language_model import LanguageModel, compile_layers

Row = dict[str, Any]
HEAD_ROWS, VOCAB = 151_936, 151_669
"""Rows of Qwen3's LM head and tokens of its tokenizer: the losses cut the head there."""


@dataclass(frozen=True)
class Shape:
    """A Qwen3 model's dimensions; `tied`: the LM head is the embedding."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    tied: bool
    head_dim: int = 128


SHAPES = {
    "0.6B": Shape(1024, 28, 16, 8, 3072, True),
    "1.7B": Shape(2048, 28, 16, 8, 6144, True),
    "8B": Shape(4096, 36, 32, 8, 12288, False),
}


@dataclass(frozen=True)
class Scale:
    """Sizes of the run: the real ones, or toy ones that only exercise the code."""

    device: str = "cuda"
    head_rows: int = HEAD_ROWS
    vocab: int = VOCAB
    widths: tuple[int, int] = (2048, 4096)
    kernel_tokens: tuple[int, ...] = (2048, 8192, 32768)
    oracle_tokens: int = 256
    square: int = 8192
    copy_bytes: int = 4 << 30
    divide: int = 1
    sampled: tuple[tuple[str, int, bool, int], ...] = (
        ("0.6B", 64, False, 0),
        ("0.6B", 256, False, 0),
        ("1.7B", 64, False, 0),
        ("1.7B", 256, False, 0),
        ("1.7B", 256, True, 0),
        ("1.7B", 256, True, 2048),
    )
    """Model, batch, whether prompts differ in length (so are padded and masked), how many tokens end a completion."""
    new_tokens: int = 256
    step_tokens: int = 65_536
    lengths: tuple[int, ...] = (2048, 4096, 8192, 16384)


TINY = Scale(
    "cpu", 96, 91, (16, 32), (24, 48), 16, 64, 1 << 20, 64, (("0.6B", 2, False, 0), ("0.6B", 4, True, 9)), 4, 64, (32,)
)


class Tokens:
    """Stands in for a tokenizer: a prompt's text is a seed and a length, completions read as nothing."""

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        seed, length = map(int, text.split())
        generator = torch.Generator().manual_seed(seed)
        return {"input_ids": torch.randint(self.vocab, (length,), generator=generator).tolist()}

    def decode(self, ids: Sequence[int], **_: object) -> str:
        return ""


def build(name: str, scale: Scale, *, trained: bool, checkpoint: bool = False, compiled: bool = False) -> LanguageModel:
    """A Qwen3 of this size with random weights: float32 when trained, for AdamW to take its masters from."""
    shape, cut = SHAPES[name], scale.divide
    config = Qwen3Config(
        vocab_size=scale.head_rows,
        hidden_size=shape.hidden // cut,
        num_hidden_layers=max(2, shape.layers // cut),
        num_attention_heads=shape.heads // (8 if cut > 1 else 1),
        num_key_value_heads=shape.kv_heads // (8 if cut > 1 else 1),
        intermediate_size=shape.intermediate // cut,
        head_dim=shape.head_dim // (8 if cut > 1 else 1),
        tie_word_embeddings=shape.tied,
        max_position_embeddings=40_960,
    )
    config._attn_implementation = "sdpa"
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if trained else torch.bfloat16)
    with torch.device(scale.device):
        module = Qwen3ForCausalLM(config).eval().requires_grad_(trained)
    torch.set_default_dtype(previous)
    if checkpoint:
        module.gradient_checkpointing_enable({"use_reentrant": False})
    settings = ModelConfig(source="file:random", dtype="bfloat16", template="none")
    # An end token past the tokenizer's last is never drawn: every completion has full length.
    model = LanguageModel(module, Tokens(scale.vocab), settings, (scale.vocab,), scale.vocab, checkpoint)  # pyright: ignore
    return compile_layers(model) if compiled else model


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def memory() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def peak_memory() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def reset_peak() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def median_seconds(work: Callable[[], object], repeats: int = 7, warmups: int = 2) -> float:
    """Median over `repeats` of the device time of `work`, by events (by the clock without CUDA)."""
    for _ in range(warmups):
        work()
    times = []
    for _ in range(repeats):
        synchronize()
        if torch.cuda.is_available():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            work()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            work()
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


def table(title: str, rows: list[Row]) -> str:
    """Markdown, 3 significant digits."""

    def cell(value: object) -> str:
        if not isinstance(value, float):
            return "-" if value is None else str(value)
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"

    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [" | ".join(names), " | ".join("---" for _ in names)]
    lines += [" | ".join(cell(row.get(name)) for name in names) for row in rows]
    return f"\n**{title}**\n\n" + "\n".join(f"| {line} |" for line in lines)
