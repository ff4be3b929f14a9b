"""The plan of a study: what every node will cost, low, mid and high; later beside it what it did cost."""

from __future__ import annotations

import functools
import json
import math
import tomllib
from pathlib import Path
from typing import Any

from headwater import plan
from headwater.config import GRPO, Distill, Execution, Recipe, TeacherRollouts, canonical
from headwater.device import memory_of
from headwater.flops import Number, Shape, shape_of
from headwater.meter import total
from headwater.plan import GROWTH, LEVELS, Device, Item, Writer
from headwater.spec import EvaluationSpec, ModelRef, Node, StageSpec
from headwater.stages.node import model_directory
from headwater.store import Store
from headwater.study.calibrate import Calibration, model_key
from headwater.study.graph import Graph
from headwater.tasks import load_task

UNSEEN = {"low": 0.5, "mid": 0.71, "high": 1.0}
"""Shares of `max_new_tokens` that a completion takes where no model was asked."""
SURE = 0.1
"""How far the mean length of a model that no reward trained may be from the calibration's, at least."""
SPEED_SPREAD = 1.2
"""Factor either way by which a study may run slower or faster than its calibration (docs/costs.md)."""


def profile_of(name: str) -> Device:
    """A device by name, or from a TOML file with the fields of `plan.Device`; ValueError for anything else."""
    if name in plan.PROFILES:
        return plan.PROFILES[name]
    try:
        return Device(**tomllib.loads(Path(name).read_text(encoding="utf-8")))
    except (OSError, TypeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(
            f"--profile {name}: name one of {', '.join(plan.PROFILES)}, or a TOML file with flops, bandwidth, memory "
            f"(and mfu, reached): {error}"
        ) from None


def shapes(graph: Graph) -> dict[str, Shape | None]:
    """Of every base model, from its config.json; None for a model that is not here yet or is no such decoder."""
    found: dict[str, Shape | None] = {}
    for node in graph.nodes.values():
        for ref in [node.start] if isinstance(node, EvaluationSpec) else [node.start, node.teacher]:
            if ref is not None and model_key(ref) not in found:
                found[model_key(ref)] = _shape(ref)
    return found


def _shape(ref: ModelRef) -> Shape | None:
    try:
        if ref.config.source.startswith("hf:"):
            return None
        return shape_of(json.loads((model_directory(ref.config.source) / "config.json").read_text(encoding="utf-8")))
    except (ValueError, OSError):
        return None


def outlook(
    recipe: Recipe, graph: Graph, calibration: Calibration | None, device: Device | None = None
) -> dict[str, Any]:
    """`{"nodes": {key: row}, "total": row, "rests_on": ...}`; ranges are [low, mid, high], None what cannot be told.

    Lengths come from the calibration, or as shares of the limit; seconds from a device's data sheet where one is named,
    else from the calibration.
    """
    known = shapes(graph)
    nodes: dict[str, Any] = {}
    for key, node in graph.nodes.items():
        nodes[key] = _row(recipe.execution, graph, node, known, calibration, device, nodes)
        nodes[key] |= {"title": graph.titles[key], "name": graph.names[key], "seed": node.seed}
        nodes[key]["kind"] = node.kind
    whole: dict[str, Any] = {}
    for name in ("tokens", "flops", "seconds"):
        rows = [row[name] for row in nodes.values()]
        whole[name] = None if None in rows else [sum(level) for level in zip(*rows, strict=True)]
    whole["peak_memory"] = max((row["memory"]["peak"] for row in nodes.values() if row["memory"]), default=None)
    price = recipe.execution.price_per_hour
    if price is not None and whole["seconds"]:
        whole["price"] = [s / 3600 * price for s in whole["seconds"]]
    return {"nodes": nodes, "total": whole, "rests_on": _rests_on(calibration, device)}


def _rests_on(calibration: Calibration | None, device: Device | None) -> str:
    lengths = "lengths of a calibration" if calibration else "completions of half to all of max_new_tokens"
    if device:
        return f"{lengths}; seconds of a data sheet at MFU {device.mfu:g}, {device.reached:.0%} of the bandwidth"
    return f"{lengths}; " + ("seconds measured on this machine" if calibration else "no seconds")


def _row(
    execution: Execution,
    graph: Graph,
    node: Node,
    known: dict[str, Shape | None],
    calibration: Calibration | None,
    device: Device | None,
    before: dict[str, Any],
) -> dict[str, Any]:
    refs = {"start": node.start, "teacher": None if isinstance(node, EvaluationSpec) else node.teacher}
    limit, shaped = plan.limit_of(node), {who: ref and known[model_key(ref)] for who, ref in refs.items()}
    if shaped["start"] and isinstance(node, StageSpec) and (lora := node.settings.lora):
        shaped["start"] = plan.adapted(shaped["start"], lora.rank, lora.targets)
    sums: dict[str, list[Number] | None] = {"tokens": [0.0] * 3, "flops": [0.0] * 3, "seconds": [0.0] * 3}
    prompt = 0.0
    for item in plan.items(node):
        ref, shape = refs[item.model], shaped[item.model]
        assert ref is not None
        wrote, grown = writer_of(graph, node, item)
        speed = calibration.speeds.get(model_key(ref)) if calibration else None
        if device is not None:
            speed = plan.assumed_speed(device, shape) if shape else None
        writer = calibration.writers.get(model_key(wrote)) if calibration else None
        for place, level in enumerate(LEVELS):
            prompt, completion, longest = _lengths(writer, node, limit, level, grown)
            add = {
                "tokens": plan.tokens(item, prompt, completion),
                "flops": plan.model_flops(item, shape, prompt, completion) if shape else None,
                "seconds": plan.seconds(item, speed, prompt, completion, longest) if speed else None,
            }
            for name, value in add.items():
                row = sums[name]
                if value is None:
                    sums[name] = None
                elif row is not None:
                    row[place] += value
    steps: Number | None = node.settings.steps if isinstance(node, StageSpec) else None
    if isinstance(node, StageSpec) and node.match:
        steps = _match(sums, node, before)
    if sums["seconds"] is not None:
        sums["seconds"] = _at_some_speed(sums["seconds"])
    memory, fits = None, []
    start = shaped["start"]
    if start is not None:
        base = calibration.base if calibration and not device else 0.0
        memory = plan.memory(node, execution, start, shaped["teacher"], prompt, base)
        room = device.memory if device else memory_of(execution.device)
        fits = plan.what_fits(node, execution, start, shaped["teacher"], prompt, base, room) if room else []
    price = execution.price_per_hour
    cost = [s / 3600 * price for s in sums["seconds"]] if price is not None and sums["seconds"] else None
    parts = None if memory is None else {**vars(memory), "peak": memory.peak}
    return {"steps": steps, "labels": plan.labels(node), **sums, "memory": parts, "fits": fits, "price": cost}


def _at_some_speed(levels: list[Number]) -> list[Number]:
    """Seconds [low, mid, high] of uncertain lengths, and of a speed that is uncertain too: factors independent."""
    low, mid, high = levels
    if not low:
        return levels
    less, more = (math.exp(math.hypot(math.log(ratio), math.log(SPEED_SPREAD))) for ratio in (mid / low, high / mid))
    return [mid / less, mid, mid * more]


def _match(sums: dict[str, list[Number] | None], node: StageSpec, before: dict[str, Any]) -> Number | None:
    """A stage that ends by FLOPs: everything in proportion to what it may spend; its steps."""
    spent = [before[key]["flops"] for key in node.match]
    if sums["flops"] is None or None in spent:
        sums |= {"tokens": None, "seconds": None}
        return None
    target = [sum(level) for level in zip(*spent, strict=True)]
    shares = [t / own for t, own in zip(target, sums["flops"], strict=True)]
    for name, row in sums.items():
        sums[name] = None if row is None else [value * share for value, share in zip(row, shares, strict=True)]
    return node.settings.steps * shares[1]


def writer_of(graph: Graph, node: Node, item: Item) -> tuple[ModelRef, bool]:
    """The base model that answers as the item's writer does, and whether reward may have changed its lengths.

    A student answers as long as its teacher does: what a dense stage carries over.
    """
    teacher = None if isinstance(node, EvaluationSpec) else node.teacher
    if item.writer == "teacher" and teacher is not None:
        return _origin(graph, teacher)
    ref, grown = _origin(graph, node.start)
    if isinstance(node, StageSpec) and isinstance(node.settings, GRPO):
        return ref, True
    if isinstance(node, StageSpec) and isinstance(node.settings, Distill) and teacher is not None:
        return _origin(graph, teacher)
    return ref, grown


def _origin(graph: Graph, ref: ModelRef) -> tuple[ModelRef, bool]:
    if ref.stage is None:
        return ref, False
    node = graph.nodes[ref.stage]
    assert isinstance(node, StageSpec)
    if isinstance(node.settings, GRPO):
        return _origin(graph, node.start)[0], True
    taught = isinstance(node.settings, Distill | TeacherRollouts) and node.teacher is not None
    return _origin(graph, node.teacher if taught and node.teacher else node.start)


def _lengths(
    writer: Writer | None, node: Node, limit: int, level: plan.Level, grown: bool
) -> tuple[Number, Number, Number]:
    """Mean tokens of prompts and completions, and of the longest completion."""
    if writer is None:
        return _guessed_prompt(canonical(node.problems.task), node.problems.split), limit * UNSEEN[level], limit
    factor = GROWTH[level] if grown else {"low": 1 - SURE, "mid": 1.0, "high": 1 + SURE}[level]
    return writer.prompt, writer.completion(limit, factor), min(limit, factor * max(writer.lengths))


@functools.lru_cache(maxsize=64)
def _guessed_prompt(task: str, split: str) -> Number:
    """Tokens of prompts that no tokenizer has seen, at four characters each: the mean of the whole split."""
    try:
        problems = load_task(json.loads(task)).problems(split)
    except (ValueError, OSError):  # planned offline, on data out of reach
        return 0.0
    return sum(len(m.content) for p in problems for m in p.messages) / 4 / max(1, len(problems))


def against(planned: dict[str, Any], graph: Graph, store: Store) -> dict[str, Any]:
    """The plan with, for every finished node and for all of them together, what was spent and planned over actual."""
    nodes, sums = {}, {"tokens": [0.0, 0.0], "seconds": [0.0, 0.0], "flops": [0.0, 0.0], "peak_memory": [0.0, 0.0]}
    for key, row in planned["nodes"].items():
        if key not in graph.nodes or not store.is_done(key):
            continue
        outcome = store.outcome(key)
        bill = total([outcome["meter"]])
        actual = {"tokens": sum(bill["tokens"].values()), "seconds": bill["seconds"], "flops": bill["flops"]}
        nodes[key] = {**row, "actual": {**actual, "peak_memory": outcome.get("peak_memory", 0)}}
        for name, value in actual.items():
            if row[name] is not None:
                sums[name] = [sums[name][0] + row[name][1], sums[name][1] + value]
        if row["memory"]:
            peak = (row["memory"]["peak"], outcome.get("peak_memory", 0))
            sums["peak_memory"] = [max(x) for x in zip(sums["peak_memory"], peak, strict=True)]
    ratios = {name: {"planned": p, "actual": a, "ratio": p / a if a else None} for name, (p, a) in sums.items() if p}
    return {"rests_on": planned["rests_on"], "nodes": nodes, "planned_against_actual": ratios}
