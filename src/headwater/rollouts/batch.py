"""Rollouts laid out for training: rows with per-token fields, cut into micro-batches by a token budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from headwater.mesh import Mesh
from headwater.types import Rollout


@dataclass(frozen=True)
class Batch:
    """Token rows and their fields; `fields[name][row]` has one entry per completion token of the row."""

    prompts: list[list[int]]
    completions: list[list[int]]
    fields: Mapping[str, list[Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, rollouts: Sequence[Rollout], **fields: list[Tensor]) -> Batch:
        return cls([r.prompt_ids for r in rollouts], [r.completion_ids for r in rollouts], fields)

    def with_fields(self, **fields: list[Tensor]) -> Batch:
        return Batch(self.prompts, self.completions, {**self.fields, **fields})

    def take(self, rows: Sequence[int]) -> Batch:
        return Batch(
            [self.prompts[r] for r in rows],
            [self.completions[r] for r in rows],
            {name: [values[r] for r in rows] for name, values in self.fields.items()},
        )

    def shard(self, mesh: Mesh) -> Batch:
        """This rank's rows."""
        return self.take(mesh.shard(range(len(self))))

    def __len__(self) -> int:
        return len(self.completions)

    @property
    def lengths(self) -> list[int]:
        """Completion tokens of each row."""
        return [len(completion) for completion in self.completions]

    @property
    def num_tokens(self) -> int:
        """Prompt and completion tokens, without padding."""
        return sum(map(len, self.prompts)) + sum(self.lengths)


@dataclass(frozen=True)
class MicroBatch:
    """Rows padded to one width. `rows` says where they stand in the batch they were cut from."""

    ids: Int[Tensor, "batch length"]
    predicts: Bool[Tensor, "batch length"]
    """True where the hidden state predicts a completion token: row-major order of these is the order of `tokens`."""
    targets: Int[Tensor, " tokens"]
    sequence_ids: Int[Tensor, " tokens"]
    rows: list[int]
    fields: Mapping[str, Shaped[Tensor, "tokens ..."]]
    attention_mask: Int[Tensor, "batch length"] | None = None
    """Only for rows padded on the left."""

    @property
    def num_sequences(self) -> int:
        return len(self.rows)


def micro_batches(batch: Batch, *, max_tokens: int, device: torch.device | str = "cpu") -> list[MicroBatch]:
    """Cut a batch, longest rows first, so that rows x width <= max_tokens (a row that is longer goes alone).

    Padding uses id 0 on the right, where causal attention cannot see it; rows without completion tokens are dropped.
    """
    width = [len(p) + len(c) for p, c in zip(batch.prompts, batch.completions, strict=True)]
    order = sorted((r for r in range(len(batch)) if batch.completions[r]), key=lambda r: (-width[r], r))
    groups: list[list[int]] = []
    for row in order:
        if groups and (len(groups[-1]) + 1) * width[groups[-1][0]] <= max_tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    return [_pad(batch, rows, device) for rows in groups]


def _pad(batch: Batch, rows: list[int], device: torch.device | str) -> MicroBatch:
    length = max(len(batch.prompts[r]) + len(batch.completions[r]) for r in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    predicts = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, r in enumerate(rows):
        prompt, completion = batch.prompts[r], batch.completions[r]
        ids[i, : len(prompt) + len(completion)] = torch.tensor(prompt + completion)
        predicts[i, len(prompt) - 1 : len(prompt) + len(completion) - 1] = True
    counts = torch.tensor([len(batch.completions[r]) for r in rows])
    return MicroBatch(
        ids=ids.to(device),
        predicts=predicts.to(device),
        targets=torch.cat([torch.tensor(batch.completions[r]) for r in rows]).to(device),
        sequence_ids=torch.repeat_interleave(torch.arange(len(rows)), counts).to(device),
        rows=rows,
        fields={name: torch.cat([values[r] for r in rows]).to(device) for name, values in batch.fields.items()},
    )


def unflatten(batch: Batch, parts: Sequence[tuple[MicroBatch, Tensor]]) -> list[Tensor]:
    """Per-token results of micro-batches, back as one CPU tensor per row of the batch (empty for rows without
    tokens)."""
    out = [torch.empty(0)] * len(batch)
    for micro, values in parts:
        counts = [len(batch.completions[r]) for r in micro.rows]
        for row, piece in zip(micro.rows, values.detach().cpu().split(counts), strict=True):
            out[row] = piece
    return out
