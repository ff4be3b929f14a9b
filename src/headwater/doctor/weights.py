"""Checks of weights as they were loaded, one model at a time, and of the room that training them takes."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from headwater.config import Execution
from headwater.doctor.finding import Finding, judge
from headwater.doctor.prompts import Patient
from headwater.models.language_model import LanguageModel


@dataclass(frozen=True)
class Loaded:
    """A module with what its loading said, and shape, mean and root mean square of every parameter."""

    module: PreTrainedModel
    report: dict[str, set[str]]
    moments: dict[str, tuple[tuple[int, ...], float, float]]


def load(patient: Patient, execution: Execution) -> Loaded:
    """The model in its compute type, frozen, as `load_model` loads it; ValueError when the file does not fit."""
    placed = {"device_map": "auto"} if execution.spread_teacher and patient.role != "student" else {}
    try:
        found: Any = AutoModelForCausalLM.from_pretrained(
            patient.directory,
            dtype=getattr(torch, patient.config.dtype),
            attn_implementation="sdpa",
            output_loading_info=True,
            **placed,
        )
    except RuntimeError as error:
        raise ValueError(f"{patient.config.source} cannot be loaded: {error}") from error
    module, report = found
    module = (module if placed else module.to(execution.device)).eval().requires_grad_(False)
    moments = {
        name: (tuple(p.shape), float(p.double().mean()), float(p.double().square().mean().sqrt()))
        for name, p in module.named_parameters()
    }
    return Loaded(module, report, moments)


def check_weights(patient: Patient, loaded: Loaded, texts: Sequence[str]) -> Iterator[Finding]:
    """What the file holds, before anything is computed with it."""
    report, module, role = loaded.report, loaded.module, patient.role
    head, embedding = (
        layer.get_parameter("weight")  # pyright: ignore -- a language model has both
        for layer in (module.get_output_embeddings(), module.get_input_embeddings())
    )
    tied = bool(module.config.get_text_config().tie_word_embeddings)
    absent, idle = (sorted(report[name]) for name in ("missing_keys", "unexpected_keys"))
    fault = (
        f"{len(absent)} tensors are not in the file and were made up: {absent[:3]}"
        if absent
        else f"{len(idle)} tensors of the file have no place: {idle[:3]}"
        if idle
        else "config.json ties LM head and embedding, and the file holds two different ones"
        if tied and head.data_ptr() != embedding.data_ptr()
        else ""
    )  # fmt: skip  # a condition a line
    yield judge(
        f"{role}: file and configuration",
        "error" if fault else "ok",
        fault or f"{len(loaded.moments)} tensors, all from the file, {'tied' if tied else 'its own'} LM head",
        "parts of the model are random, missing or another model's",
        "download it again, or correct config.json (number of layers, tie_word_embeddings)",
    )
    strange = _strange(loaded.moments) + _strange_rows(patient, embedding, texts)
    yield judge(
        f"{role}: weights",
        "error" if strange else "ok",
        "; ".join(strange[:4]) or f"{module.num_parameters():,} parameters, finite, no tensor unlike its siblings",
        "a damaged model trains, but what it reaches says nothing",
        "download or convert it again",
    )
    coarse = [name for name, p in module.named_parameters() if _few_levels(p)]
    yield judge(
        f"{role}: precision",
        "warning" if coarse else "ok",
        f"{len(coarse)} matrices have 16 levels or fewer in every 32 neighbours {coarse[:2]}",
        "rounded weights were written back as if they were exact",
        "take the release that was not quantised",
    )


def _few_levels(weight: Tensor) -> bool:
    """Whether a matrix was rounded to 4 bits or fewer, in groups along its rows."""
    if weight.ndim != 2 or weight.shape[1] < 32 or not weight.is_floating_point():
        return False
    blocks = weight[:64, : weight.shape[1] // 32 * 32].float().reshape(-1, 32).sort(dim=1).values
    return bool(((blocks.diff(dim=1) != 0).sum(1) < 16).all())


def _strange(moments: dict[str, tuple[tuple[int, ...], float, float]]) -> list[str]:
    """Tensors that no trained model has: not finite, constant matrices, far off their siblings of other layers, or
    equal to one of them."""
    out, siblings = [], {}
    for name, (shape, mean, size) in moments.items():
        if not size < float("inf"):
            out.append(f"{name} holds NaN or infinity")
        elif len(shape) > 1 and abs(size - abs(mean)) <= 1e-6 * size:
            out.append(f"{name} is constant")
        elif size > 0:
            siblings.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append((name, mean, size))
    for family in (f for f in siblings.values() if len(f) > 1):
        sizes = sorted(size for _, _, size in family)
        middle, seen = sizes[len(sizes) // 2], {}
        # Exactly constant, as a vector begins and no trained one is.
        new = [name for name, mean, size in family if len(moments[name][0]) == 1 and size - abs(mean) <= 1e-12 * size]
        out += [f"{name} is constant, its siblings are not" for name in new if 2 * len(new) < len(family)]
        for name, mean, size in family:
            # Norms and biases vary more from layer to layer than matrices do.
            factor = 8.0 if len(moments[name][0]) > 1 else 100.0
            if max(size / middle, middle / size) > factor:
                out.append(f"{name} has size {size:.3g}, its siblings {middle:.3g}")
            if len(moments[name][0]) > 1 and (twin := seen.setdefault((mean, size), name)) != name:
                out.append(f"{name} equals {twin}")
    return out


def _strange_rows(patient: Patient, embedding: Tensor, texts: Sequence[str]) -> list[str]:
    """Rows of tokens in use that are zero or equal to another's."""
    used = sorted({t for ids in patient.tokenizer(list(texts))["input_ids"] for t in ids} | set(patient.ends))  # pyright: ignore -- lists of ids
    rows = embedding[torch.tensor(used, device=embedding.device)].float().cpu()
    tokens, seen, out = patient.tokenizer.convert_ids_to_tokens(used), {}, []
    for token, row in zip(tokens, rows, strict=True):
        twin = seen.setdefault(row.numpy().tobytes(), token)
        if not bool(row.any()) or twin != token:
            out.append(f"the embedding of {token!r} is " + (f"that of {twin!r}" if bool(row.any()) else "zero"))
    return out


def check_room(
    models: dict[str, LanguageModel], trained: dict[str, int], execution: Execution, store: Path
) -> Iterator[Finding]:
    """Whether the largest stage fits in memory and all finished stages on the disk; both are estimates.

    `trained`: how many stages train each of the models.
    """
    sizes = {role: model.num_parameters for role, model in models.items()}
    config = models["student"].module.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * heads * width * execution.sampler_tokens * 4
    # Trained: compute weights, float32 masters, gradients and two moments; beside it a frozen teacher.
    needed = 20 * max(sizes[role] for role in trained) + 4 * max(sizes.values()) + cache
    if execution.device.startswith("cuda"):
        free = torch.cuda.mem_get_info()[0] + sum(4 * n for n in sizes.values())
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    disk = sum((4 + 12) * sizes[role] * count for role, count in trained.items())
    left = shutil.disk_usage(next(p for p in (store, *store.absolute().parents) if p.exists())).free
    yield judge(
        "room",
        "warning" if needed > free or disk > left else "ok",
        f"memory about {needed / 1e9:.1f} GB of {free / 1e9:.1f}; disk about {disk / 1e9:.1f} of {left / 1e9:.1f}",
        "a run that does not fit stops when it gets there",
        "lower execution.sampler_tokens and micro_batch_tokens, take smaller models, or another --store",
    )
