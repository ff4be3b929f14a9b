"""The meter: tokens, FLOPs and seconds of a stage by role."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

from headwater import flops
from headwater.flops import Shape, Work

Bill = dict[str, dict[str, int | float]]
"""Role -> tokens, flops, seconds, executed_flops, padding."""
Role = Literal["prefilled", "sampled", "graded", "scored", "trained", "evaluated", "discarded", "lost"]
COUNTED = ("prefilled", "sampled", "scored", "trained", "evaluated")
"""Roles in which a model processes tokens for a result. `discarded` (groups that were redrawn) is contained in them;
`lost` (steps done again after a crash) comes on top; `graded` tokens pass through no model."""


class Meter:
    """Cumulative totals; `state` and `restore` carry them through a checkpoint."""

    def __init__(self) -> None:
        self._rows: Bill = {}
        self._nested: list[float] = []

    def add(
        self,
        role: Role,
        shape: Shape,
        lengths: Iterable[tuple[int, int]],
        executed: Work | None = None,
        shared: Work | None = None,
        *,
        whole: bool | None = None,
        projections: int = 3,
        recomputed: bool = False,
    ) -> None:
        """Count sequences of (prompt, completion) tokens that a model processed in a role.

        `scored` and `trained` sequences are read as a `whole`; those of other roles are completions drawn with a cache,
        or with 0 completion tokens a prompt, to be counted once a group. `executed` is what went through the model,
        padding included (default: no more than was needed), `shared` the prefixes that came on top; these and
        `projections` (1: no backward pass), `recomputed`: as in `flops.training_flops`.
        """
        lengths = list(lengths)
        if role in ("scored", "trained") if whole is None else whole:
            tokens = sum(p + c for p, c in lengths)
            work = flops.total(flops.sequence_work(p, c) for p, c in lengths)
        else:
            tokens = sum(c or p for p, c in lengths)
            work = flops.total(flops.completion_work(p, c) if c else flops.prompt_work(p) for p, c in lengths)
        executed = executed or work
        row = self._row(role)
        row["tokens"] += tokens
        row["padding"] += int(executed.tokens + (shared.tokens if shared else 0) - work.tokens)
        if role == "trained" and projections > 1:
            row["flops"] += flops.training_flops(shape, work)
            row["executed_flops"] += flops.training_flops(
                shape, executed, shared, projections=projections, recomputed=recomputed
            )
        elif role != "graded":
            row["flops"] += flops.forward_flops(shape, work)
            row["executed_flops"] += flops.forward_flops(shape, executed + (shared or Work()))

    @property
    def tokens(self) -> int:
        """Tokens in all roles."""
        return int(sum(row["tokens"] for role, row in self._rows.items() if role in COUNTED))

    @property
    def flops(self) -> float:
        """Model FLOPs in all roles."""
        return float(sum(row["flops"] for role, row in self._rows.items() if role in COUNTED))

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

    def lose(self, bills: Iterable[Bill]) -> None:
        """Book what earlier attempts spent on steps that have to be done again."""
        self._rows.pop("lost", None)
        for bill in bills:
            for role in set(bill) & {*COUNTED, "graded"}:
                row = self._row("lost")
                for name, value in bill[role].items():
                    row[name] += 0 if role == "graded" and name == "tokens" else value

    def state(self) -> Bill:
        return {role: dict(row) for role, row in self._rows.items()}

    def restore(self, state: Bill) -> None:
        lost = {"lost": self._rows["lost"]} if "lost" in self._rows else {}
        self._rows = {role: dict(row) for role, row in state.items()} | lost

    def _row(self, role: str) -> dict[str, int | float]:
        empty = {"tokens": 0, "flops": 0, "seconds": 0.0, "executed_flops": 0, "padding": 0}
        return self._rows.setdefault(role, empty)


def difference(later: Bill, earlier: Bill) -> Bill:
    """What was spent between two states of one meter."""
    return {
        role: {name: value - earlier.get(role, {}).get(name, 0) for name, value in row.items()}
        for role, row in later.items()
    }


def total(bills: list[Bill]) -> dict:
    """One bill from several: `{"tokens": {role: n}, "flops": x, "seconds": s, "executed_flops": x, "padding": n,
    "wasted": {"lost": {...}, "discarded": {...}}}`."""
    tokens: dict[str, int] = {}
    sums = {"flops": 0.0, "seconds": 0.0, "executed_flops": 0.0, "padding": 0}
    wasted = {kind: {"tokens": 0, "flops": 0.0, "seconds": 0.0} for kind in ("lost", "discarded")}
    for bill in bills:
        for role, row in bill.items():
            if role in wasted:
                wasted[role] = {name: value + row[name] for name, value in wasted[role].items()}
                continue
            if role in COUNTED:
                tokens[role] = tokens.get(role, 0) + int(row["tokens"])
            sums = {name: value + row.get(name, 0) for name, value in sums.items()}
    return {"tokens": tokens, **sums, "wasted": wasted}
