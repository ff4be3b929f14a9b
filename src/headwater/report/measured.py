"""What `headwater eval` found: a table, files, and files to lay beside those of lm-evaluation-harness."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from headwater.checkpoint import write_atomically

Found = Mapping[str, Mapping[str, Any]]
"""Evaluation -> what `study.measure.evaluate_model` returns of it."""


def print_measured(console: Console, model: str, found: Found) -> None:
    """One row an evaluation, and where every completion is."""
    table = Table("", "avg@k [95 %]", "k", "problems", "pass@k", "maj@k", "parsed", "cut", title=model)
    for name, row in found.items():
        low, high = row["ci95"] or (float("nan"),) * 2
        table.add_row(
            name,
            f"{row['avg@k']:.4f} [{low:.4f}, {high:.4f}]",
            str(row["k"]),
            str(row["num_problems"]),
            f"{row['pass@k'][str(row['k'])]:.4f}",
            "-" if row["maj@k"] is None else f"{row['maj@k']:.4f}",
            f"{row['parsed']:.3f}",
            f"{row['truncated']:.3f}",
        )
    console.print(table)
    for name, row in found.items():
        console.print(f"{name}: every completion in {row['samples_file']}", markup=False, soft_wrap=True)


def write_measured(found: Found, out: Path) -> None:
    """`results.json` and a copy of every samples file, `samples_NAME.jsonl`; the results name the copies."""
    out.mkdir(parents=True, exist_ok=True)
    kept = {}
    for name, row in found.items():
        copy = out / f"samples_{name}.jsonl"
        shutil.copyfile(row["samples_file"], copy)
        kept[name] = {**row, "samples_file": copy.name}
    write_atomically(out / "results.json", json.dumps(kept, indent=1))


def write_lm_eval(found: Found, out: Path) -> Path:
    """`out/MODEL/results_DATE.json` and `samples_NAME_DATE.jsonl`, laid out as lm-evaluation-harness 0.4 lays its own.

    avg@k stands where it has `exact_match`, with the standard error over problems. Returns the results file.
    """
    protocols = {name: row["protocol"] for name, row in found.items()}
    model = next(iter(protocols.values()))["model"]
    date, plain = datetime.now().isoformat().replace(":", "-"), re.sub(r"[\"<>:/|\\?*\[\]#=]+", "__", model)
    directory = out / plain[-100:]
    directory.mkdir(parents=True, exist_ok=True)
    results = {
        "results": {name: {"alias": name, **_metrics(row)} for name, row in found.items()},
        "group_subtasks": {name: [] for name in found},
        "configs": {name: _config(name, row) for name, row in found.items()},
        "versions": {name: protocol["revision"] for name, protocol in protocols.items()},
        "n-shot": {name: protocol.get("shots", 0) for name, protocol in protocols.items()},
        "higher_is_better": {name: {"exact_match": True} for name in found},
        "n-samples": {
            name: dict.fromkeys(("original", "effective"), row["num_problems"]) for name, row in found.items()
        },
        "config": {
            "model": "headwater",
            "model_args": f"pretrained={model}",
            "headwater_version": version("headwater"),
        },
        "model_source": "headwater",
        "model_name": model,
        "model_name_sanitized": plain,
        "date": date,
    }
    for name, row in found.items():
        lines = Path(row["samples_file"]).read_text(encoding="utf-8").splitlines()
        samples = [_sample(i, json.loads(line), protocols[name]) for i, line in enumerate(lines)]
        text = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
        write_atomically(directory / f"samples_{name}_{date}.jsonl", text)
    path = directory / f"results_{date}.json"
    write_atomically(path, json.dumps(results, indent=2, ensure_ascii=False))
    return path


def _metrics(row: Mapping[str, Any]) -> dict[str, Any]:
    metrics = {"exact_match,none": row["avg@k"], "exact_match_stderr,none": row["standard_error"]}
    metrics |= {f"pass@{k},none": value for k, value in row["pass@k"].items() if k != "1"}
    return metrics | ({f"maj@{row['k']},none": row["maj@k"]} if row["maj@k"] is not None and row["k"] > 1 else {})


def _config(name: str, row: Mapping[str, Any]) -> dict[str, Any]:
    protocol = row["protocol"]
    return {
        "task": name,
        "dataset_path": protocol.get("test_source", protocol["task"].get("source", "")),
        "test_split": protocol["split"],
        "num_fewshot": protocol.get("shots", 0),
        "output_type": "generate_until",
        "generation_kwargs": _generation(protocol),
        "repeats": row["k"],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": protocol["revision"], **protocol},
    }


def _generation(protocol: Mapping[str, Any]) -> dict[str, Any]:
    taken = {name: protocol[name] for name in ("temperature", "top_p", "top_k")}
    sampled = protocol["temperature"] > 0
    return {"until": list(protocol["stop"]), "max_gen_toks": protocol["max_new_tokens"], "do_sample": sampled, **taken}


def _sample(place: int, row: Mapping[str, Any], protocol: Mapping[str, Any]) -> dict[str, Any]:
    prompt = json.dumps(row["prompt"], ensure_ascii=False)
    return {
        "doc_id": place,
        "doc": {"id": row["problem"], "prompt": row["prompt"], "answer": row["answer"]},
        "target": str(row["answer"]),
        "arguments": {"gen_args_0": {"arg_0": prompt, "arg_1": _generation(protocol)}},
        "resps": [row["texts"]],
        "filtered_resps": row["answers"],
        "filter": "none",
        "metrics": ["exact_match"],
        "doc_hash": _digest(row["problem"]),
        "prompt_hash": _digest(prompt),
        "target_hash": _digest(str(row["answer"])),
        "exact_match": sum(row["correct"]) / len(row["correct"]),
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
