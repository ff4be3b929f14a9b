"""Our sampler beside transformers' `generate`: same model, prompts and law of lengths, in turns.

    python benchmarks/sampling.py                     # 15.7M Qwen3, 64 rows, limits of 64 and 256 tokens

`modules`: our sampler with every step computed by transformers' modules, not by `rollouts.decoding` as small models on
a CPU are. `idle`: the share of tokens that were put through the model behind a completion's end. Floor: the larger of
all weights read once a step at the speed of a copy, and the products that the prompts (once a group) and the drawn
tokens need at the speed of a square product, both measured here.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from measure import SHAPES, TINY, Row, Scale, Shape, ceilings, report, synchronize, table
from workload import END, PAD, STUDENT, build, problems, prompts

from headwater import flops
from headwater.models.language_model import LanguageModel
from headwater.rollouts.decoding import Decoder
from headwater.rollouts.sampler import Sampling, TransformersSampler
from headwater.types import Problem

MODELS = {"0.1M": Shape(48, 3, 3, 3, 144, True, 16), "15.7M": STUDENT, **SHAPES}
"""The first has the shape of the world's student, for a vocabulary of 320 (`--vocab`)."""


def ours(model: LanguageModel, pool: list[Problem], group: int, limit: int, turn: int) -> Row:
    sampler = TransformersSampler(model)
    start = time.perf_counter()
    rollouts = sampler.sample(pool, Sampling(("benchmark", turn), group, limit))
    synchronize()
    lengths = [len(r.completion_ids) for r in rollouts]
    row = {"sampler": "headwater", "seconds": time.perf_counter() - start, "lengths": lengths}
    return row | {"prefilled": int(sampler.prefilled.tokens), "decoded": int(sampler.decoded.tokens)}


def by_modules(model: LanguageModel, pool: list[Problem], group: int, limit: int, turn: int) -> Row:
    """Our sampler without its own decoding: transformers' modules compute every step."""
    with patch.object(Decoder, "fits", return_value=False):
        return ours(model, pool, group, limit, turn) | {"sampler": "modules"}


@torch.no_grad()
def theirs(model: LanguageModel, pool: list[Problem], group: int, limit: int, turn: int) -> Row:
    """`generate` on the rows padded to the left, each prompt as often as it has completions; tokens as lists, too."""
    torch.manual_seed(turn)
    start = time.perf_counter()
    ids = [model.encode(p.messages) for p in pool for _ in range(group)]
    padded = model.tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt").to(model.device)
    width = padded["input_ids"].shape[1]
    out = model.module.generate(  # pyright: ignore[reportCallIssue] -- a mixin's method
        **padded, do_sample=True, top_k=0, max_new_tokens=limit, eos_token_id=END, pad_token_id=PAD
    )
    drawn = out[:, width:].tolist()
    lengths = [row.index(END) + 1 if END in row else len(row) for row in drawn]
    row = {"sampler": "generate", "seconds": time.perf_counter() - start, "lengths": lengths}
    return row | {"prefilled": len(ids) * width, "decoded": len(ids) * (len(drawn[0]) - 1)}


def measured(model: LanguageModel, rows: list[Row], pool: list[Problem], group: int, limits: Row) -> Row:
    """One line of the table from the repeats of one sampler: medians, sums over repeats where lengths differ."""
    seconds = statistics.median(row["seconds"] for row in rows)
    lengths = [n for row in rows for n in row["lengths"]]
    drawn, steps = sum(lengths) / len(rows), statistics.mean(max(row["lengths"]) for row in rows)
    needed = sum(n - 1 for n in lengths) / len(rows)
    decoded = statistics.mean(row["decoded"] for row in rows)
    once = [flops.prompt_work(len(model.encode(p.messages))) for p in pool]
    sizes = [(len(model.encode(p.messages)), n) for p in pool for n in [max(1, round(drawn / len(pool) / group))]]
    work = flops.total([*once, *(flops.completion_work(p, n) for p, n in sizes for _ in range(group))])
    read = steps * sum(p.numel() * p.element_size() for p in model.module.parameters())
    floor = max(
        read / limits["copy_gbs"] / 1e9, flops.forward_flops(model.shape, work) / limits["matmul_tflops"] / 1e12
    )
    return {
        "sampler": rows[0]["sampler"],
        "mean length": drawn / len(pool) / group,
        "tokens/s": drawn / seconds,
        "seconds": seconds,
        "spread": (max(r["seconds"] for r in rows) - min(r["seconds"] for r in rows)) / seconds,
        "idle": 1 - needed / decoded if decoded else 0.0,
        "prefilled": rows[0]["prefilled"],
        "ms/step": seconds / steps * 1e3,
        "floor ms/step": floor / steps * 1e3,
        "floor share": floor / seconds,
    }


def main(given: list[str] | None = None) -> dict[str, list[Row]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, help="15.7M, on CUDA 1.7B")
    parser.add_argument("--vocab", type=int, default=49_152)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), nargs="+")
    parser.add_argument("--problems", type=int, default=8)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--limits", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--mean", type=float, default=0.75, help="mean length without a limit, as a share of it")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to check the code")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args(given)
    if asked.tiny:
        asked.vocab, asked.problems, asked.group, asked.prompt, asked.limits, asked.repeats = 91, 2, 2, 8, [12], 1
    cuda = torch.cuda.is_available()
    device, shape = "cuda" if cuda else "cpu", MODELS[asked.model or ("1.7B" if cuda else "15.7M")]
    scale = replace(TINY if asked.tiny else Scale(square=8192 if cuda else 4096, copy_bytes=1 << 30), device=device)
    shape = replace(shape, hidden=32, layers=2, intermediate=64) if asked.tiny else shape
    rows = []
    for dtype in asked.dtype or (["bfloat16"] if cuda else ["float32", "bfloat16"]):
        reached = ceilings(scale, getattr(torch, dtype))
        pool = problems(prompts(asked.problems, asked.prompt, asked.vocab))
        for limit in asked.limits:
            mean = asked.mean * limit
            model = build(shape, asked.vocab, dtype, device, trained=False, mean_length=mean)
            samplers = {"headwater": ours, "modules": by_modules, "generate": theirs}
            found: dict[str, list[Row]] = {name: [] for name in samplers}
            for turn in range(asked.repeats + 1):  # the first warms up
                for name, sampler in samplers.items():
                    found[name].append(sampler(model, pool, asked.group, limit, turn))
            head = {"dtype": dtype, "rows": asked.problems * asked.group, "limit": limit}
            rows += [head | measured(model, turns[1:], pool, asked.group, reached) for turns in found.values()]
    print(table("sampling", rows))
    report("sampling", asked, {"sampling": rows}, asked.out)
    return {"sampling": rows}


if __name__ == "__main__":
    main()
