"""`headwater compare` in a terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text


def print_comparison(console: Console, found: Mapping[str, Any]) -> None:
    """What `headwater.study.compare.compare` found, for people."""
    console.print(f"A: {found['a']}\nB: {found['b']}", markup=False)
    stages = found["stages"]
    console.print(f"{stages['same']} stages are the same: of {stages['a']} in A, of {stages['b']} in B")
    for name in ("configuration", "code", "data"):
        _print_differing(console, name, found[name])
    for letter in ("a", "b"):
        if found[f"only_{letter}"]:
            console.print(f"only in {letter.upper()}: {', '.join(found[f'only_{letter}'])}", markup=False)
    if found["differences"]:
        table = Table(
            "", "on", Column("A - B [95 %]", no_wrap=True), "p (Holm)", "seeds", "over", "verdict", title="numbers"
        )
        for row in found["differences"]:
            low, high = row["ci95"]
            shown = f"{row['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"
            p, words = f"{row['p_adjusted']:.2g}", row["verdict"].replace("a b", "A b").replace("b b", "B b")
            table.add_row(row["name"], row["task"], shown, p, str(row["num_seeds"]), row["over"], words)
        console.print(table)
    else:
        console.print("no numbers can be compared")
    for row in found["not_compared"]:
        console.print(f"not compared: {row['name']} on {row['task']}: {row['why']}", markup=False)


def _print_differing(console: Console, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    if not rows:
        console.print(f"{name}: the same")
        return
    table = Table("", "A", "B", title=f"{name}: {len(rows)} differ")
    for row in rows:
        table.add_row(
            Text(row["key"]), *(Text(v if isinstance(v := row[side], str) else json.dumps(v)) for side in "ab")
        )
    console.print(table)
