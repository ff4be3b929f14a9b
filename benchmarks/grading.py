"""Verdicts a second of the graders on distinct completions, cold cache; and what a hostile batch costs.

    python benchmarks/grading.py                 # 5,000 completions of each style on two children
    python benchmarks/grading.py --count 500 --out FILE

All completions and gold answers are made here from a seed. GSM8K style: a worked solution of a few lines with a marked
number, a third of them wrong. MATH style: 55 % numbers, the rest fractions, radicals, pairs, intervals, polynomials and
lists, every pair of gold and answer distinct; a third repeats the gold's spelling, a third has another one, a third is
wrong, so two thirds of the expressions need symbolic algebra.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path

from headwater.grading.pool import GraderPool
from headwater.types import Problem

Item = tuple[Problem, str]
NUMBER, MATHS = "headwater.grading.text:grade_number", "headwater.grading.maths:grade_maths"
TIMEOUT_S = 2.0


def gsm8k(draw: random.Random, index: int) -> Item:
    a, b = draw.randrange(2, 999), draw.randrange(2, 99)
    gold = a * b + index
    said = gold + (draw.randrange(1, 9) if index % 3 == 0 else 0)
    mark = draw.choice(["#### {}", "The answer is {}.", "\\boxed{{{}}}", "So she has {} in all."]).format(f"{said:,}")
    work = f"She has {a} boxes of {b} each, {a} * {b} = {a * b}.\n" * draw.randrange(1, 6)
    return Problem((), f"{gold}"), f"{work}With {index} more that makes {said}.\n{mark}"


def maths(draw: random.Random, index: int) -> Item:
    """A completion with one box; a, b, c make golds distinct, `how` says how the answer is spelled."""
    a, b, c = index + 2, draw.randrange(2, 90), draw.randrange(2, 90)
    other = c + draw.randrange(1, 5)
    forms = [
        (rf"\frac{{{a}}}{{{a + b}}}+\pi", rf"\pi+\frac{{{2 * a}}}{{{2 * (a + b)}}}",
         rf"\frac{{{a}}}{{{a + b + 1}}}+\pi"),
        (rf"{c}\sqrt{{{a}}}", rf"\sqrt{{{a * c * c}}}", rf"{other}\sqrt{{{a}}}"),
        (rf"\left({a}, \frac{{{b}}}{{{c}}}\right)", rf"({a},\dfrac{{{2 * b}}}{{{2 * c}}})",
         rf"({a}, \frac{{{b}}}{{{other}}})"),
        (rf"[{b},{a + b}) \cup ({a + 99},\infty)", rf"({a + 99},+\infty)\cup[{b}, {a + b})",
         rf"[{b},{a + b}]\cup({a + 99},\infty)"),
        (f"x^2+{a}x+{b}", f"{b}+x({a}+x)", f"x^2+{a}x+{other + b}"),
        (f"(x+{a})(x-{b})", f"x^2+{a - b}x-{a * b}".replace("+-", "-"), f"(x-{a})(x+{b})"),
        (rf"{a},-{b},\sqrt{{{c}}}", rf"-{b}, \sqrt{{{c}}}, {a}", rf"{a},{b},\sqrt{{{c}}}"),
        (f"y = {a}x + {b}", f"y={b}+{a}x", f"y = {b}x + {a + 99}"),
        (rf"{a}+{b}i", f"{b}i+{a}", f"{a}-{b}i"),
    ]  # fmt: skip
    if draw.random() < 0.55:
        gold, same, wrong = f"{a}", draw.choice([f"{a}.0", rf"\frac{{{2 * a}}}{{2}}", f"x={a}"]), f"{a + 1}"
    else:
        gold, same, wrong = draw.choice(forms)
    answer = (gold, same, wrong)[index % 3]
    return Problem((), gold), f"We find {a} and {b}, hence after some work $$\\boxed{{{answer}}}$$"


def hostile(draw: random.Random, index: int) -> Item:
    return Problem((), "5"), rf"\boxed{{{draw.randrange(10**6)}x+9^{{9^{{9^{{9}}}}}}}}"


def measure(grader: str, items: list[Item], workers: int) -> dict[str, object]:
    """Wall seconds from the first item to the last verdict, children started and their imports done before."""
    with GraderPool(grader, workers=workers, timeout_s=TIMEOUT_S) as pool:
        for _ in range(workers):  # Starts every child; another gold than any below.
            pool.grade([(Problem((), "1"), r"\boxed{1}")] * 64 * workers)
        pool.counts.clear()
        start = time.perf_counter()
        pool.grade(items)
        wall = time.perf_counter() - start
        counts = dict(pool.counts)
    return {"verdicts": len(items), "wall_s": round(wall, 2), "per_s": round(len(items) / wall, 1), "reasons": counts}


def with_cpu(grader: str, items: list[Item], workers: int) -> dict[str, object]:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = measure(grader, items, workers)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)  # The children have ended; their start is in it.
    return {**found, "children_cpu_s": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--hostile", type=int, default=5, help="hostile completions among 500 of MATH style")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    draw = random.Random(0)
    easy, hard = ([make(draw, i) for i in range(args.count)] for make in (gsm8k, maths))
    assert len({text for _, text in easy}) == len({text for _, text in hard}) == args.count
    mixed = hard[:500] + [hostile(draw, i) for i in range(args.hostile)]
    draw.shuffle(mixed)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    found = {
        "commit": commit,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": f"{platform.machine()}, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f} before",
        "python": platform.python_version(),
        "workers": args.workers,
        "timeout_s": TIMEOUT_S,
        "gsm8k_style": with_cpu(NUMBER, easy, args.workers),
        "math_style": with_cpu(MATHS, hard, args.workers),
        "math_style_500_alone": with_cpu(MATHS, hard[:500], args.workers),
        f"math_style_500_and_{args.hostile}_hostile": with_cpu(MATHS, mixed, args.workers),
    }
    text = json.dumps(found, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
