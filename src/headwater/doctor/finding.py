"""What a check found."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """`seen` is what was observed; `why` it matters and what to `change` are for when it is not ok."""

    level: Level
    name: str
    seen: str
    why: str = ""
    change: str = ""


def judge(name: str, level: Level, seen: str, why: str, change: str) -> Finding:
    """A finding that explains itself only where there is something to explain."""
    return Finding(level, name, seen) if level == "ok" else Finding(level, name, seen, why, change)


def guarded(name: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """The findings of a check; what a user can mend and the code refuses is one too."""
    try:
        return list(check())
    except (ValueError, OSError) as error:
        return [refused(name, error)]


def refused(name: str, error: Exception) -> Finding:
    return Finding("error", name, str(error), "the run would stop here", "do what the message says")
