from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from headwater.models.attention import CPU_ATTENTION


def states_and_gradient(attention: str, dtype: torch.dtype, length: int, padding: int) -> tuple[Tensor, Tensor]:
    """Last hidden states of rows, one of them padded on the left, and the gradient of the first layer's keys."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 50}
    config = LlamaConfig(num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=1024, **sizes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).bfloat16().to(dtype).eval()
    ids = torch.randint(0, 50, (3, length))
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    hidden = model.base_model(input_ids=ids, attention_mask=mask if padding else None)[0]
    kept = hidden * mask[:, :, None]
    kept.double().square().sum().backward()
    return kept.detach(), model.base_model.layers[0].self_attn.k_proj.weight.grad


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("length", [1, 20, 600])
def test_it_is_sdpa_without_the_copies(length: int, padding: int):
    padding = min(padding, length - 1)
    for dtype, near in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        ours, theirs = (states_and_gradient(name, dtype, length, padding) for name in (CPU_ATTENTION, "sdpa"))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=near, atol=near * float(b.abs().max() + 1e-9))


@pytest.mark.parametrize("length", [20, 600])
def test_bfloat16_is_nearer_to_the_truth_or_as_near(length: int):
    """Against float64 with the same weights nothing is lost by float32 inside."""
    truth = states_and_gradient("sdpa", torch.float64, length, 5)

    def error(name: str) -> float:
        found = states_and_gradient(name, torch.bfloat16, length, 5)
        return max(float((a - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True))

    assert error(CPU_ATTENTION) < 1.1 * error("sdpa")
