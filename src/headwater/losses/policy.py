"""Losses on the log-probs of sampled tokens. All tensors are flat over loss tokens; see the legend in the package."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headwater.losses.numerics import LOGPROB_FLOOR, Loss, Metrics, accurate_dtype, mean_metric, where_member

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +-20, as verl does: beyond it exp overflows and a clipped token's 0 * inf gives NaN."""


def clipped_policy_gradient(
    policy_logprobs: Float[Tensor, " tokens"],
    advantages: Float[Tensor, " tokens"],
    weights: Float[Tensor, " tokens"],
    *,
    sequence_ids: Int[Tensor, " tokens"],
    num_sequences: int,
    old_logprobs: Float[Tensor, " tokens"] | None = None,
    sampler_logprobs: Float[Tensor, " tokens"] | None = None,
    ratio: Literal["token", "sequence"] = "token",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    sampler_weight_cap: float | None = 2.0,
) -> Loss:
    """Weighted sum of -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), r = policy / old (arXiv:1707.06347, eq. 7).

    | method | advantages | ratio | clip_low, clip_high | aggregate | paper |
    |---|---|---|---|---|---|
    | GRPO | std | token | 0.2, 0.2 | sequence | arXiv:2402.03300 |
    | DAPO | std | token | 0.2, 0.28 | token | arXiv:2503.14476 |
    | Dr. GRPO | mean | token | 0.2, 0.2 | constant | arXiv:2503.20783 |
    | GSPO | std | sequence | 3e-4, 4e-4 | sequence | arXiv:2507.18071 |

    `old_logprobs` are the trained model's own at the start of the update; None means the update is on-policy and r is
    1 with the gradient of log policy. With ratio="sequence" r is the geometric mean of the sequence's ratios and its
    gradient goes to each token's own log-prob (GSPO-token, section 4.3); a sequence must not be split over
    micro-batches. `sampler_logprobs` are those of the engine that drew the tokens: each token is multiplied by the
    detached min(old / sampler, sampler_weight_cap) (truncated importance sampling); None as cap leaves the loss
    uncorrected.

    Metrics: the share of members that clipping silenced below and above, mean ratio, and against the sampler the k3
    estimate of KL(sampler||old), the mean weight and `policy/sampler_mismatch_max` (nats; reduced by maximum).
    Raises ValueError for clip bounds outside [0, 1) and [0, inf), a cap that is not positive, misnumbered sequences.
    """
    if not (0 <= clip_low < 1 and clip_high >= 0) or (sampler_weight_cap is not None and sampler_weight_cap <= 0):
        raise ValueError(
            "need 0 <= clip_low < 1, clip_high >= 0 and a positive sampler_weight_cap (None: no correction), "
            f"got {clip_low}, {clip_high} and {sampler_weight_cap}"
        )
    member, dtype = weights != 0, accurate_dtype(policy_logprobs)
    policy, credit = where_member(policy_logprobs, member, dtype), where_member(advantages.detach(), member, dtype)
    old = policy.detach() if old_logprobs is None else where_member(old_logprobs.detach(), member, dtype)
    log_ratio = (policy - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if ratio == "sequence":
        mean = _sequence_means(log_ratio.detach(), member, sequence_ids, num_sequences)
        log_ratio = mean + policy - policy.detach()
    r = log_ratio.exp()
    surrogate = torch.minimum(r * credit, r.clamp(1 - clip_low, 1 + clip_high) * credit)
    metrics: Metrics = {
        "policy/clip_frac_low": mean_metric(((r < 1 - clip_low) & (credit < 0)).to(dtype), member),
        "policy/clip_frac_high": mean_metric(((r > 1 + clip_high) & (credit > 0)).to(dtype), member),
        "policy/ratio": mean_metric(r, member),
    }
    if sampler_logprobs is not None:
        gap = old.detach() - where_member(sampler_logprobs.detach(), member, dtype)
        correction = gap.exp() if sampler_weight_cap is None else gap.exp().clamp(max=sampler_weight_cap)
        surrogate = surrogate if sampler_weight_cap is None else surrogate * correction
        metrics |= _mismatch_metrics(gap, correction, member)
    return -(weights.to(dtype) * surrogate).sum(), weights.sum(), metrics


def _mismatch_metrics(gap: Tensor, correction: Tensor, member: Tensor) -> Metrics:
    worst = torch.where(member, gap.abs(), 0.0)
    return {
        "policy/sampler_mismatch_kl": mean_metric(torch.expm1(gap) - gap, member),
        "policy/sampler_weight": mean_metric(correction, member),
        "policy/sampler_mismatch_max": (worst.max() if len(worst) else worst.sum(), torch.ones_like(member.sum())),
    }


def reference_kl(
    policy_logprobs: Float[Tensor, " tokens"],
    reference_logprobs: Float[Tensor, " tokens"],
    weights: Float[Tensor, " tokens"],
    *,
    old_logprobs: Float[Tensor, " tokens"] | None = None,
    estimator: Literal["reverse", "k3"] = "reverse",
) -> Loss:
    """Penalty for leaving a reference, on sampled tokens; its value estimates KL(policy||reference) per token.

    The value is k3 = q/p - 1 - log(q/p) (p policy, q reference; joschu.net/blog/kl-approx.html), never negative.

    - "reverse": the gradient is that of k2 = log(p/q)^2 / 2, in expectation the gradient of KL(policy||reference).
    - "k3": k3 itself is differentiated, as GRPO does (arXiv:2402.03300, equation 4). In expectation that is the
      gradient of the *forward* KL(reference||policy), though the value reads as the reverse one.

    Expectations are over tokens drawn from the policy. With `old_logprobs` they were drawn from `old`, and value and
    gradient are multiplied by the detached policy / old; GRPO leaves that factor out (leave `old_logprobs` out).
    Reference log-probs are floored at -100.
    """
    member, dtype = weights != 0, accurate_dtype(policy_logprobs)
    policy = where_member(policy_logprobs, member, dtype)
    reference = where_member(reference_logprobs.detach().clamp(min=LOGPROB_FLOOR), member, dtype)
    gap = policy - reference
    k3 = torch.expm1(-gap) + gap
    if estimator == "reverse":
        slope = gap.detach() * policy
        k3 = k3.detach() + slope - slope.detach()
    k3 = k3 * _detached_ratio(policy, old_logprobs, member, dtype)
    return (weights.to(dtype) * k3).sum(), weights.sum(), {"policy/reference_kl": mean_metric(k3, member)}


def sampled_reverse_kl(
    policy_logprobs: Float[Tensor, " tokens"],
    teacher_logprobs: Float[Tensor, " tokens"],
    weights: Float[Tensor, " tokens"],
    *,
    sequence_ids: Int[Tensor, " tokens"],
    num_sequences: int,
    old_logprobs: Float[Tensor, " tokens"] | None = None,
    horizon: Literal["token", "sequence"] = "token",
) -> Loss:
    """Policy gradient of KL(policy||teacher) on tokens drawn from the policy; its value estimates that KL.

    Per token the advantage is the detached log(teacher / policy). With p the policy, q the teacher:

    - "token": discount 0. The expected gradient is that of the full-vocabulary KL(p||q) at every visited prefix, as
      `dense_divergence(kind="reverse_kl")` gives it without noise; neither counts the effect on later prefixes.
    - "sequence": the sum of advantages from the token to the end of its sequence, the whole gradient of
      KL(p(y)||q(y)) (arXiv:2605.12483v4, its local trust-region identity; MiniLLM, arXiv:2306.08543). Exact where the
      weights within a sequence are equal and do not depend on its length (aggregate "token" or "constant"). A
      sequence's tokens must come in their order; tokens of weight 0 in between are skipped.

    With `old_logprobs` the tokens were drawn from `old`; each term is multiplied by the detached policy / old of its
    token, or with "sequence" of all tokens up to it, which is unbiased and noisy: keep such updates nearly on-policy.
    Differentiating log p - log q directly would give gradient 0 in expectation. Teacher log-probs are floored at -100.
    """
    member, dtype = weights != 0, accurate_dtype(policy_logprobs)
    policy = where_member(policy_logprobs, member, dtype)
    teacher = where_member(teacher_logprobs.detach().clamp(min=LOGPROB_FLOOR), member, dtype)
    gap, r = policy.detach() - teacher, _detached_ratio(policy, old_logprobs, member, dtype)
    if horizon == "sequence":
        layout = _layout(sequence_ids, num_sequences)
        terms = _running_sum(r.log(), layout).exp() * gap
        cost = _running_sum(terms.flip(0), _layout(sequence_ids.flip(0), num_sequences)).flip(0)
    else:
        terms = cost = r * gap
    slope = cost * policy
    loss = (weights.to(dtype) * (terms + slope - slope.detach())).sum()
    return loss, weights.sum(), {"teacher/sampled_reverse_kl": mean_metric(terms, member)}


def span_reverse_kl(
    policy_logprobs: Float[Tensor, " tokens"],
    teacher_logprobs: Float[Tensor, " tokens"],
    weights: Float[Tensor, " tokens"],
    *,
    spans: Int[Tensor, " tokens"],
) -> Loss:
    """Policy gradient of KL(policy||teacher) over spans of text drawn from the policy; its value estimates that KL.

    A span is one draw: its tokens share a number in `spans` and a weight, and its log-prob is the sum of theirs, for
    the policy as for the teacher (who may spell it otherwise: only the sum counts). Each token gets the span's detached
    advantage log(teacher / policy). With one token a span this is `sampled_reverse_kl`. Teacher log-probs are floored
    at -100.
    """
    member, dtype = weights != 0, accurate_dtype(policy_logprobs)
    policy = where_member(policy_logprobs, member, dtype)
    teacher = where_member(teacher_logprobs.detach().clamp(min=LOGPROB_FLOOR), member, dtype)
    kinds, index = spans.unique(return_inverse=True)
    sums = policy.new_zeros(3, len(kinds))
    sums.index_add_(1, index, torch.stack([policy.detach(), teacher, torch.ones_like(policy)]))
    gap, share = (sums[0] - sums[1])[index], sums[2].reciprocal()[index]
    slope = gap * policy
    loss = (weights.to(dtype) * (gap * share + slope - slope.detach())).sum()
    metric = (torch.where(member, gap * share, 0.0).sum(), torch.where(member, share, 0.0).sum())
    return loss, weights.sum(), {"teacher/span_reverse_kl": metric}


def cross_entropy(policy_logprobs: Float[Tensor, " tokens"], weights: Float[Tensor, " tokens"]) -> Loss:
    """Weighted sum of -log policy, in nats: supervised fine-tuning on the tokens."""
    member, dtype = weights != 0, accurate_dtype(policy_logprobs)
    nats = -where_member(policy_logprobs, member, dtype)
    return (weights.to(dtype) * nats).sum(), weights.sum(), {"policy/cross_entropy": mean_metric(nats, member)}


def _detached_ratio(policy: Tensor, old: Tensor | None, member: Tensor, dtype: torch.dtype) -> Tensor:
    """policy / old without gradient; 1 on-policy and for non-members."""
    if old is None:
        return torch.ones_like(policy)
    log_ratio = policy.detach() - where_member(old.detach(), member, dtype)
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _check_sequences(sequence_ids: Tensor, num_sequences: int) -> None:
    if len(sequence_ids) and not 0 <= int(sequence_ids.min()) <= int(sequence_ids.max()) < num_sequences:
        raise ValueError(
            f"sequence_ids lie in {int(sequence_ids.min())}..{int(sequence_ids.max())}, "
            f"but num_sequences = {num_sequences} allows 0..{num_sequences - 1}"
        )


def _sequence_means(
    values: Float[Tensor, " tokens"], member: Bool[Tensor, " tokens"], sequence_ids: Int[Tensor, " tokens"], num: int
) -> Float[Tensor, " tokens"]:
    """Each token's mean over the members of its sequence; non-members must hold 0."""
    _check_sequences(sequence_ids, num)
    sums = values.new_zeros(num).index_add(0, sequence_ids, values)
    counts = values.new_zeros(num).index_add(0, sequence_ids, member.to(values.dtype))
    return (sums / counts.clamp(min=1))[sequence_ids]


def _layout(sequence_ids: Int[Tensor, " tokens"], num: int) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Row and column of every token in a sequences x longest grid, whatever the order of the sequences."""
    _check_sequences(sequence_ids, num)
    counts = torch.bincount(sequence_ids, minlength=num)
    order = torch.argsort(sequence_ids, stable=True)
    columns = torch.empty_like(sequence_ids)
    columns[order] = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[sequence_ids[order]]
    return sequence_ids, columns, (num, int(counts.max()) if num else 0)


def _running_sum(values: Float[Tensor, " tokens"], layout: tuple[Tensor, Tensor, tuple[int, int]]) -> Tensor:
    """Cumulative sum within each sequence. One cumsum over all tokens would carry rounding across sequences."""
    rows, columns, shape = layout
    grid = values.new_zeros(shape)
    grid[rows, columns] = values
    return grid.cumsum(1)[rows, columns]
