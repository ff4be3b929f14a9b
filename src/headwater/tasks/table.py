"""Problems from rows: JSON lines, Parquet, or a Hugging Face data set."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from headwater.assets import fetch
from headwater.grading.text import last_boxed
from headwater.tasks import check_keys
from headwater.tasks.splits import SPLITS, SplitTask, check_fractions, distinct, split_of, take
from headwater.types import Message, Problem

Row = Mapping[str, Any]

_KEYS = {
    "title",
    "test_source",
    "unlabelled_source",
    "answer_column",
    "answer_pattern",
    "grader",
    "template",
    "system",
    "where",
    "fractions",
    "sizes",
}


def load(kind: str, spec: Row) -> SplitTask:
    """Problems of the rows of `source`, split by the hash of their prompt.

    `source`: a path, `file:PATH` or `wheel:PACKAGE==VERSION/PATH`; for the kind "hub"
    `hf:NAME[@REVISION][/CONFIG]#SPLIT`. `prompt_column`: a column of text or of messages (`[{"role", "content"}]`), or
    a list of text columns to be joined with a space. `answer_column`: without it, or where it is null, a row is an
    unlabelled prompt. `answer_pattern`: a regular expression whose last match (first group) is the answer, or "boxed";
    by default what follows the last `####`, else the whole value. Rows where it finds nothing are left out. `grader`:
    needed with `answer_column`.
    `template` (with `{prompt}`) and `system` make the messages from a text. `where`: column values that a row must
    have. `title`: the task's name. `fractions`, `sizes`: of the splits; `test_source` is all test and takes the other
    rows' place there, `unlabelled_source` holds more prompts, whose answers are dropped.

    A prompt that occurs twice is one problem, and one that is in `test_source` is in no other split; `counts` has the
    numbers. Raises ValueError for unknown or missing keys and columns, unreadable rows, and splits that are too small.
    """
    title = str(spec.get("title", kind))
    check_keys(title, spec, _KEYS, {"source", "prompt_column"})
    _check(title, spec)
    counts = {"rows": 0, "unmatched": 0, "duplicates": 0, "contradictions": 0, "in_test": 0}
    labelled = _read(kind, spec["source"], spec, counts)
    tested = _read(kind, spec["test_source"], spec, counts) if "test_source" in spec else []
    more = _read(kind, spec["unlabelled_source"], {**spec, "answer_column": None}, counts) if _more(spec) else []
    return divide(title, str(spec.get("grader", "")), spec, (labelled, tested, more), counts)


def _more(spec: Row) -> bool:
    return "unlabelled_source" in spec


def _check(title: str, spec: Row) -> None:
    """Raise ValueError for settings that contradict each other."""
    check_splits(title, spec, "test_source")
    if "answer_column" in spec and not spec.get("grader"):
        raise ValueError(f"{title} has answers but no grader; name one, as 'headwater.grading.text:grade_number'")
    if "{prompt}" not in spec.get("template", "{prompt}"):
        raise ValueError(f"{title}: the template {spec['template']!r} has no {{prompt}} in it")
    try:
        re.compile(spec.get("answer_pattern", ""))
    except re.error as error:
        raise ValueError(
            f"{title}: answer_pattern {spec['answer_pattern']!r} is no regular expression: {error}"
        ) from error


def check_splits(title: str, spec: Row, tested: str) -> None:
    """Raise ValueError for bad `fractions` or `sizes`; `tested` is the key whose problems are the whole test split."""
    fractions, sizes = spec.get("fractions", {}), spec.get("sizes", {})
    check_fractions(fractions)
    if not sizes.keys() <= set(SPLITS):
        raise ValueError(f"{title}: sizes are those of {list(SPLITS)}, not {dict(sizes)}")
    if tested in spec and fractions.get("test"):
        raise ValueError(f"{title}: {tested} is the whole test split; take 'test' out of the fractions")


def divide(
    title: str,
    grader: str,
    spec: Row,
    found: tuple[list[Problem], list[Problem], list[Problem]],
    counts: dict[str, int],
) -> SplitTask:
    """Problems (labelled, of the test, more prompts) by `fractions` and `sizes`; `counts` is filled in.

    Every distinct prompt is in one split; one without an answer can only be unlabelled.
    """
    labelled, tested, more = found
    default = {"train": 0.9, "tuning": 0.1} if tested else {"train": 0.7, "tuning": 0.1, "test": 0.2}
    fractions, sizes = spec.get("fractions", default), spec.get("sizes", {})
    test, repeats = distinct(tested)
    rest, more_repeats = distinct([*labelled, *more])
    in_test = {problem.id for problem in test}
    splits: dict[str, list[Problem]] = {split: [] for split in SPLITS}
    splits["test"] += test
    for problem in rest:
        if problem.id not in in_test:
            split = split_of(problem, fractions) if problem.answer is not None else "unlabelled"
            splits[split or "unlabelled"] += [problem] if split else []
    counts["duplicates"] = repeats + more_repeats
    answers = {(problem.id, problem.answer) for problem in [*tested, *labelled] if problem.answer is not None}
    counts["contradictions"] = len(answers) - len({name for name, _ in answers})
    counts["in_test"] = sum(problem.id in in_test for problem in rest)
    sized = {split: take(title, split, splits[split], sizes.get(split)) for split in SPLITS}
    return SplitTask(title, grader, sized, counts)


def _read(kind: str, source: object, spec: Row, counts: dict[str, int]) -> list[Problem]:
    where = spec.get("where", {})
    problems = []
    for number, row in enumerate(_rows(kind, str(source)), 1):
        _need(row, [*where, *_prompt_columns(spec)], f"row {number} of {source}")
        if any(row[column] != value for column, value in where.items()):
            continue
        counts["rows"] += 1
        problem = _problem(row, spec, f"row {number} of {source}")
        counts["unmatched"] += problem is None
        problems += [problem] if problem else []
    if not problems:
        raise ValueError(f"{source} holds no problem" + (f" with {dict(where)}" if where else ""))
    return problems


def _prompt_columns(spec: Row) -> list[str]:
    column = spec["prompt_column"]
    return [column] if isinstance(column, str) else list(column)


def _need(row: Row, columns: Iterable[str], place: str) -> None:
    if missing := [column for column in columns if column not in row]:
        raise ValueError(f"{place} has no column {missing}; it has {sorted(row)}")


def _problem(row: Row, spec: Row, place: str) -> Problem | None:
    """The problem of a row, or None when its answer does not match the pattern."""
    answer = None
    if column := spec.get("answer_column"):
        _need(row, [column], place)
        if row[column] is not None:
            answer = _answer(row[column], spec.get("answer_pattern"))
            if answer is None:
                return None
    prompts = _prompt_columns(spec)
    columns = {name: value for name, value in row.items() if name not in prompts}
    return Problem(_messages([row[name] for name in prompts], spec, place), answer, columns)


def _answer(value: object, pattern: str | None) -> str | None:
    text = value if isinstance(value, str) else json.dumps(value)
    if pattern is None:
        return text.rpartition("####")[2].strip()
    if pattern == "boxed":
        return last_boxed(text) or None
    found = [match[match.re.groups and 1] for match in re.finditer(pattern, text)]
    return found[-1].strip() if found and found[-1] is not None else None


def _messages(prompts: list[object], spec: Row, place: str) -> tuple[Message, ...]:
    system = (Message("system", spec["system"]),) if spec.get("system") else ()
    match prompts:
        case [[*turns]]:
            if "template" in spec or (system and any(_is_turn(t) and t["role"] == "system" for t in turns)):
                raise ValueError(f"{place} has a conversation, to which the template or system text cannot be applied")
            if not turns or not all(map(_is_turn, turns)):
                raise ValueError(
                    f"{place}: a conversation is a list of {{'role', 'content'}} texts, not {turns!r:.200}"
                )
            return (*system, *(Message(turn["role"], turn["content"]) for turn in turns))  # type: ignore[index] -- checked
        case _ if all(isinstance(prompt, str) for prompt in prompts):
            text = " ".join(str(prompt) for prompt in prompts)
            return (*system, Message("user", spec.get("template", "{prompt}").replace("{prompt}", text)))
    raise ValueError(f"{place}: a prompt is a text or a list of messages, not {prompts!r:.200}")


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, Mapping) and all(isinstance(turn.get(key), str) for key in ("role", "content"))


def _rows(kind: str, source: str) -> Iterator[Row]:
    match kind:
        case "hub":
            rows = _hub_rows(source)
        case "parquet":
            rows = _parquet_rows(_path(source))
        case _:
            return _json_rows(_path(source))
    # Dates and the like have no JSON form and would not reach a grader.
    return (json.loads(json.dumps(row, default=str)) for row in rows)


def _path(source: str) -> Path:
    path = fetch(source)
    if not path.is_file():
        raise ValueError(f"{source} is a folder; name a file")
    return path


def _json_rows(path: Path) -> Iterator[Row]:
    for number, line in enumerate(path.read_text("utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number} of {path} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"line {number} of {path} is not a JSON object but {line[:80]!r}")
        yield row


def _parquet_rows(path: Path) -> list[Row]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError("Parquet needs the extra 'parquet': pip install 'headwater[parquet]'") from error
    return pyarrow.parquet.read_table(path).to_pylist()


def _hub_rows(source: str) -> Iterable[Row]:
    found = re.fullmatch(r"hf:([^/#@]+(?:/[^/#@]+)?)(?:@([^/#@]+))?(?:/([^/#]+))?#([^#]+)", source)
    if not found:
        raise ValueError(f"{source!r} does not name a data set; write 'hf:OWNER/NAME[@REVISION][/CONFIG]#SPLIT'")
    try:
        import datasets  # type: ignore[import-not-found] -- an extra
    except ImportError as error:
        raise ValueError("a Hub data set needs the extra 'hub': pip install 'headwater[hub]'") from error
    return datasets.load_dataset(found[1], found[3], split=found[4], revision=found[2])
