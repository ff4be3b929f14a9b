"""Grade mathematical answers by their value: numbers exactly, lists by their parts, the rest through math-verify.

docs/grading.md has the rules. Only for a grading child: math-verify's own timeouts are signal alarms, which are
switched off here, since the pool kills a child whose time is up.
"""

from __future__ import annotations

import logging
import re
import zlib
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal

from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify
from sympy import Basic, Expr, Float, Integer, Rational
from sympy.logic.boolalg import Boolean

from headwater.grading.text import extract_marked, last_line_maths, last_number
from headwater.types import Problem, Verdict

logging.getLogger("math_verify").setLevel(logging.ERROR)

# Its removal of units is off: it takes '3t' for 3. Ours is in `normalise`.
_NORMALISATION = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all", equations=False
)
_TARGETS = (LatexExtractionConfig(boxed_match_priority=0, normalization_config=_NORMALISATION),)
_MAX_PARSED = 400  # Characters; the longest gold answer of MATH has 159. What is longer is compared by spelling.
_MAX_ITEMS = 32
_MAX_DIGITS = 200

_SPACING = re.compile(
    r"\\(?:left|right)(?![a-z])\.?|\\(?:qq?uad|displaystyle)(?![a-z])|(?<!\\)\\[!,;: ()]|(?<!\\)\\[\[\]]|~|\$"
)
_TEXT = r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|mbox|rm)\s*\{([^{}]*)\}"
_AND_OR = re.compile(r"\\(?:text|mbox|textrm)\s*\{\s*,?\s*(?:and|or)\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])")
_UNIT = re.compile(rf"(?<=[0-9}})])\s*{_TEXT}(?:\s*\^\s*(?:[23]|\{{[23]\}}))?\s*$")
_UNIT_NAME = r"\s*(?:(?:[ckm]m|[km]g|m[lL]|ft|in|lb|oz|hr|mph)\b|[aApP]\.?[mM]\b\.?)"
_PLAIN_WORD = r"\s+(?!pi\b)[A-Za-z][A-Za-z.]+"
_WORDS = re.compile(rf"(?<=[0-9}}])(?:{_UNIT_NAME}(?:{_PLAIN_WORD})*|(?:{_PLAIN_WORD})+)(?:\^(?:[23]|\{{[23]\}}))?$")
_SIGNS = re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\degree\b|°|\\?%|\\?\$|\\text\s*\{\s*\}")
_SHORT_FRACTION = re.compile(r"\\frac\s*(?:([0-9])\s*([0-9])(?![0-9])|([0-9])\s*(?=\{)|(\{[^{}]*\})\s*([0-9]))")
_NUMBER = re.compile(r"([0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.([0-9]+))?")
_RATIO = re.compile(
    r"(?:([0-9]+)\s*)?\\frac\{\s*(-?[0-9]+)\s*\}\{\s*(-?[0-9]+)\s*\}|(?:([0-9]+)\s+)?([0-9]+)\s*/\s*([0-9]+)"
)
_BASE = re.compile(r"(-?[0-9A-F.]+)_\{?([0-9]+)\}?")
_WORD = re.compile(r"(?<![A-Za-z\\])(?!sin|cos|tan|log|sec|csc|cot|exp|max|min|gcd|lcm)[A-Za-z]{3,}")
_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|.", re.DOTALL)
_LABEL = re.compile(r"\s*[A-Za-z](?:_\{?\w\}?|\([A-Za-z]\))?\s*(?:=(?!=)|\\in\b)\s*(?=\S)")

_RELATION = re.compile(r"[<>=]|\\(?:[lg]eq?|neq?|in|set|mathbb|pm|mid|to|R)(?![a-z])|\\lt|\\gt")

Kind = Literal["one", "list", "set", "union", "()", "(]", "[)", "[]"]
_ANSWERED_BY = {"list": ("list", "set", "()"), "set": ("list", "set"), "()": ("()", "list")}


def grade_maths(completion: str, problem: Problem) -> Verdict:
    """Right when the completion's answer has the value of the gold answer.

    The answer: `text.extract_marked`, else `text.last_line_maths`, else the last number. Raises ValueError when the
    problem has no answer.
    """
    if not problem.answer:
        raise ValueError(f"problem {problem.id} has no answer to grade against; grade labelled problems only")
    answer = find_answer(completion)
    if not answer or not _balanced(answer):
        return Verdict(False, False, "unparsed", 0.0)
    right = same_answer(problem.answer, answer)
    said = canonical(problem.answer if right else answer)
    return Verdict(right, True, "correct" if right else "wrong", float(right), answer=said)


def find_answer(completion: str) -> str:
    """The answer's text without what surrounds it; "" when there is none."""
    answer = extract_marked(completion)
    if answer is None:
        answer = last_line_maths(completion)
    if answer is None:
        number = last_number(completion)
        answer = "" if number is None else str(number)
    return answer.strip().removesuffix(".").strip()


def same_answer(gold: str, answer: str) -> bool:
    """Whether two answers have one value; not symmetric: `x = 5` answers 5, but only `y < 3` answers `y < 3`."""
    if len(answer) > _MAX_PARSED:
        return _squeeze(gold) == _squeeze(answer)
    gold, answer = normalise(gold), normalise(answer)
    if _squeeze(gold) == _squeeze(answer):
        return True
    (kind, golds), (other, answers) = split(gold), split(answer)
    if "one" in (kind, other):
        if kind == other:
            return _same_one(gold, answer)
        return bool(_RELATION.search(gold + answer)) and _same_symbolic(gold, answer)
    if len(golds) != len(answers) or len(golds) > _MAX_ITEMS:
        return False
    if other not in _ANSWERED_BY.get(kind, (kind,)):
        return False
    if kind in ("list", "set", "union"):
        return _same_unordered(golds, answers, kind)
    return all(map(_same_one, golds, answers))


def canonical(answer: str) -> str:
    """A spelling that many equal answers share: numbers as reduced fractions, the rest without spacing and units."""
    text = normalise(answer) if len(answer) <= _MAX_PARSED else answer
    value = number(text)
    return _squeeze(text) if value is None else str(value[0])


def normalise(answer: str) -> str:
    r"""An answer without delimiters, spacing commands, text wrappers, units, and signs for degrees, money and percent.

    Fractions and roots are written one way. Units are passed over, not converted: `5\text{ cm}` is 5.
    """
    text = _SIGNS.sub("", answer.replace("\u2212", "-").replace("**", "^").replace("\\$", "").replace("{,}", ","))
    text = _SPACING.sub(lambda m: " " if m[0] in ("~", "\\ ") or "quad" in m[0] else "", text)
    text = _AND_OR.sub(",", text.strip().removeprefix("\\approx").partition("\\approx")[0])
    text = _UNIT.sub("", text.strip())
    text = re.sub(_TEXT, r"\1", text).strip().removesuffix(".").strip()
    text = re.sub(r"\\[dtc]frac\b|\\[dtc]frac(?=[0-9{ ])", r"\\frac", text)
    text = _SHORT_FRACTION.sub(_full_fraction, text)
    text = re.sub(r"\\sqrt\s*([0-9a-z])", r"\\sqrt{\1}", text)
    return re.sub(r",\s*,", ",", _WORDS.sub("", text)).strip().strip(",").strip()


def _full_fraction(match: re.Match[str]) -> str:
    if match[3]:
        return f"\\frac{{{match[3]}}}"
    return f"\\frac{match[4]}{{{match[5]}}}" if match[4] else f"\\frac{{{match[1]}}}{{{match[2]}}}"


def _squeeze(text: str) -> str:
    return re.sub(r"\s|^\+", "", text)


def number(text: str) -> tuple[Fraction, int] | None:
    """Value and number of decimals of a normalised text that is one plain number, fraction or mixed number."""
    bare = text.strip()
    sign = -1 if bare.startswith("-") else 1
    bare = bare.removeprefix("-" if sign < 0 else "+").strip()
    if len(bare) > _MAX_DIGITS:
        return None
    if (found := _NUMBER.fullmatch(bare)) and (found[1] or found[2]):
        return sign * Fraction(bare.replace(",", "")), len(found[2] or "")
    if found := _RATIO.fullmatch(bare):
        whole, over, under = int(found[1] or found[4] or 0), int(found[2] or found[5]), int(found[3] or found[6])
        return (sign * (whole + Fraction(over, under)), 0) if under else None
    return None


def split(text: str) -> tuple[Kind, list[str]]:
    r"""How a normalised answer is built, and its parts: a union, a bracketed tuple, a list or set, or one thing.

    `a \pm b` is a list of two; the thousands of `1,234` are one number.
    """
    if number(text) is not None:
        return "one", [text]
    if len(parts := _split_top(text, ("\\cup",))) > 1:
        return "union", parts
    first, last = text[:1], text[-1:]
    if first in "([" and last in ")]" and _encloses(text):
        items = _split_top(text[1:-1], (",",))
        return (f"{first}{last}", items) if len(items) > 1 else ("one", [text])  # type: ignore[return-value] -- a Kind
    kind: Kind = "list"
    if text.startswith("\\{") and text.endswith("\\}") and _encloses(text):
        kind, text = "set", text[2:-2]
    items = [branch for item in _split_top(text, (",", ";")) for branch in _branches(item)]
    return (kind if len(items) > 1 else "one"), items


def _split_top(text: str, separators: tuple[str, ...]) -> list[str]:
    """Parts between separators that stand outside all brackets."""
    parts, depth = [""], 0
    for token in _TOKEN.findall(text):
        depth += (token in ("(", "[", "{", "\\{")) - (token in (")", "]", "}", "\\}"))
        if depth == 0 and token in separators:
            parts.append("")
        else:
            parts[-1] += token
    return [part.strip() for part in parts]


def _encloses(text: str) -> bool:
    """Whether the bracket that opens the text is closed at its very end."""
    depth = place = 0
    for token in _TOKEN.findall(text):
        depth += (token in ("(", "[", "{", "\\{")) - (token in (")", "]", "}", "\\}"))
        place += len(token)
        if depth == 0:
            return place == len(text)
    return False


def _branches(item: str) -> list[str]:
    if item.count("\\pm") != 1:
        return [item]
    head, _, tail = item.partition("\\pm")
    return [f"{head.strip()}+{tail.strip()}" if head.strip() else tail.strip(), f"{head.strip()}-{tail.strip()}"]


def _same_unordered(golds: list[str], answers: list[str], kind: Kind) -> bool:
    same = same_answer if kind == "union" else _same_one
    left = list(answers)
    for gold in golds:
        place = next((i for i, answer in enumerate(left) if same(gold, answer)), None)
        if place is None:
            return False
        del left[place]
    return True


def _same_one(gold: str, answer: str) -> bool:
    if bool(_LABEL.match(gold)) != bool(_LABEL.match(answer)) and not ("=" in gold and "=" in answer):
        gold, answer = (_LABEL.sub("", text, count=1) for text in (gold, answer))
        if "one" not in (split(gold)[0], split(answer)[0]):
            return same_answer(gold, answer)
    if _squeeze(gold) == _squeeze(answer):
        return True
    exact, said = number(gold), number(answer)
    if exact and said:
        return _same_number(*exact, *said)
    base, of = _BASE.fullmatch(_squeeze(gold)), _BASE.fullmatch(_squeeze(answer))
    if (base and of) or (base and said) or (exact and of):  # math-verify drops the base.
        ours, theirs = (base.groups() if base else (gold, None)), (of.groups() if of else (answer, None))
        return ours[0] == theirs[0] and (ours[1] is None or theirs[1] is None or ours[1] == theirs[1])
    if (word := _word(gold)) is not None:
        return word == _word(answer)
    return _same_symbolic(gold, answer)


def _same_number(gold: Fraction, gold_decimals: int, said: Fraction, decimals: int) -> bool:
    """Equal; or, where one has six decimals or more, equal when the other is rounded to them."""
    places = max(gold_decimals, decimals)
    slack = Fraction(1, 2 * 10**places) if places >= 6 and gold and said else 0
    return abs(gold - said) <= min(slack, abs(gold) / 10**5)


def _word(text: str) -> str | None:
    """A name, a choice letter or a word, for comparison by spelling: products of letters are no words."""
    plain = _squeeze(text)
    choice = re.fullmatch(r"\(?([A-Z])\)?", plain)
    if choice:
        return choice[1]
    return plain.casefold() if re.fullmatch(r"[A-Z]{2}|[A-Za-z]{2}[A-Za-z'.-]+", plain) else None


def _same_symbolic(gold: str, answer: str) -> bool:
    """math-verify's comparison, unless the two differ when they are evaluated."""
    if max(len(gold), len(answer)) > _MAX_PARSED:
        return False
    if len(_WORD.findall(gold)) > 2:  # Prose: math-verify would read the one formula in it.
        return False
    value = _parse(answer)
    if len(value) < 2 or len(exact := _parse(gold)) < 2 or _differ(exact[0], value[0]):
        return False
    if any(isinstance(e[0], Boolean) and not e[0].free_symbols for e in (exact, value)):
        return False  # `1 = 2` and `3 = 4` are both false.
    return verify(list(exact), list(value), timeout_seconds=None)


@lru_cache(maxsize=1024)
def _parse(answer: str) -> tuple[Any, ...]:
    """(expression, text), or (text,) when math-verify cannot read all of it: a part of it is another answer."""
    return tuple(parse(f"\\boxed{{{answer}}}", _TARGETS, extraction_mode="first_match", parsing_timeout=None))  # type: ignore[arg-type] -- None: no alarm


def _differ(gold: object, value: object) -> bool:
    """Whether two expressions are known to differ: 20 digits at a fixed rational point.

    Faster than the simplification that would find it out, and strict where math-verify's rounding to six decimals and
    dropping of small terms would call 2^-98 and 2^-97 equal.
    """
    if not (isinstance(gold, Expr) and isinstance(value, Expr)):
        return False
    if isinstance(gold, Integer) and isinstance(value, Integer):
        return gold != value
    at: dict[Basic, Basic | float] = {
        s: Rational(zlib.crc32(str(s).encode()) % 9973 + 1, 4999) for s in gold.free_symbols | value.free_symbols
    }
    try:
        x, y = (e.doit().evalf(20, subs=at) for e in (gold, value))
        tolerance = Float(1e-6 if gold.has(Float) or value.has(Float) else 1e-9)
        # In sympy's numbers, which know no overflow; what is no number, or nan, has no order and raises.
        return bool(abs(x - y) > tolerance * max(abs(x), abs(y)))
    except (TypeError, ValueError, AttributeError, ArithmeticError):
        return False


def _balanced(answer: str) -> bool:
    """Every brace closed in order, so that the answer cannot break out of the box it is put in."""
    depth = 0
    for brace in re.findall(r"\\.|[{}]", answer):
        depth += {"{": 1, "}": -1}.get(brace, 0)
        if depth < 0:
            return False
    return depth == 0
