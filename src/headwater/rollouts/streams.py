"""Counter-based random numbers: one per sampled token, a function of where the token stands and of nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def key(*parts: object) -> int:
    """64-bit key of a stream named by these values, such as ("grpo", seed, step, problem, index)."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def uniforms(keys: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Uniform numbers in [0, 1) with 53 random bits, one per (key, position) pair: splitmix64 (Steele et al., 2014)."""
    with np.errstate(over="ignore"):
        z = keys.astype(np.uint64) + (positions.astype(np.uint64) + np.uint64(1)) * _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


def epoch_order(items: Sequence[T], start: int, count: int, *stream: object) -> list[T]:
    """Items `start` to `start + count` of an endless sequence of epochs, each a fresh permutation of `items`.

    A function of its arguments, so a resumed run draws what the uninterrupted one would have drawn.
    """
    drawn: list[T] = []
    while len(drawn) < count:
        epoch, offset = divmod(start + len(drawn), len(items))
        order = np.argsort([key(*stream, epoch, i) for i in range(len(items))], kind="stable")
        drawn += [items[i] for i in order[offset : offset + count - len(drawn)]]
    return drawn
