"""Rewards of a group of rollouts to advantages."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

STD_EPS = 1e-6


def group_advantages(
    rewards: Float[Tensor, "problems group"], *, normalise: Literal["std", "mean"] = "std"
) -> Float[Tensor, "problems group"]:
    """Each reward less its group's mean, and with "std" divided by the group's standard deviation plus 1e-6.

    "std" is GRPO (arXiv:2402.03300, section 4.1.2) with the sample deviation (divisor group - 1), as TRL and verl
    compute it; the 1e-6 is verl's (TRL adds 1e-4). "mean" is Dr. GRPO (arXiv:2503.20783, section 3). A group whose
    rewards are all equal gets exactly 0, whatever rounding makes of its mean.
    Raises ValueError for groups of one, which have nothing to be compared with, and for rewards that are not finite.
    """
    if rewards.shape[1] < 2:
        raise ValueError(
            f"group advantages need at least 2 rollouts per problem, got {rewards.shape[1]}; raise group_size"
        )
    if not torch.isfinite(rewards).all():
        raise ValueError(
            "rewards must be finite; give an ungraded rollout a number (0 counts as wrong) or drop its group"
        )
    values = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    centred = values - values.mean(1, keepdim=True)
    scale = values.std(1, keepdim=True) + STD_EPS if normalise == "std" else 1.0
    alive = values.amax(1, keepdim=True) > values.amin(1, keepdim=True)
    return torch.where(alive, centred / scale, 0.0)
