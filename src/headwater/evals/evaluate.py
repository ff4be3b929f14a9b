"""avg@k, pass@k and maj@k of one model on held-out problems, with every sample's verdict kept."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from headwater.checkpoint import write_atomically
from headwater.config import Evaluation
from headwater.evals.statistics import majority, pass_at_k
from headwater.meter import Meter
from headwater.models.language_model import LanguageModel
from headwater.rollouts.batch import Batch
from headwater.rollouts.sampler import Sampling
from headwater.rollouts.served import sampler_for
from headwater.spec import EVALUATED_AT_ONCE, EvaluationSpec
from headwater.tasks.benchmarks import provenance
from headwater.types import Grade, Problem, Rollout, Verdict


def evaluate(
    settings: Evaluation,
    *,
    model: LanguageModel,
    problems: Sequence[Problem],
    grade: Grade,
    seed: int,
    meter: Meter,
    max_tokens: int = 262_144,
    directory: Path | None = None,
    on_batch: Callable[[int, dict[str, float]], None] = lambda done, metrics: None,
) -> dict[str, Any]:
    """Sample `settings.samples` completions of every problem and grade them.

    Returns `{"avg@k", "k", "num_problems", "pass@k": {k: x}, "maj@k", "parsed", "truncated", "reasons", "styles",
    "per_problem"}`; `per_problem[i]` is the share of right samples of problem i; `maj@k` is None when the grader tells
    no answers. With a `directory`, finished batches of 512 rollouts are kept there; an interrupted evaluation goes on
    after them. Random numbers depend on (seed, problem, sample) alone. `on_batch` gets problems done and scores.
    """
    rows: list[dict[str, Any]] = []
    path = directory / "samples.jsonl" if directory else None
    if path is not None and path.exists():
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        meter.restore(rows[-1]["meter"])
    sampler = sampler_for(model, max_tokens=max_tokens)
    sampling = Sampling(
        ("evaluate", seed),
        settings.samples,
        settings.max_new_tokens,
        settings.temperature,
        settings.top_p,
        settings.top_k,
    )
    size = max(1, EVALUATED_AT_ONCE // settings.samples)
    for start in range(len(rows), len(problems), size):
        part = problems[start : start + size]
        with meter.timed("evaluated"):
            rollouts = sampler.sample(part, sampling)
            pairs = [(part[i // settings.samples], r.text) for i, r in enumerate(rollouts)]
            verdicts = mark_truncated(grade(pairs), rollouts)
        sizes = Batch.of(rollouts).sizes
        meter.add("evaluated", model.shape, sizes, sampler.decoded)
        meter.add("evaluated", model.shape, [(p, 0) for p, _ in sizes[:: settings.samples]], sampler.prefilled)
        for i, problem in enumerate(part):
            mine = slice(i * settings.samples, (i + 1) * settings.samples)
            rows.append(
                {
                    "problem": problem.id,
                    "prompt": [asdict(m) for m in problem.messages],
                    "answer": problem.answer,
                    "correct": [v.correct for v in verdicts[mine]],
                    "parsed": [v.parsed for v in verdicts[mine]],
                    "reasons": [v.reason for v in verdicts[mine]],
                    "styles": [v.style for v in verdicts[mine]],
                    "answers": [v.answer for v in verdicts[mine]],
                    "finished": [r.finished for r in rollouts[mine]],
                    "lengths": [len(r.completion_ids) for r in rollouts[mine]],
                    "texts": [r.text for r in rollouts[mine]],
                    "meter": meter.state(),
                }
            )
        if path is not None:
            write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
        so_far = summary(rows, settings.samples)
        on_batch(len(rows), {"eval/avg@k": so_far["avg@k"], "eval/truncated": so_far["truncated"]})
    return summary(rows, settings.samples)


def protocol(node: EvaluationSpec) -> dict[str, Any]:
    """What the number of an evaluation depends on besides the weights: to be named wherever it is quoted."""
    prompting = node.start.config.model_dump(mode="json", exclude={"source"})
    return {
        "model": node.start.name,
        **prompting,
        **node.settings.model_dump(mode="json", exclude={"task", "problems"}),
        "seed": node.seed,
        "grader": node.grader,
        "revision": node.revision,
        "task": node.problems.task,
        "digest": node.problems.digest,
        **provenance(node.problems.task),
    }


def mark_truncated(verdicts: Sequence[Verdict], rollouts: Sequence[Rollout]) -> list[Verdict]:
    """The verdicts, with the reason "truncated" for what was cut by the length limit and graded wrong or unparsed.

    Scores stay as they are.
    """
    return [
        replace(v, reason="truncated") if not r.finished and v.reason in ("wrong", "unparsed") else v
        for v, r in zip(verdicts, rollouts, strict=True)
    ]


def summary(rows: Sequence[dict[str, Any]], samples: int) -> dict[str, Any]:
    """The numbers of an evaluation from its per-problem rows."""
    correct = np.array([row["correct"] for row in rows], dtype=float)
    flat = [(c, s) for row in rows for c, s in zip(row["correct"], row["styles"], strict=True)]
    told = any(answer is not None for row in rows for answer in row["answers"])
    return {
        "avg@k": float(correct.mean()),
        "k": samples,
        "num_problems": len(rows),
        "pass@k": {
            str(k): float(np.mean([pass_at_k(samples, int(c), k) for c in correct.sum(1)]))
            for k in sorted({1, samples} | {2**i for i in range(samples.bit_length()) if 2**i <= samples})
        },
        "maj@k": float(np.mean([majority(row["answers"], row["correct"]) for row in rows])) if told else None,
        "parsed": float(np.mean([row["parsed"] for row in rows])),
        "truncated": 1.0 - float(np.mean([row["finished"] for row in rows])),
        "reasons": dict(Counter(reason for row in rows for reason in row["reasons"])),
        "styles": of_styles(flat),
        "per_problem": {row["problem"]: float(c) for row, c in zip(rows, correct.mean(1), strict=True)},
    }


def of_styles(pairs: Sequence[tuple[bool, str | None]]) -> dict[str, dict[str, float]]:
    """Of (correct, style) of some samples: every style's share of them, and the accuracy within it."""
    found = Counter(style for _, style in pairs if style)
    return {
        style: {"share": n / len(pairs), "accuracy": sum(c for c, s in pairs if s == style) / n}
        for style, n in sorted(found.items())
    }
