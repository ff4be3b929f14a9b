"""What travels between a grading parent and its child: one JSON document a line, any text included."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import get_args

from headwater.types import Message, Problem, Reason, Verdict

REASONS: tuple[str, ...] = get_args(Reason)


def encode(value: object) -> bytes:
    """One line of JSON. Lone surrogates pass through as they are, so what is decoded equals what was sent."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass") + b"\n"


def decode(line: bytes) -> object:
    """The value of one line; ValueError when it is not JSON."""
    return json.loads(line.decode("utf-8", "surrogatepass"))


def encode_item(completion: str, problem: Problem) -> bytes:
    """A request line. Raises ValueError when a column of the problem is not a JSON value."""
    messages = [[m.role, m.content] for m in problem.messages]
    try:
        return encode([completion, messages, problem.answer, dict(problem.columns)])
    except TypeError as error:
        raise ValueError(
            f"problem {problem.id} has a column that cannot travel to a grader ({error}); "
            f"columns may hold JSON values only, and its columns are {sorted(map(str, problem.columns))}"
        ) from error


def decode_item(line: bytes) -> tuple[str, Problem]:
    """The completion and the problem of a request line."""
    completion, messages, answer, columns = decode(line)  # type: ignore[misc] -- our own encoding
    return completion, Problem(tuple(Message(*m) for m in messages), answer, columns)


def encode_verdict(verdict: Verdict, note: str = "") -> bytes:
    """A reply line: the verdict and, for an error, what the grader said."""
    return encode([asdict(verdict), note])


def decode_verdict(line: bytes) -> tuple[Verdict, str]:
    """Verdict and note of a reply line; ValueError when it is anything else than `encode_verdict` writes."""
    match decode(line):
        case [
            {
                "correct": bool(c),
                "parsed": bool(p),
                "reason": str(r),
                "score": int() | float() as s,
                "style": None | str() as t,
                "answer": None | str() as a,
            },
            str(note),
        ] if r in REASONS and math.isfinite(s):
            return Verdict(c, p, r, float(s), t, a), note  # type: ignore[arg-type] -- matched
    raise ValueError(f"not a verdict: {line[:80]!r}")


def ready_line(error: str = "") -> bytes:
    """The first line a child writes: `error` says why its grader could not be loaded, empty when it could."""
    return encode({"ready": not error, "error": error})


def ready_error(line: bytes) -> str:
    """The error of a `ready_line`; ValueError when the line is none."""
    match decode(line):
        case {"ready": bool(), "error": str(error)}:
            return error
    raise ValueError(f"not a greeting: {line[:80]!r}")
