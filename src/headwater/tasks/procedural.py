"""reasoning-gym's procedural data sets (github.com/open-thought/reasoning-gym), any of them by name."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from headwater.grading.text import extract_tagged
from headwater.tasks import check_keys
from headwater.tasks.splits import SPLITS, SplitTask, check_fractions, split_of
from headwater.types import Message, Problem, Verdict

_SIZES = {"train": 1024, "tuning": 128, "test": 256}
_FRACTIONS = {"test": 0.2, "tuning": 0.1, "train": 0.5, "unlabelled": 0.2}
_DRAWS_PER_PROBLEM = 16
# Found in 0.1.25 by grading wrong answers with every data set: what earns this reward is not the task.
_UNSOUND = {
    "game_of_life_halting": "its scorer takes every answer that is not empty for True",
    "coin_flip": "its scorer gives 1 to a prefix of the right probability, as '0'",
    "puzzle24": "its scorer does not look whether the puzzle's numbers were used",
    "composite": "it mixes data sets; name the one you want",
}


def load(data_set: str, spec: Mapping[str, Any]) -> SplitTask:
    """Draw problems until every split has its size; the hash of the prompt decides the split, never seed or index.

    Keys, all optional: `seed` (0), `config` (the data set's own settings), `sizes` and `fractions` of the splits,
    `system`, `template` (with `{prompt}`), `partial_credit` (False: a score below 1 counts as 0).

    Two seeds may draw the same prompts (seed 43 gives what seed 42 gives, shifted by one), yet no prompt can be in
    different splits of the two. Answers of several lines need the `<answer>` tags; say so in `system` or `template`. A
    data set that grades every valid solution has no gold answer; its problems have "".
    Raises ValueError for an unknown data set or setting, and when too few distinct problems turn up.
    """
    check_keys(
        f"reasoning-gym:{data_set}",
        spec,
        {"seed", "config", "sizes", "fractions", "system", "template", "partial_credit"},
    )
    if data_set in _UNSOUND:
        raise ValueError(f"reasoning-gym:{data_set} cannot be used: {_UNSOUND[data_set]}")
    sizes, fractions = {**_SIZES, **spec.get("sizes", {})}, spec.get("fractions", _FRACTIONS)
    check_fractions(fractions)
    if not sizes.keys() <= set(SPLITS) or "{prompt}" not in spec.get("template", "{prompt}"):
        raise ValueError(f"sizes are those of {list(SPLITS)}, not {sizes}; a template contains {{prompt}}")
    splits, counts = _draw(data_set, spec, {k: n for k, n in sizes.items() if n}, fractions)
    grader = "grade_partial" if spec.get("partial_credit", False) else "grade"
    return SplitTask(f"reasoning-gym:{data_set}", f"headwater.tasks.procedural:{grader}", splits, counts)


def _draw(
    data_set: str, spec: Mapping[str, Any], sizes: Mapping[str, int], fractions: Mapping[str, float]
) -> tuple[dict[str, tuple[Problem, ...]], dict[str, int]]:
    config = spec.get("config", {})
    limit = max(1024, _DRAWS_PER_PROBLEM * sum(sizes.values()))
    entries = _create(data_set, json.dumps({**config, "seed": spec.get("seed", 0), "size": limit}))
    splits: dict[str, dict[str, Problem]] = {split: {} for split in sizes}
    repeats = 0
    for index in range(limit):
        if all(len(splits[split]) >= size for split, size in sizes.items()):
            break
        problem = _problem(data_set, config, entries[index], spec)
        split = split_of(problem, fractions)
        if split in splits and len(splits[split]) < sizes[split]:
            repeats += problem.id in splits[split]
            splits[split].setdefault(problem.id, problem.unlabelled() if split == "unlabelled" else problem)
    else:
        found = {split: len(problems) for split, problems in splits.items()}
        raise ValueError(
            f"{limit} draws from reasoning-gym:{data_set} gave {found} distinct problems of {dict(sizes)}; "
            "ask for fewer, or set a config with more variety"
        )
    return {split: tuple(problems.values()) for split, problems in splits.items()}, {"duplicates": repeats}


def _problem(data_set: str, config: Mapping[str, Any], entry: Mapping[str, Any], spec: Mapping[str, Any]) -> Problem:
    text = spec.get("template", "{prompt}").replace("{prompt}", entry["question"])
    system = (Message("system", spec["system"]),) if spec.get("system") else ()
    columns = {"data_set": data_set, "config": dict(config), "entry": _pack(dict(entry))}
    return Problem((*system, Message("user", text)), entry["answer"] or "", columns)


def grade(completion: str, problem: Problem) -> Verdict:
    """Right only for the data set's full score of 1; the answer is taken as `text.extract_tagged` says."""
    return _grade(completion, problem, partial=False)


def grade_partial(completion: str, problem: Problem) -> Verdict:
    """As `grade`, but the score is the data set's own, which may reward a wrong answer with a fraction."""
    return _grade(completion, problem, partial=True)


def _grade(completion: str, problem: Problem, *, partial: bool) -> Verdict:
    answer = extract_tagged(completion)
    if answer is None or (score := _score(answer, problem)) is None:
        return Verdict(False, False, "unparsed", 0.0)
    right = score >= 1
    score = score if partial else float(right)
    reason = "correct" if right else "partial" if score > 0 else "wrong"
    return Verdict(right, True, reason, score, answer=" ".join(answer.split()))


def _score(answer: str, problem: Problem) -> float | None:
    columns: Mapping[str, Any] = problem.columns
    scorer = _create(columns["data_set"], json.dumps(columns["config"], sort_keys=True))
    try:
        return float(scorer.score_answer(answer, _unpack(columns["entry"])))
    except ValueError:  # Some scorers convert the answer before they look whether it has the right form.
        return None


@functools.lru_cache(maxsize=8)
def _create(data_set: str, config: str) -> Any:
    """The data set with these settings (JSON); ValueError when it does not exist or refuses them."""
    import reasoning_gym  # Seconds: only when one of its tasks is used.
    from reasoning_gym.factory import DATASETS

    if data_set not in DATASETS:
        raise ValueError(f"reasoning-gym has no data set {data_set!r}; it has {', '.join(sorted(DATASETS))}")
    try:
        return reasoning_gym.create_dataset(data_set, **json.loads(config))
    except (TypeError, AssertionError, ValueError) as error:
        raise ValueError(f"reasoning-gym:{data_set} refuses the config {config}: {error}") from error


def _pack(value: Any) -> Any:
    """As JSON values. Tuples, fractions and keys that are no strings are marked, since scorers tell them apart; what
    else JSON lacks goes as text."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case tuple():
            return {"__tuple__": [_pack(item) for item in value]}
        case list():
            return [_pack(item) for item in value]
        case dict() if all(isinstance(key, str) for key in value):
            return {key: _pack(item) for key, item in value.items()}
        case dict():
            return {"__items__": [[_pack(key), _pack(item)] for key, item in value.items()]}
        case Fraction():
            return {"__fraction__": str(value)}
    return str(value)


def _unpack(value: Any) -> Any:
    match value:
        case {"__tuple__": items}:
            return tuple(_unpack(item) for item in items)
        case {"__items__": items}:
            return {_unpack(key): _unpack(item) for key, item in items}
        case {"__fraction__": text}:
            return Fraction(text)
        case dict():
            return {key: _unpack(item) for key, item in value.items()}
        case list():
            return [_unpack(item) for item in value]
    return value
