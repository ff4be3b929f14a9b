import random

import pytest
import torch

from headwater.mesh import Mesh
from headwater.rollouts.batch import MICRO_BATCH_COSTS, Batch, micro_batches, unflatten
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


def test_a_cut_is_made_where_it_saves_more_than_it_costs():
    """32 rows of 101 tokens and 32 of 5: one pass pads 3,072 tokens that a second pass, worth 512, saves; of 13 and 5
    tokens it would save 256. Below the budget nothing else cuts."""

    def widths(long: int, count: int = 32) -> list[tuple[int, ...]]:
        rows = [[1] * (long if i % 2 else 4) for i in range(2 * count)]
        micros = micro_batches(Batch([[7]] * len(rows), rows), max_tokens=100_000)
        return [tuple(m.ids.shape) for m in micros]

    assert widths(100) == [(32, 101), (32, 5)]
    assert widths(12) == [(64, 13)]
    # Among many lengths the cut is the best of its pieces: never worse than one pass, or one for each piece.
    lengths = sorted((1 + int(random.Random(i).expovariate(1 / 60)) for i in range(64)), reverse=True)
    micros = micro_batches(Batch([[7]] * 64, [[1] * n for n in lengths]), max_tokens=100_000)
    cost = sum(m.ids.numel() + MICRO_BATCH_COSTS for m in micros)
    fixed = [sum(len(part) * (part[0] + 1) + MICRO_BATCH_COSTS for part in parts) for parts in halves(lengths, 2)]
    assert 1 < len(micros) < 32 and cost <= min(fixed)


def halves(lengths: list[int], size: int) -> list[list[list[int]]]:
    """The list whole, in pieces of `size`, and cut in two at every multiple of `size`."""
    pieces = [lengths[i : i + size] for i in range(0, len(lengths), size)]
    return [[lengths], pieces, *([lengths[:i], lengths[i:]] for i in range(size, len(lengths), size))]


def test_layout_with_a_shared_prefix_by_hand():
    batch = Batch([[7, 8, 9], [5, 6], [7, 8, 9], [7, 8, 9]], [[1, 2], [3], [4], [1]])
    (micro,) = micro_batches(batch, max_tokens=14, share=True)
    assert micro.prefixes is not None and micro.rows == [0, 1, 2, 3]
    assert micro.prefixes.ids.tolist() == [[7, 8], [0, 5]]
    assert micro.prefixes.attention_mask.tolist() == [[1, 1], [0, 1]]
    assert micro.prefixes.of_row.tolist() == [0, 1, 0, 0]
    # A row is the prompt's last token and the completion without its last.
    assert micro.ids.tolist() == [[9, 1], [6, 0], [9, 0], [9, 0]]
    assert micro.predicts.tolist() == [[True, True], [True, False], [True, False], [True, False]]
    assert micro.targets.tolist() == [1, 2, 3, 4, 1]


def test_prefixes_are_shared_only_where_it_saves_a_tenth():
    def tokens(prompt: int, completion: int) -> tuple[bool, int]:
        batch = Batch([list(range(prompt))] * 4, [[1] * completion] * 4)
        (micro,) = micro_batches(batch, max_tokens=10_000, share=True)
        return micro.prefixes is not None, micro.ids.numel()

    assert tokens(9, 61) == (True, 244)  # 8 + 244 of 280
    assert tokens(9, 62) == (False, 284)  # 8 + 248 of 284, over nine tenths
    assert tokens(1, 1) == (False, 8)


@pytest.mark.parametrize("max_tokens", [1, 40, 90, 10_000])
def test_shared_prefixes_hold_every_token_once_within_the_budget(max_tokens: int):
    rng = random.Random(1)
    prompts = [[rng.randrange(300) for _ in range(rng.randint(20, 30))] for _ in range(6)]
    rows = [prompts[rng.randrange(6)] for _ in range(40)]
    completions = [[rng.randrange(300) for _ in range(rng.randint(0, 9))] for _ in range(40)]
    batch = Batch(rows, completions)
    micros = micro_batches(batch, max_tokens=max_tokens, share=True)
    assert sorted(r for m in micros for r in m.rows) == [i for i, c in enumerate(completions) if c]
    for m in micros:
        assert m.ids.numel() + (m.prefixes.ids.numel() if m.prefixes else 0) <= max_tokens or m.num_sequences == 1
        assert m.targets.tolist() == [t for r in m.rows for t in completions[r]]
        for i, r in enumerate(m.rows):
            seen = m.ids[i].tolist()
            if m.prefixes is not None:
                prefix = m.prefixes.of_row[i]
                seen = m.prefixes.ids[prefix][m.prefixes.attention_mask[prefix].bool()].tolist() + seen
            whole = rows[r] + completions[r]
            assert seen[: len(whole) - 1] == whole[:-1]
    assert (max_tokens == 1) == any(m.prefixes is None for m in micros)


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
