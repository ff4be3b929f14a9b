"""A student out of the store: a Hugging Face directory with tokenizer, generation config and a model card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from headwater.config import load_recipe
from headwater.store import Store


def export_student(directory: Path, arm: str, seed: int | None, to: Path, dtype: str, store: Store) -> None:
    """Copy the student of `arm` from a finished run to `to`, rounded to `dtype`.

    Raises ValueError for an unknown arm, seed or dtype, an unfinished run, a stage that is no longer in the store, and
    a target that exists.
    """
    results = directory / "results.json"
    if not results.exists():
        raise ValueError(f"{directory} has no results.json: finish it with `headwater resume {directory}`")
    found = json.loads(results.read_text(encoding="utf-8"))
    recipe = load_recipe(directory / "recipe.toml")
    if arm not in found["arms"]:
        raise ValueError(f"no arm {arm!r} in {directory}; there are {sorted(found['arms'])}")
    chosen = str(recipe.seeds[0] if seed is None else seed)
    if chosen not in found["arms"][arm]["seeds"]:
        raise ValueError(f"no seed {chosen} in arm {arm!r}; there are {sorted(found['arms'][arm]['seeds'])}")
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype {dtype!r}: use float32 or bfloat16")
    if to.exists():
        raise ValueError(f"{to} exists: choose a directory that does not")
    row = found["arms"][arm]["seeds"][chosen]
    source = store.model(row["stages"][-1])
    if not source.exists():
        raise ValueError(
            f"stage {row['stages'][-1]} is not in the store {store.root}: name the one it was run with (--store)"
        )

    aside = to.with_name(f".{to.name}")
    shutil.rmtree(aside, ignore_errors=True)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
    tokenizer = AutoTokenizer.from_pretrained(source)
    model.generation_config = _generation(model, tokenizer, recipe)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    (aside / "README.md").write_text(
        _card(recipe.name, arm, chosen, row, recipe.models["student"].source), encoding="utf-8"
    )
    aside.rename(to)


def _generation(model: Any, tokenizer: Any, recipe: Any) -> GenerationConfig:
    """Sampling as the first evaluation did it, so that the exported model behaves as measured."""
    settings = next(iter(recipe.evaluations.values()))
    known = model.generation_config.eos_token_id
    ends = sorted({*(known if isinstance(known, list) else [known]), tokenizer.eos_token_id} - {None})
    sampled = {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}
    return GenerationConfig(
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0],
        max_new_tokens=settings.max_new_tokens,
        **(sampled if settings.temperature > 0 else {"do_sample": False}),
    )


def _card(recipe: str, arm: str, seed: str, row: dict[str, Any], source: str) -> str:
    scores = "\n".join(
        f"| {task} | {e['avg@k']:.4f} | {e['k']} | {e['num_problems']} |" for task, e in row["evals"].items()
    )
    tokens = ", ".join(f"{n:,} {role}" for role, n in row["cost"]["tokens"].items() if n)
    return f"""---
library_name: transformers
tags: [headwater]
---
# {recipe}: {arm}, seed {seed}

Trained with Headwater from `{source}`; stages {", ".join(row["stages"])}.

Labels: {row["labels"]["distinct"]} distinct, {row["labels"]["revealed"]} reveals. Tokens: {tokens}.
Model FLOPs {row["cost"]["flops"]:.3g}, {row["cost"]["seconds"]:.0f} s.

| evaluation | avg@k | k | problems |
|---|---|---|---|
{scores}

These are one seed's numbers; intervals over seeds and problems are in the run's results.json.
"""
