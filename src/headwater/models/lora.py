"""LoRA (arXiv:2106.09685): low-rank adapters on the linear layers of a frozen model. The extra `lora` (peft)."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
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
