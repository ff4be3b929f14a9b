"""How far a study is: nodes by state, what runs now, and how long the rest may take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headwater.report.directory import STATES, Node, Number, Run

LATEST = ("reward/mean", "teacher/reverse_kl", "teacher/forward_kl", "policy/cross_entropy")
SILENT_S = 300.0
"""After this long without news a run that should be at work may have been killed."""


@dataclass(frozen=True)
class Running:
    """A node at work. `latest` is its newest reward or KL in words; `left` seconds, None while nothing tells."""

    title: str
    step: int | None
    steps: int | None
    latest: str
    left: Number | None


@dataclass(frozen=True)
class Progress:
    """`left`: seconds to the end of the study, None = not known yet. `news`: Unix time of the last sign of life."""

    counts: dict[str, int]
    total: int
    running: tuple[Running, ...]
    left: Number | None
    at_once: int
    news: Number | None
    silent: bool


def progress(run: Run, now: Number) -> Progress:
    """Progress at a time. The time left comes from finished nodes of the same kind, or a running node's own pace."""
    nodes = list(run.nodes.values())
    counts = {state: sum(node.state == state for node in nodes) for state in STATES}
    metrics = {node.key: run.rows(node.key, "metrics.jsonl") for node in nodes if node.state == "running"}
    running, remaining = [], []
    for node in nodes:
        if node.state == "running":
            left = _left(node, metrics[node.key], nodes, now)
            running.append(_running(node, metrics[node.key], left))
            remaining.append(left)
        elif node.state != "done":
            remaining.append(_usual(node, nodes))
    at_once = max(len(running), 1)
    known = [value for value in remaining if value is not None]
    alive = [row["time"] for rows in [run.events, *metrics.values()] for row in rows]
    news = max(alive, default=None)
    return Progress(
        counts=counts,
        total=len(nodes),
        running=tuple(running),
        left=sum(known) / at_once if len(known) == len(remaining) else None,
        at_once=at_once,
        news=news,
        silent=bool(running) and news is not None and now - news > SILENT_S,
    )


def _usual(node: Node, nodes: Sequence[Node]) -> Number | None:
    """Mean seconds of finished nodes of the same method and stage; evaluations of one kind whatever they follow."""
    like = [n.seconds for n in nodes if n.seconds is not None and n.state == "done" and _kind(n) == _kind(node)]
    return sum(like) / len(like) if like else None


def _kind(node: Node) -> tuple[str, str]:
    return (node.kind, node.title.split(" ")[0]) if node.kind == "evaluate" else (node.method, node.stage)


def _left(node: Node, rows: Sequence[Mapping[str, Any]], nodes: Sequence[Node], now: Number) -> Number | None:
    if node.steps and len(rows) > 1 and rows[-1]["time"] > rows[0]["time"]:
        pace = (rows[-1]["time"] - rows[0]["time"]) / max(rows[-1]["step"] - rows[0]["step"], 1)
        return pace * (node.steps - rows[-1]["step"] - 1)
    usual = _usual(node, nodes)
    return None if usual is None else max(usual - (now - node.started if node.started is not None else 0), 0.0)


def _running(node: Node, rows: Sequence[Mapping[str, Any]], left: Number | None) -> Running:
    last = rows[-1] if rows else {}
    latest = ", ".join(f"{name} {last[name]:.3g}" for name in LATEST if isinstance(last.get(name), int | float))
    return Running(node.title, last["step"] + 1 if rows else None, node.steps, latest, left)
