"""The miniature study, written once and run once for all tests that only look at it."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import miniature

from headwater.config import load_recipe
from headwater.store import Store
from headwater.study.executors import Event
from headwater.study.run import run


@dataclass(frozen=True)
class Done:
    recipe: Path
    out: Path
    store: Store
    results: dict[str, Any]
    events: list[Event] = field(default_factory=list)


@pytest.fixture(scope="session")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`recipe.toml` of the miniature study."""
    return miniature.write(tmp_path_factory.mktemp("mini"))


@pytest.fixture(scope="session")
def done(mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Done]:
    """The study after one run in this process."""
    root = tmp_path_factory.mktemp("done")
    store, events = Store(root / "store"), []
    found = run(load_recipe(mini), root / "out", store, on_event=events.append)
    yield Done(mini, root / "out", store, found, events)
