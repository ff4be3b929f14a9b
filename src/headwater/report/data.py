"""The data of a recipe before anything is trained: what overlaps with the evaluations, and how long the texts are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from headwater.config import Recipe
from headwater.models.template import encode, with_template
from headwater.stages.node import model_directory
from headwater.study.graph import plan
from headwater.tasks import load_task
from headwater.tasks.overlap import overlaps
from headwater.types import Problem

SHOWN_CHARACTERS = 160
LENGTHS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Upper ends of the histogram's bars, in tokens."""


def survey(recipe: Recipe, threshold: float, examples: int = 3) -> dict[str, Any]:
    """Overlaps of the whole training and unlabelled splits with every evaluation, and lengths in the student's tokens.

    `{"threshold", "overlap": {EVALUATION: {SPLIT: {"problems", KIND: {"count", "examples": [{"score", "train",
    "test"}]}}}}, "lengths": {WHAT: {"count", "median", "p95", "max", "histogram"}}, "limits": {NAME: max_new_tokens}}`.
    Raises ValueError as planning the recipe does, and for a threshold outside (0, 1].
    """
    plan(recipe, offline=True)
    task = load_task(recipe.task)
    pool = {"train": task.problems("train")} | (
        {"unlabelled": task.problems("unlabelled")} if recipe.pool.unlabelled else {}
    )
    overlap: dict[str, Any] = {}
    for name, settings in recipe.evaluations.items():
        held = load_task(settings.task or recipe.task).problems(settings.split)[: settings.problems]
        overlap[name] = {split: _overlap(problems, held, threshold, examples) for split, problems in pool.items()}
    config = recipe.models["student"]
    tokenizer = with_template(AutoTokenizer.from_pretrained(model_directory(config.source)), config)
    lengths = {f"{split} prompts": [len(encode(tokenizer, config, p.messages)) for p in pool[split]] for split in pool}
    lengths["solutions"] = _solutions(tokenizer, pool["train"])
    limits = {f"stages.{name}": stage.max_new_tokens for name, stage in recipe.stages.items()}
    limits |= {f"evaluations.{name}": settings.max_new_tokens for name, settings in recipe.evaluations.items()}
    return {
        "threshold": threshold,
        "overlap": overlap,
        "lengths": {name: _histogram(found) for name, found in lengths.items() if found},
        "limits": limits,
    }


def _overlap(pool: Sequence[Problem], held: Sequence[Problem], threshold: float, examples: int) -> dict[str, Any]:
    texts = {p.id: p.messages[-1].content for p in (*pool, *held)}
    out: dict[str, Any] = {"problems": len(pool)}
    for kind, found in overlaps(pool, held, threshold).items():
        shown = [{"score": row.score, "train": texts[row.train], "test": texts[row.test]} for row in found[:examples]]
        out[kind] = {"count": len(found), "examples": shown}
    return out


def _solutions(tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem]) -> list[int]:
    texts = [p.columns["solution"] for p in problems if isinstance(p.columns.get("solution"), str)]
    return [len(ids) for ids in tokenizer(texts)["input_ids"]] if texts else []  # pyright: ignore -- lists of ids


def _histogram(lengths: Sequence[int]) -> dict[str, Any]:
    ordered = sorted(lengths)
    bars = Counter(next((bound for bound in LENGTHS if length <= bound), LENGTHS[-1] * 2) for length in ordered)
    return {
        "count": len(ordered),
        "median": ordered[len(ordered) // 2],
        "p95": ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))],
        "max": ordered[-1],
        "histogram": {str(bound): bars[bound] for bound in sorted(bars)},
    }


def print_survey(console: Console, found: dict[str, Any]) -> None:
    """The survey for people."""
    said = {"words": "in the same words", "numbers": "but for numbers"}
    for name, splits in found["overlap"].items():
        for split, row in splits.items():
            for kind, words in said.items():
                console.print(
                    f"{name}: {row[kind]['count']} of {row['problems']} {split} problems stand in it {words} "
                    f"(>= {found['threshold']:g})",
                    markup=False,
                )
                for pair in row[kind]["examples"]:
                    for side in ("train", "test"):
                        text = " ".join(pair[side].split())[:SHOWN_CHARACTERS]
                        console.print(f"    {pair['score']:.2f} {side}: {text}", markup=False, soft_wrap=True)
    for name, row in found["lengths"].items():
        console.print(f"tokens of {row['count']} {name}: median {row['median']}, 95 % {row['p95']}, most {row['max']}")
        for bound, count in row["histogram"].items():
            share = count / row["count"]
            console.print(f"    <= {bound:>5} {'#' * round(40 * share):<40} {share:6.1%}", markup=False)
    console.print("max_new_tokens: " + ", ".join(f"{name} {limit}" for name, limit in found["limits"].items()))
    console.print("[pool] exclude_overlap = SHARE keeps such problems out of the pool", markup=False)
