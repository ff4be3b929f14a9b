"""Which problems a node sees: nested label pools drawn by a seed, their halves, and a digest of what was drawn."""

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


def half(pool: Sequence[Problem], part: Literal["all", "first", "second"]) -> list[Problem]:
    """The whole pool or one of its two disjoint halves (an odd one goes to the second)."""
    middle = len(pool) // 2
    return {"all": list(pool), "first": list(pool[:middle]), "second": list(pool[middle:])}[part]


def pool_digest(problems: Sequence[Problem], *, labelled: bool) -> str:
    """20 hex digits of the prompts and, when labelled, the answers and columns."""
    rows = [[p.id, p.answer, dict(p.columns)] if labelled else [p.id] for p in problems]
    return hashlib.sha256(canonical(rows).encode()).hexdigest()[:20]
