"""Charts as SVG that stretches with the page: text keeps its size, colours and dashes come from the style sheet.

Drawn here and not by a charting library: a page stays under a megabyte where plotly alone brings five, it works without
JavaScript, follows dark mode and print through CSS, and every mark carries its numbers as text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from headwater.report.directory import Group, Number, Run, groups

Point = tuple[Number, Number, Number | None, Number | None]
"""x, y, and the ends of y's interval or range."""

SLOTS = 8
_MARKS = (
    "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0z",  # circle
    "M-4-4h8v8h-8z",  # square
    "M0-5.5L5.2 4H-5.2z",  # triangle
    "M0-6L6 0L0 6L-6 0z",  # diamond
    "M0 5.5L5.2-4H-5.2z",  # triangle, down
    "M-1.7-5h3.4v3.3h3.3v3.4h-3.3v3.3h-3.4v-3.3h-3.3v-3.4h3.3z",  # plus
)


@dataclass(frozen=True)
class Series:
    """A named line with a band (`line`), or points with whiskers. `slot` picks colour, dash and mark."""

    name: str
    slot: int
    points: tuple[Point, ...]
    line: bool = True


@dataclass(frozen=True)
class Axis:
    """`ticks` are drawn and labelled; `log` spaces by ratio."""

    low: Number
    high: Number
    ticks: tuple[tuple[Number, str], ...]
    label: str
    log: bool = False

    def at(self, value: Number) -> Number:
        """Place on the axis, 0..1; what lies beyond it is drawn at its end."""
        scaled = math.log if self.log else float
        low, high = scaled(self.low), scaled(self.high)
        return min(max((scaled(value) - low) / (high - low), 0.0), 1.0)


def linear_axis(values: Sequence[Number], label: str, scale: Number = 1, count: int = 4) -> Axis:
    """An axis over finite values with about `count` round ticks, whose texts show value x scale."""
    low, high = min(values), max(values)
    if low == high:
        low, high = (0.0, 1.0) if low == 0 else (low - abs(low) / 2, high + abs(high) / 2)
    step = _nice((high - low) / count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    shown = [i * step for i in range(first, last + 1)]
    digits = max(0, -math.floor(math.log10(step * scale) + 1e-9))
    ticks = tuple((v, _tick(v * scale, digits)) for v in shown)
    return Axis(shown[0], shown[-1], ticks, label)


def log_axis(values: Sequence[Number], label: str, text: Any = str, at: Sequence[Number] | None = None) -> Axis:
    """A log axis over positive values; ticks `at` these values, or at round ones: powers of ten if three are inside."""
    low, high = min(values), max(values)
    low, high = (low / 1.3, high * 1.3) if low == high or at is None else (low, high)
    shown = _round_inside(low, high) if at is None else at
    return Axis(low, high, tuple((v, text(v)) for v in shown), label, log=True)


def _round_inside(low: Number, high: Number) -> list[Number]:
    powers = [10.0**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    shown: list[Number] = []
    for digits in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8), [d / 10 for d in range(10, 100)]):
        shown = [round(d * power, 12) for power in powers for d in digits if low <= d * power <= high]
        if len(shown) >= 3:
            break
    return shown[:: math.ceil(len(shown) / 6)]


def _nice(step: Number) -> Number:
    power = 10.0 ** math.floor(math.log10(step))
    return next(d * power for d in (1, 2, 2.5, 5, 10) if d * power >= step * 0.999)


def _tick(value: Number, digits: int) -> str:
    if abs(value) >= 10_000 or 0 < abs(value) < 0.001:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.{digits}f}".replace("-", "\N{MINUS SIGN}")


def chart(
    series: Sequence[Series], x: Axis, y: Axis, alt: str, *, height: int = 260, rules: Sequence[tuple[Number, str]] = ()
) -> Markup:
    """Lines with bands, or points with whiskers. `rules` are labelled horizontal lines. `alt` is the text alternative.

    Series share their places: x stretches with the page, y is in pixels.
    """
    parts = [_frame(x, y, height)]
    inner = [_line(s, x, y, height) for s in series if s.line and len(s.points) > 1]
    parts.append(
        f'<svg class="stretch" viewBox="0 0 1000 {height}" preserveAspectRatio="none" width="100%" height="{height}">'
        f"{''.join(inner)}</svg>"
    )
    for value, name in rules:
        top = _px(height * (1 - y.at(value)))
        parts.append(f'<line class="rule" x1="0" x2="100%" y1="{top}" y2="{top}"/>')
        parts.append(
            f'<text class="rule-name" x="100%" y="{_px(height * (1 - y.at(value)) - 5)}">{escape(name)}</text>'
        )
    for s in series:
        if not s.line or len(s.points) <= 12:
            parts += [_mark(s, point, x, y, height) for point in s.points]
    return Markup(
        '<div class="chart"><p class="axis-y" aria-hidden="true">{}</p><svg class="plot" role="img" aria-label="{}" '
        'width="100%" height="{}">{}</svg><p class="axis-x" aria-hidden="true">{}</p></div>'
    ).format(y.label, alt, height, Markup("".join(parts)), x.label)


def _frame(x: Axis, y: Axis, height: int) -> str:
    parts = []
    for value, text in y.ticks:
        top = _px(height * (1 - y.at(value)))
        parts.append(f'<line class="grid" x1="0" x2="100%" y1="{top}" y2="{top}"/>')
        parts.append(f'<text class="tick y" x="-8" y="{top}" dy=".35em">{escape(text)}</text>')
    for value, text in x.ticks:
        left = f"{100 * x.at(value):.2f}%"
        parts.append(f'<line class="grid" x1="{left}" x2="{left}" y1="{height}" y2="{height + 5}"/>')
        parts.append(f'<text class="tick x" x="{left}" y="{height + 20}">{escape(text)}</text>')
    return "".join(parts)


def _line(s: Series, x: Axis, y: Axis, height: int) -> str:
    places = [(1000 * x.at(p[0]), height * (1 - y.at(p[1]))) for p in s.points]
    path = "M" + "L".join(f"{_px(a)} {_px(b)}" for a, b in places)
    banded = [(1000 * x.at(p[0]), p[2], p[3]) for p in s.points if p[2] is not None and p[3] is not None]
    band = ""
    if len(banded) > 1 and any(low != high for _, low, high in banded):
        upper = [f"{_px(a)} {_px(height * (1 - y.at(high)))}" for a, _, high in banded]
        lower = [f"{_px(a)} {_px(height * (1 - y.at(low)))}" for a, low, _ in reversed(banded)]
        band = f'<path class="band {_class(s.slot)}" d="M{"L".join(upper + lower)}z"/>'
    return f'{band}<path class="line {_class(s.slot)}" d="{path}"/>'


def _mark(s: Series, point: Point, x: Axis, y: Axis, height: int) -> str:
    at, value, low, high = point
    left, parts = f"{100 * x.at(at):.2f}%", ""
    if not s.line and low is not None and high is not None:
        top, bottom = (_px(height * (1 - y.at(end))) for end in (high, low))
        parts = f'<line class="whisker {_class(s.slot)}" x1="{left}" x2="{left}" y1="{top}" y2="{bottom}"/>'
    inner = f'<path class="mark {_class(s.slot)}" d="{_MARKS[_mark_of(s.slot)]}"/>'
    title = f"<title>{escape(s.name)}: {value:.4g} at {at:.4g}</title>"
    return f'{parts}<svg class="stretch" x="{left}" y="{_px(height * (1 - y.at(value)))}">{title}{inner}</svg>'


def legend(series: Sequence[Series]) -> Markup:
    """Names beside their line or mark: colour, dash and shape all tell them apart."""
    items = []
    for s in series:
        line = f'<path class="line {_class(s.slot)}" d="M0 7H34"/>' if s.line else ""
        drawn = f'<path class="mark {_class(s.slot)}" d="{_MARKS[_mark_of(s.slot)]}"/>'
        mark = f'<svg class="stretch" x="17" y="7">{drawn}</svg>'
        shown = mark if not s.line or len(s.points) <= 12 else ""
        items.append(
            Markup('<li><svg width="34" height="14" aria-hidden="true">{}</svg>{}</li>').format(
                Markup(line + shown), s.name
            )
        )
    return Markup('<ul class="legend">{}</ul>').format(Markup("").join(items))


def _class(slot: int) -> str:
    return f"s{slot % SLOTS} d{slot // SLOTS % 4}"


def _mark_of(slot: int) -> int:
    return (slot + slot // SLOTS) % len(_MARKS)


def _px(value: Number) -> str:
    return f"{value:.1f}".removesuffix(".0")


@dataclass(frozen=True)
class ForestRow:
    """A difference with its interval, in percent of the common axis; `shape` repeats the verdict without colour."""

    name: str
    task: str
    text: str
    verdict: str
    kind: str
    svg: Markup


_SHAPES = {"a": "M-5-6L6 0L-5 6z", "b": "M5-6L-6 0L5 6z", "none": _MARKS[0]}


def forest(run: Run, rows: Sequence[tuple[str, ...]]) -> tuple[list[ForestRow], Markup]:
    """Declared differences on one axis, and the axis. `rows` are `tables.comparison_rows`."""
    found = run.results.get("comparisons", [])
    if not found:
        return [], Markup("")
    ends = [value for row in found for value in (*row["ci95"], row["difference"])]
    axis = linear_axis([0.0, *ends], "points", scale=100, count=4)
    out = []
    for row, text in zip(found, rows, strict=True):
        kind = {"a better": "a", "b better": "b"}.get(row["verdict"], "none")
        left, middle, right = (f"{100 * axis.at(v):.2f}%" for v in (row["ci95"][0], row["difference"], row["ci95"][1]))
        margin = f"{100 * axis.at(row['margin']):.2f}%" if _inside(axis, row.get("margin")) else ""
        lines = "".join(
            f'<line class="grid" x1="{100 * axis.at(v):.2f}%" x2="{100 * axis.at(v):.2f}%" y1="0" y2="40"/>'
            for v, _ in axis.ticks
        )
        lines += f'<line class="zero" x1="{100 * axis.at(0):.2f}%" x2="{100 * axis.at(0):.2f}%" y1="0" y2="40"/>'
        if margin:
            lines += f'<line class="margin" x1="{margin}" x2="{margin}" y1="0" y2="40"/>'
        lines += f'<line class="whisker v-{kind}" x1="{left}" x2="{right}" y1="20" y2="20"/>'
        lines += f'<svg class="stretch" x="{middle}" y="20"><path class="mark v-{kind}" d="{_SHAPES[kind]}"/></svg>'
        alt = escape(f"{text[0]} on {text[1]}: {text[2]} points, {text[6]}")
        svg = Markup(f'<svg class="plot" role="img" aria-label="{alt}" width="100%" height="40">{lines}</svg>')
        out.append(ForestRow(text[0], text[1], text[2], text[6], kind, svg))
    ticks = "".join(
        f'<text class="tick x" x="{100 * axis.at(v):.2f}%" y="14">{escape(t)}</text>' for v, t in axis.ticks
    )
    return out, Markup(f'<svg class="plot" aria-hidden="true" width="100%" height="20">{ticks}</svg>')


def _inside(axis: Axis, value: Number | None) -> bool:
    return value is not None and axis.low <= value <= axis.high


BOX, GAP_X, GAP_Y = (176, 66), 52, 24


def graph(run: Run) -> Markup:
    """Stages by level, from the untrained models on the left; a stage that several arms share is one box."""
    boxes = groups(run)
    if not boxes:
        return Markup("")
    place, rows = _places(run, boxes)
    of = {node.key: box for box in boxes for node in box.nodes}
    parts = []
    for box in boxes:
        sources = list(dict.fromkeys(of[p] for node in box.nodes for p in node.parents if p in of))
        x1, y1 = _corner(place[box])
        for source in sources:
            x0, y0 = _corner(place[source])
            parts.append(f'<path class="edge" d="{_edge(x0, y0, x1, y1)}"/>')
    parts += [_box(box, *_corner(place[box])) for box in boxes]
    levels = max(level for level, _ in place.values()) + 1
    width, height = levels * (BOX[0] + GAP_X) - GAP_X + 4, rows * (BOX[1] + GAP_Y) - GAP_Y + 4
    alt = "; ".join(f"{b.stage} ({b.method}) for {b.name}: {state_text(b)}" for b in boxes)
    frame = '<svg class="graph" role="img" aria-label="{}" width="{}" height="{}" viewBox="-2 -2 {} {}">{}</svg>'
    drawn = Markup("".join(parts))
    return Markup(frame).format(f"Graph of stages. {alt}", width, height, width, height, drawn)


def _edge(x0: Number, y0: Number, x1: Number, y1: Number) -> str:
    """A curve between two boxes; below the boxes in between when both stand in one row."""
    if y0 == y1 and x1 - x0 > BOX[0] + GAP_X:
        base = y0 + BOX[1]
        return f"M{x0 + BOX[0] - 40} {base}C{x0 + BOX[0]} {base + 20} {x1} {base + 20} {x1 + 40} {base}"
    start, end = (x0 + BOX[0], y0 + BOX[1] / 2), (x1, y1 + BOX[1] / 2)
    bend = max((end[0] - start[0]) / 2, 20)
    return f"M{start[0]} {start[1]}C{start[0] + bend} {start[1]} {end[0] - bend} {end[1]} {end[0]} {end[1]}"


def _places(run: Run, boxes: Sequence[Group]) -> tuple[dict[Group, tuple[int, int]], int]:
    """Box -> (level, row): a level is the longest way from an untrained model, a row the first arm that is free."""
    depth: dict[str, int] = {}

    def level(key: str) -> int:
        if key not in depth:
            depth[key] = 0
            depth[key] = max((level(p) + 1 for p in run.nodes[key].parents if p in run.nodes), default=0)
        return depth[key]

    lanes = {arm: row for row, arm in enumerate(run.arms)}
    place: dict[Group, tuple[int, int]] = {}
    for box in boxes:
        at = (max(level(node.key) for node in box.nodes), min(lanes[arm] for arm in box.arms))
        while at in place.values():
            at = (at[0], at[1] + 1)
        place[box] = at
    used = {row: i for i, row in enumerate(sorted({row for _, row in place.values()}))}
    return {box: (column, used[row]) for box, (column, row) in place.items()}, len(used)


def _corner(place: tuple[int, int]) -> tuple[int, int]:
    return place[0] * (BOX[0] + GAP_X), place[1] * (BOX[1] + GAP_Y)


def _box(box: Group, x: int, y: int) -> str:
    state = state_text(box)
    kind = worst_state(box)
    return (
        f'<g class="box m-{escape(box.method)} {kind.replace(" ", "-")}"><title>{escape(box.stage)} for '
        f'{escape(box.name)}: {escape(state)}</title><rect x="{x}" y="{y}" width="{BOX[0]}" height="{BOX[1]}" rx="6"/>'
        f'<rect class="stripe" x="{x + 5}" y="{y + 8}" width="4" height="{BOX[1] - 16}"/>'
        f'<text class="stage" x="{x + 14}" y="{y + 20}">{escape(_cut(box.stage, 14))} '
        f'<tspan class="method">{escape(_cut(box.method, 10))}</tspan></text>'
        f'<text class="of" x="{x + 14}" y="{y + 38}">{escape(_cut(box.name, 22))}</text>'
        f'<text class="state" x="{x + 14}" y="{y + 56}">{escape(_cut(state, 23))}</text></g>'
    )


_GLYPH = {"done": "\u25cf", "running": "\u25d0", "failed": "\u2715", "stopped": "\u25cc", "to do": "\u25cb"}


def worst_state(box: Group) -> str:
    """The state that a reader must know of: failed before running before stopped before to do before done."""
    states = {node.state for node in box.nodes}
    return next(state for state in ("failed", "running", "stopped", "to do", "done") if state in states)


def state_text(box: Group) -> str:
    """`done 3 of 5, running 1`, with a sign for the state that matters most."""
    counts: Mapping[str, int] = {s: sum(n.state == s for n in box.nodes) for s in _GLYPH}
    words = [f"{state} {n}" for state, n in counts.items() if n]
    return f"{_GLYPH[worst_state(box)]} {', '.join(words)} of {len(box.nodes)}"


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "\u2026"
