"""FLOPs of a decoder-only transformer from its shape: 2 for every multiply-add of a matrix product, 0 for the rest.

*Model* FLOPs are what the mathematics needs: a token attends to itself and what precedes it, nothing is padded or
computed twice. *Executed* FLOPs are what the code multiplies: rectangles of padded rows, all pairs of queries and keys,
recomputed logits and activations. Both are `Work` (how much went through the model) times a `Shape`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Number = int | float


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder with gated MLPs (Llama, Qwen, SmolLM). `vocab`: rows of the LM head that are multiplied."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    tied: bool = False
    adapters: int = 0
    """Parameters of low-rank adapters beside the matrices of all layers; with any, all else is frozen."""

    @property
    def matrices(self) -> int:
        """Elements of the projections and MLPs of all layers: multiply-adds of a token."""
        attention = 2 * self.heads * self.head_dim + 2 * self.kv_heads * self.head_dim
        return self.layers * self.hidden * (attention + 3 * self.mlp)

    @property
    def head(self) -> int:
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """Weights without adapters, norms and biases left out."""
        return self.matrices + self.head * (1 if self.tied else 2)

    @property
    def trained(self) -> int:
        """Parameters with a gradient when the model is trained."""
        return self.adapters or self.parameters


def shape_of(config: Mapping[str, Any], *, vocab: int | None = None, adapters: int = 0) -> Shape:
    """The shape in a `config.json` (transformers' names); `vocab` where fewer rows of the LM head are multiplied.

    Raises ValueError naming a size that is missing.
    """
    try:
        heads = config["num_attention_heads"]
        return Shape(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            mlp=config["intermediate_size"],
            vocab=vocab or config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings", False)),
            adapters=adapters,
        )
    except KeyError as error:
        raise ValueError(
            f"a model of type {config.get('model_type')!r} has no {error.args[0]!r}: FLOPs are counted for decoders "
            "with gated MLPs, such as Llama, Qwen and SmolLM"
        ) from None


@dataclass(frozen=True)
class Work:
    """`tokens` through the layers, (query, key) `pairs` of each head, `logits`: tokens through the LM head."""

    tokens: Number = 0
    pairs: Number = 0
    logits: Number = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.tokens + other.tokens, self.pairs + other.pairs, self.logits + other.logits)

    def __mul__(self, times: Number) -> Work:
        return Work(self.tokens * times, self.pairs * times, self.logits * times)


def total(works: Iterable[Work]) -> Work:
    return sum(works, Work())


def prompt_work(prompt: Number) -> Work:
    """A prompt read once; the logits of its last token are those of the completions' first."""
    return Work(prompt, prompt * (prompt + 1) / 2)


def completion_work(prompt: Number, completion: Number) -> Work:
    """Decoding with a cache: the last token is drawn and not read, so `completion` - 1 go through the layers."""
    read = max(0, completion - 1)
    return Work(read, read * prompt + read * (read + 1) / 2, completion)


def sequence_work(prompt: Number, completion: Number) -> Work:
    """A whole sequence at once, with logits where they predict the completion."""
    return Work(prompt + completion, (prompt + completion) * (prompt + completion + 1) / 2, completion)


def padded_work(rows: int, width: int) -> Work:
    """A rectangle of rows: the padding too, and all pairs of positions, as eager attention multiplies them."""
    return Work(rows * width, rows * width * width)


def forward_flops(shape: Shape, work: Work) -> Number:
    """2 x (matrices x tokens + 2 x layers x heads x head_dim x pairs + head x logits)."""
    pair = 2 * shape.layers * shape.heads * shape.head_dim
    return 2 * ((shape.matrices + shape.adapters) * work.tokens + pair * work.pairs + shape.head * work.logits)


def training_flops(
    shape: Shape, work: Work, shared: Work | None = None, *, projections: int = 3, recomputed: bool = False
) -> Number:
    """Forward and backward: three times the forward pass, where every weight is trained.

    Frozen matrices have no gradient of their own, and nothing flows below the first layer's adapters. `shared`:
    prefixes that rows go on from; of the last layer only their keys and values are used, so the rest of it has no
    backward pass. `projections`: how many products with the LM head the loss makes when the head is trained (3 are
    needed; `token_logprobs` makes its logits twice); `recomputed`: activation checkpointing runs the layers again.
    """
    shared = shared or Work()
    work += shared
    pair = 2 * shape.heads * shape.head_dim
    frozen = shape.adapters > 0
    keys = 2 * shape.hidden * shape.kv_heads * shape.head_dim
    idle = (1 if frozen else 2) * (shape.matrices / shape.layers - keys) * shared.tokens + 2 * pair * shared.pairs
    matrices = shape.matrices * (2 if frozen else 3) + 3 * shape.adapters
    if frozen:
        matrices -= keys + shape.hidden * shape.heads * shape.head_dim
    layers = matrices * work.tokens + 3 * pair * shape.layers * work.pairs - idle
    # torch stops recomputing a layer once it has all that it saved, which its last product is not.
    once_more = shape.matrices + shape.adapters - shape.layers * shape.hidden * shape.mlp
    again = once_more * work.tokens + pair * shape.layers * work.pairs if recomputed else 0
    return 2 * (layers + again + (projections - frozen) * shape.head * work.logits)
