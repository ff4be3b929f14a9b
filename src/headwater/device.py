"""What the device can do and what a process took of it: measured, never assumed."""

from __future__ import annotations

import json
import os
import resource
import time
from contextlib import suppress
from pathlib import Path

import platformdirs
import torch


def reset_peak(device: str) -> None:
    """Start the high-water mark of memory anew; where the system refuses it goes on from the process's start."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5): resets VmHWM


def peak_memory(device: str) -> int:
    """Bytes: of tensors on the GPU, on the CPU resident memory of the process, interpreter and libraries included."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_memory(device: str) -> int:
    """Bytes in use now, counted as `peak_memory` does."""
    return torch.cuda.memory_allocated() if device.startswith("cuda") else _status("VmRSS")


def memory_of(device: str) -> int:
    """Bytes of the device, of the machine for the CPU; 0 where it cannot be told."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(device).total_memory if torch.cuda.is_available() else 0
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0


def _status(name: str) -> int:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    return 0


def name_of(device: str, threads: int) -> str:
    """`NVIDIA H100 80GB HBM3`, or the CPU with the number of threads."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device) if torch.cuda.is_available() else device
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {threads} threads"
    return f"cpu, {threads} threads"


def matmul_peak(device: str, dtype: str) -> float:
    """FLOP/s of a large square product on this device, the best of several; kept in the user's cache directory.

    What a model's FLOPs are divided by for its MFU (arXiv:2204.02311, appendix B), measured instead of a data sheet's.
    """
    path = platformdirs.user_cache_path("headwater") / "matmul_peak.json"
    key = f"{name_of(device, torch.get_num_threads())}, {dtype}, torch {torch.__version__}"
    known: dict[str, float] = {}
    with suppress(OSError, ValueError):
        known = json.loads(path.read_text(encoding="utf-8"))
    if key not in known:
        known[key] = _measure(device, getattr(torch, dtype))
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(known, indent=1), encoding="utf-8")
    return known[key]


def _measure(device: str, dtype: torch.dtype) -> float:
    on_gpu = device.startswith("cuda")
    size = 8192 if on_gpu else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best, end = 0.0, time.perf_counter() + 0.5
    while best == 0 or time.perf_counter() < end:
        started = time.perf_counter()
        torch.matmul(a, b)
        if on_gpu:
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best
