import numpy as np
from scipy.stats import chisquare

from headwater.rollouts import streams


def test_uniforms_are_uniform_along_positions_and_along_keys():
    keys = np.array([streams.key("test", i) for i in range(500)], dtype=np.uint64)
    grid = streams.uniforms(keys[:, None], np.arange(400)[None])
    assert grid.shape == (500, 400) and grid.min() >= 0 and grid.max() < 1
    assert len(np.unique(grid)) == grid.size
    for numbers in (grid.ravel(), grid[:, 0], grid[0], grid[:, 1] - grid[:, 0] + (grid[:, 1] < grid[:, 0])):
        assert chisquare(np.histogram(numbers, bins=20, range=(0, 1))[0]).pvalue > 1e-3
    # Neighbours along either axis are unrelated: |correlation| of n pairs is within 4 / sqrt(n).
    for a, b in ((grid[:, 1:], grid[:, :-1]), (grid[1:], grid[:-1])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / np.sqrt(a.size)


def test_a_number_depends_on_key_and_position_alone():
    keys = np.array([streams.key("a", i) for i in range(50)], dtype=np.uint64)
    positions = np.arange(50) % 7
    together = streams.uniforms(keys, positions)
    order = np.random.default_rng(0).permutation(50)
    assert (streams.uniforms(keys[order], positions[order]) == together[order]).all()
    alone = [streams.uniforms(keys[i : i + 1], positions[i : i + 1])[0] for i in range(50)]
    assert (np.array(alone) == together).all()


def test_splitmix64_is_the_published_one():
    # First outputs of the reference C code (prng.di.unimi.it/splitmix64.c) seeded with 1234567.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    got = streams.uniforms(np.full(4, 1234567, dtype=np.uint64), np.arange(4))
    assert (got == [(value >> 11) * 2.0**-53 for value in expected]).all()


def test_keys_do_not_run_parts_together():
    assert streams.key("a", 1, 23) != streams.key("a", 12, 3) != streams.key("a", 123)
    assert streams.key("a", 1) == streams.key("a", 1) == streams.key("a", "1")


def test_every_epoch_is_a_fresh_permutation_and_any_window_can_be_drawn_alone():
    items = [f"item {i}" for i in range(13)]
    whole = streams.epoch_order(items, 0, 13 * 5, "warmup", 3)
    epochs = [whole[i : i + 13] for i in range(0, len(whole), 13)]
    assert all(sorted(epoch) == sorted(items) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5
    for start in range(30):
        for count in (0, 1, 5, 13, 30):
            assert streams.epoch_order(items, start, count, "warmup", 3) == whole[start : start + count]
    assert streams.epoch_order(items, 0, 13, "warmup", 4) != whole[:13] != streams.epoch_order(items, 0, 13, "sft", 3)
