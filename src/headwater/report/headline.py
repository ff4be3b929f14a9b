"""What the declared comparisons found, in sentences made from the numbers alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headwater.report.directory import Number, Run

MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Sentence:
    """`verdict` is the row's; `lead` can stand alone, `rest` says at what price and over what."""

    verdict: str
    lead: str
    rest: str

    @property
    def text(self) -> str:
        return f"{self.lead}{self.rest}."


def headlines(run: Run) -> list[Sentence]:
    """One sentence for the first declared comparison on every task, at the largest of its budgets."""
    return [sentence(run, row) for row in _first(run)]


def further(run: Run) -> list[Sentence]:
    """Sentences for the other declared comparisons."""
    first = _first(run)
    return [sentence(run, row) for row in run.results.get("comparisons", []) if row not in first]


def _first(run: Run) -> list[Mapping[str, Any]]:
    rows = run.results.get("comparisons", [])
    largest: dict[str, Mapping[str, Any]] = {}
    for row in (row for row in rows if _arms(row) == _arms(rows[0])):
        if row["task"] not in largest or _budget(row) > _budget(largest[row["task"]]):
            largest[row["task"]] = row
    return list(largest.values())


def _arms(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Both sides without their budgets."""
    return tuple(re.sub(r"@\d+", "", row[side]) for side in ("a", "b"))


def _budget(row: Mapping[str, Any]) -> int:
    return max([int(n) for side in ("a", "b") for n in re.findall(r"@(\d+)", row[side])], default=0)


def sentence(run: Run, row: Mapping[str, Any]) -> Sentence:
    """A comparison in words: who is better by how many points, at how many labels and seeds, at what cost."""
    first, second, value, (low, high) = row["a"], row["b"], row["difference"], row["ci95"]
    if row["verdict"] == "b better":
        first, second, value, low, high = second, first, -value, -high, -low
    where = f" on {row['task']}{_labels(run, first, second)}, {plural(row['num_seeds'], 'seed')}"
    if row["verdict"] == "not distinguishable":
        lead = f"{first} and {second} are not distinguishable"
        rest = f"{where}: the difference is {signed(value)} points [{signed(low)}, {signed(high)}]"
    else:
        lead = f"{first} beats {second} by {points(value)} points"
        rest = f" [{points(low)}, {points(high)}]{where}"
    rest += _cost(run, first, second, first if row["verdict"] == "not distinguishable" else "it")
    if row["over"] == "problems":
        rest += "; over problems only: another training run could come out differently"
    return Sentence(row["verdict"], lead, rest)


def prediction(row: Mapping[str, Any]) -> str | None:
    """The answer to `a - b <= margin`; None for a comparison without a margin."""
    if row.get("margin") is None or not row.get("outcome"):
        return None
    low, high = (signed(end) for end in row["ci95"])
    found = f"the difference is {signed(row['difference'])} points [{low}, {high}]"
    why = {
        "confirmed": "the data rule out a larger difference",
        "refuted": "the data show a larger difference",
        "undecided": "the data rule out neither; this confirms nothing",
    }[row["outcome"]]
    claim = f"{row['a']} {MINUS} {row['b']} is at most {signed(row['margin'])} points on {row['task']}"
    return f"Predicted: {claim}. {row['outcome'].capitalize()}: {found}; {why}."


def decisions(results: Mapping[str, Any]) -> list[str]:
    """What `split = "auto"` chose on every seed, and why."""
    return [
        f"{name}, seed {seed}: auto sends {row['decision']['share']:g} of the labels upstream because "
        f"{row['decision']['reason']}."
        for name, arm in results.get("arms", {}).items()
        for seed, row in arm["seeds"].items()
        if "decision" in row
    ]


def points(share: Number) -> str:
    """A share in hundredths, with one decimal."""
    return f"{100 * share:.1f}".replace("-0.0", "0.0").replace("-", MINUS)


def signed(share: Number) -> str:
    """Like `points`, with its sign."""
    return f"{100 * share:+.1f}".replace("-0.0", "+0.0").replace("-", MINUS)


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def mean_over(bills: Sequence[Mapping[str, Any]], part: str, name: str) -> Number:
    """Mean of a number in some bills, such as `labels`, `distinct`; tokens add up over roles."""
    values = [bill[part][name] for bill in bills]
    return sum(sum(v.values()) if isinstance(v, Mapping) else v for v in values) / len(values)


def _means(run: Run, names: tuple[str, str], part: str, name: str) -> dict[str, Number]:
    """Mean over seeds of those arms in `names` that are finished."""
    arms = run.results.get("arms", {})
    return {arm: mean_over(list(arms[arm]["seeds"].values()), part, name) for arm in names if arm in arms}


def _labels(run: Run, first: str, second: str) -> str:
    used = {name: round(mean) for name, mean in _means(run, (first, second), "labels", "distinct").items()}
    if len(set(used.values())) == 1 and len(used) == 2:
        return f" at {plural(used[first], 'label')}"
    return "".join(f" {'against' if i else 'with'} {plural(n, 'label')}" for i, n in enumerate(used.values()))


def _cost(run: Run, first: str, second: str, subject: str) -> str:
    spent = _means(run, (first, second), "cost", "tokens")
    if len(spent) < 2 or not all(spent.values()):
        return ""
    ratio = spent[first] / spent[second]
    if 0.95 < ratio < 1.05:
        return f"; {subject} costs about as many tokens"
    return f"; {subject} costs {f'{ratio:.2g}' if ratio < 10 else f'{ratio:,.0f}'} times the tokens"
