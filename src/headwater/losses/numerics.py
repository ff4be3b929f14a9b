"""What all losses share: the return type, precision, and keeping masked entries away from every exp and product."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from typing import Any, no_type_check

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

Metrics = dict[str, tuple[Tensor, Tensor]]
"""Name -> (total, count), detached; the reported value is total / count over all micro-batches and ranks, or for a name
that ends in `_max` the largest total."""
Loss = tuple[Float[Tensor, ""], Float[Tensor, ""], Metrics]

LOGPROB_FLOOR = -100.0
"""A teacher's or reference's log-prob below this counts as this. exp(-103) is the smallest positive float32, so the
floor says 'no mass at all' and keeps a forbidden token's penalty finite: 100 nats per unit of student mass on it."""

NO_MASS = -1e4
"""A log-prob whose exponential is 0 in every precision, and whose product with that is 0 too (-inf's would be NaN)."""


def accurate_dtype(tensor: Tensor) -> torch.dtype:
    """float64 stays float64, everything else is reduced in float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def where_member(
    values: Float[Tensor, " tokens"], member: Bool[Tensor, " tokens"], dtype: torch.dtype
) -> Float[Tensor, " tokens"]:
    """The values in `dtype`, with 0 for non-members, so that their -inf or NaN reaches neither loss nor gradient.

    Masking after an exp or a product is too late: the gradient there is 0 * inf = NaN.
    """
    return torch.where(member, values.to(dtype), 0.0)


def mean_metric(values: Float[Tensor, " tokens"], member: Bool[Tensor, " tokens"]) -> tuple[Tensor, Tensor]:
    """(total, count) over members, each counting once whatever its loss weight."""
    return torch.where(member, values.detach(), 0.0).sum(), member.sum()


def merged(metrics: Metrics, observed: Metrics) -> Metrics:
    """The totals and counts of both added; of a name that ends in `_max` the larger total."""
    out = dict(metrics)
    for name, (total, count) in observed.items():
        if name in out:
            before, counted = out[name]
            total = torch.maximum(before, total) if name.endswith("_max") else before + total
            count = counted + count
        out[name] = (total, count)
    return out


def matmul_dtype(hidden: Tensor, head: Tensor) -> torch.dtype:
    """The dtype a logits product runs in: autocast's when it is on (never for float64), else the wider of the two."""
    widest = torch.promote_types(hidden.dtype, head.dtype)
    device = hidden.device.type
    if widest != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return widest


def matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in `dtype`, also where an autocast region would choose another: forward and backward must agree."""
    with torch.autocast(a.device.type, enabled=False):
        return a.to(dtype) @ b.to(dtype)


def add_product(total: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype) -> None:
    """total += a @ b, multiplied in `dtype`; on CUDA summed in total's dtype, on a CPU some rows at a time."""
    if total.is_cuda and total.dtype != dtype:
        with torch.autocast("cuda", enabled=False):
            torch.addmm(total, a.to(dtype), b.to(dtype), out_dtype=total.dtype, out=total)
        return
    size = len(total) if total.is_cuda else max(1, 4 * CACHED // total.shape[1])
    for some, rows in zip(total.split(size), a.split(size), strict=True):
        some += matmul(rows, b, dtype)


def padded_rows(rows: int, head: Tensor) -> int:
    """How many rows of a head to multiply by when `rows` of them count.

    On CUDA the next multiple of 128: cuBLAS multiplies bfloat16 5 to 7 times slower when a side is odd, as vocabularies
    tend to be (Qwen3: 151,669 tokens).
    """
    return -(-rows // 128) * 128 if head.is_cuda else rows


def first_rows(matrix: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """The first `rows` rows in `dtype`, with rows of 0 where there are fewer."""
    matrix = matrix[:rows].to(dtype)
    return matrix if len(matrix) == rows else pad(matrix, (0, 0, 0, rows - len(matrix)))


@no_type_check
def with_columns(matrix: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """The matrix in `dtype` with columns of 0 added up to `columns`."""
    matrix = matrix.to(dtype)
    return matrix if matrix.shape[1] == columns else pad(matrix, (0, columns - matrix.shape[1]))


def fused(function: Callable[..., Any], on: Tensor) -> Callable[..., Any]:
    """The function, for tensors on CUDA compiled to a few passes over tokens x vocab instead of thirty.

    torch 2.11 cannot trace through run-time type checks: give it functions with `no_type_check`.
    """
    return _compiled(function) if on.is_cuda else function


CACHED = 1 << 19
"""Elements of a matrix that several passes on a CPU find in its cache (benchmarks/README.md)."""


def by_rows(
    function: Callable[..., Any], product: Tensor, rowwise: tuple[Tensor, ...], *rest: Any
) -> tuple[Any, ...]:  # Any: a matrix or None, then a tensor for every value
    """function(product, *rowwise, *rest), which treats every row for itself: a matrix like the product or None, then
    tensors with a value a row. On a CPU some rows at a time, and the matrix takes the product's place."""
    if product.is_cuda:
        return function(product, *rowwise, *rest)
    lot, found, matrix = max(1, CACHED // product.shape[1]), [], None
    for start in range(0, max(1, len(product)), lot):
        part = slice(start, start + lot)
        matrix, *columns = function(product[part], *(x[part] for x in rowwise), *rest)
        if matrix is not None:
            product[part] = matrix
        found.append(columns)
    return None if matrix is None else product, *(torch.cat(column) for column in zip(*found, strict=True))


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # Triton needs a C compiler at run time; without one the function stays as it is, slower and with the same result.
    has_compiler = any(shutil.which(name) for name in (os.environ.get("CC", "gcc"), "clang"))
    return torch.compile(function, dynamic=True) if has_compiler else function


def rows_and_chunk(head: Tensor, temperature: float, vocab_size: int, chunk_tokens: int) -> tuple[int, int]:
    """Rows of the head that count, and tokens whose logits exist together: chunk_tokens, or fewer where those would
    outnumber the head's weights (each chunk adds to their gradient; on a CPU half of them) and 2^24. ValueError unless
    all are positive."""
    if not (temperature > 0 and vocab_size >= 1 and chunk_tokens >= 1):
        raise ValueError(
            "temperature, vocab_size and chunk_tokens must be positive, "
            f"got {temperature}, {vocab_size} and {chunk_tokens}; temperature 0 (greedy) has no log-probs"
        )
    rows = min(vocab_size, len(head))
    return rows, min(chunk_tokens, max(head.shape[1] // (1 if head.is_cuda else 2), 2**24 // rows))
