"""Which problem belongs to which split, by content alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from headwater.types import Problem

# In this order the shares are laid out, so that changing how much is trained on never moves a problem out of the test.
SPLITS = ("test", "tuning", "train", "unlabelled")
_BUCKETS = 10_000


@dataclass(frozen=True)
class SplitTask:
    """A task whose problems are at hand. `counts` tells what was read and what was left out, and why."""

    name: str
    grader: str
    splits: Mapping[str, tuple[Problem, ...]]
    counts: Mapping[str, int] = field(default_factory=dict)

    def problems(self, split: str) -> tuple[Problem, ...]:
        """The problems of a split; those of "unlabelled" carry no answer. ValueError for an unknown split."""
        if split not in self.splits:
            raise ValueError(f"{self.name} has no split {split!r}; choose one of {sorted(self.splits)}")
        return self.splits[split]


def check_fractions(fractions: Mapping[str, float]) -> None:
    """Raise ValueError unless the keys are splits and the values shares that sum to at most 1."""
    if (
        not fractions.keys() <= set(SPLITS)
        or min(fractions.values(), default=0) < 0
        or sum(fractions.values()) > 1.0001
    ):
        raise ValueError(f"fractions are shares >= 0 of {list(SPLITS)} with a sum of at most 1, not {dict(fractions)}")


def split_of(problem: Problem, fractions: Mapping[str, float]) -> str | None:
    """The split that the hash of the problem's prompt falls into; None for what the fractions leave over."""
    bucket, bound = int(problem.id, 16) % _BUCKETS, 0.0
    for split in SPLITS:
        bound += fractions.get(split, 0.0)
        if bucket < round(bound * _BUCKETS):
            return split
    return None


def distinct(problems: Iterable[Problem]) -> tuple[list[Problem], int]:
    """The problems with different prompts, in order, and how many repeated one; a labelled repeat takes the place."""
    found: dict[str, Problem] = {}
    repeats = 0
    for problem in problems:
        earlier = found.setdefault(problem.id, problem)
        repeats += earlier is not problem
        if earlier.answer is None and problem.answer is not None:
            found[problem.id] = problem
    return list(found.values()), repeats


def take(name: str, split: str, problems: Sequence[Problem], size: int | None) -> tuple[Problem, ...]:
    """The `size` problems of smallest id (all for None): position in the file has no say, and sizes are nested.

    Raises ValueError when there are fewer.
    """
    if size is not None and not 0 <= size <= len(problems):
        raise ValueError(
            f"{name}: split {split!r} has {len(problems)} problems and its size is given as {size}; "
            "ask for fewer, or change the fractions"
        )
    chosen = sorted(problems, key=lambda problem: problem.id)[:size]
    return tuple(problem.unlabelled() if split == "unlabelled" else problem for problem in chosen)


def check_disjoint(train: Sequence[Problem], test: Sequence[Problem]) -> None:
    """Raise ValueError, with the number and an example, when a prompt occurs in both."""
    tested = {problem.id for problem in test}
    if shared := {problem.id: problem for problem in train if problem.id in tested}:
        example = next(iter(shared.values()))
        raise ValueError(
            f"{len(shared)} of {len(train)} training prompts are also test prompts, for example {example.id} "
            f"({example.messages[-1].content[:80]!r}); remove them from one side, or set pool.exclude_overlap"
        )
