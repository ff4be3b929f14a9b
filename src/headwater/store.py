"""The store: finished and half-finished nodes by key, outside any checkout, shared by all studies."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

from headwater.ledger import Ledger


def default_root() -> Path:
    """`$HEADWATER_STORE`, or `store` in the per-user data directory."""
    return Path(os.environ.get("HEADWATER_STORE") or platformdirs.user_data_path("headwater") / "store")


@dataclass(frozen=True)
class Store:
    """A directory of nodes. A node is done when its `done.json` is there, written last."""

    root: Path

    def check_writable(self) -> None:
        """ValueError, before hours of work, when nodes cannot be written here."""
        try:
            (self.root / "nodes").mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.root / "nodes").close()
        except OSError as error:
            raise ValueError(
                f"the store {self.root} cannot be written ({error.strerror}): name another directory with --store or "
                "$HEADWATER_STORE"
            ) from None

    def path(self, key: str) -> Path:
        return self.root / "nodes" / key

    def is_done(self, key: str) -> bool:
        return (self.path(key) / "done.json").exists()

    def finish(self, key: str, outcome: dict[str, Any]) -> None:
        from headwater import checkpoint  # torch: not for those who only name a store

        checkpoint.write_atomically(self.path(key) / "done.json", json.dumps(outcome, indent=1))

    def outcome(self, key: str) -> dict[str, Any]:
        """What a finished node left: `meter`, `execution`, and for an evaluation its `result`."""
        return json.loads((self.path(key) / "done.json").read_text(encoding="utf-8"))

    def ledger(self, key: str) -> Ledger:
        return Ledger(self.path(key) / "ledger.jsonl")

    def model(self, key: str) -> Path:
        """The Hugging Face directory that a finished stage wrote."""
        return self.path(key) / "model"
