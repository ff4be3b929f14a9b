"""A trained model out of the store: a Hugging Face directory, or an adapter, with a model card written from the run."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch
from huggingface_hub import try_to_load_from_cache
from transformers import GenerationConfig

from headwater.arms import StageName
from headwater.config import ModelConfig, Recipe, load_recipe
from headwater.meter import total
from headwater.models.language_model import LanguageModel, load_model
from headwater.models.lora import join_adapters
from headwater.spec import StageSpec
from headwater.store import Store


@dataclass(frozen=True)
class _Found:
    """An endpoint of a finished run: `keys` are its arm's stages of one seed, up to the one that is exported."""

    recipe: Recipe
    results: dict[str, Any]
    endpoint: str
    seed: str
    names: list[StageName]
    keys: list[str]
    store: Store

    @property
    def role(self) -> str:
        arm = self.recipe.arms[self.results["arms"][self.endpoint.partition("/")[0]]["arm"]]
        return arm.teacher_model if self.names[-1].startswith("teacher") else "student"

    @property
    def config(self) -> ModelConfig:
        return self.recipe.models[self.role]

    def specs(self) -> dict[str, StageSpec]:
        """The stages that made its weights, from the first."""
        out: dict[str, StageSpec] = {}
        key: str | None = self.keys[-1]
        while key is not None:
            out[key] = _node(self.store, key)
            key = out[key].start.stage
        return dict(reversed(out.items()))


def _node(store: Store, key: str) -> StageSpec:
    job = json.loads((store.path(key) / "spec.json").read_text(encoding="utf-8"))
    return StageSpec.model_validate(job["spec"])


def export_model(
    directory: Path, endpoint: str, seed: int | None, to: Path, store: Store, *, dtype: str, adapter: bool
) -> None:
    """Write `ARM` (its student) or `ARM/STAGE` of a finished run to `to`, weights rounded to `dtype`.

    With `adapter` the weights are one LoRA adapter for the recipe's model: what all stages on the way added, their
    ranks together.
    Raises ValueError for an unknown arm, stage, seed or dtype, an unfinished run, a stage that is no longer in the
    store, a target that exists, and an adapter of a model that a stage trained in full.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype {dtype!r}: use float32 or bfloat16")
    if to.exists():
        raise ValueError(f"{to} exists: choose a directory that does not")
    found = _find(directory, endpoint, seed, store)
    specs = found.specs()
    if adapter and (full := [node.label for node in specs.values() if node.settings.lora is None]):
        raise ValueError(f"{endpoint}: {full} trained all weights, so there is no adapter: leave out --adapter")
    aside = to.with_name(f".{to.name}")
    shutil.rmtree(aside, ignore_errors=True)
    model = load_model(found.config.model_copy(update={"dtype": dtype}), store.model(found.keys[-1]))
    if adapter:
        source = found.config.source
        name = (
            source.removeprefix("hf:").partition("@")[0] if source.startswith("hf:") else source.removeprefix("file:")
        )
        join_adapters([store.path(key) / "adapter" for key in specs], aside, name, getattr(torch, dtype))
        _generation(model, found.recipe).save_pretrained(aside)
    else:
        model.module.generation_config = _generation(model, found.recipe)
        model.module.save_pretrained(aside)
    model.tokenizer.save_pretrained(aside)
    (aside / "README.md").write_text(_card(found, specs, to.name, adapter), encoding="utf-8")
    aside.rename(to)


def _find(directory: Path, endpoint: str, seed: int | None, store: Store) -> _Found:
    path = directory / "results.json"
    if not path.exists():
        raise ValueError(f"{directory} has no results.json: finish it with `headwater resume {directory}`")
    results, recipe = json.loads(path.read_text(encoding="utf-8")), load_recipe(directory / "recipe.toml")
    arm, slash, stage = endpoint.partition("/")
    if arm not in results["arms"]:
        raise ValueError(f"no arm {arm!r} in {directory}; there are {sorted(results['arms'])}")
    row = results["arms"][arm]
    if slash and stage not in row["stages"]:
        raise ValueError(f"arm {arm!r} has no stage {stage!r}; there are {row['stages']}")
    chosen = str(recipe.seeds[0] if seed is None else seed)
    if chosen not in row["seeds"]:
        raise ValueError(f"no seed {chosen} in arm {arm!r}; there are {sorted(row['seeds'])}")
    end = row["stages"].index(stage) + 1 if slash else len(row["stages"])
    keys = row["seeds"][chosen]["stages"][:end]
    if not store.model(keys[-1]).exists():
        raise ValueError(f"stage {keys[-1]} is not in the store {store.root}: name the one it was run with (--store)")
    return _Found(recipe, results, endpoint, chosen, row["stages"][:end], keys, store)


def _generation(model: LanguageModel, recipe: Recipe) -> GenerationConfig:
    """Sampling as the first evaluation did it, so that the exported model behaves as measured."""
    settings = next(iter(recipe.evaluations.values()))
    pad = model.tokenizer.pad_token_id
    sampled = {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}
    return GenerationConfig(
        eos_token_id=list(model.eos_ids),
        pad_token_id=model.eos_ids[0] if pad is None else pad,
        max_new_tokens=settings.max_new_tokens,
        # Rows of the head that are no tokens: we never sample them, and neither shall others.
        suppress_tokens=list(range(model.vocab_size, len(model.padded_head))) or None,
        **(sampled if settings.temperature > 0 else {"do_sample": False}),
    )


def _card(found: _Found, specs: dict[str, StageSpec], name: str, adapter: bool) -> str:
    store, source = found.store, found.config.source
    decided = dict.fromkeys(node.decision for node in specs.values() if node.decision)
    billed = [*found.keys, *decided]
    ledgers = [store.ledger(key) for key in billed]
    taught = dict.fromkeys(node.teacher.config.source for node in specs.values() if node.teacher)
    template = Path(__file__).with_name("card.md.jinja").read_text(encoding="utf-8")
    return (
        jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        .from_string(template)
        .render(
            found=found,
            adapter=adapter,
            name=name,
            source=source,
            hub=source.removeprefix("hf:").partition("@")[0] if source.startswith("hf:") else None,
            licence=_licence(source),
            teachers={teacher: _licence(teacher) for teacher in taught},
            stages=[_node(store, key) for key in found.keys],
            budget=found.results["arms"][found.endpoint.partition("/")[0]]["budget"],
            labels=len(set().union(*(ledger.problems for ledger in ledgers))),
            reveals=sum(ledger.revealed for ledger in ledgers),
            cost=total([store.outcome(key)["meter"] for key in billed]),
            scores=_scores(found),
            made=store.outcome(found.keys[-1])["environment"],
        )
    )


def _scores(found: _Found) -> list[tuple[str, dict[str, Any], dict[str, Any] | None]]:
    """Evaluation, the numbers of this seed, and the summary over seeds where the run has one for this model."""
    results, key = found.results, found.keys[-1]
    rows = {
        keys["stages"][-1]: (keys["evals"], arm["summary"])
        for arm in results["arms"].values()
        for keys in arm["seeds"].values()
    }
    if key in rows:
        evals, summary = rows[key]
    else:
        row = results["models"].get(key, {"evals": {}})
        same = (m.get("summary") for m in results["models"].values() if "of" in m and m["of"] == row.get("of"))
        evals, summary = row["evals"].get(found.seed, {}), next(filter(None, same), {})
    return [(name, result, summary.get(name)) for name, result in evals.items()]


def _licence(source: str) -> str | None:
    """What the model's own card says, where it can be read without a download."""
    if source.startswith("world:"):
        return "apache-2.0"
    if source.startswith("hf:"):
        name, _, revision = source.removeprefix("hf:").partition("@")
        path = try_to_load_from_cache(name, "README.md", revision=revision or None)
    else:
        path = Path(source.removeprefix("file:")).expanduser() / "README.md"
    if not isinstance(path, str | Path) or not Path(path).is_file():
        return None
    line = re.search(r"^license: *(\S+)", Path(path).read_text(encoding="utf-8"), re.MULTILINE)
    return line[1] if line else None
