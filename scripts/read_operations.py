"""Of one-operation word problems: how often a model writes the right operation, and how often it then calculates right.

    python scripts/read_operations.py RUN STORE

RUN is what `headwater run recipes/smollm2_case.toml` wrote, STORE the store that it used.
"""

from __future__ import annotations

import json
import operator
import re
import sys
from collections.abc import Iterator
from pathlib import Path

_NUMBER = r"(\d[\d,]*(?:\.\d+)?)"
_EXPRESSION = re.compile(rf"{_NUMBER}[^\d=+\-*/x]{{0,25}}([+\-*/x])\s*{_NUMBER}[^\d=+*/]{{0,25}}=\s*\$?{_NUMBER}")
_OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "x": operator.mul, "/": operator.truediv}


def read(text: str, answer: float) -> tuple[bool, bool]:
    """Whether the first `a + b = c` of a completion, worked out exactly, is the answer; and whether c is within 1 % of
    what a + b is. False, False where there is none."""
    found = _EXPRESSION.search(text)
    if found is None:
        return False, False
    a, b, c = (float(found[i].replace(",", "")) for i in (1, 3, 4))
    if found[2] == "/" and b == 0:
        return False, False
    value = _OPERATIONS[found[2]](a, b)
    return abs(value - answer) < 1e-6 * max(1.0, abs(answer)), abs(value - c) <= 0.01 * max(1.0, abs(value))


def evaluations(run: Path) -> Iterator[tuple[str, str]]:
    """(name, key of its evaluation node) of every model and arm."""
    results = json.loads((run / "results.json").read_text())
    for part, by_seed in (("models", "evals"), ("arms", "seeds")):
        for name, entry in results[part].items():
            for seed, found in entry[by_seed].items():
                for shown in (found if part == "models" else found["evals"]).values():
                    yield f"{entry.get('role') or name}, seed {seed}", Path(shown["per_problem"]).stem


def main(run: Path, store: Path) -> None:
    print("| samples of | right operation | and right arithmetic | second / first |\n|---|---|---|---|")
    for name, key in evaluations(run):
        rows = [json.loads(line) for line in (store / "nodes" / key / "samples.jsonl").open()]
        marks = [read(text, float(row["answer"].replace(",", ""))) for row in rows for text in row["texts"]]
        chosen, both = sum(right for right, _ in marks), sum(right and exact for right, exact in marks)
        print(f"| {name} | {chosen / len(marks):.3f} | {both / len(marks):.3f} | {both / max(1, chosen):.2f} |")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
