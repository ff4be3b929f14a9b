"""What a store keeps that no run needs, and its removal: never what a process holds, never what a run names."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from headwater.meter import total
from headwater.run import lease
from headwater.store import Store
from headwater.study.executors import holder

Kind = Literal["unused stage", "unused evaluation", "checkpoints", "leftover"]
KINDS: tuple[Kind, ...] = ("leftover", "checkpoints", "unused stage", "unused evaluation")
SETTLED_S = 86_400
"""Leftovers younger than a day may be somebody's work: a download, a conversion, a write on a slow disk."""


@dataclass(frozen=True)
class Item:
    """A file or directory that can go. `key` is the node it is or lies in, None in the cache of downloads.

    `seconds` is what it took to make, as its node recorded it: lost with an unused node, 0 for the rest. The bytes of
    an unused node are without those of the items inside it.
    """

    kind: Kind
    path: Path
    key: str | None
    num_bytes: int
    seconds: float = 0.0
    title: str = ""


@dataclass(frozen=True)
class Survey:
    """A store: its nodes, their bytes, those held by a process, and what can go."""

    num_nodes: int
    num_bytes: int
    held: dict[str, str]
    items: list[Item]


def run_directories(roots: Sequence[Path]) -> list[Path]:
    """The directories among and below `roots` that hold a run (a recipe.toml or a stages.json)."""
    found: dict[Path, None] = {}
    for root in roots:
        # One level by glob as well, which follows links where rglob does not.
        for pattern in ("recipe.toml", "stages.json"):
            for path in sorted({*root.glob(pattern), *root.glob(f"*/{pattern}"), *root.rglob(pattern)}):
                found.setdefault(path.parent.resolve())
    return list(found)


def named(runs: Iterable[Path]) -> set[str]:
    """Keys of all nodes that the runs name in their stages.json.

    Raises ValueError for a directory without one: what it needs cannot be told, so nothing may be called unused.
    """
    keys: set[str] = set()
    for run in runs:
        try:
            keys |= json.loads((run / "stages.json").read_text(encoding="utf-8"))["nodes"].keys()
        except (OSError, ValueError, KeyError, AttributeError):
            raise ValueError(
                f"{run} has no readable stages.json, so which nodes it needs is not known: "
                f"`headwater resume {run}` writes it, or delete the directory"
            ) from None
    return keys


def survey(store: Store, keep: set[str] | None, cache: Path) -> Survey:
    """What the store and the cache of downloads hold, and what of it can go.

    `keep` are the keys of nodes that are needed, to which the parents of all needed and all held nodes are added; None
    calls no node unused.
    """
    nodes = [path for path in _entries(store.root / "nodes") if not path.name.startswith(".")]
    specs = {path.name: _json(path / "spec.json").get("spec", {}) for path in nodes}
    held = {path.name: who for path in nodes if (who := holder(path))}
    needed = _with_parents({*(specs if keep is None else keep), *held}, specs)
    items: list[Item] = []
    for path in nodes:
        if path.name in held:
            continue
        within = list(_within(store, path))
        items += within
        if path.name not in needed:
            items.append(_unused(path, specs[path.name], size(path) - sum(item.num_bytes for item in within)))
    items += [
        Item("leftover", path, None, size(path), title="of a removal that was cut off")
        for path in _entries(store.root / "nodes")
        if path.name.startswith(".")
    ]
    for path in _entries(cache) + _entries(cache / "converted"):
        if path.name.startswith((".fetch-", ".convert-")) and _settled(path):
            items.append(Item("leftover", path, None, size(path), title="of a download or conversion"))
    return Survey(len(nodes), sum(map(size, nodes)), held, items)


def remove(item: Item, store: Store) -> bool:
    """Delete an item; False when a process holds its node now, which then stays as it is.

    A node loses its `done.json` first and its name next, so that a crash in between leaves one that is trained again.
    """
    if item.key is None:
        _delete(item.path)
        return True
    directory = store.path(item.key)
    if not directory.exists():
        return True
    with ExitStack() as stack:
        try:
            stack.enter_context(lease(directory))
        except BlockingIOError:
            return False
        if item.path != directory:
            # Finished by now or still not: either way what was found may go only while that has not changed.
            if item.kind != "checkpoints" or store.is_done(item.key):
                _delete(item.path)
            return True
        (directory / "done.json").unlink(missing_ok=True)
        aside = directory.with_name(f".removed-{item.key}-{os.getpid()}")
        directory.rename(aside)
        shutil.rmtree(aside)
    return True


def size(path: Path) -> int:
    """Bytes of a file, or of the files below a directory; links are not followed."""
    try:
        if not path.is_dir() or path.is_symlink():
            return path.lstat().st_size
        return sum(size(Path(entry.path)) for entry in os.scandir(path))
    except FileNotFoundError:  # a study at work replaces its checkpoints
        return 0


def _unused(path: Path, spec: Mapping[str, Any], num_bytes: int) -> Item:
    outcome = _json(path / "done.json")
    kind: Kind = "unused evaluation" if spec.get("kind") == "evaluate" else "unused stage"
    method = (spec.get("settings") or {}).get("method", "")
    state = "" if outcome else "unfinished "
    return Item(
        kind,
        path,
        path.name,
        num_bytes,
        seconds=total([outcome.get("meter", {})])["seconds"],
        title=f"{state}{method or spec.get('kind', 'node')}, seed {spec.get('seed')}",
    )


def _within(store: Store, path: Path) -> Iterator[Item]:
    """What is superfluous inside a node, whether it stays or not."""
    checkpoints = path / "checkpoints"
    if store.is_done(path.name) and checkpoints.is_dir():
        yield Item("checkpoints", checkpoints, path.name, size(checkpoints), title="of a finished stage")
    elif checkpoints.is_dir():
        yield from _leftovers(checkpoints, path.name)
    yield from _leftovers(path, path.name)


def _leftovers(directory: Path, key: str) -> Iterator[Item]:
    """Everything that is being written has a name that begins with a dot until it is whole."""
    for path in _entries(directory):
        if path.name.startswith(".") and _settled(path):
            yield Item("leftover", path, key, size(path), title=f"{path.name} of killed work")


def _with_parents(keys: set[str], specs: Mapping[str, Mapping[str, Any]]) -> set[str]:
    found, todo = set(), list(keys)
    while todo:
        if (key := todo.pop()) not in found:
            found.add(key)
            spec = specs.get(key, {})
            # Read without a schema: the store may hold nodes of other versions.
            refs = [spec.get(role) or {} for role in ("start", "teacher")]
            todo += [*(ref["stage"] for ref in refs if ref.get("stage")), *spec.get("match", ())]
            todo += [spec["decision"]] if spec.get("decision") else []
    return found


def _settled(path: Path) -> bool:
    """Whether nothing in it was written for a day."""
    try:
        inside = [path, *(path.rglob("*") if path.is_dir() else ())]
        return time.time() - max(p.lstat().st_mtime for p in inside) > SETTLED_S
    except FileNotFoundError:  # somebody is at work on it
        return False


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _entries(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
