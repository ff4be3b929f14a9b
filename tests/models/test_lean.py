"""Norms and gated layers with their own backward passes: gradients, transformers' values, and what is kept."""

import os
import subprocess
import sys

import pytest
import torch
from families import random_module  # pyright: ignore -- pytest puts it on the path
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from headwater.assets import fetch
from headwater.config import ModelConfig
from headwater.models.language_model import load_model
from headwater.models.lean import make_lean, rms_norm, silu_times


def test_gradients_are_those_of_the_formulas():
    x, gate, up = (torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True) for _ in range(3))
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    exact = weight * x / (x.square().mean(-1, keepdim=True) + 0.3).sqrt()
    assert torch.allclose(rms_norm(x, weight, 0.3), exact, rtol=1e-14)
    assert torch.allclose(silu_times(gate, up), gate * gate.sigmoid() * up, rtol=1e-14)
    assert torch.autograd.gradcheck(lambda a, b: rms_norm(a, b, 0.3), (x, weight))
    assert torch.autograd.gradcheck(lambda a, b: rms_norm(a.transpose(0, 1), b, 1e-6), (x, weight))
    assert torch.autograd.gradcheck(silu_times, (gate, up))


def run(module: torch.nn.Module) -> tuple[Tensor, dict[str, Tensor], int]:
    """Logits, gradients of a fixed function of them, and bytes kept for the backward pass."""
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    ids = torch.arange(60).view(3, 20) % 300
    module.zero_grad()
    with saved_tensors_hooks(keep, lambda x: x):
        logits = module(input_ids=ids, use_cache=False).logits
    (logits.double().log_softmax(-1)[..., 7].sum()).backward()
    return (
        logits.detach(),
        {name: p.grad for name, p in module.named_parameters() if p.grad is not None},
        sum(kept.values()),
    )


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_a_model_computes_what_it_computed_and_keeps_less(kind: str, dtype: torch.dtype, near: float):
    module = random_module(kind, dtype)
    logits, gradients, kept = run(module)
    make_lean(module)
    ours, found, less = run(module)
    assert less < 0.85 * kept
    assert (ours - logits).float().norm() < near * logits.float().norm()
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (found[name] - gradient).float().norm() <= near * gradient.float().norm(), name


def test_other_classes_stay_as_they_are():
    gemma = random_module("gemma", torch.float32)
    make_lean(gemma)
    assert not any("forward" in vars(part) for part in gemma.modules())
    relu = random_module("llama", torch.float32, hidden_act="relu")
    make_lean(relu)
    changed = {type(part).__name__ for part in relu.modules() if "forward" in vars(part)}
    assert changed == {"LlamaRMSNorm"}


def test_models_loaded_on_a_cpu_are_lean():
    config = ModelConfig(source="world:student")
    module = load_model(config, fetch(config.source)).module
    changed = [type(part).__name__ for part in module.modules() if "forward" in vars(part)]
    assert changed.count("Qwen3RMSNorm") == 3 * 4 + 1 and changed.count("Qwen3MLP") == 3


def test_prepared_products_are_not_kept_by_the_thousand():
    """Half a megabyte for every shape of a bfloat16 product, and shapes are new every step; what a user sets stays."""
    names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    program = f"import os, headwater; print(*(os.environ[name] for name in {names}))"
    own = {name: value for name, value in os.environ.items() if name not in names}
    for given, wanted in (({}, "16 16"), ({names[0]: "99"}, "99 16")):
        out = subprocess.run(
            [sys.executable, "-c", program], env=own | given, capture_output=True, text=True, check=True
        )
        assert out.stdout.split() == wanted.split()
