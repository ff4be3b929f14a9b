"""How the cost of a GRPO and of a distillation step grows: with completion length, batch, vocabulary, model size.

    python benchmarks/scaling.py                        # a 15.7M student, a 44M teacher, both methods, every axis

One axis moves at a time; no completion ends early, so that sizes are exact. Each point is the median step of the
package's own stage after a first one; peak memory is of one more step, the most that tensors held above the weights
(gradients and optimizer state are in it). Of every axis the exponent of seconds and
memory is fitted (1: linear), against model FLOPs for the model's size. `prefixes`: the same steps with prompts shared
by a group computed once (as the package does where that pays) and with each row computing its own.
"""

from __future__ import annotations

import argparse
import statistics
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch
from measure import SHAPES, Row, Shape, allocated_peak, growth, report, table
from workload import STUDENT, TEACHER, build, problems, prompts, run_stage, timed_stage

from headwater.models.language_model import LanguageModel

MODELS = {
    "2 layers of 128": Shape(128, 2, 2, 1, 384, True, 64),
    "4 layers of 256": STUDENT,
    "6 layers of 512": TEACHER,
    "12 layers of 768": Shape(768, 12, 12, 4, 2048, True, 64),
}
AXES: dict[str, list] = {
    "completion": [32, 64, 128, 256],
    "problems": [2, 4, 8, 16],
    "vocab": [8192, 16_384, 49_152, 151_936],
    "model": list(MODELS),
}
BASE: Row = {"completion": 64, "problems": 8, "vocab": 49_152, "model": "4 layers of 256", "prompt": 64, "group": 8}
TINY = Shape(32, 2, 2, 1, 64, True, 16)


def point(method: str, at: Row, dtype: str, device: str, repeats: int, share: bool = True) -> Row:
    """The median step of one stage at one place, by its seconds."""
    shape = SHAPES.get(at["model"]) or MODELS[at["model"]]
    student = build(shape, at["vocab"], dtype, device, trained=True)
    teacher = None
    if method == "distill":
        teacher = build(at.get("teacher", TEACHER), at["vocab"], dtype, device, trained=False)
    pool = problems(prompts(2 * at["problems"], at["prompt"], at["vocab"]))
    of = (method, student, teacher, pool)
    how = {"problems_per_step": at["problems"], "group_size": at["group"], "new_tokens": at["completion"]}
    with nullcontext() if share else mock.patch.object(LanguageModel, "shares_prefixes", False):
        rows = timed_stage(*of, repeats=repeats, **how)
        peak = allocated_peak(lambda: run_stage(*of, steps=1, on_step=lambda row: None, **how))
    middle = sorted(rows, key=lambda row: row["seconds"])[(len(rows) - 1) // 2]
    seconds = [row["seconds"] for row in rows]
    spread = (max(seconds) - min(seconds)) / statistics.median(seconds)
    return middle | {"spread": spread, "peak GB": peak / 1e9}


def main(given: list[str] | None = None) -> dict[str, list[Row]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=("grpo", "distill"), default=["grpo", "distill"])
    parser.add_argument("--axes", nargs="+", choices=(*AXES, "prefixes"), default=[*AXES, "prefixes"])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to check the code")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args(given)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    axes, base, prompt_lengths, repeats = AXES, BASE, [64, 256], asked.repeats
    if asked.tiny:
        MODELS["tiny"] = TINY
        axes, repeats, prompt_lengths = {"completion": [4, 8], "vocab": [64, 128]}, 1, [16]
        base = {"completion": 4, "problems": 2, "vocab": 64, "model": "tiny", "teacher": TINY, "prompt": 8, "group": 2}
    rows, fits = [], []
    for method in asked.methods:
        for axis in [axis for axis in asked.axes if axis in axes]:
            mine = []
            for value in axes[axis]:
                found = point(method, base | {axis: value}, asked.dtype, device, repeats)
                mine.append({"method": method, "axis": axis, "at": value, **found})
                print(table(f"{method}, {axis}", mine[-1:]), flush=True)
            rows += mine
            fit: Row = {"method": method, "axis": axis, "points": len(mine)}
            for name in ("seconds", "sampled", "scored", "trained", "peak GB"):
                points = [(r["GFLOP"] if axis == "model" else r["at"], r[name]) for r in mine if name in r]
                fit |= {f"{name} ~ x^": growth(points) if points else None}
            fits.append(fit)
    prefixes = []
    for method in asked.methods if "prefixes" in asked.axes else ():
        for length in prompt_lengths:
            for share in (True, False):
                found = point(method, base | {"prompt": length}, asked.dtype, device, repeats, share)
                prefixes.append({"method": method, "prompt": length, "shared": share, **found})
    results = {"scaling": rows, "growth": fits, "prefixes": prefixes}
    for name, lines in results.items():
        print(table(name, lines))
    report("scaling", asked, results, asked.out)
    return results


if __name__ == "__main__":
    main()
