"""What a node will cost, from what it will do and how fast the device is: tokens, FLOPs, seconds, memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from headwater import flops
from headwater.config import GRPO, SFT, Distill, Execution, Joint, TeacherRollouts, Warmup
from headwater.flops import Number, Shape, Work
from headwater.meter import Role
from headwater.probe.measure import CONTINUATIONS
from headwater.spec import EVALUATED_AT_ONCE, DecisionSpec, EvaluationSpec, Node, StageSpec

Level = Literal["low", "mid", "high"]
LEVELS: tuple[Level, ...] = ("low", "mid", "high")
GROWTH = {"low": 1.0, "mid": math.sqrt(2), "high": 2.0}
"""How much longer reward may make completions: not at all, or twice as long; the middle is their geometric mean."""


@dataclass(frozen=True)
class Device:
    """What the seconds rest on: a device's data sheet, with the share of it that is assumed to be reached."""

    flops: Number
    bandwidth: Number
    memory: Number
    mfu: Number = 0.35
    """Of updates and scoring."""
    reached: Number = 0.4
    """Of the bandwidth, in decoding."""


PROFILES = {
    "a100": Device(312e12, 2.04e12, 80e9),
    "h100": Device(989e12, 3.35e12, 80e9),
    "h200": Device(989e12, 4.8e12, 141e9),
    "b200": Device(2250e12, 8.0e12, 180e9),
    "l40s": Device(362e12, 0.864e12, 48e9),
    "rtx4090": Device(165e12, 1.008e12, 24e9),
}
"""Dense bfloat16 FLOP/s, bytes/s and bytes of the vendors' data sheets."""


@dataclass(frozen=True)
class Speed:
    """Seconds of one model on this machine: a decoding step and a row in it, a token scored, an update and a token in
    it. Grading is not timed."""

    step: Number
    row: Number
    scored: Number
    update: Number
    trained: Number


@dataclass(frozen=True)
class Writer:
    """How a base model answers the recipe's prompts: their mean tokens, and lengths of sampled completions."""

    prompt: Number
    lengths: tuple[int, ...]

    def completion(self, limit: int, growth: Number) -> Number:
        """Mean tokens of a completion that ends at `limit`."""
        return sum(min(limit, growth * n) for n in self.lengths) / len(self.lengths)


@dataclass(frozen=True)
class Item:
    """Sequences that a model processes in a role, in so many calls; `group` completions share a prompt."""

    role: Role
    model: Literal["start", "teacher"]
    sequences: Number
    calls: Number
    group: int = 1
    writer: Literal["start", "teacher"] = "start"
    """Whose completions they are."""


def items(node: Node) -> list[Item]:
    """What a node does in all its steps."""
    if isinstance(node, DecisionSpec):
        drawn = node.problems.count * node.settings.samples
        return [
            Item("evaluated", "start", drawn * (1 + 2 * CONTINUATIONS), 1, node.settings.samples),
            Item("evaluated", "teacher", drawn * (1 + CONTINUATIONS), 1, node.settings.samples, "teacher"),
        ]
    settings = node.settings
    if isinstance(node, StageSpec) and not pool_size(node):
        return []  # a side of a split without labels is not trained
    if isinstance(node, EvaluationSpec):
        drawn = node.problems.count * settings.samples  # pyright: ignore -- an Evaluation
        return [Item("evaluated", "start", drawn, math.ceil(drawn / EVALUATED_AT_ONCE), settings.samples)]  # pyright: ignore -- an Evaluation
    if isinstance(settings, TeacherRollouts):
        solutions = isinstance(settings, SFT) and settings.tokens == "solutions"
        trained = settings.steps * settings.sequences_per_step
        writer = "start" if solutions or node.teacher is None else "teacher"
        work = [Item("trained", "start", trained, settings.steps, writer=writer)]
        if writer == "teacher":
            sampled = pool_size(node) * settings.rollouts_per_problem
            work.append(Item("sampled", "teacher", sampled, 1, settings.rollouts_per_problem, writer))
            if isinstance(settings, Warmup):
                work.append(Item("scored", "teacher", sampled if settings.stored_top_k else trained, 1, 1, writer))
            if settings.keep != "all":
                work.append(Item("graded", "teacher", sampled, 1, 1, writer))
        return work
    assert isinstance(settings, GRPO | Distill)
    drawn = settings.steps * settings.problems_per_step * settings.group_size
    updates = settings.steps * (settings.updates_per_batch if isinstance(settings, GRPO) else 1)
    work = [
        Item("sampled", "start", drawn, settings.steps, settings.group_size),
        Item("trained", "start", drawn, updates),
    ]
    if isinstance(settings, GRPO):
        work.append(Item("graded", "start", drawn, settings.steps))
        own = (settings.updates_per_batch > 1) + (settings.kl_coef > 0)
        work += [Item("scored", "start", drawn, settings.steps)] * own
    if node.teacher is not None and (isinstance(settings, Distill | Joint)):
        work.append(Item("scored", "teacher", drawn, settings.steps))
    return work


def adapted(shape: Shape, rank: int, targets: Sequence[str] | Literal["all-linear"] = "all-linear") -> Shape:
    """The shape with LoRA's adapters: rank x (in + out) for every target of every layer."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sides = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "o_proj": queries}
    sides |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), shape.mlp)
    chosen = sides if targets == "all-linear" else targets
    return replace(shape, adapters=rank * shape.layers * sum(shape.hidden + sides.get(t, shape.mlp) for t in chosen))


def limit_of(node: Node) -> int:
    """Most tokens of a completion."""
    return node.max_new_tokens if isinstance(node, DecisionSpec) else node.settings.max_new_tokens


def pool_size(node: StageSpec) -> int:
    """Problems that the stage sees; of a share that is not decided yet, all."""
    if node.problems.share is None:
        return node.problems.count
    first = int(node.problems.count * node.problems.share)
    return {"all": node.problems.count, "first": first, "second": node.problems.count - first}[node.problems.part]


def labels(node: Node) -> int:
    """Most problems whose answers a stage reveals."""
    if isinstance(node, DecisionSpec):
        return node.problems.count
    if isinstance(node, EvaluationSpec) or not node.problems.labelled:
        return 0
    settings, size = node.settings, pool_size(node)
    held = settings.gate.held_out(size) if settings.gate and size else 0
    watched = held if settings.gate and settings.gate.watch == "score" else 0
    if isinstance(settings, GRPO):
        return watched + min(size - held, settings.steps * settings.problems_per_step * (1 + settings.redraws))
    if isinstance(settings, SFT) and settings.tokens == "solutions":
        return min(size, settings.steps * settings.sequences_per_step)
    return watched + (size - held if isinstance(settings, TeacherRollouts) and settings.keep != "all" else 0)


def tokens(item: Item, prompt: Number, completion: Number) -> Number:
    """As the meter counts them; what is graded passes through no model."""
    if item.role == "graded":
        return 0
    if item.role in ("scored", "trained"):
        return item.sequences * (prompt + completion)
    return item.sequences * (completion + prompt / item.group)


def model_flops(item: Item, shape: Shape, prompt: Number, completion: Number) -> Number:
    """Model FLOPs, as the meter counts them."""
    if item.role == "graded":
        return 0
    if item.role == "trained":
        return item.sequences * flops.training_flops(shape, flops.sequence_work(prompt, completion))
    if item.role == "scored":
        return item.sequences * flops.forward_flops(shape, flops.sequence_work(prompt, completion))
    work = flops.completion_work(prompt, completion) + flops.prompt_work(prompt) * (1 / item.group)
    return item.sequences * flops.forward_flops(shape, work)


def seconds(item: Item, speed: Speed, prompt: Number, completion: Number, longest: Number) -> Number:
    """Seconds of an item whose longest completions have `longest` tokens: decoding goes on until they end."""
    if item.role == "graded":
        return 0
    if item.role == "scored":
        return item.sequences * (prompt + completion) * speed.scored
    if item.role == "trained":
        return item.calls * speed.update + item.sequences * (prompt + completion) * speed.trained
    return item.calls * longest * speed.step + item.sequences * completion * speed.row


def assumed_speed(device: Device, shape: Shape) -> Speed:
    """Seconds from a data sheet: decoding reads the weights once a step, the rest is arithmetic."""
    able = device.flops * device.mfu
    forward = flops.forward_flops(shape, Work(1, 0, 1)) / able
    step = 2 * shape.parameters / (device.bandwidth * device.reached)  # bfloat16
    # The optimizer reads and writes four float32 numbers a weight.
    return Speed(step, forward, forward, 32 * shape.trained / (device.bandwidth * device.reached), 3 * forward)


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the worst moment of a node."""

    base: Number
    """Interpreter and libraries, where they share the memory (CPU)."""
    weights: Number
    optimizer: Number
    """Float32 masters where the weights are rounded, two moments, gradients."""
    teacher: Number
    activations: Number
    logits: Number
    cache: Number
    """Keys and values while sampling, which is not while training."""

    @property
    def peak(self) -> Number:
        working = max(self.cache, self.activations + self.logits)
        return self.base + self.weights + self.optimizer + self.teacher + working


def memory(
    node: Node,
    execution: Execution,
    start: Shape,
    teacher: Shape | None,
    prompt: Number,
    base: Number,
) -> Memory:
    """What a node needs by count of tensors; prompts are taken as long as `prompt`."""
    settings, wide = node.settings, 2 if node.start.config.dtype == "bfloat16" else 4
    limit, done = limit_of(node), items(node)
    drawn = [i for i in done if i.role in ("sampled", "evaluated")]
    cache = 0.0
    for item in drawn:
        shape = teacher if item.model == "teacher" and teacher else start
        rows = min(item.sequences / item.calls, max(item.group, execution.sampler_tokens / (prompt + limit)))
        kept = 2 * shape.layers * shape.kv_heads * shape.head_dim * wide
        # Growing the cache copies a layer; a draw that truncates, or from few tokens, holds log-probs in float32,
        # masses and their sums in float64; others hold less.
        cache = max(cache, rows * (prompt + limit) * kept * (1 + 1 / shape.layers) + rows * shape.vocab * 28)
    held = 0.0 if teacher is None or execution.teacher else teacher.parameters * _teacher_wide(node)
    if not isinstance(node, StageSpec) or not done:
        return Memory(base, start.parameters * wide, 0, held, 0, 0, cache)
    masters = 4 * start.trained if wide == 2 else 0
    updates = next(i for i in done if i.role == "trained")
    padded = min(execution.micro_batch_tokens, updates.sequences / updates.calls * (prompt + limit))
    padded = max(padded, prompt + limit)
    per_layer = wide * (8 * start.hidden + 4 * start.heads * start.head_dim + 5 * start.mlp)
    layers = 1 if execution.gradient_checkpointing else start.layers
    saved = padded * (layers * per_layer + (start.layers * start.hidden * wide if layers == 1 else 0))
    matrices = 2 if execution.device == "cpu" else 5  # tokens of a chunk x vocabulary, counted in float32
    logits = min(execution.chunk_tokens, padded) * start.vocab * 4 * matrices
    logits += 0 if start.adapters else 4 * start.head
    if isinstance(settings, GRPO) and settings.kl_coef > 0 and not settings.lora:
        held += start.parameters * wide
    return Memory(base, start.parameters * wide, masters + 12 * start.trained, held, saved, logits, cache)


def _teacher_wide(node: Node) -> int:
    teacher = None if isinstance(node, EvaluationSpec) else node.teacher
    return 2 if teacher is not None and teacher.config.dtype == "bfloat16" else 4


def what_fits(
    node: Node,
    execution: Execution,
    start: Shape,
    teacher: Shape | None,
    prompt: Number,
    base: Number,
    available: Number,
) -> list[str] | None:
    """The nearest settings with which the node fits: none needed ([]), or None when all of them are not enough.

    Smaller micro-batches and sampler lots cost little time, recomputing activations a third more arithmetic, and LoRA
    changes what is learned: they are tried in this order and added up.
    """
    changes: dict[str, str] = {}

    def peak() -> Number:
        return memory(node, execution, start, teacher, prompt, base).peak

    longest = int(prompt) + limit_of(node)
    for name in ("micro_batch_tokens", "sampler_tokens"):
        while peak() > available and (value := getattr(execution, name) // 2) >= longest:
            smaller = execution.model_copy(update={name: value})
            if memory(node, smaller, start, teacher, prompt, base).peak < peak():
                changes[f"execution.{name}"] = str(value)
            execution = smaller
    if peak() > available and isinstance(node, StageSpec):
        execution = execution.model_copy(update={"gradient_checkpointing": True})
        changes["execution.gradient_checkpointing"] = "true"
        if peak() > available:
            start = adapted(start, 16)
            changes["lora"] = "{ rank = 16 }"
    return None if peak() > available else [f"{name} = {value}" for name, value in changes.items()]
