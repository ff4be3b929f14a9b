"""What a study will cost before it runs: tokens and FLOPs at most, seconds from finished nodes like its own."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from headwater import assets, spec
from headwater.config import GRPO, SFT, Distill, TeacherRollouts, Warmup
from headwater.meter import Role
from headwater.probe.measure import CONTINUATIONS
from headwater.spec import DecisionSpec, EvaluationSpec, ModelRef, Node, StageSpec
from headwater.store import Store
from headwater.study.graph import Graph

FLOPS_PER_TOKEN = {"prefilled": 2, "sampled": 2, "graded": 0, "scored": 2, "trained": 6, "evaluated": 2}


@dataclass(frozen=True)
class Forecast:
    """Of one node. None is what cannot be told: `tokens` of a stage that ends by FLOPs, `flops` of a model that is not
    here, `seconds` when no node like it has finished in this store. `rests_on` counts those that have."""

    tokens: int | None
    """Completion tokens in all roles, when every completion is as long as it may be; prompts come on top."""
    flops: float | None
    """Of those tokens, counted as the meter does."""
    seconds: float | None
    rests_on: int


def forecast(graph: Graph, store: Store) -> dict[str, Forecast]:
    """What every node of a graph will cost, finished ones included. Loads no model."""
    finished = _finished(store)
    found: dict[str, Forecast] = {}
    for key, node in graph.nodes.items():
        seconds, rests_on = _seconds(node, finished)
        if isinstance(node, StageSpec) and node.match:
            spent = [found[k].flops for k in node.match]
            known = [x for x in spent if x is not None]
            found[key] = Forecast(None, sum(known) if len(known) == len(spent) else None, seconds, rests_on)
            continue
        work = at_most(node)
        sizes = [num_parameters(ref.config.source) for _, _, ref in work]
        priced = zip(work, sizes, strict=True)
        flops = None
        if None not in sizes:
            flops = float(sum(FLOPS_PER_TOKEN[role] * tokens * (size or 0) for (role, tokens, _), size in priced))
        found[key] = Forecast(sum(tokens for _, tokens, _ in work), flops, seconds, rests_on)
    return found


def at_most(node: Node) -> list[tuple[Role, int, ModelRef]]:
    """Completion tokens by role, with the model that processes them, when every completion has `max_new_tokens`.

    Not for a stage that ends by FLOPs, whose steps are not known.
    """
    start = node.start
    if isinstance(node, DecisionSpec):
        once = node.problems.count * node.settings.samples * node.max_new_tokens
        return [
            ("evaluated", once * (1 + 2 * CONTINUATIONS), start),
            ("evaluated", once * (1 + CONTINUATIONS), node.teacher),
        ]
    settings = node.settings
    if isinstance(node, EvaluationSpec):
        return [("evaluated", node.problems.count * node.settings.samples * node.settings.max_new_tokens, start)]
    teacher = node.teacher
    if isinstance(settings, TeacherRollouts):
        trained = settings.steps * settings.sequences_per_step * settings.max_new_tokens
        work: list[tuple[Role, int, ModelRef]] = [("trained", trained, start)]
        if teacher is None or (isinstance(settings, SFT) and settings.tokens == "solutions"):
            return work
        sampled = _pool_size(node) * settings.rollouts_per_problem * settings.max_new_tokens
        work.append(("sampled", sampled, teacher))
        if isinstance(settings, Warmup):
            work.append(("scored", sampled if settings.stored_top_k else trained, teacher))
        return work
    assert isinstance(settings, GRPO | Distill)
    drawn = settings.steps * settings.problems_per_step * settings.group_size * settings.max_new_tokens
    rounds = 1 + settings.redraws if isinstance(settings, GRPO) else 1
    own = (settings.updates_per_batch > 1) + (settings.kl_coef > 0) if isinstance(settings, GRPO) else 0
    scorers = [start] * own + ([teacher] if teacher else [])
    return [
        ("sampled", drawn * rounds, start),
        ("trained", drawn, start),
        *(("scored", drawn, model) for model in scorers),
    ]


@cache
def num_parameters(source: str) -> int | None:
    """Parameters of a model of this machine, from the headers of its safetensors files; None for any other."""
    if source.startswith(("hf:", "wheel:")):
        return None
    try:
        files = sorted(assets.fetch(source).glob("*.safetensors"))
    except ValueError:
        return None
    return sum(map(_elements, files)) or None


def _elements(path: Path) -> int:
    """Elements of a safetensors file: 8 bytes of length, then a JSON header with every tensor's shape."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    total = 0
    for name, tensor in header.items():
        if name != "__metadata__":
            size = 1
            for length in tensor["shape"]:
                size *= length
            total += size
    return total


def _pool_size(node: StageSpec) -> int:
    if node.problems.share is None:
        return node.problems.count
    first = int(node.problems.count * node.problems.share)
    return {"all": node.problems.count, "first": first, "second": node.problems.count - first}[node.problems.part]


def _finished(store: Store) -> dict[str, list[float]]:
    """Seconds per unit of work (a step, or an evaluation) of all finished nodes by what they have in common."""
    found: dict[str, list[float]] = {}
    for path in (store.root / "nodes").glob("*/done.json"):
        try:
            node = spec.parse(json.dumps(json.loads((path.parent / "spec.json").read_text(encoding="utf-8"))["spec"]))
            meter = json.loads(path.read_text(encoding="utf-8"))["meter"]
        except (OSError, ValueError, KeyError):  # of another version, or being removed
            continue
        if not (isinstance(node, StageSpec) and node.match):
            seconds = sum(row["seconds"] for row in meter.values())
            found.setdefault(_likeness(node), []).append(seconds / _steps(node))
    return found


def _seconds(node: Node, finished: dict[str, list[float]]) -> tuple[float | None, int]:
    if isinstance(node, StageSpec) and node.match:
        return None, 0
    like = finished.get(_likeness(node), [])
    return (float(median(like) * _steps(node)) if like else None), len(like)


def _steps(node: Node) -> int:
    return node.settings.steps if isinstance(node, StageSpec) else 1


def _likeness(node: Node) -> str:
    """Equal for nodes whose steps cost the same: method, settings but their number, and models as they began."""
    settings = node.settings.model_dump(mode="json", exclude={"steps"})
    models: Iterable[ModelRef | None] = [node.start, None if isinstance(node, EvaluationSpec) else node.teacher]
    known: list[Any] = [node.label, settings, [ref and [ref.config.model_dump(), ref.fingerprint] for ref in models]]
    if not isinstance(node, StageSpec) or isinstance(node.settings, TeacherRollouts):
        known.append([node.problems.count, node.problems.part])
    return spec.digest(known)
