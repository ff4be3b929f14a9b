"""Tiny models with the shipped world's tokenizer and, where they are, the shipped models themselves."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import PreTrainedTokenizerBase

import headwater
from headwater.config import LoRA, ModelConfig
from headwater.models.language_model import LanguageModel, adapt, load_model, wrap
from headwater.tasks.chains import Chains
from headwater.types import Problem, Verdict

MakeModel = Callable[..., LanguageModel]

ROOT = Path(__file__).resolve().parents[1]
WORLD = Path(headwater.__file__).parent / "data" / "world"
# Each ends a completion too, so that a random model's completions have many lengths.
STOPS = tuple("!#$%&ABCDEFGHIJKLMNOPQRSTUVWXYZ")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pretrain_world() -> ModuleType:
    """scripts/pretrain_world.py as a module."""
    spec = importlib.util.spec_from_file_location("pretrain_world", ROOT / "scripts" / "pretrain_world.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["pretrain_world"] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tokenizer(pretrain_world: ModuleType) -> PreTrainedTokenizerBase:
    return pretrain_world.build_tokenizer()


@pytest.fixture(scope="session")
def tiny_directory(pretrain_world: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 with 2 layers of width 32 and the world's tokenizer, as a Hugging Face directory."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = pretrain_world.build_tokenizer()
    pretrain_world.build_model("32x2", tokenizer, 0).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def make_model(pretrain_world: ModuleType, tokenizer: PreTrainedTokenizerBase) -> MakeModel:
    """A random model in memory: `make_model(seed, rung="32x2", dtype=..., scale=..., trained=..., stops=..., ...)`.

    `scale` multiplies the initial matrices: peaked distributions that depend on all of the context. The head has rows
    beyond the tokenizer's. With `lora` only adapters are trained.
    """

    def make(
        seed: int = 0,
        rung: str = "32x2",
        *,
        dtype: torch.dtype = torch.float32,
        scale: float = 3.0,
        trained: bool = True,
        stops: tuple[str, ...] = STOPS,
        compute: str = "float32",
        template: str = "chat",
        lora: LoRA | None = None,
    ) -> LanguageModel:
        module = pretrain_world.build_model(rung, tokenizer, seed).to(dtype).eval().requires_grad_(trained)
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(scale)
        config = ModelConfig.model_validate(
            {"source": f"random:{seed}", "dtype": compute, "stop_tokens": stops, "template": template}
        )
        model = wrap(module, tokenizer, config)
        if lora is None:
            return model
        # Frozen weights are loaded in the compute dtype; B is not left at 0, or A would have no gradient yet.
        for parameter in module.parameters():
            parameter.data = parameter.data.to(dtype if compute == "float32" else getattr(torch, compute))
        model = adapt(model, lora, seed)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        return model

    return make


@pytest.fixture(scope="session")
def problems() -> tuple[Problem, ...]:
    """24 labelled problems with prompts of 27 to 39 characters."""
    return Chains(train=24).problems("train")


@pytest.fixture(scope="session")
def parity_grade() -> Callable[[list[tuple[Problem, str]]], list[Verdict]]:
    """A grader that a random model sometimes pleases: half of the completions have an even number of characters."""

    def grade(pairs: list[tuple[Problem, str]]) -> list[Verdict]:
        rights = [len(text) % 2 == 0 for _, text in pairs]
        return [Verdict(right, True, "correct" if right else "wrong", float(right)) for right in rights]

    return grade


@pytest.fixture(scope="session")
def load_world() -> Callable[..., LanguageModel]:
    """`load_world("student", trained=True)`: a shipped model."""

    def load(role: str, *, trained: bool = False) -> LanguageModel:
        return load_model(ModelConfig(source=f"world:{role}"), WORLD / role, trained=trained)

    return load
