"""The cache with room holds what transformers' own holds, through growth and rows that leave."""

import torch
from transformers.cache_utils import DynamicLayer

from headwater.rollouts.caches import RoomyLayer


def test_room_changes_nothing_but_the_copies():
    torch.manual_seed(0)
    plain, roomy, rows, places = DynamicLayer(), RoomyLayer(), 6, set()
    for step in range(60):
        new = [torch.randn(rows, 2, 5 if step == 0 else 1, 4) for _ in range(2)]
        for ours, theirs in zip(roomy.update(*new), plain.update(*new), strict=True):
            assert torch.equal(ours, theirs)
        if step in (20, 21, 40):
            keep = torch.arange(1, rows)
            rows -= 1
            plain.batch_select_indices(keep)
            roomy.batch_select_indices(keep)
        assert roomy.keys is not None
        places.add(roomy.keys.data_ptr())
        if step == 50:  # rows that a group shares, and that leave before the next token
            keep = torch.arange(0, 2 * rows, 3)
            rows = len(keep)
            for layer in (plain, roomy):
                layer.batch_repeat_interleave(2)
                layer.batch_select_indices(keep)
    assert roomy.get_seq_length() == 64
    assert len(places) < 15, "tokens are written where there is room"
