"""Problems that stand in the training data and in an evaluation: in the same words, or with other numbers only."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal

from headwater.types import Problem

Kind = Literal["words", "numbers"]
NGRAMS: dict[Kind, int] = {"words": 8, "numbers": 3}
"""Words of a shingle. Eight in a row are rarely equal by chance; three, with numbers masked, tell order enough."""
_WORD = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]+|[^\w\s.,;:!?'\"]")


@dataclass(frozen=True)
class Overlap:
    """A training problem and the evaluation problem most like it, by their ids.

    `words`: the share of the evaluation problem's 8-grams that the training problem has (containment). `numbers`: the
    Jaccard index of their 3-grams when every number reads alike, so 1 for problems that differ in numbers only.
    """

    train: str
    test: str
    kind: Kind
    score: float


def overlaps(train: Sequence[Problem], test: Sequence[Problem], threshold: float) -> dict[Kind, list[Overlap]]:
    """Of each kind, every training problem with a score of at least `threshold`, the most alike first.

    Exact, and no comparison of all pairs: two texts as alike as that share one of the `(1 - threshold)` rarest shingles
    of the evaluation problem (prefix filtering; Chaudhuri et al. 2006), and only such pairs are compared. Lines that
    all problems of a side have in common (instructions, worked examples) are left out. Raises ValueError unless
    0 < threshold <= 1.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"the threshold of overlap is a share in (0, 1], not {threshold}")
    sides = _texts(train), _texts(test)
    return {kind: _find(*sides, kind, threshold) for kind in NGRAMS}


def _find(train: Mapping[str, str], test: Mapping[str, str], kind: Kind, threshold: float) -> list[Overlap]:
    theirs, ours = ({place: _shingles(text, kind) for place, text in side.items()} for side in (train, test))
    frequency = Counter(shingle for side in (theirs, ours) for shingles in side.values() for shingle in shingles)
    index: dict[str, list[str]] = defaultdict(list)
    for place, shingles in ours.items():
        rarest = sorted(shingles, key=lambda shingle: (frequency[shingle], shingle))
        # Less than a shingle below: 0.7 * 10 is a little more than 7.
        for shingle in rarest[: len(rarest) - ceil(threshold * len(rarest) - 1e-9) + 1]:
            index[shingle].append(place)
    found = []
    for place, shingles in theirs.items():
        near = {other for shingle in shingles if shingle in index for other in index[shingle]}
        scored = [(_score(shingles, ours[other], kind), other) for other in near]
        if scored and (best := max(scored))[0] >= threshold:
            found.append(Overlap(place, best[1], kind, best[0]))
    return sorted(found, key=lambda overlap: (-overlap.score, overlap.train))


def _score(train: frozenset[str], test: frozenset[str], kind: Kind) -> float:
    return len(train & test) / len(test if kind == "words" else train | test)


def _shingles(text: str, kind: Kind) -> frozenset[str]:
    words = _WORD.findall(text.lower())
    if kind == "numbers":
        words = ["#" if word[0].isdigit() else word for word in words]
    size = NGRAMS[kind]
    return frozenset(" ".join(words[i : i + size]) for i in range(max(1, len(words) - size + 1)))


def _texts(problems: Sequence[Problem]) -> dict[str, str]:
    """What each problem asks, by id, without the lines that all have."""
    lines = {problem.id: problem.messages[-1].content.splitlines() for problem in problems}
    shared = set.intersection(*map(set, lines.values())) if len(lines) > 1 else set()
    return {place: "\n".join(line for line in own if line not in shared) for place, own in lines.items()}
