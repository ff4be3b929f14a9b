"""What vLLM's worker does for a student under training: takes weights from files, sums those it multiplies by.

Stands alone: it runs in vLLM's environment (`--worker-extension-cls headwater_vllm.Weights`), which has no headwater.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BLOCK = 1 << 22
"""Elements that are mixed at once."""
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def checksums(named: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """64 bits for every layer (the first number in a name; "" without any): the sum of a mixing of each element's bits.

    Zeros mix to 0, so neither the order of elements, fused matrices nor rows of padding matter; -0 counts as 0.
    """
    sums: Counter[str] = Counter()
    for name, weight in named:
        layer = re.search(r"(?<=\.)\d+(?=\.)", name)
        for part in weight.detach().reshape(-1).split(BLOCK):
            x = (part + 0.0).view(BITS[part.element_size()]).long()
            x = x * 0x2545F4914F6CDD1D
            x = (x ^ (x >> 32)) * 0x369DEA0F31A53F85
            sums[layer[0] if layer else ""] += int((x ^ (x >> 29)).sum())
    return {layer: f"{total % 2**64:016x}" for layer, total in sums.items()}


def live(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every weight of vLLM's model once, as the next forward pass will read it; and once more where a packed copy of an
    embedding, which a head tied to it multiplies by, is not equal to it."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, weight in module.named_parameters(recurse=False):
            packed = name == "weight" and hasattr(module, "cpu_linear")
            used = unpacked(module, weight) if packed else weight
            if id(weight) not in seen:
                yield f"{prefix}.{name}", weight if weight.numel() else used
            if weight.numel() and not torch.equal(used, weight):
                yield f"{prefix}.{name}", used
            seen.add(id(weight))


def unpacked(layer: Any, weight: Tensor) -> Tensor:
    """The matrix that a layer of vLLM's CPU build multiplies by: it repacks them, and products with the unit vectors
    show them exactly."""
    width = weight.shape[1] if weight.numel() else layer.input_size_per_partition
    unit = torch.eye(width, dtype=weight.dtype)
    return torch.cat([layer.cpu_linear(rows, weight, None) for rows in unit.split(256)]).T


class Weights:
    """Methods that vLLM mixes into its worker, for POST /collective_rpc."""

    model_runner: Any
    model_config: Any
    headwater_version = "its own weights"

    def headwater_status(self, sums: str = "") -> dict[str, Any]:
        """What is served, and in which version; with `sums`, `checksums` of the weights in use."""
        from vllm import __version__  # pyright: ignore -- vLLM's environment has it

        config = self.model_config
        found = {"vllm": __version__, "version": self.headwater_version, "logprobs_mode": str(config.logprobs_mode)}
        found["dtype"] = str(config.dtype).removeprefix("torch.")
        return found | ({"sums": checksums(live(self.model_runner.get_model()))} if sums else {})

    def headwater_load(self, directory: str, version: str) -> dict[str, Any]:
        """Take over the weights in a directory's safetensors files; {"error": words} where that fails."""
        from safetensors import safe_open

        def stored() -> Iterator[tuple[str, Tensor]]:
            for path in sorted(Path(directory).glob("*.safetensors")):
                with safe_open(path, framework="pt") as file:
                    yield from ((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118 -- no mapping

        try:
            if not Path(directory).is_dir():
                raise FileNotFoundError(f"{directory} is not there")
            self.headwater_version = f"half of {version}"
            self.reload_weights(weights_iterator=stored())  # pyright: ignore -- the worker's
            for module in self.model_runner.get_model().modules():
                # A tied head is not reloaded, and the CPU build has a packed copy of it.
                if hasattr(module, "cpu_linear") and module.weight.numel():
                    module.quant_method.process_weights_after_loading(module)
            self.headwater_version = version
        except Exception as error:  # the server would answer without a reason
            return {"error": f"{type(error).__name__}: {error}"}
        return {}
