r"""Public benchmarks by name: where their rows are, how many, how they are asked and graded.

The facts are in data/benchmarks.toml: files of wheels pinned by SHA-256, Hub data sets by revision, both by the number
of their problems. No problem text is part of Headwater.

AIME's trap: a gold answer from the first `\boxed` of a solution, or "025" compared as text, is wrong for a third of
AIME 2024. Gold answers come from the answer column alone and must be whole numbers of at most three digits, which are
kept without leading zeros.
"""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any, Literal

from headwater.tasks import check_keys, table
from headwater.tasks.splits import SPLITS, SplitTask, take
from headwater.types import Message, Problem

Style = Literal["words", "maths"]

GRADERS = {"words": "headwater.grading.text:grade_number", "maths": "headwater.grading.maths:grade_maths"}
INSTRUCTIONS = {
    "words": '{question}\nSolve it step by step. End with "The answer is" and the number.',
    "maths": "{question}\nPlease reason step by step, and put your final answer within \\boxed{}.",
}
"""What a chat prompt without worked examples says."""
EXAMPLES = {
    "words": (
        "gsm8k",
        "000f634bff50753f 001a82c5e94a58b5 004161518915c004 006edcd6431343ca "
        "007497b1fb9b3c6c 007586b305712e89 008939995281da38 00aa1679c21c2f0e",
    ),
    "maths": ("math", "4a9168e0f5b4034d e63bcbe4ba60d221 e20bca16f35fdbab fb34bd84da7209c4"),
}
"""Worked examples: a benchmark and ids of its training problems (`Problem.id` of the bare question). For word problems
the smallest ids among those whose question and solution have at most 45 words each; for maths the problems of Minerva's
prompt (Lewkowycz et al. 2022, appendix D.2) with the data set's own solutions."""


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark is read, asked and graded.

    `wheel` and `hub` are settings of `table.load` with `test_source` and, where there are official training problems,
    `train_source`; `num_*` count the problems with an answer. `divided`: without official splits, so that training may
    use what the hash of a prompt leaves to it.
    """

    style: Style
    num_test: int
    wheel: Mapping[str, Any]
    num_train: int = 0
    hub: Mapping[str, Any] | None = None
    divided: bool = False


@functools.cache
def benchmarks() -> dict[str, Benchmark]:
    """Every benchmark by name."""
    text = (files("headwater") / "data" / "benchmarks.toml").read_text(encoding="utf-8")
    return {name: Benchmark(**facts) for name, facts in tomllib.loads(text).items()}


def load(name: str, spec: Mapping[str, Any]) -> SplitTask:
    r"""The benchmark, asked as `spec` says.

    `source`: "wheel" (default) or "hub". `prompt`: "chat", the question with an instruction, or "few-shot", after
    `shots` worked examples (see `EXAMPLES`). `template`: "chat", where the examples are turns of a conversation, or
    "none", where all is one text `Question: ...\nAnswer: ...` for base models, whose own `template` is then "none" too.
    `system`: a system message. `fractions` and `sizes` as of `table.load`; official test problems are never trained on,
    and benchmarks without official splits have a split "all" besides.

    A worked example is no problem of its own benchmark. GSM8K and MATH carry their worked solutions as the column
    `solution`. Raises ValueError for unknown settings and for a source with another number of problems than is known.
    """
    benchmark = benchmarks()[name]
    shares = {"fractions"} if benchmark.divided or benchmark.num_train else set()
    check_keys(name, spec, {"source", "prompt", "shots", "template", "system", "sizes"} | shares)
    ids = _example_ids(name, benchmark.style, spec)
    examples = _examples(ids, benchmark.style, spec.get("source", "wheel"))
    bare = _read(name, spec)
    sizes = spec.get("sizes", {})
    if not sizes.keys() <= set(SPLITS):
        raise ValueError(f"{name}: sizes are those of {list(SPLITS)}, not {dict(sizes)}")
    splits: dict[str, tuple[Problem, ...]] = {}
    for split, found in bare.splits.items():
        chosen = take(name, split, [p for p in found if p.id not in ids], sizes.get(split))
        splits[split] = tuple(_ask(p, examples, benchmark.style, spec) for p in chosen)
    if benchmark.divided:
        splits["all"] = sum(splits.values(), ())
    return SplitTask(name, GRADERS[benchmark.style], splits, bare.counts)


def bare(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The task without the settings of its prompt, where equal questions of two benchmarks are equal problems."""
    of_prompt = {"prompt", "shots", "template", "system"} if spec.get("name") in benchmarks() else set()
    return {key: value for key, value in spec.items() if key not in of_prompt}


def provenance(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What a number must name: the benchmark's sources with version and checksum or revision; {} for other tasks."""
    name = str(spec.get("name"))
    if name not in benchmarks():
        return {}
    rows = _rows(name, spec)
    shots = len(_example_ids(name, benchmarks()[name].style, spec))
    return {
        "benchmark": name,
        "shots": shots,
        **{key: rows[key] for key in ("test_source", "train_source") if key in rows},
    }


def _rows(name: str, spec: Mapping[str, Any]) -> Mapping[str, Any]:
    kinds = {"wheel": benchmarks()[name].wheel, "hub": benchmarks()[name].hub}
    rows = kinds.get(spec.get("source", "wheel"))
    if rows is None:
        there = [kind for kind, found in kinds.items() if found]
        raise ValueError(f"{name}: source = {spec.get('source')!r}; use one of {there}")
    return rows


def _read(name: str, spec: Mapping[str, Any]) -> SplitTask:
    """The splits with bare questions, so that how they are asked moves no problem from one split to another."""
    benchmark = benchmarks()[name]
    rows = dict(_rows(name, spec)) | {"title": name, "grader": GRADERS[benchmark.style]}
    rows["source"] = rows.pop("train_source", rows["test_source"])
    if not benchmark.num_train:
        del rows["test_source"]
        rows |= {} if benchmark.divided else {"fractions": {"test": 1.0}}
    kind = "hub" if spec.get("source") == "hub" else "jsonl"
    task = table.load(kind, rows | ({"fractions": spec["fractions"]} if "fractions" in spec else {}))
    found, known = task.counts["rows"] - task.counts["unmatched"], benchmark.num_test + benchmark.num_train
    if found != known:
        raise ValueError(
            f"{name} has {found} problems with an answer at {rows['source']}, but {known} are known: use another source"
        )
    return task


def _example_ids(name: str, style: Style, spec: Mapping[str, Any]) -> list[str]:
    """The worked examples that the settings ask for, in their fixed order; ValueError for settings that conflict."""
    ids = EXAMPLES[style][1].split()
    prompt, template = spec.get("prompt", "few-shot" if spec.get("shots") else "chat"), spec.get("template", "chat")
    shots = spec.get("shots", len(ids) if prompt == "few-shot" else 0)
    if prompt not in ("chat", "few-shot"):
        raise ValueError(f"{name}: prompt = {prompt!r}; use 'chat' or 'few-shot'")
    if template not in ("chat", "none"):
        raise ValueError(f"{name}: template = {template!r}; use 'chat' or 'none'")
    if shots not in (range(1, len(ids) + 1) if prompt == "few-shot" else (0,)):
        raise ValueError(f"{name}: shots = {shots} with prompt = {prompt!r}: 'chat' has 0, 'few-shot' 1 to {len(ids)}")
    return ids[:shots]


def _examples(ids: list[str], style: Style, source: str) -> list[Problem]:
    if not ids:
        return []
    read = _read(EXAMPLES[style][0], {"source": source})
    known = {problem.id: problem for split in SPLITS for problem in read.splits[split]}
    return [known[place] for place in ids]


def _ask(problem: Problem, examples: list[Problem], style: Style, spec: Mapping[str, Any]) -> Problem:
    """The problem with the messages of its prompt and, where the data have one, its worked solution as a column."""
    question = problem.messages[-1].content
    messages = [Message("system", spec["system"])] if spec.get("system") else []
    if spec.get("template") == "none":
        shown = [f"Question: {e.messages[-1].content}\nAnswer: {_worked(e)}" for e in examples]
        messages.append(Message("user", "\n\n".join([*shown, f"Question: {question}\nAnswer:"])))
    elif examples:
        for example in examples:
            messages += [*example.messages, Message("assistant", _worked(example))]
        messages.append(Message("user", question))
    else:
        messages.append(Message("user", INSTRUCTIONS[style].replace("{question}", question)))
    worked = {"solution": solution} if (solution := _worked(problem)) else {}
    return replace(problem, messages=tuple(messages), columns={**problem.columns, **worked})


def _worked(problem: Problem) -> str:
    """MATH's solution, or GSM8K's without its calculator marks and ending in "The answer is ..."; "" where none is."""
    text = str(problem.columns.get("answer", ""))
    if "####" not in text:
        return str(problem.columns.get("solution", ""))
    steps = re.sub(r"<<[^<>]*>>", "", text.rpartition("####")[0]).strip()
    return f"{steps}\nThe answer is {problem.answer}."
