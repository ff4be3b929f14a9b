"""The meter: tokens, FLOPs and seconds of a stage by role."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

Bill = dict[str, dict[str, int | float]]
"""Role -> tokens, flops, seconds."""
Role = Literal["prefilled", "sampled", "graded", "scored", "trained", "evaluated"]
FLOPS_PER_TOKEN = {"prefilled": 2, "sampled": 2, "graded": 0, "scored": 2, "trained": 6, "evaluated": 2}
"""Multiples of the parameter count: 2ND forward, 6ND forward and backward (arXiv:2001.08361); attention is left out."""


class Meter:
    """Cumulative totals; `state` and `restore` carry them through a checkpoint."""

    def __init__(self) -> None:
        self._rows: Bill = {}
        self._nested: list[float] = []

    def add(self, role: Role, tokens: int, parameters: int) -> None:
        """Count tokens (without padding) that a model of this many parameters processed in a role."""
        row = self._row(role)
        row["tokens"] += tokens
        row["flops"] += FLOPS_PER_TOKEN[role] * tokens * parameters

    @property
    def tokens(self) -> int:
        """Tokens in all roles."""
        return int(sum(row["tokens"] for row in self._rows.values()))

    @property
    def flops(self) -> float:
        """FLOPs in all roles."""
        return float(sum(row["flops"] for row in self._rows.values()))

    @contextmanager
    def timed(self, role: Role) -> Iterator[None]:
        """Add the wall seconds of the block to a role, less those of timed blocks inside it."""
        start = time.perf_counter()
        self._nested.append(0.0)
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            self._row(role)["seconds"] += elapsed - self._nested.pop()
            if self._nested:
                self._nested[-1] += elapsed

    def state(self) -> Bill:
        return {role: dict(row) for role, row in self._rows.items()}

    def restore(self, state: Bill) -> None:
        self._rows = {role: dict(row) for role, row in state.items()}

    def _row(self, role: str) -> dict[str, int | float]:
        return self._rows.setdefault(role, {"tokens": 0, "flops": 0, "seconds": 0.0})


def total(bills: list[Bill]) -> dict:
    """One bill from several: `{"tokens": {role: n}, "flops": x, "seconds": s}`."""
    tokens: dict[str, int] = {}
    flops, seconds = 0.0, 0.0
    for bill in bills:
        for role, row in bill.items():
            tokens[role] = tokens.get(role, 0) + int(row["tokens"])
            flops, seconds = flops + row["flops"], seconds + row["seconds"]
    return {"tokens": tokens, "flops": flops, "seconds": seconds}
