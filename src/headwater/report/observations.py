"""What was seen while stages ran: health warnings, where gates ended stages, condition C2 before and after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from headwater.monitors.health import warnings
from headwater.report.directory import Group, Node, Run, groups, read_json
from headwater.report.tables import DASH, Table

C2 = {
    "forward_kl@teacher": "KL(teacher, student)",
    "reverse_kl@student": "KL(student, teacher)",
    "overlap@student": "overlap of top 16",
    "entropy_gap@student": "entropy gap",
    "log_ratio_tail@student": "log-ratio below -5",
}
"""Names in monitors.jsonl and as headings; the second word says on whose rollouts."""


def health(run: Run) -> list[str]:
    """`STAGE of ARMS, seed N: what is wrong`, one line each."""
    seen = [(_title(group, node), run.rows(node.key, "metrics.jsonl")) for group, node in _nodes(run)]
    return [f"{title}: {line}" for title, rows in seen for line in warnings(rows)]


def gates(run: Run) -> list[str]:
    """Of every gated stage that has ended, where it ended and why."""
    lines = []
    for group, node in _nodes(run):
        gate = read_json(run.root / "nodes" / node.key / "done.json").get("gate")
        if not gate:
            continue
        series = ", ".join(f"{row['mean']:.3g}" for row in gate["looks"])
        end = f"gate ended it before step {gate['stopped_at']}" if gate["reason"] else "gate let it run to its end"
        of = f" of {node.steps}" if node.steps and gate["reason"] else ""
        lines.append(f"{_title(group, node)}: {end}{of}{': ' + gate['reason'] if gate['reason'] else ''} ({series})")
    return lines


def closeness(run: Run) -> Table | None:
    """C2 at the first and the last measurement of every stage with a teacher, means over seeds."""
    rows = []
    for group in groups(run):
        seen = [found for node in group.nodes if (found := run.rows(node.key, "monitors.jsonl"))]
        if seen:
            rows.append((f"{group.stage} of {group.name}", *(_change(seen, f"c2/{name}") for name in C2)))
    caption = "Condition C2: closeness to the teacher on held-out prompts, before and after the stage (nats a token)"
    return Table(caption, ("stage", *C2.values()), tuple(rows)) if rows else None


def _change(seen: Sequence[Sequence[dict[str, Any]]], name: str) -> str:
    ends = [(rows[0][name], rows[-1][name]) for rows in seen if name in rows[0] and name in rows[-1]]
    if not ends:
        return DASH
    before, after = (sum(pair[i] for pair in ends) / len(ends) for i in (0, 1))
    return f"{before:.3g} \N{RIGHTWARDS ARROW} {after:.3g}"


def _nodes(run: Run) -> list[tuple[Group, Node]]:
    return [(group, node) for group in groups(run) for node in group.nodes]


def _title(group: Group, node: Node) -> str:
    return f"{group.stage} of {group.name}, seed {node.seed}"
