"""Attention on a CPU as fast as torch has it: heads that share keys read them in place, and short rows in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

CPU_ATTENTION = "headwater_cpu"
"""`attn_implementation` of models on a CPU."""
FLOAT32_KEYS = 512
"""Up to so many keys the backward pass of torch's CPU kernel is faster in float32 than in bfloat16
(benchmarks/README.md, "What was done on a CPU")."""

ELSEWHERE = ("position_bias", "softcap", "cache")
"""What some architectures ask of attention, left to the original."""


def cpu_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **others: Any
) -> tuple[Tensor, None]:
    """transformers' `sdpa`: query [rows, heads, tokens, width] and key, value [rows, shared heads, keys, width] to
    [rows, tokens, heads, width].

    Where there is a mask the original copies keys and values for every head that shares them; only CUDA needs that.
    """
    dtype, several = query.dtype, query.shape[2] > 1
    if several and key.shape[2] <= FLOAT32_KEYS and dtype == torch.bfloat16:
        query, key, value = query.float(), key.float(), value.float()
    if attention_mask is None or not several or any(others.get(name) is not None for name in ELSEWHERE):
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **others)
        return out.to(dtype), None
    how = {"dropout_p": others.get("dropout", 0.0), "scale": others.get("scaling"), "enable_gqa": True}
    out = scaled_dot_product_attention(query, key, value, attention_mask, **how)
    return out.to(dtype).transpose(1, 2).contiguous(), None


AttentionInterface.register(CPU_ATTENTION, cpu_attention)
AttentionMaskInterface.register(CPU_ATTENTION, sdpa_mask)
