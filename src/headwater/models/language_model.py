"""A causal language model with its tokenizer: prompts in, last hidden states out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention import SDPBackend
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import DynamicLayer

from headwater.config import LoRA, ModelConfig, Served
from headwater.flops import Shape, shape_of
from headwater.models import template
from headwater.models.attention import CPU_ATTENTION
from headwater.models.lean import make_lean
from headwater.models.lora import add_adapters, check_installed, without_adapters
from headwater.types import Message

ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Not cuDNN's: it prepares every new shape, and lengths are new at most steps (benchmarks/README.md)."""


@dataclass(frozen=True)
class Prefixes:
    """Beginnings that several rows have in common, padded on the left; row i goes on from beginning `of_row[i]`."""

    ids: Int[Tensor, "prefixes width"]
    attention_mask: Int[Tensor, "prefixes width"]
    of_row: Int[Tensor, " batch"]


@dataclass(frozen=True)
class LanguageModel:
    """Weights, tokenizer and prompting of one model.

    `vocab_size` is the tokenizer's: rows of the LM head beyond it are padding, never sampled and never normalised over.
    """

    module: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: ModelConfig
    eos_ids: tuple[int, ...]
    vocab_size: int
    checkpoint_activations: bool = False
    """Recompute activations in the backward pass: less memory, a third more arithmetic."""
    compiled: bool = False
    """Decoder layers are compiled (`compile_layers`), for training and scoring; the sampler runs them as written."""
    lora: LoRA | None = None
    """Only adapters are trained, on weights that stay as they are in `directory`."""
    directory: Path | None = None
    """Where the weights were read from."""
    without_adapters: bool = False
    """Run the frozen weights alone: the reference of a policy that shares its module."""
    served: Served | None = None
    """Where the weights are; `module` then has shapes alone."""

    @property
    def device(self) -> torch.device:
        return self.module.device

    @property
    def padded_head(self) -> Float[Tensor, "rows hidden"]:
        """The LM head with its padding rows: what the losses, which know `vocab_size`, multiply without a copy."""
        return self.module.get_output_embeddings().weight  # pyright: ignore -- typed Module

    @property
    def head(self) -> Float[Tensor, "vocab hidden"]:
        """Rows of the LM head that are tokens."""
        return self.padded_head[: self.vocab_size]

    def logits(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens vocab"]:
        """Logits of the tokens, in the dtype of `hidden`."""
        # cuBLAS multiplies bfloat16 several times slower when a side is odd, as the number of tokens tends to be.
        head = self.padded_head if hidden.is_cuda else self.head
        return (hidden @ head.T.to(hidden))[:, : self.vocab_size]

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.module.parameters())

    @property
    def num_trained(self) -> int:
        """Parameters that have gradients and optimizer state: all of them, or those of the adapters."""
        return sum(p.numel() for p in self.module.parameters() if p.requires_grad)

    @property
    def shape(self) -> Shape:
        """Sizes that FLOPs are counted from; where only adapters are trained, with them."""
        adapters = 0 if self.without_adapters or self.num_trained == self.num_parameters else self.num_trained
        return shape_of(self.module.config.get_text_config().to_dict(), vocab=self.vocab_size, adapters=adapters)

    def hidden(
        self,
        ids: Int[Tensor, "batch tokens"],
        attention_mask: Int[Tensor, "batch tokens"] | None = None,
        prefixes: Prefixes | None = None,
    ) -> Float[Tensor, "batch tokens hidden"]:
        """Last hidden states, after the final norm: `hidden @ head.T` are the logits.

        Rows padded on the right need no mask (attention is causal); padded on the left they need one. With `prefixes`
        (only where `shares_prefixes`) every row goes on from its own: the states are those of the whole rows, but each
        prefix is computed once, and gradients flow back through its keys and values.
        """
        positions = None
        if attention_mask is not None:
            positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        if ids.is_cuda:
            # For good, and not in a context: activation checkpointing runs the layers again after this has returned,
            # and must meet the same kernels.
            torch.backends.cuda.enable_cudnn_sdp(False)
        with without_adapters(self.module) if self.without_adapters else nullcontext():
            if prefixes is not None:
                return self._continued(ids, prefixes)
            out = self.base(input_ids=ids, attention_mask=attention_mask, position_ids=positions, use_cache=False)[0]
        return out.to(ids.device)

    def _continued(self, ids: Int[Tensor, "batch tokens"], prefixes: Prefixes) -> Float[Tensor, "batch tokens hidden"]:
        cache, mask = DynamicCache(config=self.module.config), prefixes.attention_mask
        places = (mask.cumsum(1) - 1).clamp(min=0)
        self.base(
            input_ids=prefixes.ids, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True
        )
        cache.batch_select_indices(prefixes.of_row)
        begun = mask[prefixes.of_row]
        return self.base(
            input_ids=ids,
            attention_mask=torch.cat([begun, torch.ones_like(ids)], 1),
            position_ids=begun.sum(1, keepdim=True) + torch.arange(ids.shape[1], device=ids.device),
            past_key_values=cache,
            use_cache=True,
        )[0]

    @property
    def shares_prefixes(self) -> bool:
        """Whether `hidden` takes prefixes: every layer attends to all that came before, on one device, and is neither
        recomputed in the backward pass nor compiled."""
        plain = all(type(layer) is DynamicLayer for layer in DynamicCache(config=self.module.config).layers)
        return plain and not (self.checkpoint_activations or self.compiled or hasattr(self.module, "hf_device_map"))

    @property
    def base(self) -> torch.nn.Module:
        """The module without its LM head."""
        return self.module.base_model

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a prompt, ready for the completion to follow; ValueError when there are none."""
        return template.encode(self.tokenizer, self.config, messages)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a completion without the token, or the stop string, that ended it."""
        text = ids[:-1] if ids and ids[-1] in self.eos_ids else ids
        return template.cut(str(self.tokenizer.decode(list(text), skip_special_tokens=False)), self.config.stop)

    def is_finished(self, ids: Sequence[int]) -> bool:
        """Whether a completion ends by itself, not by the limit of its length."""
        return ids[-1] in self.eos_ids or template.stop_length(self.tokenizer, ids, self.config.stop) is not None


def load_model(
    config: ModelConfig,
    directory: Path,
    *,
    device: str = "cpu",
    trained: bool = False,
    checkpoint_activations: bool = False,
    spread: bool = False,
    compile: bool = False,
    lora: LoRA | None = None,
    seed: str | int = 0,
) -> LanguageModel:
    """Load a Hugging Face directory (or a snapshot of one).

    A frozen model is loaded in `config.dtype` and, with `spread`, laid out over all GPUs; one to be trained in float32,
    from which `update.AdamW` takes its masters, or with `lora` frozen, under adapters drawn by `seed`. `compile` acts
    on CUDA only.
    Raises ValueError as `adapt` does, when the tokenizer has no template, no end token, or more tokens than the model
    has rows, and when the logits are not `hidden @ head.T` (a soft-cap or a bias the losses would miss).
    """
    if lora is not None:
        check_installed()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    trained = trained and lora is None
    dtype = torch.float32 if trained else getattr(torch, config.dtype)
    placed = {"device_map": "auto"} if spread else {}
    attention = CPU_ATTENTION if device == "cpu" and not spread else "sdpa"
    module = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation=attention, **placed)
    if not spread:
        module = module.to(torch.device(device))  # pyright: ignore[reportArgumentType] -- typed for modules of its own
    module = module.eval().requires_grad_(trained)
    if attention == CPU_ATTENTION:
        make_lean(module)
    if checkpoint_activations:
        module.gradient_checkpointing_enable({"use_reentrant": False})
    model = wrap(module, tokenizer, config)
    model = replace(model, checkpoint_activations=checkpoint_activations, directory=directory)
    model = model if lora is None else adapt(model, lora, seed)
    return compile_layers(model) if compile and model.device.type == "cuda" and not spread else model


def load_served(config: ModelConfig, directory: Path, served: Served) -> LanguageModel:
    """A model whose weights a server has: tokenizer and shape, from a directory that needs no weights; raises as
    `load_model` does."""
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory)).eval().requires_grad_(False)
    with suppress(OSError):  # without the file, what transformers makes of config.json
        module.generation_config = GenerationConfig.from_pretrained(directory)
    return replace(wrap(module, AutoTokenizer.from_pretrained(directory), config), served=served)


def adapt(model: LanguageModel, settings: LoRA, seed: str | int) -> LanguageModel:
    """The model, its weights frozen, with new adapters put into its module; raises as `lora.add_adapters` does."""
    model.module.requires_grad_(False)
    add_adapters(model.module, settings, seed)
    return replace(model, lora=settings)


def compile_layers(model: LanguageModel) -> LanguageModel:
    """The model with each decoder layer compiled (`torch.compile`) for any number of rows and tokens.

    Raises ValueError for a module that does not keep its decoder layers in `layers`.
    """
    layers = getattr(model.base, "layers", None)
    if not isinstance(layers, torch.nn.ModuleList):
        raise ValueError(
            f"{model.config.source}: {type(model.base).__name__} has no `layers` to compile; set compile = false"
        )
    # A graph each for one row, several rows, with gradient, without, of every model: torch allows 8 in a process.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for layer in layers:
        layer.compile(dynamic=True)
    return replace(model, compiled=True)


def wrap(module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> LanguageModel:
    """A LanguageModel from a module in memory; raises as `load_model` does."""
    _without_dropout(module)
    tokenizer = template.with_template(tokenizer, config)
    rows = module.get_output_embeddings().weight.shape[0]  # pyright: ignore -- typed Module
    if len(tokenizer) > rows:
        raise ValueError(f"{config.source}: the tokenizer has {len(tokenizer)} tokens but the model only {rows} rows")
    model = LanguageModel(
        module, tokenizer, config, end_ids(module.generation_config, tokenizer, config), len(tokenizer)
    )
    if module.device.type != "meta":
        _check_plain_head(model)
    _ = model.shape  # a model whose FLOPs cannot be counted fails here, and not after its first completions
    return model


def check_same_tokenizer(student: LanguageModel, teacher: LanguageModel) -> None:
    """Token-level supervision needs one token inventory: raise ValueError with an example where two differ."""
    check_same_tokens(student.tokenizer, teacher.tokenizer, names=(student.config.source, teacher.config.source))


def check_same_tokens(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, *, names: tuple[str, str]
) -> None:
    """As `check_same_tokenizer`, before any weight is loaded; `names` are those of student and teacher."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours != theirs:
        differing = sorted(t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t))
        first = differing[0]
        raise ValueError(
            f"teacher {names[1]} and student {names[0]} have different tokenizers: "
            f"{len(differing)} tokens differ, for example {first!r} is {theirs.get(first)} for the teacher and "
            f"{ours.get(first)} for the student; choose a teacher of the student's family, or carry its scores over "
            "spans of text: alignment = 'spans' in [stages.warmup] and [stages.distill]"
        )


def check_other_tokens(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, *, names: tuple[str, str]
) -> None:
    """Spans are an approximation that equal tokenizers do not need: raise ValueError where both are the same."""
    if student.get_vocab() == teacher.get_vocab():
        raise ValueError(
            f"teacher {names[1]} and student {names[0]} have the same tokenizer: remove alignment = 'spans', "
            "token by token is exact"
        )


def end_ids(
    generation: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase, config: ModelConfig
) -> tuple[int, ...]:
    """Ids that end a completion: the generation config's, the tokenizer's and the recipe's; ValueError without any."""
    eos = generation.eos_token_id if generation else None
    named = [*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id]
    ids = {token for token in named if isinstance(token, int)}
    for token in config.stop_tokens:
        number = tokenizer.convert_tokens_to_ids(token)
        if not isinstance(number, int) or number == tokenizer.unk_token_id:
            raise ValueError(f"{config.source}: stop token {token!r} is not one token of its tokenizer")
        ids.add(number)
    if not ids:
        raise ValueError(
            f"{config.source}: neither tokenizer nor generation config names an end token; set stop_tokens"
        )
    return tuple(sorted(ids))


def _without_dropout(module: PreTrainedModel) -> None:
    """A policy that drops what its sampler does not drop is another policy; adapters, added later, have their own."""
    for part in module.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
        if hasattr(part, "attention_dropout"):
            part.attention_dropout = 0.0  # pyright: ignore[reportArgumentType] -- typed for tensors and modules


@torch.no_grad()
def _check_plain_head(model: LanguageModel) -> None:
    ids = torch.tensor([[model.eos_ids[0]] * 3], device=model.device)
    logits = model.module(input_ids=ids).logits[..., : model.vocab_size]
    if not bool(torch.isfinite(logits).all()):
        raise ValueError(
            f"{model.config.source}: its logits are not finite, so its weights are damaged, or left by training that "
            "blew up: `headwater doctor` says which weights"
        )
    ours = model.hidden(ids) @ model.head.T
    if not torch.allclose(logits, ours, rtol=1e-2, atol=1e-2 * float(logits.abs().max())):
        raise ValueError(
            f"{model.config.source}: its logits are not hidden states times LM head (a soft-cap, scale or bias): "
            "the losses would not see it; this architecture is not supported"
        )
