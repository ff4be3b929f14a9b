import random

import pytest
import torch

from headwater.mesh import Mesh
from headwater.rollouts.batch import Batch, micro_batches, unflatten
from headwater.types import Rollout


def random_batch(seed: int, rows: int = 40) -> Batch:
    rng = random.Random(seed)
    prompts = [[rng.randrange(300) for _ in range(rng.randint(1, 9))] for _ in range(rows)]
    completions = [[rng.randrange(300) for _ in range(rng.randint(0, 12))] for _ in range(rows)]
    return Batch(
        prompts,
        completions,
        {
            "place": [torch.arange(len(c)) + 100 * i for i, c in enumerate(completions)],
            "pair": [torch.rand(len(c), 2) for c in completions],
        },
    )


def test_layout_by_hand():
    batch = Batch([[7, 8], [5]], [[1, 2, 3], [4]], {"x": [torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.4])]})
    (micro,) = micro_batches(batch, max_tokens=10)
    assert micro.ids.tolist() == [[7, 8, 1, 2, 3], [5, 4, 0, 0, 0]]
    # The state at 8 predicts 1, the states at 1 and 2 predict 2 and 3; the last token predicts nothing.
    assert micro.predicts.tolist() == [[False, True, True, True, False], [True, False, False, False, False]]
    assert micro.targets.tolist() == [1, 2, 3, 4] and micro.sequence_ids.tolist() == [0, 0, 0, 1]
    assert micro.fields["x"].tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert (micro.rows, micro.num_sequences, micro.attention_mask) == ([0, 1], 2, None)
    assert (batch.num_tokens, batch.lengths) == (7, [3, 1])
    one_each = micro_batches(batch, max_tokens=9)
    assert [m.ids.tolist() for m in one_each] == [[[7, 8, 1, 2, 3]], [[5, 4]]]


@pytest.mark.parametrize("max_tokens", [1, 25, 60, 10_000])
def test_every_token_once_aligned_within_the_budget(max_tokens: int):
    batch = random_batch(0)
    micros = micro_batches(batch, max_tokens=max_tokens)
    rows = [row for m in micros for row in m.rows]
    assert sorted(rows) == [i for i, c in enumerate(batch.completions) if c]
    for m in micros:
        assert m.ids.numel() <= max_tokens or m.num_sequences == 1
        expected = [t for r in m.rows for t in batch.completions[r]]
        assert m.targets.tolist() == expected and int(m.predicts.sum()) == len(expected)
        # What a state predicts is the id at the next place.
        assert m.ids[:, 1:][m.predicts[:, :-1]].tolist() == expected
        assert [m.rows[s] for s in m.sequence_ids.tolist()] == [p // 100 for p in m.fields["place"].tolist()]
    for name in ("place", "pair"):
        back = unflatten(batch, [(m, m.fields[name]) for m in micros])
        for row, values in enumerate(back):
            if batch.completions[row]:
                assert torch.equal(values, batch.fields[name][row])
        assert all(len(v) == len(c) for v, c in zip(back, batch.completions, strict=True))


def test_packing_is_not_wasteful():
    batch = Batch([[1]] * 8, [[2] * 3] * 8)
    assert [m.num_sequences for m in micro_batches(batch, max_tokens=12)] == [3, 3, 2]


def test_take_of_and_shard_keep_rows_together():
    rollouts = [Rollout(f"p{i}", 0, [i], [10 * i] * (i + 1), [0.0] * (i + 1), "", True, 0) for i in range(5)]
    batch = Batch.of(rollouts, x=[torch.full((i + 1,), float(i)) for i in range(5)])
    taken = batch.take([4, 1])
    assert taken.prompts == [[4], [1]] and taken.lengths == [5, 2] and taken.fields["x"][1].tolist() == [1.0, 1.0]
    shares = [batch.shard(Mesh(rank, 2)).prompts for rank in range(2)]
    assert shares == [[[0], [2], [4]], [[1], [3]]]
