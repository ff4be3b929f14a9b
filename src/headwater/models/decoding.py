"""One token a row through a decoder of Llama's family on a CPU, with fewer operations than its modules."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import linear, rms_norm
from transformers import DynamicCache

from headwater.models.language_model import LanguageModel

FAMILY = ("llama", "qwen2", "qwen3")
"""Model types whose layers are computed as `Decoder` does."""
ROTARY = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary positions whose angles do not depend on how long the longest row is."""


class Decoder:
    """The model's own weights, read in place: what `model.base` makes of one more token a row, up to rounding.

    Small models spend most of a decoding step between their operations (benchmarks/README.md).
    """

    def __init__(self, model: LanguageModel, positions: int) -> None:
        """For tokens at positions below `positions`."""
        self.base: Any = model.base  # Any: modules are typed as one another's tensors
        self.width: int = self.base.layers[0].self_attn.head_dim
        like = torch.empty(0, dtype=self.base.embed_tokens.weight.dtype)
        cos, sin = self.base.rotary_emb(like, torch.arange(positions)[None])
        self.cos = cos[0]
        self.sin = torch.cat([-sin[0, :, : self.width // 2], sin[0, :, self.width // 2 :]], 1)

    @staticmethod
    def fits(model: LanguageModel) -> bool:
        """Whether a model is of the family, on a CPU and as its authors wrote it: no adapters, no biases but those of
        queries, keys and values. Not in bfloat16, where the modules are faster."""
        if model.device.type != "cpu" or model.module.config.model_type not in FAMILY:
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

    def step(
        self,
        token: Int[Tensor, " rows"],
        positions: Int[Tensor, " rows"],
        bias: Float[Tensor, "rows 1 1 keys"],
        cache: DynamicCache,
    ) -> Float[Tensor, "rows hidden"]:
        """Last hidden states after the final norm, extending the cache; `bias` is added to the scores of every key,
        the new one included."""
        hidden = self.base.embed_tokens(token)
        cos, sin = self.cos[positions, None], self.sin[positions, None]
        pairs = bias.expand(-1, self.base.config.num_key_value_heads, -1, -1).flatten(0, 1)
        layers: list[Any] = cache.layers  # Any: transformers types layers of other kinds too
        for layer, held in zip(self.base.layers, layers, strict=True):
            attention, mlp = layer.self_attn, layer.mlp
            normed = _norm(layer.input_layernorm, hidden)
            query, key, value = (
                linear(normed, part.weight, part.bias).unflatten(1, (-1, self.width))
                for part in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            if hasattr(attention, "q_norm"):
                query, key = _norm(attention.q_norm, query), _norm(attention.k_norm, key)
            query, key = self._turned(query, cos, sin), self._turned(key, cos, sin)
            keys, values = held.update(key[:, :, None], value[:, :, None])
            mixed = _attended(query, keys, values, pairs, attention.scaling)
            hidden = torch.addmm(hidden, mixed, attention.o_proj.weight.T)
            normed = _norm(layer.post_attention_layernorm, hidden)
            gate, up = mlp.act_fn(linear(normed, mlp.gate_proj.weight)), linear(normed, mlp.up_proj.weight)
            hidden = torch.addmm(hidden, gate.mul_(up), mlp.down_proj.weight.T)
        return _norm(self.base.norm, hidden)

    def _turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotary positions: the halves of every head, swapped, meet the sines."""
        swapped = x.unflatten(2, (2, -1)).flip(2).flatten(2)
        return torch.addcmul(x * cos, swapped, sin)


def _norm(module: Any, x: Tensor) -> Tensor:
    return rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)


def _attended(
    query: Float[Tensor, "rows heads width"],
    keys: Float[Tensor, "rows shared keys width"],
    values: Float[Tensor, "rows shared keys width"],
    bias: Float[Tensor, "pairs 1 keys"],
    scale: float,
) -> Float[Tensor, "rows mixed"]:
    """Attention of one query a row; `bias` is for every pair of a row and a head of keys."""
    several = query.reshape(len(bias), -1, query.shape[2])
    scores = torch.baddbmm(bias, several, keys.flatten(0, 1).transpose(1, 2), alpha=scale)
    return torch.bmm(scores.softmax(-1), values.flatten(0, 1)).view(len(query), -1)
