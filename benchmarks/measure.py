"""What the measurements share: models of real shapes with random weights, losses beside plain torch, time, memory,
tables."""

from __future__ import annotations

import gc
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen3Config, Qwen3ForCausalLM

from headwater.config import ModelConfig
from headwater.losses import oracle
from headwater.losses.dense import Divergence, dense_divergence
from headwater.losses.projection import sum_over_logprobs, token_logprobs
from headwater.models.language_model import LanguageModel, compile_layers
from headwater.scoring.scores import HiddenScores, TopKScores
from headwater.stages.node import environment

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
    model = LanguageModel(module, Tokens(scale.vocab), settings, (scale.vocab,), scale.vocab, checkpoint)  # pyright: ignore -- Tokens counts alone
    return compile_layers(model) if compiled else model


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def memory() -> int:
    """Bytes that tensors hold on the device; without CUDA the process's resident set."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else _resident("VmRSS")


def peak_memory() -> int:
    """The most of `memory` since `reset_peak`."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _resident("VmHWM")


def reset_peak() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark begins again (man 5 proc)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def available_memory() -> int:
    """Bytes that can still be allocated on the device, or in main memory without CUDA."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


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


def ceilings(scale: Scale, dtype: torch.dtype = torch.bfloat16) -> Row:
    """What the device reaches: a square product of random data, and a copy counting bytes read and written."""
    a, b = (torch.randn(scale.square, scale.square, device=scale.device, dtype=dtype) for _ in range(2))
    product = median_seconds(lambda: a @ b, 20)
    source = torch.randint(256, (scale.copy_bytes,), device=scale.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    copy = median_seconds(lambda: target.copy_(source))
    return {"matmul_tflops": 2 * scale.square**3 / product / 1e12, "copy_gbs": 2 * scale.copy_bytes / copy / 1e9}


def loss_inputs(tokens: int, scale: Scale, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random hidden states and heads whose logits have a standard deviation of about 4: peaked, as a model's are."""
    (narrow, wide), device = scale.widths, scale.device

    def head(width: int) -> Tensor:
        return (torch.randn(scale.head_rows, width, device=device) * (4 / width**0.5)).to(dtype)

    return {
        "hidden": torch.randn(tokens, narrow, device=device, dtype=dtype).requires_grad_(),
        "head": head(narrow).requires_grad_(),
        "teacher_hidden": torch.randn(tokens, wide, device=device, dtype=dtype),
        "teacher_head": head(wide),
        "weights": torch.rand(tokens, device=device) + 0.5,
        "targets": torch.randint(scale.vocab, (tokens,), device=device),
    }


@torch.no_grad()
def top_k(x: dict[str, Tensor], vocab: int, k: int = 64) -> TopKScores:
    parts = [
        (h @ x["teacher_head"][:vocab].T).float().log_softmax(1).topk(min(k, vocab // 2))
        for h in x["teacher_hidden"].split(1024)
    ]
    return TopKScores(torch.cat([p.indices for p in parts]), torch.cat([p.values for p in parts]))


def ours(name: str, x: dict[str, Tensor], vocab: int, teacher: TopKScores | None, chunk: int = 1024) -> Tensor:
    """The weighted sum that the package computes from hidden states, `chunk` tokens at a time."""
    if name == "token_logprobs":
        logprobs, _ = token_logprobs(x["hidden"], x["head"], x["targets"], vocab_size=vocab, chunk_tokens=chunk)
        return (x["weights"] * logprobs).sum()
    if name == "sum_over_logprobs":
        of = lambda logprobs, part: ((x["weights"][part] * logprobs).sum(), {})  # noqa: E731 -- one line
        settings = {"vocab_size": vocab, "chunk_tokens": chunk}
        return sum_over_logprobs(x["hidden"], x["head"], x["targets"], of, **settings)[0]
    scores = teacher or HiddenScores(x["teacher_hidden"], x["teacher_head"])
    settings = {"kind": kind_of(name), "vocab_size": vocab, "chunk_tokens": chunk}
    return dense_divergence(x["hidden"], x["head"], scores, x["weights"], **settings)[0]


def plain(name: str, x: dict[str, Tensor], vocab: int, teacher: TopKScores | None, dtype: torch.dtype) -> Tensor:
    """The same from full logits by autograd: the float64 oracle, or (with float32) what one would write in torch."""
    logits = (x["hidden"] @ x["head"].T).to(dtype)
    if name in SPARSE:
        logprobs, _ = oracle.token_logprobs_from_logits(logits, x["targets"], vocab_size=vocab)
        return (x["weights"] * logprobs).sum()
    kind = kind_of(name)
    if teacher is not None:
        return oracle.topk_divergence_from_logits(
            logits, teacher.ids, teacher.logprobs.to(dtype), x["weights"], kind=kind, vocab_size=vocab
        )
    other = (x["teacher_hidden"] @ x["teacher_head"].T).to(dtype)
    return oracle.dense_divergence_from_logits(logits, other, x["weights"], kind=kind, vocab_size=vocab)


def kind_of(name: str) -> Divergence:
    return "forward_kl" if "forward" in name else "reverse_kl" if "reverse" in name else "jsd"


SPARSE = ("token_logprobs", "sum_over_logprobs")
KERNELS = (*SPARSE, "reverse_kl", "forward_kl", "jsd", "top-64 forward_kl", "top-64 reverse_kl", "top-64 jsd")


def forward_backward(total: Callable[[], Tensor], x: dict[str, Tensor], repeats: int = 5) -> tuple[float, float]:
    """Median seconds, and peak memory in bytes above the inputs and the two gradients it returns."""

    def work() -> None:
        torch.autograd.grad(total(), (x["hidden"], x["head"]))

    work()
    above = allocated_peak(work) - sum(t.numel() * t.element_size() for t in (x["hidden"], x["head"]))
    return median_seconds(work, repeats, 0), above


def allocated_peak(work: Callable[[], object]) -> int:
    """The most bytes that tensors held at once during `work`, above those before it. On a CPU counted from torch's
    own allocations: the resident set also holds what malloc keeps of earlier work."""
    reset_peak()
    if torch.cuda.is_available():
        before = memory()
        work()
        return peak_memory() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # pyright: ignore -- set by now
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0))


def kernels(
    scale: Scale,
    peak_tflops: float,
    names: Sequence[str],
    dtype: torch.dtype = torch.bfloat16,
    repeats: int = 5,
    chunk: int = 1024,
) -> list[Row]:
    """Forward and backward of each loss against the products that any method must do, and full logits.

    Floor: 2 x tokens x vocabulary x width for each of student logits, gradient of hidden, gradient of head, and
    teacher logits where there is a teacher's hidden state. Recomputed logits are not in it. Full logits are left out
    (None) where ten float32 copies of them, about what autograd keeps of a divergence, do not fit.
    """
    rows = []
    for tokens in scale.kernel_tokens:
        x = loss_inputs(tokens, scale, dtype)
        for name in names:
            teacher = top_k(x, scale.vocab) if "top" in name else None
            exact = teacher is None and name not in SPARSE
            width = 3 * scale.widths[0] + (scale.widths[1] if exact else 0)
            floor = 2 * tokens * scale.vocab * width / peak_tflops / 1e12
            seconds, above = forward_backward(partial(ours, name, x, scale.vocab, teacher, chunk), x, repeats)
            row = {"loss": name, "vocab": scale.vocab, "tokens": tokens, "ms": seconds * 1e3, "GB": above / 1e9}
            row |= {"floor ms": floor * 1e3, "floor share": floor / seconds, "plain ms": None, "plain GB": None}
            reset_peak()
            if 40 * tokens * scale.head_rows < available_memory():
                try:
                    work = partial(plain, name, x, scale.vocab, teacher, torch.float32)
                    plain_s, plain_b = forward_backward(work, x, repeats)
                    row |= {"plain ms": plain_s * 1e3, "plain GB": plain_b / 1e9}
                except torch.cuda.OutOfMemoryError:
                    pass
            rows.append(row)
            reset_peak()
    return rows


def growth(points: Sequence[tuple[float, float]]) -> float | None:
    """The exponent p of the least-squares fit y = c x^p; None for fewer than two different x."""
    x, y = np.log(np.maximum(np.array(points, dtype=float), 1e-12)).T
    return float(np.polyfit(x, y, 1)[0]) if len(set(x)) > 1 else None


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


def report(script: str, arguments: object, results: dict[str, list[Row]], out: Path | None) -> None:
    """Write results as JSON with commit, device, versions, date and load, where `out` says so."""
    if out is not None:
        where = {"script": script, "arguments": {n: str(v) for n, v in vars(arguments).items()}}
        where |= {"date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), "threads": torch.get_num_threads()}
        where |= {"load average at the end": os.getloadavg()[0], **environment()}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(where | results, indent=1) + "\n", encoding="utf-8")
