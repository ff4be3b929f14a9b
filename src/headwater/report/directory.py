"""A run directory as values: what is there is read, what is missing stays empty; no torch, no store, no models."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

State = Literal["done", "running", "failed", "stopped", "to do"]
STATES: tuple[State, ...] = ("done", "running", "failed", "stopped", "to do")

Rows = list[dict[str, Any]]
Number = int | float
"""JSON writes 3.0 and 3 alike."""


@dataclass(frozen=True)
class Node:
    """A stage or an evaluation. `stopped`: begun by an invocation that ended. Times in Unix seconds."""

    key: str
    title: str
    kind: str
    method: str
    stage: str
    seed: str
    parents: tuple[str, ...]
    steps: int | None
    state: State = "to do"
    error: str = ""
    started: Number | None = None
    seconds: Number | None = None
    """From `started` to `done` when this directory saw both, else what the node's meter holds."""


@dataclass(frozen=True)
class Group:
    """The nodes of one stage over seeds that serve the same arms: drawn once, however many arms share it."""

    stage: str
    method: str
    arms: tuple[str, ...]
    nodes: tuple[Node, ...]

    @property
    def name(self) -> str:
        return ", ".join(self.arms)


@dataclass(frozen=True)
class Run:
    """Everything the report is made of; see the contract of a run directory (schema 1)."""

    root: Path
    recipe: dict[str, Any]
    recipe_text: str
    environment: dict[str, Any]
    results: dict[str, Any]
    events: Rows
    nodes: dict[str, Node]
    arms: dict[str, dict[str, list[str]]]
    requested: int
    unchecked: list[str]

    @property
    def name(self) -> str:
        return str(self.results.get("recipe") or self.recipe.get("name") or self.root.name)

    @property
    def stages(self) -> list[Node]:
        return [node for node in self.nodes.values() if node.kind == "stage"]

    @property
    def complete(self) -> bool:
        """Whether results.json holds every arm."""
        return bool(self.results.get("complete"))

    def rows(self, key: str, name: str) -> Rows:
        """Rows of one of a node's JSONL files."""
        return read_rows(self.root / "nodes" / key / name)


def read(root: Path) -> Run:
    """A run directory. Raises ValueError when it does not exist or holds no run."""
    if not root.is_dir():
        raise ValueError(f"{root} is no directory: give a run directory, such as runs/NAME")
    if not any((root / name).exists() for name in ("recipe.toml", "stages.json", "results.json")):
        raise ValueError(f"{root} holds no run (no recipe.toml, stages.json or results.json): give a run directory")
    recipe_text = _text(root / "recipe.toml")
    stages, events = read_json(root / "stages.json"), read_rows(root / "events.jsonl")
    return Run(
        root=root,
        recipe=_toml(recipe_text),
        recipe_text=recipe_text,
        environment=read_json(root / "environment.json"),
        results=read_json(root / "results.json"),
        events=events,
        nodes=_nodes(root, stages.get("nodes", {}), events),
        arms=stages.get("arms", {}),
        requested=stages.get("requested", 0),
        unchecked=stages.get("unchecked", []),
    )


def groups(run: Run) -> list[Group]:
    """Stages in the order of the arms, seeds and sharing arms together."""
    serves: dict[str, list[str]] = {}
    for arm, seeds in run.arms.items():
        for key in (key for keys in seeds.values() for key in keys):
            if key in run.nodes and arm not in serves.setdefault(key, []):
                serves[key].append(arm)
    found: dict[tuple[str, str, tuple[str, ...]], list[Node]] = {}
    for key, arms in serves.items():
        node = run.nodes[key]
        found.setdefault((node.stage, node.method, tuple(arms)), []).append(node)
    return [Group(*parts, tuple(nodes)) for parts, nodes in found.items()]


def read_rows(path: Path) -> Rows:
    """Rows of a JSONL file; lines that are no object, such as one still being written, are left out."""
    rows = (_loads(line) for line in _text(path).splitlines())
    return [row for row in rows if isinstance(row, dict)]


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file, {} when it is missing or half written."""
    found = _loads(_text(path))
    return found if isinstance(found, dict) else {}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _loads(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _toml(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return {}


def _nodes(root: Path, described: Mapping[str, Mapping[str, Any]], events: Rows) -> dict[str, Node]:
    told = _states(events)
    nodes = {}
    for key, row in described.items():
        state, error, started, seconds = told.get(key, ("to do", "", None, None))
        if (root / "nodes" / key / "done.json").exists():
            state = "done"
            seconds = _metered(root / "nodes" / key / "done.json") if seconds is None else seconds
        elif state == "to do" and (root / "nodes" / key / "metrics.jsonl").exists():
            state = "stopped"
        nodes[key] = Node(
            key=key,
            title=row["title"],
            kind=row["kind"],
            method=row["label"],
            stage=row["stage"] or row["title"].rpartition(", seed ")[0],
            seed=str(row["seed"]),
            parents=tuple(row["parents"]),
            steps=row["steps"],
            state=state,
            error=error or (_last_line(root / "nodes" / key / "error.txt") if state == "failed" else ""),
            started=started,
            seconds=seconds,
        )
    return nodes


def _metered(path: Path) -> Number | None:
    """Seconds on the meter of a node that another run directory saw."""
    roles = read_json(path).get("meter", {}).values()
    return sum(role["seconds"] for role in roles) or None


def _states(events: Sequence[Mapping[str, Any]]) -> dict[str, tuple[State, str, Number | None, Number | None]]:
    """Key -> (state, error, started, seconds), replaying the events in order."""
    told: dict[str, tuple[State, str, Number | None, Number | None]] = {}
    for event in events:
        kind, key, time = event.get("kind"), str(event.get("key") or ""), event.get("time")
        if kind in ("run", "end"):  # nothing outlives its invocation
            told |= {k: ("stopped", "", t, None) for k, (state, _, t, _) in told.items() if state == "running"}
        elif kind == "started":
            told[key] = ("running", "", time, None)
        elif kind == "done":
            begun = told.get(key, ("to do", "", None, None))[2]
            told[key] = ("done", "", begun, time - begun if time is not None and begun is not None else None)
        elif kind == "failed":
            told[key] = ("failed", str(event.get("error") or ""), None, None)
    return told


def _last_line(path: Path) -> str:
    lines = _text(path).strip().splitlines()
    return lines[-1] if lines else ""
