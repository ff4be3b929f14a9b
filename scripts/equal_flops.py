"""An arm against fixed alternatives at equal FLOPs, budget by budget, from a finished run directory.

    python scripts/equal_flops.py runs/gates gated half bridge bridge-15-45 double
    python scripts/equal_flops.py runs/allocator auto share-0 share-25 share-50 share-75 share-100

A row for every label budget: score, FLOPs (mean over seeds, all that is billed), labels, reveals; then ARM less the
alternative with the highest mean among those that cost no more than 1.05 times its FLOPs, and among all. The
alternative is chosen by the very scores it is compared on, which favours it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from jaxtyping import Float

from headwater.evals.statistics import Estimate, mean_interval, paired_difference

SLACK = 1.05


def scores(root: Path, arm: dict, task: str) -> Float[np.ndarray, "seeds problems"]:
    files = [seed["evals"][task]["per_problem"] for _, seed in sorted(arm["seeds"].items())]
    tables = [json.loads((root / file).read_text(encoding="utf-8")) for file in files]
    return np.array([[table[problem] for problem in sorted(table)] for table in tables])


def mean_cost(arm: dict) -> tuple[float, float, float]:
    """FLOPs, distinct labels and reveals, means over seeds."""
    seeds = arm["seeds"].values()
    return tuple(
        float(np.mean(x))
        for x in (
            [s["cost"]["flops"] for s in seeds],
            [s["labels"]["distinct"] for s in seeds],
            [s["labels"]["revealed"] for s in seeds],
        )
    )


def text(found: Estimate, sign: str = "") -> str:
    low, high = found.ci95
    return f"{found.value:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("arm")
    parser.add_argument("fixed", nargs="+")
    parser.add_argument("--task", default="chains")
    given = parser.parse_args()
    arms = json.loads((given.run / "results.json").read_text(encoding="utf-8"))["arms"]
    budgets = sorted({name.partition("@")[2] for name in arms if name.partition("@")[0] == given.arm}, key=int)
    for budget in budgets:
        names = [f"{name}@{budget}" for name in (given.arm, *given.fixed)]
        table = {name: scores(given.run, arms[name], given.task) for name in names}
        cost = {name: mean_cost(arms[name]) for name in names}
        print(f"\n| {budget} labels | score | TFLOP | distinct | reveals |\n|---|---|---|---|---|")
        for name in names:
            flops, distinct, reveals = cost[name]
            print(
                f"| {name} | {text(mean_interval(table[name]))} | {flops / 1e12:.3f} | {distinct:.0f} | {reveals:.0f} |"
            )
        own, *others = names
        affordable = [name for name in others if cost[name][0] <= SLACK * cost[own][0]]
        for label, among in (("at no more FLOPs", affordable), ("of all", others)):
            if among:
                best = max(among, key=lambda name: table[name].mean())
                found = paired_difference(table[own], table[best])
                print(f"\n{own} less the best {label} ({best}): {text(found, '+')}, p {found.p_value:.3f}")


if __name__ == "__main__":
    main()
