"""A study small enough for tests: random models of a few thousand weights, rows in a file, a grader of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
HEADWATER = [sys.executable, "-c", "from headwater.cli import app; app()"]
GRADER = '''
from headwater.types import Verdict


def grade(completion, problem):
    """Any text earns something, so that even a random policy has groups with different rewards."""
    score = sum(c in "0123456789abcdefghijklm" for c in completion) / max(1, len(completion))
    return Verdict(score > 0.3, True, "correct" if score > 0.3 else "partial", score)
'''
RECIPE = """
name = "miniature"
seeds = [0]

[models.teacher]
source = "file:{root}/teacher"

[models.student]
source = "file:{root}/student"

[task]
name = "jsonl"
source = "file:{root}/rows.jsonl"
prompt_column = "question"
answer_column = "answer"
grader = "{root}/grader.py:grade"
sizes = {{ train = 40, test = 8, tuning = 4 }}

[pool]
labels = 8

[stages.teacher_rl]
method = "grpo"
steps = 2
problems_per_step = 2
group_size = 3
max_new_tokens = 6
optimizer = {{ lr = 1e-2 }}

[stages.warmup]
method = "warmup"
steps = 2
sequences_per_step = 4
max_new_tokens = 6
optimizer = {{ lr = 1e-2 }}

[stages.distill]
method = "distill"
steps = 2
problems_per_step = 2
group_size = 2
max_new_tokens = 6
optimizer = {{ lr = 1e-2 }}

[stages.student_rl]
method = "grpo"
steps = 2
problems_per_step = 2
group_size = 3
max_new_tokens = 6
optimizer = {{ lr = 1e-2 }}

[arms.direct]
teacher = "none"
finish = "full"

[arms.bridge]
teacher = "rl"
bridge = "full"

[arms.finished]
teacher = "rl"
bridge = "full"
finish = "full"

[evaluations.rows]
problems = 4
samples = 2
max_new_tokens = 6

[[comparisons]]
a = "bridge"
b = "direct"

[[comparisons]]
a = "bridge/teacher_rl"
b = "base teacher"

[execution]
threads = 1
save_every = 1
grader_timeout_s = 60.0
"""


def world_script() -> ModuleType:
    name = "pretrain_world"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
        assert spec and spec.loader
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def write(root: Path) -> Path:
    """Models, rows, grader and `recipe.toml` under `root`; returns the recipe."""
    # A process of the command line has this from its environment, which here comes too late.
    transformers.utils.logging.disable_progress_bar()
    script = world_script()
    tokenizer = script.build_tokenizer()
    for seed, (name, rung) in enumerate({"teacher": "48x2", "student": "32x2"}.items()):
        torch.manual_seed(seed)
        script.build_model(rung, tokenizer, seed).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    rows = [f'{{"question": "{a}+{b}*3=", "answer": "{(a + 3 * b) % 20}"}}\n' for a in range(10) for b in range(10)]
    (root / "rows.jsonl").write_text("".join(rows))
    (root / "grader.py").write_text(GRADER)
    (root / "recipe.toml").write_text(RECIPE.format(root=root))
    return root / "recipe.toml"


def write_for_vllm(directory: Path, **changes: Any) -> None:
    """In place of a model that `write` left, random weights large enough to have opinions, with heads of 32, for which
    vLLM's CPU build has a kernel; `changes` of its configuration."""
    config = transformers.AutoConfig.from_pretrained(directory)
    for name, value in {"head_dim": 32, **changes}.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    module = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3.0)
    module.save_pretrained(directory)


def without_time(text: str) -> list[str]:
    """Lines of a metrics file with the clock taken out."""
    return [json.dumps({k: v for k, v in json.loads(line).items() if k != "time"}) for line in text.splitlines()]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
