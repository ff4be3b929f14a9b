import math
from itertools import combinations
from typing import Any

import pytest
import torch

from headwater.meter import Meter
from headwater.monitors.closeness import VIEW, by_problem, closeness, compare_rollouts, summary
from headwater.monitors.trainability import estimated_mixed_rate
from headwater.rollouts.sampler import Sampling, TransformersSampler
from headwater.types import Problem


def test_one_rollout_alone_equals_its_share_of_a_padded_batch(make_model, problems):
    student, teacher = make_model(0, dtype=torch.float64), make_model(1, "48x2", dtype=torch.float64)
    rollouts = TransformersSampler(student).sample(problems[:6], Sampling(("here", 0), 2, 12))
    together = compare_rollouts(student, teacher, rollouts, VIEW)
    for rollout, row in zip(rollouts, together, strict=True):
        (alone,) = compare_rollouts(student, teacher, [rollout], VIEW)
        assert len(row["forward_kl"]) == len(rollout.completion_ids)
        for name, values in alone.items():
            torch.testing.assert_close(row[name], values, rtol=0, atol=1e-10)


def test_log_ratio_is_that_of_the_drawn_tokens(make_model, problems):
    """Against full logits of both models, one forward pass a rollout."""
    student, teacher = make_model(0, dtype=torch.float64), make_model(1, dtype=torch.float64)
    rollouts = TransformersSampler(student).sample(problems[:3], Sampling(("here", 0), 1, 12))
    for rollout, row in zip(rollouts, compare_rollouts(student, teacher, rollouts, VIEW), strict=True):
        ids = torch.tensor([rollout.prompt_ids + rollout.completion_ids])
        first = len(rollout.prompt_ids) - 1
        logs = [
            m.module(input_ids=ids).logits[0, first:-1, : m.vocab_size].log_softmax(1).detach()
            for m in (teacher, student)
        ]
        drawn = [x.gather(1, torch.tensor(rollout.completion_ids)[:, None])[:, 0] for x in logs]
        torch.testing.assert_close(row["log_ratio"], drawn[0] - drawn[1], rtol=0, atol=1e-10)


def test_summary_is_over_tokens_and_by_problem_over_its_own():
    rows = [
        {name: torch.tensor(values) for name in ("forward_kl", "reverse_kl", "overlap", "entropy_gap", "log_ratio")}
        for values in ([1.0, 2.0], [-6.0])
    ]
    found = summary(rows)
    assert found["forward_kl"] == -1.0 and found["entropy_gap_abs"] == 3.0
    assert math.isclose(found["log_ratio_tail"], 1 / 3)
    assert math.isclose(found["log_ratio_p01"], -6 + 0.02 * 7)
    assert math.isclose(found["log_ratio_p99"], 1 + 0.98)


def test_closeness_has_its_own_streams_and_counts_only_where_asked(make_model, problems):
    student, teacher = make_model(0), make_model(1)
    asked: dict[str, Any] = {"samples": 2, "max_new_tokens": 12, "seed": 3}
    first = closeness(student, teacher, problems[:4], **asked)
    meter = Meter()
    again = closeness(student, teacher, [Problem(p.messages) for p in problems[:4]], meter=meter, **asked)
    assert first == again and set(n.rpartition("@")[2] for n in first) == {"teacher", "student"}
    assert first["c2/forward_kl@teacher"] > 0 and 0 <= first["c2/overlap@student"] <= 1
    assert meter.state()["evaluated"]["tokens"] > 0
    only = closeness(student, teacher, problems[:4], on=("student",), **asked)
    changed: dict[str, Any] = {**asked, "seed": 4}
    assert only == {name: value for name, value in first.items() if name.endswith("@student")}
    assert closeness(student, teacher, problems[:4], **changed) != first


def test_by_problem_pools_the_tokens_of_a_problem(make_model, problems):
    model = make_model(0)
    rollouts = TransformersSampler(model).sample(problems[:2], Sampling(("here", 0), 2, 6))
    rows = [{"forward_kl": torch.full((i + 1,), float(i))} for i in range(4)]
    found = by_problem(rows, rollouts, "forward_kl")
    assert found == {problems[0].id: 2 / 3, problems[1].id: pytest.approx((2 * 3 + 3 * 4) / 7)}


@pytest.mark.parametrize("right", range(6))
def test_mixed_rate_is_that_of_all_subsets(right):
    samples = [1] * right + [0] * (5 - right)
    subsets = list(combinations(samples, 3))
    mixed = sum(0 < sum(s) < 3 for s in subsets) / len(subsets)
    assert math.isclose(estimated_mixed_rate(5, right, 3), mixed)


def test_mixed_rate_is_unbiased():
    p, k = 0.3, 6
    mean = sum(math.comb(k, c) * p**c * (1 - p) ** (k - c) * estimated_mixed_rate(k, c, 4) for c in range(k + 1))
    assert math.isclose(mean, 1 - p**4 - (1 - p) ** 4)
    with pytest.raises(ValueError, match="2 samples"):
        estimated_mixed_rate(2, 1, 4)
