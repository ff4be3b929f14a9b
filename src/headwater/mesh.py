"""Who computes what: identities in one process, collectives under torchrun. Every count passes through here."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Mesh:
    """This process's place among the data-parallel ranks."""

    rank: int = 0
    size: int = 1

    @property
    def is_writer(self) -> bool:
        """True in the one process that writes files."""
        return self.rank == 0

    def shard(self, items: Sequence[T]) -> list[T]:
        """Every `size`-th item from `rank` on: this rank's share."""
        return list(items[self.rank :: self.size])

    def all_sum(self, value: Tensor) -> Tensor:
        """Sum over ranks; the value itself in one process."""
        if self.size == 1:
            return value
        value = value.clone()
        dist.all_reduce(value)
        return value

    def collect(self, value: T) -> list[T]:
        """The value of every rank, by rank."""
        if self.size == 1:
            return [value]
        values = [value] * self.size
        dist.all_gather_object(values, value)
        return values

    def gather(self, items: list[T]) -> list[T]:
        """The shards of all ranks, undone to the order before `shard`."""
        parts = self.collect(items)
        return [parts[i % self.size][i // self.size] for i in range(sum(map(len, parts)))]

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def join(device: str) -> Mesh:
    """The mesh of the running job: torchrun's when it started this process, else one rank."""
    if not dist.is_torchelastic_launched():
        return Mesh()
    if not dist.is_initialized():
        # Counts and metrics live on the CPU, which NCCL cannot reduce.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
        if device.startswith("cuda"):
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return Mesh(dist.get_rank(), dist.get_world_size())
