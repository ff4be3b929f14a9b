"""Which problems a node sees: nested label pools drawn by a seed, their parts, and a digest of what was drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

from headwater.config import canonical
from headwater.types import Problem


def draw_pool(problems: Sequence[Problem], count: int, seed: int | None) -> list[Problem]:
    """`count` problems: the first ones (seed None), or a seed's draw, in which a smaller count is a prefix of a larger.

    Raises ValueError when the split has fewer.
    """
    if count > len(problems):
        raise ValueError(f"{count} problems asked for, but the split has {len(problems)}: lower the number or add data")
    if seed is None:
        return list(problems[:count])
    return sorted(problems, key=lambda p: hashlib.sha256(f"pool:{seed}:{p.id}".encode()).digest())[:count]


def part_of(pool: Sequence[Problem], part: Literal["all", "first", "second"], share: float = 0.5) -> list[Problem]:
    """The whole pool or one of two disjoint parts, the first with `share` of it (rounded down)."""
    middle = int(len(pool) * share)
    return {"all": list(pool), "first": list(pool[:middle]), "second": list(pool[middle:])}[part]


def pool_digest(problems: Sequence[Problem], *, labelled: bool) -> str:
    """20 hex digits of the prompts and, when labelled, the answers and columns."""
    rows = [[p.id, p.answer, dict(p.columns)] if labelled else [p.id] for p in problems]
    return hashlib.sha256(canonical(rows).encode()).hexdigest()[:20]
