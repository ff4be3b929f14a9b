"""Where the answer stands in a completion. Every function takes any text and is linear in its length."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from fractions import Fraction

from headwater.types import Problem, Verdict

_BOX = re.compile(r"\\(?:boxed|fbox)")
_ANSWER = re.compile(r"answer[*_]*[ \t]*(?:is[ \t]*:?|:|=)[*_ \t]*", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\.\s+(?=[A-Z])")
_DOLLARS = re.compile(r"[ \t]*\$+([^$]*[^$\\ \t])\$+(?:[^$0-9\\=]*$)")
_NUMBER = re.compile(
    r"(?<![\w^)])(-?\$?-?)"
    r"(?:([0-9]+) (?=[0-9]+/[0-9]))?"
    r"([0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?:/([0-9]+))?"
)
_FRAC = re.compile(r"(?:([0-9]) ?)?\\[dt]?frac ?(?:\{ ?(-?[0-9]+) ?\} ?\{ ?([0-9]+) ?\}|([0-9])([0-9]))")
_MAX_DIGITS = 60
_MAX_SPELLINGS = 8  # Of one number: 18, 18.0, $18.00. More are different numbers, or noise.
_ROUNDED_DECIMALS = 5


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` (or `\fbox{...}`, `\boxed 5`) with its braces balanced.

    None when there is no box, or when the last one is not closed: an earlier box is no answer then, since the model had
    taken it back.
    """
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    match = _BOX.match(text, start)
    assert match
    rest = re.compile(r"[ \t]*").match(text, match.end())
    assert rest
    if not text.startswith("{", rest.end()):
        word = re.compile(r"[^\s$.,]+").match(text, rest.end())
        return word[0] if word else None
    return _braced(text, rest.end())


def _braced(text: str, start: int) -> str | None:
    """What the brace at `start` encloses; escaped braces do not count."""
    depth = 0
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return text[start + 1 : match.start()].strip()
    return None


def extract_marked(text: str) -> str | None:
    r"""The answer that the text marks as one; "" when its last mark holds none, None when it marks nothing.

    A box goes before GSM8K's `####`, and that before a phrase "answer is ...", "answer: ..." or "answer = ..." (the
    rest of its line). Of several marks of a kind the last counts.
    """
    if _BOX.search(text):
        return last_boxed(text) or ""
    if "####" in text:
        return _clean(text[text.rindex("####") + 4 :].partition("\n")[0])
    end = None
    for phrase in _ANSWER.finditer(text):
        end = phrase.end()
    return None if end is None else _clean(_sentence(text[end:].partition("\n")[0]))


def _sentence(rest: str) -> str:
    """Up to the end of the sentence; an answer in dollar signs with nothing but words after it is what they hold."""
    rest = _SENTENCE_END.split(rest, maxsplit=1)[0]
    maths = _DOLLARS.match(rest)
    return maths[1] if maths else rest


def last_line_maths(text: str) -> str | None:
    """The last line's content when all of the line is one piece of mathematics in delimiters; else None."""
    line = text.rstrip().rpartition("\n")[2].strip().removesuffix(".").strip()
    for left, right in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        inner = line.removeprefix(left).removesuffix(right)
        if len(inner) == len(line) - len(left) - len(right):
            return inner.strip() if inner.strip() and left not in inner else None
    return None


def _clean(answer: str) -> str:
    """Without the emphasis, dollar signs, colons and full stop around it."""
    return answer.strip(" \t\r*_`").removesuffix(".").strip(" \t\r*_`$")


def extract_tagged(text: str) -> str | None:
    r"""The answer of a completion that was asked for `<answer>...</answer>`.

    The last closed pair; without any tag the last box, without a box the last line that is not empty. None when the
    last tag or box is not closed, or nothing is left.
    """
    start = text.rfind("<answer>")
    if start >= 0:
        end = text.find("</answer>", start)
        return text[start + len("<answer>") : end].strip() if end >= 0 else None
    if _BOX.search(text):
        return last_boxed(text)
    return text.strip().rpartition("\n")[2].strip() or None


def last_number(text: str) -> Fraction | None:
    r"""A text's last number, exactly: `1,234.5`, `$-3`, `3/4`, `2 1/2`, `\frac{3}{4}`; units and % are passed over.

    Digits that follow a letter or a caret (`x2`, `m^2`) are no numbers, nor is anything of more than 60 digits.
    """
    return next(_values(reversed(_NUMBER.findall(_plain(text)))), None)


def _plain(text: str) -> str:
    """Numbers as they are typed without LaTeX."""
    text = text.replace("\u2212", "-").replace("\\$", "$").replace("{,}", ",").replace("\\!", "").replace("\\,", "")
    return _FRAC.sub(_plain_fraction, text)


def _values(found: Iterable[tuple[str, ...]]) -> Iterator[Fraction]:
    return (value for groups in found if (value := _value(*groups)) is not None)


def _plain_fraction(match: re.Match[str]) -> str:
    whole = f"{match[1]} " if match[1] else ""
    return f"{whole}{match[2] or match[4]}/{match[3] or match[5]}"


def _value(sign: str, whole: str, number: str, divisor: str) -> Fraction | None:
    if max(len(whole), len(number), len(divisor)) > _MAX_DIGITS or (divisor and int(divisor) == 0):
        return None
    value = Fraction(number.replace(",", "")) / int(divisor or 1) + int(whole or 0)
    return -value if "-" in sign else value


def parse_number(answer: str) -> Fraction | None:
    """The number that an answer states: after the last `=` if it has one, and None unless it is exactly one number."""
    spellings = set(_NUMBER.findall(_plain(answer.rpartition("=")[2])))
    values = set(_values(spellings)) if len(spellings) <= _MAX_SPELLINGS else set()
    return values.pop() if len(values) == 1 else None


def grade_number(completion: str, problem: Problem) -> Verdict:
    """Grade a numeric answer (GSM8K, ASDiv, MAWPS, SVAMP), compared as exact fractions: 3 = 3.0, 1/2 = 0.5, 50% = 50.

    The marked answer counts (see `extract_marked`) and must state one number; without a mark the last number of the
    text counts. A gold answer of five decimals or more was rounded: whatever rounds to it is right. Raises ValueError
    when the problem's answer is not a number.
    """
    gold = parse_number(problem.answer or "")
    if gold is None:
        raise ValueError(f"problem {problem.id} has the answer {problem.answer!r}, which is not one number")
    marked = extract_marked(completion)
    number = last_number(completion) if marked is None else parse_number(marked)
    if number is None:
        return Verdict(False, False, "unparsed", 0.0)
    decimals = len((problem.answer or "").strip().partition(".")[2])
    slack = Fraction(1, 2 * 10**decimals) if decimals >= _ROUNDED_DECIMALS else 0
    right = abs(number - gold) <= slack
    answer = str(gold if right else number)
    return Verdict(right, True, "correct" if right else "wrong", float(right), answer=answer)
