"""Losses: pure functions on tensors.

Legend of the shapes in this package. Per-token tensors are flat over *loss tokens* (response tokens, no padding) and
aligned with the target: entry t belongs to token t given what precedes it; a hidden state is the one that predicts it.

- `tokens`: loss tokens of the micro-batch, all sequences one after the other
- `hidden`, `teacher_hidden`: model widths; `rows`, `teacher_rows`: LM head rows, padding included
- `vocab`: the shared vocabulary prefix, at most `vocab_size`; `k`: a top-k teacher's ids per token
- `sequence_ids`: sequence of each token, 0..num_sequences-1, numbered within the micro-batch

Every loss returns `(weighted sum, weight, metrics)`: the sum of weight x token loss, with gradient; the sum of the
weights; and `{name: (total, count)}`, detached, where each member token (weight not 0) counts once. Nothing is divided
here: the sums, weights, totals and counts of all micro-batches and ranks are added up first, and divided once (a name
ending in `_max` is reduced by maximum). The denominator of an aggregate comes from `headwater.scoring.weights`.
Sums are taken in float32 (float64 where the input is) whatever the input's dtype. Entries of weight 0 may hold -inf or
NaN; a batch without members gives a differentiable 0. Constants (old, sampler, reference, teacher) are detached here.
"""

from headwater.losses.dense import dense_divergence
from headwater.losses.numerics import LOGPROB_FLOOR, Loss, Metrics
from headwater.losses.policy import (
    clipped_policy_gradient,
    cross_entropy,
    reference_kl,
    sampled_reverse_kl,
    span_reverse_kl,
)
from headwater.losses.projection import sum_over_logprobs, token_logprobs
from headwater.scoring.scores import HiddenScores, TopKScores

__all__ = [
    "LOGPROB_FLOOR",
    "HiddenScores",
    "Loss",
    "Metrics",
    "TopKScores",
    "clipped_policy_gradient",
    "cross_entropy",
    "dense_divergence",
    "reference_kl",
    "sampled_reverse_kl",
    "span_reverse_kl",
    "sum_over_logprobs",
    "token_logprobs",
]
