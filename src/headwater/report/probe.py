"""One page of text from a probe: every recommendation with its measurement and its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

STAGES = {
    "teacher": "the teacher: what it can reach its own way",
    "student": "the student: what the bridge cannot carry into it",
    "labels": "the labels: too few for the teacher's reward training",
    "prompts": "the prompts: too few for the dense stages; unlabelled ones are free (prompts = 'unlabelled')",
}
MEASURED = ("forward_kl", "reverse_kl", "overlap", "entropy_gap", "log_ratio_p01", "log_ratio_p99", "log_ratio_tail")
C2 = tuple(f"{name}@{who}" for name in MEASURED for who in ("teacher", "student"))


def as_text(found: Mapping[str, Any]) -> str:
    """The page; intervals are 95 % over the problems of the sample."""
    pair, limits = found["pair"], found["limits"]
    lines = [
        f"probe: teacher {pair['teacher']}, student {pair['student']}",
        f"{found['problems']} problems of a pool of {found['labels']}; billed: {found['billed']['distinct']} distinct "
        f"labels; {sum(found['cost']['tokens'].values()):,} tokens, {found['cost']['seconds']:.0f} s",
        "",
        f"Labels upstream? {found['regime'].upper()}: all of them upstream minus direct GRPO "
        f"{_signed(found['difference'])}",
        f"Share upstream: {found['share']:g} (best in {found['chance'][format(found['share'], 'g')]:.0%} of resampled "
        "problems)",
        f"What limits the route: {STAGES[found['limiting']]}",
        "",
        "expected score of the student",
        _row("direct GRPO", found["direct"]),
        *(_row(f"share {name} upstream", x) for name, x in found["shares"].items()),
        "",
        "without end of labels and prompts",
        _row("teacher, its own way", limits["teacher"]),
        _row("student, the teacher's way", limits["followed"]),
        _row("student, its own way", limits["own"]),
        _row("student after the bridge", limits["bridge"]),
        *(f"  lost to the {name:<11} {loss:+.3f}" for name, loss in found["losses"].items()),
    ]
    for role, seen in found["models"].items():
        lines += ["", role, *_model(seen)]
    if found["c2"]:
        lines += ["", f"{'closeness (C2)':<26} {'pool':>10} {'held out':>10}"]
        lines += [_c2(name, found["c2"]) for name in C2]
    return "\n".join([*lines, "", "The rule, its constants and where it was right and wrong: docs/probe.md"])


def _model(seen: Mapping[str, Any]) -> list[str]:
    rows = [_row(name, x) for name, x in seen.items() if isinstance(x, list)]
    total = sum(seen["reasons"].values())
    shares = ", ".join(f"{name} {n / total:.2f}" for name, n in sorted(seen["reasons"].items()))
    rows.append(f"  verdicts: {shares}; truncated {seen['truncated']:.2f}; {seen['length']:.1f} tokens on average")
    styles = ", ".join(f"{name} {row['share']:.2f} x {row['accuracy']:.2f}" for name, row in seen["styles"].items())
    return rows + ([f"  styles (share x accuracy): {styles}"] if styles else [])


def _c2(name: str, c2: Mapping[str, Mapping[str, float]]) -> str:
    return f"  {name:<24} " + " ".join(f"{c2[where]['c2/' + name]:>10.4f}" for where in ("pool", "held out"))


def _row(name: str, x: Sequence[float]) -> str:
    return f"  {name:<26} {x[0]:.3f} [{x[1]:.3f}, {x[2]:.3f}]"


def _signed(x: Sequence[float]) -> str:
    return f"{x[0]:+.3f} [{x[1]:+.3f}, {x[2]:+.3f}]"
