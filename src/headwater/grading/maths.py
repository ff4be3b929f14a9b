"""Grade mathematical answers by their value, through math-verify.

Only for a grading child: math-verify's own timeouts are signal alarms, which are switched off here, since the pool
kills a child whose time is up.
"""

from __future__ import annotations

import logging
import re

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from headwater.grading.text import extract_marked, last_number
from headwater.types import Problem, Verdict

logging.getLogger("math_verify").setLevel(logging.ERROR)

_TARGETS = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
_SPACING = re.compile(r"\\left|\\right|\\[!,;: ]|\s|\$|\\\(|\\\)")
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mbox)\{([^{}]*)\}")


def grade_maths(completion: str, problem: Problem) -> Verdict:
    """Right when the marked answer (see `text.extract_marked`), else the last number, has the value of the gold answer.

    Equal spellings are equal; all else is decided by math-verify's symbolic comparison. A gold answer that it cannot
    read is matched by spelling only. Raises ValueError when the problem has no answer.
    """
    if not problem.answer:
        raise ValueError(f"problem {problem.id} has no answer to grade against; grade labelled problems only")
    answer = extract_marked(completion)
    if answer is None:
        number = last_number(completion)
        answer = "" if number is None else str(number)
    gold, answer = _trim(problem.answer), _trim(answer)
    if not answer or not _balanced(answer):
        return Verdict(False, False, "unparsed", 0.0)
    if _spelling(answer) == _spelling(gold):
        return Verdict(True, True, "correct", 1.0)
    value = _parse(answer)
    right = bool(value) and verify(_parse(gold), value, timeout_seconds=None)
    parsed = bool(value) or bool(_spelling(answer))
    return Verdict(right, parsed, "correct" if right else "wrong", float(right))


def _parse(answer: str) -> list:
    return parse(f"\\boxed{{{answer}}}", _TARGETS, parsing_timeout=None)  # type: ignore[arg-type] -- None: no alarm


def _trim(answer: str) -> str:
    """Without the delimiters of mathematics and the full stop around it."""
    answer = answer.strip().removesuffix(".").strip()
    for left, right in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        if len(answer) > len(left) + len(right) and answer.startswith(left) and answer.endswith(right):
            return answer[len(left) : -len(right)].strip()
    return answer


def _balanced(answer: str) -> bool:
    """Every brace closed in order, so that the answer cannot break out of the box it is put in."""
    depth = 0
    for brace in re.findall(r"\\.|[{}]", answer):
        depth += {"{": 1, "}": -1}.get(brace, 0)
        if depth < 0:
            return False
    return depth == 0


def _spelling(answer: str) -> str:
    """The answer without spacing, text wrappers, fraction sizes, and the brackets of a choice letter."""
    plain = _SPACING.sub("", _TEXT.sub(r"\1", answer)).replace("dfrac", "frac").replace("tfrac", "frac")
    choice = re.fullmatch(r"\(([A-Z])\)", plain)
    return choice[1] if choice else plain
