"""Random models of transformers' families, two layers deep, with norms and biases that are not those of a fresh one."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}


def random_module(kind: str, dtype: torch.dtype, **settings: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **settings})
    module = AutoModelForCausalLM.from_config(config, attn_implementation="headwater_cpu")
    with torch.no_grad():
        for weight in module.parameters():
            weight.normal_(1.0 if weight.ndim == 1 else 0.0, 0.3)
    return module.to(dtype).eval()
