"""The label ledger: every revealed answer of a stage, written once under (step, problem)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path


class Ledger:
    """Reveals of one stage. A *label* is one revealed answer; re-reading it at a later step is another reveal.

    The file is append-only JSON lines; of the ranks of a mesh only one `writes` it. A key that is already there is not
    written again, so a step repeated after a crash counts once; a last line torn by the crash is dropped.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path = path
        self._writes = writes
        self._keys: dict[tuple[int, str], None] = {}
        if path.exists():
            data = path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            if writes and len(whole) < len(data):
                os.truncate(path, len(whole))
            rows = map(json.loads, whole.splitlines())
            self._keys = {(row["step"], row["problem"]): None for row in rows}

    def reveal(self, step: int, problems: Iterable[str]) -> None:
        """Record that the answers of these problem ids were used at this step."""
        new = [key for key in dict.fromkeys((step, problem) for problem in problems) if key not in self._keys]
        if new and self._writes:
            with self.path.open("a", encoding="utf-8") as file:
                rows = ({"step": step, "problem": problem} for step, problem in new)
                file.write("".join(json.dumps(row) + "\n" for row in rows))
        self._keys.update(dict.fromkeys(new))

    def labels(self, step: int) -> int:
        """Number of problems revealed up to and including this step."""
        return len({problem for revealed_at, problem in self._keys if revealed_at <= step})

    @property
    def revealed(self) -> int:
        """Number of reveals."""
        return len(self._keys)

    @property
    def problems(self) -> set[str]:
        """Ids of the problems revealed; their number is the bill in distinct labels."""
        return {problem for _, problem in self._keys}
