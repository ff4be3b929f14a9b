"""vLLM itself samples from a student under training, in weights that are shown to be the student's."""

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import miniature
import pytest
import tomli_w
import torch
from test_export import vllm_python
from typer.testing import CliRunner

from headwater.cli import app
from headwater.config import GRPO, ModelConfig, ServedStudent
from headwater.mesh import Mesh
from headwater.models.in_vllm.headwater_vllm import checksums
from headwater.models.language_model import LanguageModel, load_model
from headwater.rollouts import synced
from headwater.rollouts.batch import Batch
from headwater.rollouts.sampler import Sampling, TransformersSampler
from headwater.rollouts.synced import SyncedSampler, sampling_server
from headwater.run import StageRun
from headwater.scoring.log_probs import View, score_tokens
from headwater.stages import grpo
from headwater.types import Message, Problem

PROBLEMS = [Problem((Message("user", f"{a}+{b}*3=" * 9),), answer="1") for a in range(4) for b in range(2)]
ARGUMENTS = ("--max-model-len", "256", "--enforce-eager", "--max-num-seqs", "8", "--kv-cache-memory-bytes", "67108864")


def write(root: Path) -> Path:
    """The miniature study, its student with a tied head and padding rows, none of them a multiple of 64."""
    recipe = miniature.write(root)
    miniature.write_for_vllm(root / "student", vocab_size=300, tie_word_embeddings=True)
    return recipe


def student(root: Path) -> LanguageModel:
    return load_model(ModelConfig(source=f"file:{root}/student"), root / "student", trained=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sampler")
    write(root)
    return root


@pytest.fixture(scope="module")
def served(root: Path) -> Iterator[ServedStudent]:
    settings = ServedStudent(python=vllm_python(), arguments=ARGUMENTS)
    with sampling_server(settings, student(root), Mesh(), root / "vllm.log") as running:
        assert running is not None
        yield running


def gaps(model: LanguageModel, rollouts: list[Any], temperature: float) -> torch.Tensor:
    theirs = torch.tensor([x for r in rollouts for x in r.sampler_logprobs])
    return (torch.cat(score_tokens(model, Batch.of(rollouts), View(temperature, 16_384, 1024))) - theirs).abs()


@pytest.mark.slow  # vLLM takes minutes to start
def test_a_skipped_sync_is_seen_where_log_probs_agree(
    root: Path, served: ServedStudent, tmp_path: Path, parity_grade, monkeypatch: pytest.MonkeyPatch
):
    """Three updates of GRPO at a learning rate of 1e-6, then one more that is not sent."""
    model, run = student(root), StageRun(tmp_path)
    run.sampler = served
    method = {"steps": 3, "problems_per_step": 4, "group_size": 4, "max_new_tokens": 16, "optimizer": {"lr": 1e-6}}
    given = {"policy": model, "problems": PROBLEMS, "grade": parity_grade, "seed": 0, "run": run}
    optimizer = grpo.train(GRPO.model_validate(method), **given)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    worst = max(row["policy/sampler_mismatch_max"] for row in rows)
    assert optimizer.steps == 3 and worst < 1e-4

    old = synced.call(served, "headwater_status", sums="yes")
    assert old["version"].startswith("2 of ")
    differing = {n for n, total in checksums(model.module.named_parameters()).items() if old["sums"][n] != total}
    assert differing == {"", "0", "1"}  # of the third update, which nobody has sampled from
    sampler = SyncedSampler(model, Mesh(), served, tmp_path)
    with monkeypatch.context() as patch:
        send = synced.call
        patch.setattr(synced, "call", lambda s, m, **a: {} if m == "headwater_load" else send(s, m, **a))
        with pytest.raises(ValueError, match=r"does not have the weights of version 3 .*3 of 3 layers"):
            sampler.load(None, 3)
        patch.setattr(SyncedSampler, "_check_version", lambda *_: None)
        stale = gaps(model, sampler.sample(PROBLEMS, Sampling(("test",), 4, 16)), 1.0)
    sampler.load(None, 3)
    fresh = gaps(model, sampler.sample(PROBLEMS, Sampling(("test",), 4, 16)), 1.0)
    for name, gap in {"stale": stale, "fresh": fresh}.items():
        kl = float((gap.expm1() - gap).mean())
        print(
            f"{name}: log-probs of {len(gap)} tokens differ by {gap.mean():.1e}, at most {gap.max():.1e}; KL {kl:.1e}"
        )
    print(f"in training they differ by {worst:.1e} at most")
    assert fresh.max() < 1e-4
    # Far below what bfloat16 rounds away, and below what docs/metrics.md takes for health.
    assert stale.mean() < 5e-3 and (stale.expm1() - stale).mean() < 1e-3


@pytest.mark.slow  # vLLM takes minutes to start
def test_vllm_samples_from_what_it_was_sent(root: Path, served: ServedStudent, tmp_path: Path):
    """Greedy tokens, and log-probs at another temperature, of three unlike sets of weights: no prefix stays cached."""
    model = student(root)
    sampler = SyncedSampler(model, Mesh(), served, tmp_path)
    for version in range(3):
        with torch.no_grad():
            for parameter in model.module.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape) * parameter.abs().mean())
        sampler.load(None, version)
        greedy = Sampling(("test",), 1, 16, temperature=0.0)
        ours, theirs = TransformersSampler(model).sample(PROBLEMS, greedy), sampler.sample(PROBLEMS, greedy)
        assert [(r.completion_ids, r.text, r.finished) for r in ours] == [
            (r.completion_ids, r.text, r.finished) for r in theirs
        ]
        tempered = sampler.sample(PROBLEMS, Sampling(("test",), 4, 16, temperature=0.6))
        gap = gaps(model, tempered, 0.6)
        print(f"temperature 0.6: log-probs of {len(gap)} tokens differ by {gap.max():.1e} at most")
        assert gap.max() < 1e-4 and {r.policy_version for r in tempered} == {version}


@pytest.mark.slow  # vLLM takes minutes to start
def test_a_study_whose_stage_starts_and_ends_its_vllm(tmp_path: Path):
    recipe = tomllib.loads(write(tmp_path).read_text())
    recipe |= {"arms": {"direct": recipe["arms"]["direct"]}, "comparisons": []}
    recipe["stages"] = {"student_rl": recipe["stages"]["student_rl"]}
    del recipe["models"]["teacher"]
    recipe["execution"]["sampler"] = {"python": vllm_python(), "arguments": list(ARGUMENTS)}
    (tmp_path / "sampled.toml").write_text(tomli_w.dumps(recipe))
    command = [
        "run",
        str(tmp_path / "sampled.toml"),
        "--out",
        str(tmp_path / "out"),
        "--store",
        str(tmp_path / "store"),
    ]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    (log,) = (tmp_path / "out").glob("nodes/*/metrics.jsonl")
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(rows) == 2 and all(row["policy/sampler_mismatch_max"] < 1e-4 for row in rows)
    left = [p for p in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path).encode() in _read(p)]
    assert left == []


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
