"""vLLM itself behind the URL: it scores, samples and teaches as the same weights do in this process."""

import json
import os
import shutil
import socket
import subprocess
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import miniature
import pytest
import tomli_w
import torch
from test_export import vllm_python
from transformers import AutoTokenizer

from headwater.config import Distill, ModelConfig, Served, Warmup, load_recipe
from headwater.doctor.checkup import checkup
from headwater.models.language_model import LanguageModel, load_model, load_served
from headwater.rollouts.batch import Batch
from headwater.rollouts.sampler import Sampling, TransformersSampler
from headwater.rollouts.served import sampler_for
from headwater.run import StageRun
from headwater.scoring.log_probs import View, score_tokens, top_k_scores
from headwater.stages import distill, warmup
from headwater.types import Message, Problem

PROBLEMS = [Problem((Message("user", f"{a}+{b}*3="),)) for a in range(4) for b in range(2)]
METHOD = {"steps": 2, "max_new_tokens": 12, "stored_top_k": 16, "optimizer": {"lr": 1e-3}}
VIEW = View(1.0, 16_384, 1024)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """Random, without padding rows."""
    root = tmp_path_factory.mktemp("vllm")
    miniature.write(root)
    words = len(AutoTokenizer.from_pretrained(root / "teacher"))
    miniature.write_for_vllm(root / "teacher", vocab_size=words)
    return load_model(ModelConfig(source=f"file:{root}/teacher"), root / "teacher")


@pytest.fixture(scope="module")
def served(teacher: LanguageModel) -> Iterator[Served]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "OMP_NUM_THREADS")}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    command = [vllm_python(), "-m", "vllm.entrypoints.openai.api_server", "--model", str(teacher.directory)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "tiny", "--dtype", "float32"]
    command += ["--max-model-len", "256", "--enforce-eager", "--max-num-seqs", "8", "--max-logprobs", "16"]
    process = subprocess.Popen(command, env=environment)
    found = Served(url=f"http://127.0.0.1:{port}/v1")
    try:
        for _ in range(1800):
            assert process.poll() is None, "vLLM ended"
            time.sleep(1)
            try:
                urlopen(f"{found.url}/models", timeout=10).close()
                break
            except OSError:
                continue
        yield found
    finally:
        process.terminate()
        process.wait(60)


def there(teacher: LanguageModel, served: Served) -> LanguageModel:
    assert teacher.directory is not None
    return load_served(teacher.config, teacher.directory, served)


@pytest.mark.slow  # vLLM takes minutes to start
def test_vllm_scores_and_samples_as_we_do(teacher: LanguageModel, served: Served):
    away = there(teacher, served)
    batch = Batch.of(TransformersSampler(teacher).sample(PROBLEMS, Sampling(("test",), 2, 24)))
    ours, theirs = (top_k_scores(model, batch, 16, VIEW) for model in (teacher, away))
    worst = max(
        float((a - b).abs().max())
        for a, b in zip(ours.fields["teacher_logprobs"], theirs.fields["teacher_logprobs"], strict=True)
    )
    same = torch.cat(ours.fields["teacher_ids"]) == torch.cat(theirs.fields["teacher_ids"])
    own = max(
        float((a - b).abs().max())
        for a, b in zip(score_tokens(teacher, batch, VIEW), score_tokens(away, batch, VIEW), strict=True)
    )
    print(f"{len(same)} tokens: log-probs differ by {worst:.1e} (top 16) and {own:.1e} (own) at most")
    print(f"{float(same.float().mean()):.4f} of the top ids are in the same place")
    assert worst < 1e-3 and own < 1e-3 and same.float().mean() > 0.99
    greedy = Sampling(("test",), 1, 24, temperature=0.0)
    rollouts = [sampler_for(model).sample(PROBLEMS, greedy) for model in (teacher, away)]
    for a, b in zip(*rollouts, strict=True):
        assert (a.prompt_ids, a.completion_ids, a.text, a.finished) == (
            b.prompt_ids,
            b.completion_ids,
            b.text,
            b.finished,
        )


@pytest.mark.slow  # vLLM takes minutes to start
def test_vllm_teaches_as_we_do(teacher: LanguageModel, served: Served, tmp_path: Path):
    """A warmup on vLLM's rollouts and a distillation, each with the teacher there and here."""
    assert teacher.directory is not None
    stages = {
        warmup: Warmup.model_validate(METHOD | {"sequences_per_step": 4, "rollouts_per_problem": 2}),
        distill: Distill.model_validate(METHOD | {"problems_per_step": 4, "group_size": 2}),
    }
    for stage, settings in stages.items():
        weights: dict[str, torch.Tensor] = {}
        for where, model in {"start": None, "there": there(teacher, served), "here": teacher}.items():
            student = load_model(teacher.config, teacher.directory.parent / "student", trained=True)
            run = StageRun(tmp_path / stage.__name__ / where)
            drawn = tmp_path / stage.__name__ / "there" / "rollouts.jsonl"
            if where == "here" and drawn.exists():
                shutil.copy(drawn, run.directory)
            if model is not None:
                stage.train(settings, student=student, teacher=model, problems=PROBLEMS, seed=0, run=run)
            weights[where] = torch.cat([p.flatten() for p in student.module.parameters()])
        moved, apart = ((weights[w] - weights["here"]).abs().max() for w in ("start", "there"))
        print(f"{stage.__name__}: weights move by {moved:.1e} at most and are {apart:.1e} apart")
        assert moved > 1e-3 and apart < 1e-4


@pytest.mark.slow  # vLLM takes minutes to start
def test_the_checkup_understands_vllm(teacher: LanguageModel, served: Served, tmp_path: Path):
    recipe = tomllib.loads(miniature.write(tmp_path).read_text())
    del recipe["stages"]["teacher_rl"]
    recipe["stages"]["warmup"]["stored_top_k"] = 16
    recipe["stages"]["distill"]["stored_top_k"] = 17
    recipe["models"]["teacher"]["source"] = f"file:{teacher.directory}"
    recipe |= {"arms": {"bridge": {"preset": "given"}}, "comparisons": []}
    del recipe["stages"]["student_rl"]
    recipe["execution"]["teacher"] = {"url": served.url}
    path = tmp_path / "served.toml"
    path.write_text(tomli_w.dumps(recipe))
    seen = {}
    for k in (16, 17):
        _, findings = checkup(load_recipe(path, [f"stages.distill.stored_top_k={k}"]))
        (seen[k],) = [f for f in findings if f.name == "teacher: server"]
    print(json.dumps({k: f.seen for k, f in seen.items()}))
    assert seen[16].level == "ok"
    assert seen[17].level == "error" and "start it with --max-logprobs 17" in seen[17].seen
