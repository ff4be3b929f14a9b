"""Key-value caches that do not copy all they hold for every token."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):
    """A layer of transformers' growing cache with room for more tokens: copied when that is used up, a quarter larger
    each time, and when rows leave."""

    room: list[Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            return super().update(key_states, value_states)
        held: list[Tensor] = [self.keys, self.values]  # pyright: ignore -- None only until the first tokens
        used = held[0].shape[2]
        need = used + key_states.shape[2]
        if self.room is None or len(self.room[0]) != len(held[0]) or self.room[0].shape[2] < need:
            self.room = [_moved(x, need + max(16, used // 4)) for x in held]
        for room, new in zip(self.room, (key_states, value_states), strict=True):
            room.narrow(2, used, need - used).copy_(new)
        self.keys, self.values = (room.narrow(2, 0, need) for room in self.room)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.keys is None or self.room is None or len(self.room[0]) != len(self.keys):
            return super().batch_select_indices(indices)
        self.room, used = [room.index_select(0, indices) for room in self.room], self.keys.shape[2]
        self.keys, self.values = (room.narrow(2, 0, used) for room in self.room)


def _moved(held: Tensor, slots: int) -> Tensor:
    rows, heads, used, width = held.shape
    room = held.new_empty(rows, heads, slots, width)
    room[:, :, :used] = held
    return room


@dataclass(frozen=True)
class Slots:
    """A cache whose tensors [rows, heads, slots, width] stay where they are: a token is written at slot `at` [1]."""

    keys: list[Tensor]
    values: list[Tensor]
    at: Tensor

    def update(self, key: Tensor, value: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        return self.keys[layer].index_copy_(2, self.at, key), self.values[layer].index_copy_(2, self.at, value)

    def resize(self, rows: Tensor, used: int, size: int) -> None:
        """Keep these rows and the first `used` slots, then 0 up to `size`: masked or not, NaN would spread."""
        for held in (self.keys, self.values):
            for i, old in enumerate(held):
                held[i] = old.new_zeros(len(rows), old.shape[1], size, old.shape[3])
                held[i][:, :, :used] = old[rows, :, :used]
