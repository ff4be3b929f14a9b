"""Writes run directories as a study would leave them: finished, with budgets, at work, with a failure."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HOSTILE = "</script><img src=x onerror=alert(1)>\n  & \"two\"  'spaces' <b>bold</b> {{ 7*7 }}\u202e\ud83d\ude00 \ud800"
START = 1_800_000_000.0
CHAINS = {
    "direct": ("student_rl",),
    "bridge": ("teacher_rl", "warmup", "distill"),
    "bridge_rl": ("teacher_rl", "warmup", "distill", "student_rl"),
    "sft_control": ("teacher_rl", "sft"),
}
METHOD = {"teacher_rl": "grpo", "student_rl": "grpo", "warmup": "warmup", "distill": "distill", "sft": "sft"}
REASONS = {"correct": 20, "wrong": 42, "timeout": 2}
LEVEL = {"direct": 0.33, "bridge": 0.41, "bridge_rl": 0.45, "sft_control": 0.27}
RECIPE = """name = "made"
note = "A study that no machine ran: <numbers> & names are made up."
seeds = {seeds}
comparisons = [{{ a = "bridge", b = "direct" }}]
[pool]
labels = 128
[evaluations.chains]
problems = 32
"""


def key(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:20]


def make(
    root: Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    budgets: Sequence[int] = (),
    arms: Sequence[str] = tuple(CHAINS),
    at_work: bool = False,
    failed: bool = False,
) -> Path:
    """A run directory. `at_work`: the last arm's stages are running or to do; `failed`: its first one failed."""
    root.mkdir(parents=True, exist_ok=True)
    nodes, by_arm, requested = _stages(seeds, budgets, arms)
    unfinished = [name for name in by_arm if name.partition("@")[0] == arms[-1]] if at_work or failed else []
    (root / "recipe.toml").write_text(RECIPE.format(seeds=list(seeds)))
    _write(root / "environment.json", {
        "python": "3.11.9", "machine": "x86_64", "packages": {"headwater": "0.1.0", "torch": "2.13.0"}, "device": "cpu",
        "command": ["headwater", "run", "recipe.toml"], "commit": "0123abc", "cores": 2, "processor": "made up",
    })  # fmt: skip  # a table: several entries a line
    own = {k for name in unfinished for keys in by_arm[name].values() for k in keys}
    own -= {k for name in by_arm if name not in unfinished for keys in by_arm[name].values() for k in keys}
    evals: dict[str, Any] = {}
    for model in ["student", "teacher", *[k for k in nodes if nodes[k]["kind"] == "stage"]]:
        for seed in seeds if model in ("student", "teacher") else [nodes[model]["seed"]]:
            place = key("eval", model, seed)
            title = f"base {model}" if model in ("student", "teacher") else f"after {nodes[model]['title']}"
            evals.setdefault(model, {}).setdefault("chains", {})[str(seed)] = place
            nodes[place] = {
                "title": f"chains {title}, seed {seed}", "kind": "evaluate", "label": "evaluate", "stage": None,
                "seed": seed, "parents": [] if model in ("student", "teacher") else [model], "steps": None,
            }  # fmt: skip  # a table: several entries a line
            if model in own:
                own.add(place)
    _write(root / "stages.json", {
        "nodes": nodes, "arms": by_arm, "evals": evals, "requested": requested,
        "unchecked": ["data of hf:some/set: the Hub is out of reach"] if failed else [],
    })  # fmt: skip  # a table: several entries a line
    _events(root, nodes, own, failed)
    for place, node in nodes.items():
        if place not in own:
            _node(root / "nodes" / place, place, node)
    _results(root, nodes, by_arm, evals, seeds, budgets, unfinished)
    return root


def _stages(
    seeds: Sequence[int], budgets: Sequence[int], arms: Sequence[str]
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, list[str]]], int]:
    nodes: dict[str, dict[str, Any]] = {}
    by_arm: dict[str, dict[str, list[str]]] = {}
    requested = 0
    for labels in budgets or (128,):
        for arm in arms:
            name = f"{arm}@{labels}" if budgets else arm
            for seed in seeds:
                student, teacher, keys = None, None, []
                for stage in CHAINS[arm]:
                    parents = [p for p in (student, teacher if METHOD[stage] != "grpo" else None) if p]
                    place = key(stage, seed, labels, parents)
                    nodes[place] = {
                        "title": f"{stage}, seed {seed}", "kind": "stage", "label": METHOD[stage], "stage": stage,
                        "seed": seed, "parents": parents, "steps": 40,
                    }  # fmt: skip  # a table: several entries a line
                    student, teacher = (student, place) if stage == "teacher_rl" else (place, teacher)
                    keys.append(place)
                    requested += 1
                by_arm.setdefault(name, {})[str(seed)] = keys
    return nodes, by_arm, requested


def _events(root: Path, nodes: dict[str, dict[str, Any]], own: set[str], failed: bool) -> None:
    rows: list[dict[str, Any]] = [{"time": START, "kind": "run", "key": None, "error": "", "command": ["headwater"]}]
    now = START
    for place in (k for k in nodes if k not in own):
        rows.append({"time": now, "kind": "started", "key": place, "error": ""})
        now += 20.0 if nodes[place]["kind"] == "stage" else 5.0
        rows.append({"time": now, "kind": "done", "key": place, "error": ""})
    if own:
        first = next(k for k in nodes if k in own)
        rows.append({"time": now, "kind": "run", "key": None, "error": "", "command": ["headwater", "resume", "it"]})
        rows.append({"time": now, "kind": "started", "key": first, "error": ""})
        if failed:
            rows.append({"time": now + 3, "kind": "failed", "key": first, "error": "loss is not finite <at step 3>"})
        else:
            (root / "nodes" / first).mkdir(parents=True)
            lines = [metrics(nodes[first], step, now + 2 + step) for step in range(10)]
            _lines(root / "nodes" / first / "metrics.jsonl", lines)
    else:
        rows.append({"time": now, "kind": "end", "key": None, "error": ""})
    _lines(root / "events.jsonl", rows)


def metrics(node: dict[str, Any], step: int, time: float) -> dict[str, Any]:
    """A row of metrics.jsonl, different for every seed."""
    wave = 0.05 * math.sin(step + node["seed"])
    row: dict[str, Any] = {"step": step, "time": time, "policy/entropy": 0.3 / (1 + step / 20) + wave / 5}
    row |= {"completion/len_mean": 18 + step / 4, "completion/frac_truncated": 0.0, "optim/lr": 1e-4}
    if node["label"] == "grpo":
        row |= {"reward/mean": 0.2 + step / 100 + wave, "reward/frac_groups_zero_std": 0.3 + wave}
        row |= {"grader/frac_timeout": 0.25 if step == 3 else 0.0, "grader/frac_memory": 0.0, "grader/frac_error": 0.0}
    elif node["label"] in ("warmup", "distill"):
        row["teacher/forward_kl" if node["label"] == "warmup" else "teacher/reverse_kl"] = 0.4 / (1 + step / 5)
    return row


def _node(directory: Path, place: str, node: dict[str, Any]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    _write(directory / "spec.json", {"spec": {"kind": node["kind"]}})
    result = {"result": {"reasons": REASONS}} if node["kind"] == "evaluate" else {}
    _write(directory / "done.json", {"key": place, **result})
    if node["kind"] == "stage":
        _lines(directory / "metrics.jsonl", [metrics(node, step, START + step) for step in range(40)])
        return
    rows = []
    for i in range(32):
        good = (i + node["seed"]) % 3 == 0
        rows.append({
            "problem": key("problem", i)[:16], "prompt": [{"role": "user", "content": f"{i}+{i}="}], 
            "answer": str(2 * i),
            "correct": [good, False], "parsed": [True, i != 0], "reasons": ["correct" if good else "wrong", "unparsed"],
            "styles": ["worked", None], "finished": [True, i != 1], "lengths": [3, 9],
            "texts": [str(2 * i), HOSTILE if i == 0 else f"line one\n    two of {i}\n" + "x" * (2000 if i == 1 else 0)],
        })  # fmt: skip  # a table: several entries a line
    _lines(directory / "samples.jsonl", rows)


def summary(mean: float, seeds: Sequence[int], gap: bool = False) -> dict[str, Any]:
    found: dict[str, Any] = {
        "mean": mean, "ci95": [mean - 0.03, mean + 0.03],
        "over": "seeds and problems" if len(seeds) > 1 else "problems",
        "pass@k": {"1": {"mean": mean, "ci95": [mean - 0.03, mean + 0.03]},
                   "8": {"mean": min(mean + 0.2, 1), "ci95": [mean + 0.15, 1.0]}},
        "unparsed": 0.02, "truncated": 0.01, "wrong": 1 - 0.02 - mean,
        "styles": {"worked": {"share": 0.7, "accuracy": mean}, "bare": {"share": 0.3, "accuracy": 0.1}},
    }  # fmt: skip  # a table: several entries a line
    return found | ({"gap_recovery": {"value": 0.5, "ci95": [0.4, 0.6]}} if gap else {})


def result(place: str, mean: float) -> dict[str, Any]:
    return {
        "avg@k": mean, "k": 2, "num_problems": 32, "pass@k": {"1": mean, "8": mean + 0.4}, "parsed": 0.98,
        "truncated": 0.01,
        "reasons": REASONS, "styles": {"worked": {"share": 1.0, "accuracy": mean}},
        "per_problem": f"evals/{place}.json",
    }  # fmt: skip  # a table: several entries a line


def compared(a: str, b: str, difference: float, half: float, **more: Any) -> dict[str, Any]:
    """A row of `comparisons` whose verdict follows from its interval."""
    low, high = difference - half, difference + half
    found = "a better" if low > 0 else "b better" if high < 0 else "not distinguishable"
    return {
        "a": a, "b": b, "task": "chains", "difference": difference, "ci95": [low, high], "num_seeds": 3,
        "p_adjusted": 0.2 if found == "not distinguishable" else 1e-4, "over": "seeds and problems",
        "verdict": found, **more,
    }  # fmt: skip  # a table: several entries a line


def _results(
    root: Path,
    nodes: dict[str, dict[str, Any]],
    by_arm: dict[str, dict[str, list[str]]],
    evals: dict[str, Any],
    seeds: Sequence[int],
    budgets: Sequence[int],
    unfinished: Sequence[str],
) -> None:
    models: dict[str, Any] = {}
    for model, mean in (("student", 0.17), ("teacher", 0.31)):
        by_seed = {s: {"chains": result(k, mean)} for s, k in evals[model]["chains"].items()}
        models[model] = {"role": f"base {model}", "evals": by_seed, "summary": {"chains": summary(mean, seeds)}}
    done = {name: by_seed for name, by_seed in by_arm.items() if name not in unfinished}
    rows: dict[str, Any] = {}
    ends = {keys[-1] for by_seed in done.values() for keys in by_seed.values()}
    for name, by_seed in done.items():
        arm, _, labels = name.partition("@")
        pool = int(labels or 128)
        mean = LEVEL[arm] + 0.03 * math.log2(pool / 128)
        for seed, keys in by_seed.items():
            for stage, place in list(zip(CHAINS[arm], keys, strict=True))[:-1]:
                role = "trained teacher" if stage == "teacher_rl" else f"student after {stage}"
                row = {"role": role, "of": f"{name}/{stage}", "seed": int(seed)}
                row["evals"] = {seed: {"chains": result(evals[place]["chains"][seed], 0.8)}}
                row |= {"summary": {"chains": summary(0.8, seeds)}} if int(seed) == seeds[0] else {}
                if place not in ends:
                    models.setdefault(place, row)
        rows[name] = {
            "arm": arm, "budget": pool, "stages": list(CHAINS[arm]), "summary": {"chains": summary(mean, seeds, True)},
            "seeds": {seed: _bill(CHAINS[arm], keys, pool, evals, seed, mean) for seed, keys in by_seed.items()},
        }  # fmt: skip  # a table: several entries a line
    tail = f"@{max(budgets)}" if budgets else ""
    pairs = [
        compared(f"bridge{tail}", f"direct{tail}", 0.08, 0.02),
        compared(f"bridge{tail}", "base student", 0.24, 0.02),
    ]
    if "bridge_rl" in by_arm or budgets:
        pairs.append(compared(f"bridge_rl{tail}", f"bridge{tail}", 0.01, 0.03, margin=0.05, outcome="confirmed"))
    pairs = [p for p in pairs if all(side in rows or side.startswith("base") for side in (p["a"], p["b"]))]
    for pair in pairs:
        pair |= {"num_seeds": len(seeds), "over": "seeds and problems" if len(seeds) > 1 else "problems"}
    stages = [k for k in nodes if nodes[k]["kind"] == "stage"]
    _write(root / "results.json", {
        "schema": 1, "recipe": "made", "complete": not unfinished, "models": models, "arms": rows, "comparisons": pairs,
        **(_curves(rows, budgets) if budgets else {}),
        "study": {
            "labels": {"distinct": 300, "revealed": 2400}, "stages_trained": len(stages),
            "cost": {"tokens": {"trained": 9}, "flops": 9e12, "seconds": 99},
            "stages_requested": sum(len(k) for s in by_arm.values() for k in s.values()),
        },
    })  # fmt: skip  # a table: several entries a line


def _bill(
    stages: Sequence[str], keys: Sequence[str], pool: int, evals: dict[str, Any], seed: str, mean: float
) -> dict[str, Any]:
    bills = []
    for i, (stage, place) in enumerate(zip(stages, keys, strict=True), start=1):
        sparse = METHOD[stage] == "grpo"
        bills.append({
            "stage": stage, "key": place,
            "labels": {"distinct": pool if sparse else 0, "revealed": 960 if sparse else 0},
            "cost": {"tokens": {"sampled": 100_000 * i, "trained": 200_000}, "flops": 3e11 * i, "seconds": 20.0 * i},
        })  # fmt: skip  # a table: several entries a line
    cost = {
        "tokens": {"sampled": sum(b["cost"]["tokens"]["sampled"] for b in bills), "trained": 200_000 * len(bills)},
        "flops": sum(b["cost"]["flops"] for b in bills), "seconds": sum(b["cost"]["seconds"] for b in bills),
    }  # fmt: skip  # a table: several entries a line
    revealed = sum(b["labels"]["revealed"] for b in bills)
    return {
        "stages": list(keys), "labels": {"distinct": pool, "revealed": revealed}, "cost": cost, "by_stage": bills,
        "evals": {"chains": result(evals[keys[-1]]["chains"][seed], mean)},
    }  # fmt: skip  # a table: several entries a line


def _curves(rows: dict[str, Any], budgets: Sequence[int]) -> dict[str, Any]:
    curves: dict[str, Any] = {}
    for row in rows.values():
        found = row["summary"]["chains"]
        curves.setdefault(row["arm"], {}).setdefault("chains", []).append(
            {"labels": row["budget"], "mean": found["mean"], "ci95": found["ci95"]}
        )
    ends = [min(budgets), max(budgets)]
    matches = [
        {"value": None, "ci95": [float(ends[1]), None]},
        {"value": 90.4, "ci95": [64.0, 120.0]},
    ]
    named = [
        {"arm": f"bridge@{labels}", "baseline": "direct", "task": "chains", "labels": labels, "range": ends, **match}
        for labels, match in zip(sorted(budgets, reverse=True), matches, strict=False)
    ]
    return {"curves": curves, "labels_to_match": named}


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def _lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
