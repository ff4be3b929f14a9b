"""Time and memory of every loss against tokens and vocabulary, beside plain torch: `python benchmarks/loss_kernels.py`.

Forward and backward with respect to hidden state and head; memory is the peak above inputs and the two gradients that
come back. Plain torch makes full float32 logits and leaves the rest to autograd. Of each loss the growth with tokens is
fitted: the exponent of time (1 is linear) and how far memory strays over the sizes (0 is flat).

Not named kernels.py: transformers imports a package of that name where it finds one, and would find the script.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from pathlib import Path

import torch
from measure import KERNELS, TINY, Row, Scale, ceilings, growth, kernels, report, table


def growths(rows: list[Row]) -> list[Row]:
    """For every loss and vocabulary: exponents of time and memory, and (largest - least) / median memory."""
    found = []
    for loss, vocab in dict.fromkeys((row["loss"], row["vocab"]) for row in rows):
        mine = [row for row in rows if (row["loss"], row["vocab"]) == (loss, vocab)]
        row: Row = {"loss": loss, "vocab": vocab, "tokens": f"{mine[0]['tokens']}-{mine[-1]['tokens']}"}
        memory = [r["GB"] for r in mine]
        row |= {"time ~ tokens^": growth([(r["tokens"], r["ms"]) for r in mine])}
        row |= {"memory spread": (max(memory) - min(memory)) / max(1e-9, statistics.median(memory))}
        for name in ("ms", "GB"):
            points = [(r["tokens"], r[f"plain {name}"]) for r in mine if r[f"plain {name}"] is not None]
            row |= {f"plain {name} ~ tokens^": growth(points) if points else None}
        found.append(row)
    return found


def main(given: list[str] | None = None) -> dict[str, list[Row]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 8192, 16_384, 32_768])
    parser.add_argument("--vocab", type=int, nargs="+", default=[49_152, 151_669])
    parser.add_argument("--widths", type=int, nargs=2, help="of student and teacher; 256 512, on CUDA 2048 4096")
    parser.add_argument("--losses", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="float32, on CUDA bfloat16")
    parser.add_argument("--chunk-tokens", type=int, default=1024, help="of the losses; 1024 is the package's default")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to check the code")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args(given)
    cuda = torch.cuda.is_available()
    dtype = getattr(torch, asked.dtype or ("bfloat16" if cuda else "float32"))
    torch.manual_seed(0)
    scale = replace(TINY if asked.tiny else Scale(square=8192 if cuda else 4096), device="cuda" if cuda else "cpu")
    peak = ceilings(replace(scale, copy_bytes=1 << 20), dtype)["matmul_tflops"]
    if not asked.tiny:
        widths = tuple(asked.widths or ((2048, 4096) if cuda else (256, 512)))
        scale = replace(scale, widths=widths, kernel_tokens=tuple(asked.tokens))
    rows = []
    for vocab in [scale.vocab] if asked.tiny else asked.vocab:
        padded = replace(scale, vocab=vocab, head_rows=scale.head_rows if asked.tiny else -(-vocab // 128) * 128)
        rows += kernels(padded, peak, asked.losses, dtype, 1 if asked.tiny else asked.repeats, asked.chunk_tokens)
        print(table(f"{vocab} tokens, {str(dtype)[6:]}, products {peak:.3g} TFLOP/s", rows), flush=True)
    results = {"kernels": rows, "growth": growths(rows)}
    print(table("growth", results["growth"]))
    report("loss_kernels", asked, results, asked.out)
    return results


if __name__ == "__main__":
    main()
