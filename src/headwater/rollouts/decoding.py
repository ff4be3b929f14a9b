"""One token a row through a decoder of Llama's family on a CPU, with fewer operations than its modules."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import linear
from transformers import DynamicCache

from headwater.models.language_model import LanguageModel
from headwater.rollouts.caches import RoomyLayer

FAMILY = ("llama", "qwen2", "qwen3")
"""Model types whose layers are computed as `Decoder` does."""
ROTARY = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary positions whose angles do not depend on how long the longest row is."""
MOST = 1 << 26
"""Weights of the largest model: most of them are copied, and a larger one spends its time in products."""
FEW = 25
"""Keys from which torch 2.13 leaves the product of one row of probabilities and the values (width 16) to MKL; its own
loop for fewer is slower than a multiplication and a sum."""


class Decoder:
    """What `model.base` makes of one more token a row, up to rounding, as long as the weights stay as they are.

    Small models spend most of a decoding step between their operations, and rows of one prompt reading its keys and
    values once each (benchmarks/README.md). So products of one input are one product, the scales of norms are in the
    weights behind them, rotary pairs lie side by side and turn as complex numbers, and a prompt's keys and values are
    kept and read once for all of its rows.
    """

    def __init__(
        self,
        model: LanguageModel,
        cache: DynamicCache,
        mask: Int[Tensor, "prompts width"],
        group: int,
        limit: int,
    ) -> None:
        """After prompts, padded on the left, that `cache` holds; `group` consecutive rows go on from each with at most
        `limit` tokens."""
        base: Any = model.base  # Any: modules are typed as one another's tensors
        self.embed, self.final = base.embed_tokens, base.norm
        self.layers = [_Layer(layer) for layer in base.layers]
        held: list[Any] = cache.layers  # Any: transformers types layers of other kinds too
        self.prompts = [(_side_by_side(x.keys).flatten(0, 1), x.values.flatten(0, 1)) for x in held]
        self.own, self.read = [RoomyLayer() for _ in held], 0
        self.shared: int = held[0].keys.shape[1]
        like = torch.empty(0, dtype=self.embed.weight.dtype)
        cos, sin = (half.chunk(2, 2)[0][0] for half in base.rotary_emb(like, torch.arange(mask.shape[1] + limit)[None]))
        self.turns = torch.complex(cos, sin)[:, None]
        self.places = mask.sum(1).repeat_interleave(group)
        self.bias = torch.zeros(mask.shape, dtype=like.dtype).masked_fill_(mask == 0, -torch.inf)
        self._belong(torch.arange(len(mask)).repeat_interleave(group))

    @staticmethod
    def fits(model: LanguageModel) -> bool:
        """Whether a model is of the family, small, on a CPU and as its authors wrote it: no adapters, no biases but
        those of queries, keys and values. Not in bfloat16, where the modules are faster."""
        if model.device.type != "cpu" or model.module.config.model_type not in FAMILY or model.num_parameters > MOST:
            return False
        if model.module.dtype == torch.bfloat16:
            return False
        base: Any = model.base
        without_bias = [
            part
            for layer in base.layers
            for part in (layer.self_attn.o_proj, layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj)
        ]
        others = [
            part
            for layer in base.layers
            for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
        ]
        plain = all(type(part) is torch.nn.Linear for part in without_bias + others)
        return plain and all(part.bias is None for part in without_bias) and base.rotary_emb.rope_type in ROTARY

    def step(self, token: Int[Tensor, " rows"]) -> Float[Tensor, "rows hidden"]:
        """Last hidden states after the final norm, having read one more token of every row."""
        self.read += 1
        hidden, turn = self.embed(token), self.turns[self.places]
        self.places = self.places + 1
        for layer, prompts, own in zip(self.layers, self.prompts, self.own, strict=True):
            query, key, value = layer.projected(hidden, turn)
            keys, values = own.update(key[:, :, None], value[:, :, None])
            hidden = torch.addmm(hidden, self._attended(query, *prompts, keys, values), layer.output)
            gate, up = linear(_normed(hidden, layer.eps), layer.gate_and_up).chunk(2, 1)
            hidden = torch.addmm(hidden, layer.activation(gate).mul_(up), layer.down)
        return _normed(hidden, self.final.variance_epsilon) * (self.final.weight * hidden.shape[1] ** 0.5)

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Go on with these rows alone, in order."""
        for own in self.own:
            own.batch_select_indices(rows)
        self.places = self.places[rows]
        of_row = self.of_row[rows]
        left, of_row = of_row.unique(return_inverse=True)
        if len(left) < len(self.bias):
            pairs = (left[:, None] * self.shared + torch.arange(self.shared)).flatten()
            self.prompts = [(keys[pairs], values[pairs]) for keys, values in self.prompts]
            self.bias = self.bias[left]
        self._belong(of_row)

    @property
    def pairs(self) -> int:
        """Of queries and keys, in a layer's last step; with the places in prompts' groups that no row has."""
        return len(self.bias) * self.most * self.bias.shape[1] + len(self.places) * self.read

    def _belong(self, of_row: Int[Tensor, " rows"]) -> None:
        """Which prompt each row goes on from. `grid` holds a row for every prompt and place in its group, some row
        where the group has fewer, and `slots` the place of each row in it; both None where no group has."""
        counts = of_row.bincount()
        self.of_row, self.most = of_row, int(counts.max())
        self.grid = self.slots = None
        if len(counts) * self.most > len(of_row):
            first = (counts.cumsum(0) - counts)[of_row]
            self.slots = of_row * self.most + torch.arange(len(of_row)) - first
            self.grid = torch.zeros(len(counts) * self.most, dtype=torch.long)
            self.grid[self.slots] = torch.arange(len(of_row))
        biases = self.bias[:, None, None].expand(-1, self.shared, -1, -1)
        self.biases = biases.reshape(-1, 1, self.bias.shape[1])

    def _attended(
        self,
        query: Float[Tensor, "rows shared several width"],
        prompt_keys: Float[Tensor, "pairs before width"],
        prompt_values: Float[Tensor, "pairs before width"],
        keys: Float[Tensor, "rows shared after width"],
        values: Float[Tensor, "rows shared after width"],
    ) -> Float[Tensor, "rows mixed"]:
        """Attention of one query a head to its prompt and what came after; queries are scaled already."""
        before, own = prompt_keys.shape[1], values.flatten(0, 1)
        to_prompt = torch.baddbmm(self.biases, self._by_prompt(query), prompt_keys.transpose(1, 2))
        to_own = torch.bmm(query.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2)).view(*query.shape[:3], -1)
        weights = torch.cat([self._by_row(to_prompt, query.shape[2]), to_own], 3).softmax(3)
        mixed = self._by_row(torch.bmm(self._by_prompt(weights[..., :before]), prompt_values), query.shape[2])
        after = weights[..., before:].flatten(0, 1)
        rest = (after[..., None] * own[:, None]).sum(2) if own.shape[1] < FEW else torch.bmm(after, own)
        return torch.add(mixed, rest.view(mixed.shape)).flatten(1)

    def _by_prompt(self, of_rows: Float[Tensor, "rows shared several n"]) -> Float[Tensor, "pairs places n"]:
        grid = of_rows if self.grid is None else of_rows.index_select(0, self.grid)
        return grid.unflatten(0, (-1, self.most)).transpose(1, 2).flatten(0, 1).flatten(1, 2)

    def _by_row(
        self, of_pairs: Float[Tensor, "pairs places n"], several: int
    ) -> Float[Tensor, "rows shared several n"]:
        grid = of_pairs.view(-1, self.shared, self.most, several, of_pairs.shape[2]).transpose(1, 2).flatten(0, 1)
        return grid if self.slots is None else grid.index_select(0, self.slots)


class _Layer:
    """A layer's weights, joined: rows of a product stand for queries, keys and values, or for gate and up."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.width: int = attention.head_dim
        self.eps, self.activation = layer.input_layernorm.variance_epsilon, mlp.act_fn
        turned = (attention.q_proj, attention.k_proj)
        self.heads, self.shared = (len(part.weight) // self.width for part in turned)
        weight = torch.cat([self._paired(part.weight) for part in turned] + [attention.v_proj.weight])
        self.bias = None
        if attention.q_proj.bias is not None:
            self.bias = torch.cat([self._paired(part.bias) for part in turned] + [attention.v_proj.bias])
        # Queries are scaled where their norm's weights are, or, without a norm, where they are made.
        self.norms = None
        if hasattr(attention, "q_norm"):
            query, key = _scale(attention.q_norm) * attention.scaling, _scale(attention.k_norm)
            norms = [query.expand(self.heads, -1), key.expand(self.shared, -1)]
            self.norms = self._paired(torch.cat(norms).flatten()).view(-1, self.width)
            self.head_eps: float = attention.q_norm.variance_epsilon
        else:
            weight[: self.heads * self.width] *= attention.scaling
            if self.bias is not None:
                self.bias[: self.heads * self.width] *= attention.scaling
        self.weight = weight * _scale(layer.input_layernorm)
        self.output, self.down = attention.o_proj.weight.T, mlp.down_proj.weight.T
        self.gate_and_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        self.gate_and_up *= _scale(layer.post_attention_layernorm)

    def projected(
        self, hidden: Float[Tensor, "rows hidden"], turn: Tensor
    ) -> tuple[
        Float[Tensor, "rows shared several width"],
        Float[Tensor, "rows shared width"],
        Float[Tensor, "rows shared width"],
    ]:
        """Queries, keys and values; `turn` [rows, 1, width / 2], complex."""
        parts = linear(_normed(hidden, self.eps), self.weight, self.bias).unflatten(1, (-1, self.width))
        both, value = parts.split([self.heads + self.shared, self.shared], 1)
        if self.norms is not None:
            both = _normed(both, self.head_eps) * self.norms
        both = torch.view_as_real(torch.view_as_complex(both.unflatten(2, (-1, 2))) * turn).flatten(2)
        query, key = both.split([self.heads, self.shared], 1)
        return query.unflatten(1, (self.shared, -1)), key, value

    def _paired(self, rows: Tensor) -> Tensor:
        """Rows, or numbers, of several heads: of each the two that turn together side by side."""
        return rows.unflatten(0, (-1, 2, self.width // 2)).transpose(1, 2).flatten(0, 2)


def _side_by_side(keys: Float[Tensor, "prompts shared keys width"]) -> Tensor:
    return keys.unflatten(3, (2, -1)).transpose(3, 4).flatten(3)


def _scale(norm: Any) -> Tensor:
    """What `_normed` leaves out."""
    return norm.weight * len(norm.weight) ** 0.5


def _normed(x: Float[Tensor, "... n"], eps: float) -> Tensor:
    """x / sqrt(sum of squares + n x eps): the root mean square norm but for the weights and sqrt(n)."""
    size = vector_norm(x, dim=-1, keepdim=True)
    return x * size.square_().add_(x.shape[-1] * eps).rsqrt_()
