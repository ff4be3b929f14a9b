"""One grading process: `python -m headwater.grading.child GRADER MEMORY_MB PARENT_PID`.

Requests come in on standard input and verdicts leave on what was standard output, in order, one line each. The grader
itself sees neither: its standard streams are the null device, so nothing it prints or reads can touch the protocol.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import importlib
import importlib.util
import inspect
import math
import numbers
import os
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from headwater.grading import wire
from headwater.types import Problem, Verdict

Grader = Callable[[str, Problem], object]
_PR_SET_PDEATHSIG = 1
_MAX_ANSWER = 1000  # Characters: it is kept with every sample, and what a model marks may be its whole text.


def split_spec(spec: str) -> tuple[str, str, str]:
    """(`""` | `"trl"` | `"trl-text"`, module or file, function) of a grader's name; ValueError when it is not one."""
    style, _, rest = spec.partition(":") if spec.startswith(("trl:", "trl-text:")) else ("", "", spec)
    place, _, function = rest.rpartition(":")
    if not place or not function.isidentifier():
        raise ValueError(
            f"{spec!r} does not name a grader; write 'package.module:function' or 'path/file.py:function', "
            "with 'trl:' or 'trl-text:' in front for a reward function in TRL's signature"
        )
    return style, place, function


def load_grader(spec: str) -> Grader:
    """Import a grader. Raises what the import raises, AttributeError for a missing function."""
    style, place, name = split_spec(spec)
    module = _import_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    function = getattr(module, name)
    return _from_trl(function, as_messages=style == "trl") if style else function


def _import_file(path: Path) -> ModuleType:
    """A user's file as a module, its folder importable as it is when Python runs the file."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path} in {Path.cwd()}")
    sys.path.insert(0, str(path.resolve().parent))
    spec = importlib.util.spec_from_file_location(f"_grader_{path.stem}", path)
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _from_trl(function: Callable[..., object], *, as_messages: bool) -> Grader:
    """A reward function `(prompts, completions, **columns) -> list[float | None]`, sync or async, as a grader.

    It is called with lists of length one, so that a timeout costs one completion; a function that compares completions
    of a batch with each other cannot work here. None counts as score 0, reason "unparsed".
    """

    def grade(completion: str, problem: Problem) -> object:
        prompt = [{"role": m.role, "content": m.content} for m in problem.messages]
        text_prompt = "\n".join(m.content for m in problem.messages)
        # The source row, and `answer` where it has none.
        columns = {name: [value] for name, value in {"answer": problem.answer, **problem.columns}.items()}
        rewards = function(
            prompts=[prompt if as_messages else text_prompt],
            completions=[[{"role": "assistant", "content": completion}] if as_messages else completion],
            **columns,
        )
        rewards = asyncio.run(rewards) if inspect.iscoroutine(rewards) else rewards
        (reward,) = rewards  # type: ignore[misc] -- whatever a user returned; a wrong shape is the caught error
        return Verdict(False, False, "unparsed", 0.0) if reward is None else reward

    return grade


def to_verdict(result: object) -> Verdict:
    """A grader's result as a verdict: a Verdict, a bool, or a number of which 1 and more is fully right.

    Raises TypeError for anything else and ValueError for a score that is not finite.
    """
    if isinstance(result, bool):
        result = float(result)
    if isinstance(result, numbers.Real):
        score = float(result)
        reason = "correct" if score >= 1 else "partial" if score > 0 else "wrong"
        result = Verdict(score >= 1, True, reason, score)
    if not isinstance(result, Verdict):
        raise TypeError(f"a grader returns a Verdict, bool or number, not {type(result).__name__}")
    if not math.isfinite(result.score):
        raise ValueError(f"a score must be finite, not {result.score}")
    return replace(result, answer=result.answer and result.answer[:_MAX_ANSWER])


def judge(grader: Grader, line: bytes) -> tuple[Verdict, str]:
    """Grade one request; whatever the grader raises becomes a verdict and a note."""
    try:
        return to_verdict(grader(*wire.decode_item(line))), ""
    except MemoryError:
        return Verdict(False, False, "memory", 0.0), "MemoryError"
    except (Exception, SystemExit) as error:
        return Verdict(False, False, "error", 0.0), _describe(error)


def _describe(error: BaseException) -> str:
    """Type and message, cut to what a log can hold; a message that cannot be printed is left out."""
    with contextlib.suppress(Exception):
        return f"{type(error).__name__}: {error}"[:500].replace("\n", " ")
    return type(error).__name__


def _confine(memory_mb: int, parent: int) -> None:
    """Bound the memory, leave no core files, die with the parent."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    die_with(parent)


def die_with(parent: int) -> None:
    """Have the kernel kill this process as soon as its parent, the process of this id, is gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # It died before we could ask to be told.
        os._exit(1)


def _take_pipes() -> tuple[int, int]:
    """Move the protocol to descriptors of its own and put the null device in place of the standard streams."""
    pipes = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    return pipes


def main(spec: str, memory_mb: str, parent: str) -> None:
    """Load the grader, say so, then answer one line with one line until the input ends."""
    _confine(int(memory_mb), int(parent))
    requests, replies = _take_pipes()
    try:
        grader = load_grader(spec)
    except (Exception, SystemExit) as error:
        os.write(replies, wire.ready_line(_describe(error)))
        return
    os.write(replies, wire.ready_line())
    for line in os.fdopen(requests, "rb"):
        os.write(replies, wire.encode_verdict(*judge(grader, line)))


if __name__ == "__main__":
    main(*sys.argv[1:])
