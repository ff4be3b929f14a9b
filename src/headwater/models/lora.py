"""LoRA (arXiv:2106.09685): low-rank adapters on the linear layers of a frozen model. The extra `lora` (peft)."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from headwater.methods import LoRA


def check_installed() -> None:
    """ValueError without peft."""
    if importlib.util.find_spec("peft") is None:
        raise ValueError("lora needs peft: pip install 'headwater[lora]'")


def check_targets(settings: LoRA, directory: Path) -> None:
    """Raise what `add_adapters` would, from the model's configuration alone."""
    check_installed()
    with torch.device("meta"):
        target_layers(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory)), settings)


def target_layers(module: PreTrainedModel, settings: LoRA) -> list[str]:
    """Names of the linear layers that get adapters.

    Raises ValueError for a name that is no linear layer below the LM head, which the losses read as it stands.
    """
    decoder = module.base_model.named_modules()
    names = {name.rpartition(".")[2] for name, layer in decoder if isinstance(layer, torch.nn.Linear)}
    targets = names if settings.targets == "all-linear" else set(settings.targets)
    if not targets or not targets <= names:
        raise ValueError(
            f"lora.targets {sorted(targets - names)} are not in this model, whose linear layers are {sorted(names)}: "
            "name some of these, or use 'all-linear'"
        )
    return sorted(targets)


def add_adapters(module: PreTrainedModel, settings: LoRA, seed: str | int) -> None:
    """Run W + alpha / rank B A in place of every target W; A and B alone take gradients.

    A is drawn by `seed` (Kaiming uniform), B is 0, so nothing changes yet. Raises ValueError without peft and as
    `target_layers` does.
    """
    check_installed()
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=target_layers(module, settings),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random.Random(f"lora {seed}").getrandbits(63))
        inject_adapter_in_model(config, module)
    module.eval()


@contextmanager
def without_adapters(module: PreTrainedModel) -> Iterator[None]:
    """The frozen model that the adapters sit on, for the time of the block."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def save_adapter(module: PreTrainedModel, directory: Path) -> None:
    """Write the adapters alone, as `PeftModel.from_pretrained(base, directory)` reads them."""
    from peft import get_peft_model_state_dict

    directory.mkdir(parents=True)
    weights = get_peft_model_state_dict(module, save_embedding_layers=False)
    # peft's files name the layers of a module that is wrapped twice; ours has its adapters in place.
    named = {f"base_model.model.{name}": weight.detach().contiguous().cpu() for name, weight in weights.items()}
    save_file(named, directory / "adapter_model.safetensors")
    module.peft_config["default"].save_pretrained(str(directory))  # pyright: ignore -- set by peft


def merged(base: Path, adapter: Path) -> PreTrainedModel:
    """The model in `base` in float32, with the weights W + alpha / rank B A."""
    from peft import PeftModel

    module = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(module, str(adapter)).merge_and_unload()  # pyright: ignore -- typed a Module


def join_adapters(adapters: Sequence[Path], directory: Path, base: str, dtype: torch.dtype) -> None:
    """Write one adapter for the model `base` that adds what these add together; their ranks add up.

    sum_i s_i B_i A_i = s [B_1 s_1 / s, B_2 s_2 / s, ...] [A_1; A_2; ...] with the last one's s = alpha / rank.
    """
    from peft import LoraConfig

    configs: list[Any] = [LoraConfig.from_pretrained(str(path)) for path in adapters]
    parts = [load_file(path / "adapter_model.safetensors") for path in adapters]
    last, scales = configs[-1], [config.lora_alpha / config.r for config in configs]
    joined: dict[str, torch.Tensor] = {}
    for name in sorted(set().union(*parts)):
        like = next(part[name] for part in parts if name in part)
        rows = "lora_A" in name
        blocks = []
        for part, config, scale in zip(parts, configs, scales, strict=True):
            shape = (config.r, like.shape[1]) if rows else (like.shape[0], config.r)
            block = part.get(name, torch.zeros(shape))  # a stage without this target added nothing there
            blocks.append(block if rows else block * (scale / scales[-1]))
        joined[name] = torch.cat(blocks, 0 if rows else 1).to(dtype).contiguous()
    last.r = sum(config.r for config in configs)
    last.lora_alpha = scales[-1] * last.r
    last.target_modules = {name.split(".lora_")[0].rpartition(".")[2] for name in joined}
    last.base_model_name_or_path = base
    last.save_pretrained(str(directory))
    save_file(joined, directory / "adapter_model.safetensors", {"format": "pt"})
