"""Plans against what runs cost: `python benchmarks/plan.py [RECIPE ...] [--out FILE]`, each in a store of its own."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from headwater.stages.node import environment

HEADWATER = [sys.executable, "-c", "from headwater.cli import app; app()"]


def measure(recipe: str) -> dict:
    """Run a recipe from nothing; what its results say of its plan, by node and in sum."""
    with tempfile.TemporaryDirectory() as root:
        out = Path(root) / "run"
        subprocess.run([*HEADWATER, "run", recipe, "--out", str(out), "--store", f"{root}/store"], check=True)
        plan = json.loads((out / "results.json").read_text(encoding="utf-8"))["plan"]
        whole = json.loads((out / "plan.json").read_text(encoding="utf-8"))["total"]
    return {"recipe": recipe, "total": whole, **plan}


def table(found: dict) -> str:
    lines = [
        f"## {found['recipe']}",
        "",
        "| | planned | low | high | actual | planned / actual |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in found["planned_against_actual"].items():
        levels = found["total"].get(name)
        low, high = (f"{levels[0]:.4g}", f"{levels[2]:.4g}") if isinstance(levels, list) else ("", "")
        lines.append(f"| {name} | {row['planned']:.4g} | {low} | {high} | {row['actual']:.4g} | {row['ratio']:.2f} |")
    for row in found["nodes"].values():
        actual = row["actual"]
        ratios = [row[name][1] / actual[name] for name in ("tokens", "seconds")]
        ratios.append(row["memory"]["peak"] / actual["peak_memory"])
        lines.append(f"| {row['title']}: tokens, seconds, memory | | | | | {', '.join(f'{r:.2f}' for r in ratios)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*", default=["recipes/quickstart.toml", "recipes/smollm2_smoke.toml"])
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    rows = [measure(recipe) for recipe in asked.recipes]
    print("\n\n".join(map(table, rows)))
    if asked.out:
        asked.out.write_text(json.dumps({"environment": environment(), "plans": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
