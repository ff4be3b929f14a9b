"""Norms and gated layers of Llama's family for a CPU, with backward passes of their own: fewer passes over activations
and fewer of them kept than autograd needs."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.linalg import vector_norm
from torch.nn.functional import silu
from transformers.activations import SiLUActivation

NORMS = ("LlamaRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")
GATED = ("LlamaMLP", "Qwen2MLP", "Qwen3MLP")
"""Classes of transformers whose `forward` is what is computed here."""


def make_lean(module: torch.nn.Module) -> None:
    """Have every norm and gated layer of the module compute as this file does; other classes stay as they are."""
    for part in module.modules():
        name = type(part).__name__
        if name in NORMS:
            part.forward = MethodType(_norm, part)
        elif name in GATED and isinstance(part.act_fn, torch.nn.SiLU | SiLUActivation):
            part.forward = MethodType(_gated, part)


def _norm(self: Any, x: Tensor) -> Tensor:
    return rms_norm(x, self.weight, self.variance_epsilon)


def _gated(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(silu_times(self.gate_proj(x), self.up_proj(x)))


def rms_norm(x: Float[Tensor, "... n"], weight: Float[Tensor, " n"], eps: float) -> Float[Tensor, "... n"]:
    """weight x / sqrt(mean(x^2) + eps), in float32 from bfloat16 up to the product with the weight (as transformers);
    x is kept and nothing as large."""
    return _RMSNorm.apply(x, weight, eps)


def silu_times(gate: Float[Tensor, "... n"], up: Float[Tensor, "... n"]) -> Float[Tensor, "... n"]:
    """silu(gate) up; the two are kept and not silu(gate)."""
    return _SiluTimes.apply(gate, up)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        n, dtype = x.shape[-1], torch.promote_types(x.dtype, torch.float32)
        size = vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
        rate = size.square_().add_(n * eps).rsqrt_().mul_(n**0.5)
        ctx.save_for_backward(x, weight, rate)
        return (x * rate).to(x.dtype).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rate = ctx.saved_tensors
        grad, n = grads[0].to(rate.dtype), x.shape[-1]
        unit = x * rate
        product = (grad * unit).reshape(-1, n)
        along = (product @ weight.to(rate.dtype)).view(rate.shape).mul_(rate).div_(-n)
        grad_x = (grad * weight).mul_(rate).addcmul_(unit, along).to(x.dtype)
        return grad_x, product.sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None, None


class _SiluTimes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grads[0] * up, gate), silu(gate).mul_(grads[0])
