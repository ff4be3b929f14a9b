"""Can reward teach here? The share of groups in which some completions are right and some are wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import comb


def estimated_mixed_rate(num_samples: int, num_correct: int, group_size: int) -> float:
    """Unbiased estimate of U_G(p) = 1 - p^G - (1 - p)^G, the probability that a group of G is mixed, from k samples of
    one problem: the share of its subsets of G that are.

    Raises ValueError unless 0 <= num_correct <= num_samples and 2 <= group_size <= num_samples: plugging the observed
    pass rate into U_G would be biased.
    """
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"num_correct must be within 0..{num_samples}, given {num_correct}")
    if not 2 <= group_size <= num_samples:
        raise ValueError(f"groups of {group_size} need 2 <= group_size <= samples, given {num_samples} samples")
    return mixed_share([1.0] * num_correct + [0.0] * (num_samples - num_correct), group_size)


def mixed_share(scores: Sequence[float], group_size: int) -> float:
    """Share of the subsets of `group_size` scores that are not all equal: the same estimate for partial credit."""
    same = sum(comb(count, group_size) for count in Counter(scores).values())
    return 1.0 - same / comb(len(scores), group_size)
