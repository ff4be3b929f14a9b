"""One optimizer step from micro-batches: one global denominator per loss term, the only backward()."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from headwater.config import Optimizer
from headwater.losses.numerics import Metrics, merged
from headwater.mesh import Mesh
from headwater.models.language_model import LanguageModel
from headwater.rollouts.batch import MicroBatch, states


@dataclass(frozen=True)
class Term:
    """A loss term of one micro-batch: its weighted sum, the denominator of the whole batch over all ranks, a
    coefficient."""

    total: Float[Tensor, ""]
    denominator: float
    coef: float = 1.0


Loss = Callable[[Float[Tensor, "tokens hidden"], Float[Tensor, "rows hidden"], MicroBatch], tuple[list[Term], Metrics]]
"""Hidden states that predict the targets, the padded LM head, the micro-batch -> loss terms and metrics."""


WIDENED = 8192
"""Rows of a bfloat16 gradient at a time that a CPU adds to float32: torch widens the whole of what it adds."""


class NonFiniteError(RuntimeError):
    """A loss or gradient was NaN or infinite; `micro_batches` are what the step saw."""

    def __init__(self, message: str, micro_batches: Sequence[MicroBatch]) -> None:
        super().__init__(message)
        self.micro_batches = list(micro_batches)


class AdamW:
    """torch's AdamW over float32 masters of the trainable weights.

    A float32 model's weights are their own masters. A model that computes in bfloat16 (load it in float32: rounding
    happens here) has its gradients added to the masters' in float32 as soon as they exist, and every step rounded back.
    Weight decay acts on matrices only, not on norms and biases.
    """

    def __init__(self, model: LanguageModel, settings: Optimizer) -> None:
        dtype = getattr(torch, model.config.dtype)
        self.weights = {name: p for name, p in model.module.named_parameters() if p.requires_grad}
        self.masters = {name: _master(weight, dtype) for name, weight in self.weights.items()}
        groups = [
            {"params": [m for m in self.masters.values() if m.ndim >= 2], "weight_decay": settings.weight_decay},
            {"params": [m for m in self.masters.values() if m.ndim < 2], "weight_decay": 0.0},
        ]
        self.inner = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=settings.lr, betas=settings.betas, fused=True
        )

    def step(self, lr: float, *, scale: float = 1.0) -> None:
        """One step along `scale` times the gradients, which are spent."""
        for group in self.inner.param_groups:
            group["lr"] = lr
        if scale != 1:
            for master in self.masters.values():
                if master.grad is not None:
                    master.grad.mul_(scale)
        self.inner.step()
        self.zero()
        self._round()

    @property
    def steps(self) -> int:
        """Steps taken."""
        return max((int(slots["step"]) for slots in self.inner.state.values()), default=0)

    def zero(self) -> None:
        self.inner.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Flat tensors: `master.NAME`, `exp_avg.NAME`, `exp_avg_sq.NAME`, `step.NAME`."""
        out = {f"master.{name}": master.detach() for name, master in self.masters.items()}
        for name, master in self.masters.items():
            out |= {f"{slot}.{name}": value for slot, value in self.inner.state.get(master, {}).items()}
        return out

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        for name, master in self.masters.items():
            master.copy_(state[f"master.{name}"])
            slots = {s: state[f"{s}.{name}"] for s in ("step", "exp_avg", "exp_avg_sq") if f"{s}.{name}" in state}
            if slots:
                on_device = {
                    s: v if s == "step" and not master.is_cuda else v.to(master.device) for s, v in slots.items()
                }
                self.inner.state[master] = on_device
        self._round()

    def unround(self) -> None:
        """Make the model's weights the float32 masters themselves: the end of training."""
        for name, weight in self.weights.items():
            weight.data = self.masters[name].data

    @torch.no_grad()
    def _round(self) -> None:
        for name, weight in self.weights.items():
            if weight is not self.masters[name]:
                weight.copy_(self.masters[name])


def learning_rate(settings: Optimizer, step: int, steps: int) -> float:
    """Rate of step 0..steps-1: linear warm-up to `lr`, then constant, linear or cosine to 0 at `steps`."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.lr
    progress = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    return settings.lr * (1 - progress if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress)))


def update(
    model: LanguageModel,
    optimizer: AdamW,
    micro_batches: Sequence[MicroBatch],
    loss: Loss,
    *,
    lr: float,
    max_grad_norm: float,
    mesh: Mesh,
    still: Sequence[MicroBatch] = (),
    before: Callable[[MicroBatch], MicroBatch] = lambda micro: micro,
) -> dict[str, float]:
    """Gradient of sum_terms coef x (sum over all micro-batches and ranks) / denominator, clipped by global norm, then
    one step.

    The result does not depend on how rows were cut into micro-batches and dealt to ranks; a rank may have none. `still`
    are known to have no gradient: they count in loss and metrics, without a backward pass. `before` may add fields to a
    micro-batch when its turn comes, while the model's activations do not exist. Where the gradient is
    exactly 0 (no trained token, or only groups of equal rewards) nothing is learned: weights and optimizer state stay
    as they are.
    Raises NonFiniteError, on every rank and before the weights change, when a loss or the gradient is not finite.
    """
    metrics: Metrics = {}
    dropout = model.lora is not None and model.lora.dropout > 0
    if dropout:
        # By the number of updates, so that a resumed stage drops what it would have dropped.
        torch.manual_seed(optimizer.steps * mesh.size + mesh.rank)
    # Activation checkpointing and dropout act in train mode only; sampling needs eval mode, for its cache.
    model.module.train(model.checkpoint_activations or dropout)
    value, failed = torch.zeros((), dtype=torch.float64), []
    for micro, learns in [*((m, True) for m in micro_batches), *((m, False) for m in still)]:
        micro = before(micro)
        with torch.set_grad_enabled(learns):
            hidden = states(model, micro)
            terms, observed = loss(hidden, model.padded_head, micro)
        # The empty sum ties the loss to the graph when every term is left out.
        total = sum((t.coef / t.denominator * t.total for t in terms if t.denominator > 0), hidden[:0].sum())
        value += total.detach().double().cpu()
        if not bool(torch.isfinite(total)):
            failed = [micro]
            break
        if learns:
            total.backward()
        metrics = merged(metrics, {name: (a.double().cpu(), b.double().cpu()) for name, (a, b) in observed.items()})
    model.module.eval()
    value = mesh.all_sum(value)
    if not bool(torch.isfinite(value)):
        optimizer.zero()
        raise NonFiniteError(f"the loss is {float(value)}", failed)
    norm = _reduce_gradients(optimizer, mesh)
    if not math.isfinite(norm):
        optimizer.zero()
        raise NonFiniteError(f"the gradient norm is {norm}", micro_batches)
    if norm > 0:
        optimizer.step(lr, scale=min(1.0, max_grad_norm / norm))
    optimizer.zero()
    reduced: Metrics = {}
    for observed in mesh.collect(metrics):
        reduced = merged(reduced, observed)
    return {
        **{name: _value(name, *sums) for name, sums in reduced.items()},
        "optim/loss": float(value),
        "optim/grad_norm": norm,
        "optim/lr": lr,
    }


def _reduce_gradients(optimizer: AdamW, mesh: Mesh) -> float:
    """Sum every gradient over ranks, in place; their global L2 norm."""
    norms = []
    for master in optimizer.masters.values():
        if master.grad is None and mesh.size > 1:
            # Collectives must match: a rank without tokens still takes part.
            master.grad = torch.zeros_like(master)
        if master.grad is not None:
            master.grad.copy_(mesh.all_sum(master.grad))
            norms.append(torch.linalg.vector_norm(master.grad))
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0


def _value(name: str, total: Tensor, count: Tensor) -> float:
    if name.endswith("_max"):
        return float(total)
    return float(total / count) if float(count) else math.nan


def _master(weight: torch.nn.Parameter, dtype: torch.dtype) -> torch.nn.Parameter:
    """The weight itself, or a float32 copy of one that is rounded to `dtype` in place and hands over its gradients."""
    if weight.dtype == torch.float64 or dtype == torch.float32:
        return weight
    master = torch.nn.Parameter(weight.detach().float().clone())
    weight.data = weight.data.to(dtype)

    def collect(param: Tensor) -> None:
        assert param.grad is not None
        if master.grad is None:
            master.grad = param.grad.float()
        else:
            lot = len(param) if param.is_cuda else WIDENED
            for total, part in zip(master.grad.split(lot), param.grad.split(lot), strict=True):
                total += part
        param.grad = None

    weight.register_post_accumulate_grad_hook(collect)
    return master
