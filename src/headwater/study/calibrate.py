"""Tens of seconds with a recipe's own models on this machine: how long they answer, how fast they run."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass

import torch

from headwater import spec
from headwater.checkpoint import write_atomically
from headwater.config import Execution, LoRA, Recipe
from headwater.device import name_of, resident_memory
from headwater.flops import Number
from headwater.mesh import Mesh
from headwater.models.language_model import LanguageModel, load_model
from headwater.plan import Speed, Writer, pool_size
from headwater.rollouts.batch import Batch, micro_batches
from headwater.rollouts.sampler import Sampling, TransformersSampler
from headwater.run import set_deterministic
from headwater.scoring.log_probs import View, score_tokens
from headwater.spec import ModelRef, StageSpec
from headwater.stages.node import model_directory, select
from headwater.stages.sft import token_loss
from headwater.store import Store
from headwater.study.graph import Graph
from headwater.types import Problem, Rollout
from headwater.update import AdamW, update

PROBLEMS = 64
"""Prompts that are asked at most: lengths differ more between problems than between answers to one."""
BUDGET_S = 8.0
"""Sampling of one model takes about this long at most; lots are smaller, then completions shorter, where it must."""


@dataclass(frozen=True)
class Calibration:
    """Of every base model, by `model_key`; `base`: bytes that interpreter and libraries hold."""

    writers: dict[str, Writer]
    speeds: dict[str, Speed]
    base: Number


def model_key(ref: ModelRef) -> str:
    return spec.digest([ref.config.model_dump(mode="json"), ref.fingerprint])


def calibrate(recipe: Recipe, graph: Graph, store: Store, *, measure: bool = True) -> Calibration | None:
    """Measured once for models, prompts, settings and device and kept in the store; None when it is not there and
    `measure` is off. Prompts are looked at, answers are not."""
    uses = _uses(graph, served=recipe.execution.teacher is not None)
    threads = recipe.execution.threads or (1 if recipe.execution.executor != "inline" else torch.get_num_threads())
    names = {"micro_batch_tokens", "sampler_tokens", "chunk_tokens", "compile", "gradient_checkpointing"}
    execution = recipe.execution.model_dump(include=names)
    place = {
        k: [node.settings.model_dump(mode="json"), node.problems.digest, repr(_adapters(graph, k))]
        for k, (_, node) in uses.items()
    }
    name = spec.digest([place, execution, name_of(recipe.execution.device, threads)])
    path = store.root / "calibrations" / f"{name}.json"
    if path.exists():
        raw = json.loads(path.read_text(encoding="utf-8"))
        writers = {k: Writer(w["prompt"], tuple(w["lengths"])) for k, w in raw["writers"].items()}
        return Calibration(writers, {k: Speed(**v) for k, v in raw["speeds"].items()}, raw["base"])
    if not measure:
        return None
    before = torch.get_num_threads()
    set_deterministic(threads)
    base, writers, speeds = float(resident_memory(recipe.execution.device)), {}, {}
    for key, (ref, node) in uses.items():
        adapters = _adapters(graph, key)
        model = load_model(
            ref.config,
            model_directory(ref.config.source),
            device=recipe.execution.device,
            trained=bool(adapters),
            checkpoint_activations=bool(adapters) and recipe.execution.gradient_checkpointing,
            spread=not adapters and recipe.execution.spread_teacher,
            lora=adapters[0] if adapters else None,
        )
        writers[key], speeds[key] = _measure(model, node, recipe)
        del model
    torch.set_num_threads(before)
    found = Calibration(writers, speeds, base)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(asdict(found), indent=1))
    return found


def _uses(graph: Graph, *, served: bool = False) -> dict[str, tuple[ModelRef, StageSpec]]:
    """Every base model that writes here, with the stage in which its completions may be longest."""
    found: dict[str, tuple[ModelRef, StageSpec]] = {}
    for node in graph.nodes.values():
        if not isinstance(node, StageSpec) or not pool_size(node):
            continue
        for ref in filter(None, [node.start, None if served else node.teacher]):
            key = model_key(ref)
            if key not in found or node.settings.max_new_tokens > found[key][1].settings.max_new_tokens:
                found[key] = (ref, node)
    return found


def _adapters(graph: Graph, key: str) -> list[LoRA | None]:
    """How the stages train a base model, in full (None) first; [] for one that only teaches, which has no room to be
    trained."""
    stages = [n for n in graph.nodes.values() if isinstance(n, StageSpec) and pool_size(n)]
    return sorted((n.settings.lora for n in stages if model_key(n.start) == key), key=lambda lora: lora is not None)


def _measure(model: LanguageModel, node: StageSpec, recipe: Recipe) -> tuple[Writer, Speed]:
    ex, settings = recipe.execution, node.settings
    problems = [p.unlabelled() for p in select(node.problems)]
    group = getattr(settings, "group_size", 0) or getattr(settings, "rollouts_per_problem", 1)
    per_step = min(len(problems), getattr(settings, "problems_per_step", 8))
    sampler = TransformersSampler(model, max_tokens=ex.sampler_tokens)
    # Rounds the weights to the dtype that will be sampled from.
    optimizer = AdamW(model, settings.optimizer) if model.num_trained else None
    limit = settings.max_new_tokens
    _timed_sample(sampler, problems[:1], 1, min(4, limit), "first call", settings.temperature)
    few = _timed_sample(sampler, problems[:1], group, min(16, limit), "few", settings.temperature)
    limit = min(limit, max(16, int(BUDGET_S / 2 * few[2] / few[1])))
    one = few[1] * limit / few[2]  # seconds of a group, which more of them at once need less of
    asked = min(per_step, max(1, int(BUDGET_S / 2 / one)))
    small = _timed_sample(sampler, problems[:asked], group, limit, "small", settings.temperature)
    count = min(len(problems), PROBLEMS, max(per_step, int(BUDGET_S / max(1e-6, small[1] / asked))))
    rollouts, elapsed, steps = _timed_sample(sampler, problems[:count], group, limit, "calibrate", settings.temperature)
    step, row = _two_rates((small[1], small[2], _drawn(small[0])), (elapsed, steps, _drawn(rollouts)))
    lengths = [len(r.completion_ids) for r in rollouts]
    if limit < settings.max_new_tokens:  # as if what was cut goes on ending at the rate seen so far
        ended = max(1, sum(r.finished for r in rollouts))
        lengths = [n if r.finished else n + sum(lengths) // ended for n, r in zip(lengths, rollouts, strict=True)]
    batch = Batch.of(rollouts[: per_step * group])
    view = View(settings.temperature, ex.micro_batch_tokens, ex.chunk_tokens)
    started = time.perf_counter()
    score_tokens(model, batch, view)
    scored = (time.perf_counter() - started) / batch.num_tokens
    fixed, trained = _time_updates(model, optimizer, batch, ex) if optimizer else (0.0, 0.0)
    prompts = sum(len(model.encode(p.messages)) for p in problems) / len(problems)
    return Writer(prompts, tuple(lengths)), Speed(step, row, scored, fixed, trained)


def _timed_sample(
    sampler: TransformersSampler, problems: list[Problem], group: int, limit: int, name: str, temperature: Number
) -> tuple[list[Rollout], float, int]:
    started = time.perf_counter()
    rollouts = sampler.sample(problems, Sampling((name, 0), group, limit, temperature))
    return rollouts, time.perf_counter() - started, max(len(r.completion_ids) for r in rollouts)


def _drawn(rollouts: list[Rollout]) -> int:
    return sum(len(r.completion_ids) for r in rollouts)


def _two_rates(small: tuple[Number, int, int], large: tuple[Number, int, int]) -> tuple[Number, Number]:
    """Seconds a step and a token from two (seconds, steps, tokens), neither below 0 and the larger one exact."""
    (t1, s1, n1), (t2, s2, n2) = small, large
    apart = n2 - n1 * s2 / s1
    per_token = min(max(0.0, (t2 - t1 * s2 / s1) / apart), t2 / n2) if apart > 0 else t2 / n2
    return (t2 - per_token * n2) / s2, per_token


def _time_updates(model: LanguageModel, optimizer: AdamW, batch: Batch, ex: Execution) -> tuple[Number, Number]:
    """Seconds of an update whatever its size, and of each token in it, from a part of the batch and all of it."""
    times = []
    batch = batch.with_fields(weights=[torch.ones(n) for n in batch.lengths])
    part = batch.take(range(max(1, len(batch) // 4)))
    for rows in (part, part, batch):  # the first makes the optimizer's state
        micros = micro_batches(rows, max_tokens=ex.micro_batch_tokens, device=model.device, share=model.shares_prefixes)
        started = time.perf_counter()
        loss = token_loss(model.vocab_size, float(sum(rows.lengths)), ex.chunk_tokens)
        update(model, optimizer, micros, loss, lr=1e-9, max_grad_norm=1.0, mesh=Mesh())
        times.append((time.perf_counter() - started, 1, rows.num_tokens))
    return _two_rates(times[1], times[2]) if len(batch) > 1 else (0.0, times[2][0] / batch.num_tokens)
