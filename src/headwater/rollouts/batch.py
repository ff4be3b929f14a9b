"""Rollouts laid out for training: rows with per-token fields, cut into micro-batches by a token budget."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from headwater import flops
from headwater.flops import Work
from headwater.mesh import Mesh
from headwater.models.language_model import LanguageModel, Prefixes
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
    def sizes(self) -> list[tuple[int, int]]:
        """Prompt and completion tokens of each row."""
        return [(len(p), len(c)) for p, c in zip(self.prompts, self.completions, strict=True)]

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
    prefixes: Prefixes | None = None
    """Prompts less their last token, where rows share them; `ids` then begins with that token."""

    @property
    def num_sequences(self) -> int:
        return len(self.rows)


def states(model: LanguageModel, micro: MicroBatch) -> Float[Tensor, "tokens hidden"]:
    """The hidden states that predict the micro-batch's targets, in their order."""
    return model.hidden(micro.ids, micro.attention_mask, micro.prefixes)[micro.predicts]


def micro_batches(
    batch: Batch, *, max_tokens: int, device: torch.device | str = "cpu", share: bool = False
) -> list[MicroBatch]:
    """Cut a batch, longest rows first, so that rows x width <= max_tokens (a row that is longer goes alone), and where
    more padding is saved than a micro-batch costs.

    Padding uses id 0 on the right, where causal attention cannot see it; rows without completion tokens are dropped.
    With `share`, rows of one prompt go on from a prefix computed once (the budget then counts prefixes and rows alike)
    where that leaves at most nine tenths of the padded tokens; below that, attention without a mask is faster.
    """
    rows = [r for r in range(len(batch)) if batch.completions[r]]
    prompts, ends = batch.prompts, batch.lengths
    width = {r: len(prompts[r]) + ends[r] for r in rows}
    plain, cost = _cut([(r, r, 0, width[r]) for r in sorted(rows, key=lambda r: (-width[r], r))], max_tokens)
    if share and all(len(prompts[r]) > 1 for r in rows):
        prefix = {prompt: i for i, prompt in enumerate(dict.fromkeys(tuple(prompts[r]) for r in rows))}
        shared = {r: (r, prefix[tuple(prompts[r])], len(prompts[r]) - 1, ends[r]) for r in rows}
        longest: dict[int, int] = {}
        for _, i, _, end in shared.values():
            longest[i] = max(longest.get(i, 0), end)
        by_length = sorted(shared.values(), key=lambda row: (-row[3], row[0]))
        by_prefix = sorted(by_length, key=lambda row: (-longest[row[1]], row[1]))
        groups, shared_cost = min((_cut(order, max_tokens) for order in (by_length, by_prefix)), key=lambda cut: cut[1])
        if 10 * shared_cost <= 9 * cost:
            return [_pad(batch, group, device, share=True) for group in groups]
    return [_pad(batch, group, device) for group in plain]


def executed_work(micros: Sequence[MicroBatch], mesh: Mesh) -> tuple[Work, Work]:
    """What all ranks' micro-batches put through a model: the rows, and the prefixes they share."""
    rows, shared = Work(), Work()
    for micro in micros:
        (count, width), before = micro.ids.shape, 0
        if micro.prefixes is not None:
            before = micro.prefixes.ids.shape[1]
            shared += flops.padded_work(*micro.prefixes.ids.shape)
        rows += Work(count * width, count * width * (before + width), len(micro.targets))
    return flops.total(mesh.collect(rows)), flops.total(mesh.collect(shared))


Row = tuple[int, int, int, int]
"""A row, its prefix, the length of the prefix, the length of the row."""
MICRO_BATCH_COSTS = 512
"""About the tokens that a pass on a CPU could compute in the time it takes whatever its size: an estimate."""


class _Padded(NamedTuple):
    """Rows together: their prefixes once, padded to the longest of length `start`, and `rows` padded to `end`."""

    prefixes: frozenset[int] = frozenset()
    start: int = 0
    rows: int = 0
    end: int = 0

    @property
    def tokens(self) -> int:
        return len(self.prefixes) * self.start + self.rows * self.end

    def joined(self, other: _Padded) -> _Padded:
        start, end = max(self.start, other.start), max(self.end, other.end)
        return _Padded(self.prefixes | other.prefixes, start, self.rows + other.rows, end)


def _padded(rows: Sequence[Row]) -> _Padded:
    return functools.reduce(_Padded.joined, [_Padded(frozenset((p,)), start, 1, end) for _, p, start, end in rows])


def _cut(order: list[Row], max_tokens: int) -> tuple[list[list[int]], int]:
    """Consecutive rows in groups within the budget, and the padded tokens of all."""
    groups: list[list[int]] = []
    total = 0
    for lot in _lots(order):
        size = _Padded()
        for some in [lot] if _padded(lot).tokens <= max_tokens else [[row] for row in lot]:
            more = size.joined(_padded(some))
            if not size.rows or more.tokens > max_tokens:
                total, more = total + size.tokens, _padded(some)
                groups.append([])
            groups[-1] += [row[0] for row in some]
            size = more
        total += size.tokens
    return groups, total


def _lots(order: list[Row], pieces: int = 16) -> list[list[Row]]:
    """The order cut where that is cheapest, in padded tokens and MICRO_BATCH_COSTS for each lot, among at most `pieces`
    equal pieces; without regard to the budget."""
    size = max(1, -(-len(order) // pieces))
    parts = [_padded(order[start : start + size]) for start in range(0, len(order), size)]
    # Of the first 0, 1, ... parts: the least cost, and how many parts each lot ends with.
    best: list[tuple[float, list[int]]] = [(0.0, []), *[(math.inf, [])] * len(parts)]
    for first in range(len(parts)):
        lot, (cost, cut) = _Padded(), best[first]
        for last in range(first, len(parts)):
            lot = lot.joined(parts[last])
            best[last + 1] = min(best[last + 1], (cost + MICRO_BATCH_COSTS + lot.tokens, [*cut, last + 1]))
    return [order[size * start : size * end] for start, end in pairwise([0, *best[-1][1]])]


def _pad(batch: Batch, rows: list[int], device: torch.device | str, *, share: bool = False) -> MicroBatch:
    starts = [batch.prompts[r][-1:] if share else batch.prompts[r] for r in rows]
    # Behind a prefix, what the last token would predict is nobody's target.
    ends = [batch.completions[r][: -1 if share else None] for r in rows]
    length = max(len(start) + len(end) for start, end in zip(starts, ends, strict=True))
    padded = [start + end + [0] * (length - len(start) - len(end)) for start, end in zip(starts, ends, strict=True)]
    counts = torch.tensor([len(batch.completions[r]) for r in rows])
    first, place = torch.tensor([len(start) - 1 for start in starts])[:, None], torch.arange(length)
    return MicroBatch(
        ids=torch.tensor(padded).to(device),
        predicts=((place >= first) & (place < first + counts[:, None])).to(device),
        targets=torch.tensor([token for r in rows for token in batch.completions[r]]).to(device),
        sequence_ids=torch.repeat_interleave(torch.arange(len(rows)), counts).to(device),
        rows=rows,
        fields={name: torch.cat([values[r] for r in rows]).to(device) for name, values in batch.fields.items()},
        prefixes=_prefixes([batch.prompts[r][:-1] for r in rows], device) if share else None,
    )


def _prefixes(of_rows: list[list[int]], device: torch.device | str) -> Prefixes:
    place = {prefix: i for i, prefix in enumerate(dict.fromkeys(map(tuple, of_rows)))}
    width = max(map(len, place))
    ids, mask = torch.zeros(2, len(place), width, dtype=torch.long)
    for prefix, i in place.items():
        ids[i, width - len(prefix) :] = torch.tensor(prefix)
        mask[i, width - len(prefix) :] = 1
    of_row = torch.tensor([place[tuple(prefix)] for prefix in of_rows])
    return Prefixes(ids.to(device), mask.to(device), of_row.to(device))


def unflatten(batch: Batch, parts: Sequence[tuple[MicroBatch, Tensor]]) -> list[Tensor]:
    """Per-token results of micro-batches, back as one CPU tensor per row of the batch (empty for rows without
    tokens)."""
    out = [torch.empty(0)] * len(batch)
    for micro, values in parts:
        counts = [len(batch.completions[r]) for r in micro.rows]
        for row, piece in zip(micro.rows, values.detach().cpu().split(counts), strict=True):
            out[row] = piece
    return out
