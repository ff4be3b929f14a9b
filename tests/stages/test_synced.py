"""A server that samples from the model under training has its weights, and says so of each version."""

import json
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_vllm
import miniature
import pytest
import tomli_w
import torch
from fake_vllm import FakeVLLM, FakeWorker

from headwater.config import GRPO, Distill, Joint, ServedStudent, load_recipe
from headwater.doctor.checkup import checkup
from headwater.mesh import Mesh
from headwater.models import server
from headwater.models.in_vllm.headwater_vllm import BLOCK, checksums, live
from headwater.rollouts.sampler import Sampling, TransformersSampler
from headwater.rollouts.synced import BOUND, SyncedSampler, sampling_server
from headwater.run import StageRun
from headwater.stages import distill, grpo, joint
from headwater.types import Message, Problem, Rollout

METHOD = {"steps": 3, "problems_per_step": 4, "group_size": 2, "max_new_tokens": 8, "optimizer": {"lr": 1e-3}}


@pytest.fixture(autouse=True)
def _as_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "PAUSES_S", (0.0, 0.0))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__="0.32.0"))


@pytest.fixture
def fake(make_model) -> Iterator[FakeVLLM]:
    model = make_model(1, trained=False)

    def draw(body: dict[str, Any]) -> list[Rollout]:
        sampling = Sampling(("served", body["seed"]), body["n"], body["max_tokens"], body["temperature"])
        return TransformersSampler(model).complete([Problem((Message("user", "?"),))], [body["prompt"]], sampling)

    with fake_vllm.running(FakeVLLM(model, draw=draw, workers=[FakeWorker(model)])) as made:
        yield made


def synced(fake: FakeVLLM, directory: Path) -> StageRun:
    run = StageRun(directory)
    run.sampler = ServedStudent(url=fake.url, timeout_s=30.0, requests=3)
    return run


def flat(model: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.module.parameters()])


def metrics(run: StageRun) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]


def test_checksums_see_every_bit_of_an_element_and_no_layout():
    torch.manual_seed(0)
    q, k, norm = torch.randn(8, 6), torch.randn(4, 6), torch.randn(6)
    sums = checksums({"model.layers.3.q.weight": q, "model.layers.3.k.weight": k, "model.norm.weight": norm}.items())
    fused = torch.cat([k, q, torch.zeros(4, 6)])[:, torch.randperm(6)]
    assert checksums([("layers.3.qk.weight", fused), ("norm", norm)]) == sums and sorted(sums) == ["", "3"]
    assert checksums([("layers.2.qk.weight", fused), ("norm", norm)]) != sums
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        weights = torch.randn(5, 5).to(dtype)
        seen = {checksums([("", weights)])[""]}
        for i in range(25):
            changed = weights.flatten().clone()
            changed[i] = (
                torch.nextafter(changed[i].float(), torch.tensor(9.0)) if dtype == torch.float32 else -changed[i]
            )
            seen.add(checksums([("", changed)])[""])
        assert len(seen) == 26
    up = torch.tensor([1.0, 2.0]).view(torch.int32) + torch.tensor([1, -1], dtype=torch.int32)  # the same sum of bits
    assert checksums([("", up.view(torch.float32))]) != checksums([("", torch.tensor([1.0, 2.0]))])
    assert checksums([("", torch.tensor([1.0, -0.0]))]) == checksums([("", torch.tensor([0.0, 1.0]))])
    many = torch.randn(BLOCK + 3)
    assert checksums([("", many)]) == checksums([("", many.flip(0))]) != checksums([("", many[1:])])


def test_what_a_packed_layer_multiplies_by_is_seen():
    class Packed(torch.nn.Module):
        def __init__(self, packed: torch.Tensor, weight: torch.Tensor) -> None:
            super().__init__()
            self.weight, self.input_size_per_partition = torch.nn.Parameter(weight), packed.shape[1]
            self.cpu_linear = lambda x, weight, bias: x @ packed.T

    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.randn(7, 300).to(dtype)
        gone, kept = Packed(matrix, torch.empty(0, dtype=dtype)), Packed(matrix, matrix)
        assert checksums(live(gone)) == checksums(live(kept)) == checksums([("weight", matrix)])
        assert checksums(live(Packed(matrix, matrix + 1))) != checksums([("weight", matrix + 1)])
        assert checksums(live(Packed(matrix, matrix + 1))) != checksums([("weight", matrix)])


@pytest.mark.parametrize("method", ["grpo", "joint", "distill"])
def test_every_step_samples_from_the_weights_before_its_update(
    make_model, problems, parity_grade, fake, tmp_path: Path, method: str
):
    student, run = make_model(0), synced(fake, tmp_path)
    given = {"problems": problems, "seed": 0, "run": run, "grade": parity_grade}
    before: list[torch.Tensor] = []
    run._on_log = lambda done, steps, observed: before.append(flat(student))
    if method == "grpo":
        grpo.train(GRPO.model_validate(METHOD | {"temperature": 0.7}), policy=student, **given)
    else:
        stage, settings = {"joint": (joint, Joint), "distill": (distill, Distill)}[method]
        more = {"reward_weight": 0.5} if method == "joint" else {}
        stage.train(
            settings.model_validate(METHOD | more), student=student, teacher=make_model(2, trained=False), **given
        )
    worker = fake.workers[0]
    assert worker.resets == 3 and worker.headwater_version.startswith("2 of ")
    assert torch.equal(flat(fake.model), before[1]) and not torch.equal(before[1], before[2])
    assert len(fake.asked) == 12 and all(body["logprobs"] == 0 for body in fake.asked)
    for row in metrics(run):
        assert row["policy/sampler_mismatch_max"] < 1e-4 and abs(row["policy/sampler_mismatch_kl"]) < 1e-6
    assert sorted(path.name for path in tmp_path.glob(".*")) == []


def test_a_mismatch_is_seen_where_the_loss_has_no_ratio(make_model, problems, fake, tmp_path: Path):
    draw = fake.draw

    def shifted(body: dict[str, Any]) -> list[Rollout]:
        return [Rollout(**{**vars(r), "sampler_logprobs": [x - 0.25 for x in r.sampler_logprobs]}) for r in draw(body)]

    fake.draw, run = shifted, synced(fake, tmp_path)
    settings = Distill.model_validate(METHOD | {"steps": 1})
    teacher = make_model(2, trained=False)
    distill.train(settings, student=make_model(0), teacher=teacher, problems=problems, seed=0, run=run)
    (row,) = metrics(run)
    assert row["policy/sampler_mismatch_max"] == pytest.approx(0.25, abs=1e-4)
    assert row["policy/sampler_mismatch_kl"] == pytest.approx(0.25 + torch.tensor(0.25).expm1().item() - 0.5, abs=1e-4)


def test_rollouts_carry_version_and_log_probs(make_model, problems, fake, tmp_path: Path):
    student = make_model(0)
    sampler = SyncedSampler(student, Mesh(), ServedStudent(url=fake.url), tmp_path)
    sampler.load(None, 7)
    rollouts = sampler.sample(problems[:3], Sampling(("test",), 2, 8))
    assert {r.policy_version for r in rollouts} == {7} and len(rollouts) == 6
    assert all(len(r.sampler_logprobs) == len(r.completion_ids) for r in rollouts)
    whole = next(r for r in rollouts if len(r.completion_ids) > 3)
    stop = str(student.tokenizer.decode(whole.completion_ids[:2]))
    config = student.config.model_copy(update={"stop": (stop,)})
    sampler.model = replace(student, config=config)
    short = sampler.sample(problems[:3], Sampling(("test",), 2, 8))[rollouts.index(whole)]
    assert 0 < len(short.completion_ids) < len(whole.completion_ids) and not short.text
    assert short.sampler_logprobs == whole.sampler_logprobs[: len(short.completion_ids)]


def test_weights_that_stay_as_they_were_end_the_stage(make_model, problems, parity_grade, fake, tmp_path: Path):
    """At this learning rate log-probs do not tell."""
    settings = GRPO.model_validate(METHOD | {"optimizer": {"lr": 1e-6}})
    student, run = make_model(0), synced(fake, tmp_path)

    def keep(done: int, steps: int, observed: dict[str, float]) -> None:
        fake.workers[0].keeps = True

    run._on_log = keep
    with pytest.raises(ValueError, match=r"does not have the weights of version 1 .*3 of 3 layers differ"):
        grpo.train(settings, policy=student, problems=problems, grade=parity_grade, seed=0, run=run)
    moved = (flat(student) - flat(fake.model)).abs().max()
    assert 0 < moved < 2e-6
    batch = [list(range(1, 20))]
    new, old = (m.module(input_ids=torch.tensor(batch)).logits.log_softmax(-1).detach() for m in (student, fake.model))
    assert (new - old).abs().max() < 1e-3


def test_faults_of_a_sampling_server(make_model, problems, fake, tmp_path: Path):
    served, worker = ServedStudent(url=fake.url), fake.workers[0]
    sampler = SyncedSampler(make_model(0), Mesh(), served, tmp_path)
    worker.resettable = False
    with pytest.raises(ConnectionError, match=r"failed 3 times .*the prefix cache is in use"):
        sampler.load(None, 0)
    worker.resettable = True
    sampler.load(None, 0)

    fake.workers.append(FakeWorker(fake.model))
    with pytest.raises(ValueError, match="it has 2 workers"):
        sampler.load(None, 1)
    fake.workers.pop()
    sampler.load(None, 1)
    other = SyncedSampler(make_model(0), Mesh(), served, tmp_path)
    other.load(None, 1)
    with pytest.raises(ValueError, match=r"has weights of version 1 of .*another run uses it"):
        sampler.sample(problems[:1], Sampling(("test",), 2, 8))
    larger = SyncedSampler(make_model(0, "48x2"), Mesh(), served, tmp_path)
    with pytest.raises(ValueError, match=r"headwater_load failed in the server .*RuntimeError"):
        larger.load(None, 2)


def test_a_server_that_starts_late_or_never(make_model, tmp_path: Path):
    python, log = tmp_path / "python", tmp_path / "vllm.log"
    python.write_text("#!/bin/sh\necho there is no room; exit 3\n")
    python.chmod(0o755)
    settings = ServedStudent(python=str(python), timeout_s=30.0)
    with (
        pytest.raises(ValueError, match=r"did not serve \(status 3(.|\n)*there is no room"),
        sampling_server(settings, make_model(0), Mesh(), log),
    ):
        pass


def test_the_child_ends_with_its_parent(tmp_path: Path):
    """The parent is killed; the child has a child."""
    pids = tmp_path / "pids"
    child = f"sleep 999 & echo $! $$ >> {pids}; wait"
    code = "import subprocess as s, sys; s.Popen(sys.argv[1:], stdin=s.PIPE, start_new_session=True).wait()"
    parent = subprocess.Popen([sys.executable, "-c", code, "sh", "-c", BOUND, "sh", "sh", "-c", child])
    try:
        until = time.monotonic() + 30
        while not (pids.exists() and pids.read_text().endswith("\n")) and time.monotonic() < until:
            time.sleep(0.05)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    started = [int(pid) for pid in pids.read_text().split()]
    assert len(started) == 2
    until = time.monotonic() + 10
    while any(map(is_running, started)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(is_running, started))


def is_running(pid: int) -> bool:
    try:
        return re.search(r"\) ([A-Z])", Path(f"/proc/{pid}/stat").read_text())[1] != "Z"  # pyright: ignore -- matches
    except OSError:
        return False


def test_the_checkup_asks_the_server(tmp_path: Path, make_model, fake):
    recipe = tomllib.loads(miniature.write(tmp_path).read_text())
    del recipe["stages"]["teacher_rl"]
    recipe |= {"arms": {"bridge": {"preset": "given"}}, "comparisons": []}
    del recipe["stages"]["student_rl"]
    recipe["execution"]["sampler"] = {"url": fake.url}
    path = tmp_path / "synced.toml"
    path.write_text(tomli_w.dumps(recipe))

    def finding(*sets: str) -> tuple[str, str]:
        _, findings = checkup(load_recipe(path, list(sets)))
        (found,) = [f for f in findings if f.name == "student: sampler"]
        return found.level, found.seen

    assert finding() == ("ok", f"{fake.url} answers")
    fake.workers[0].model_config.logprobs_mode = "raw_logprobs"
    seen = finding("models.student.dtype=bfloat16")[1]
    assert "its dtype is float32, its logprobs_mode is raw_logprobs" in seen
    assert "--dtype bfloat16 --logprobs-mode processed_logprobs" in seen
    fake.workers[0].model_config.logprobs_mode = "processed_logprobs"
    fake.shifted_ids = 1
    assert "other ids for a text" in finding()[1]
    assert finding("execution.sampler.url=http://127.0.0.1:9")[0] == "error"
    own = ["execution.sampler.url=", f"execution.sampler.python={sys.executable}"]
    level, seen = finding(*own)
    assert level == "error" and "does not import vllm" in seen


@pytest.mark.parametrize(
    ("sampler", "sets", "part"),
    [
        ({"url": "http://h/v1", "python": "p"}, [], "not both"),
        ({}, [], "not both"),
        ({"url": "http://h/v1"}, ["execution.executor=local:2"], "one set of weights"),
        ({"url": "http://h/v1"}, [], "serves the student alone"),
        ({"python": "p"}, ["stages.distill.lora={rank=4}"], "has no adapters"),
        ({"url": "h:8000"}, [], "execution.sampler.url"),
    ],
)
def test_recipes_that_cannot_be_sampled_so(tmp_path: Path, sampler: dict[str, str], sets: list[str], part: str):
    recipe = tomllib.loads(miniature.write(tmp_path).read_text())
    recipe["execution"]["sampler"] = sampler
    path = tmp_path / "synced.toml"
    path.write_text(tomli_w.dumps(recipe))
    with pytest.raises(ValueError) as error:
        load_recipe(path, sets)
    assert part in str(error.value)


def test_teacher_and_student_are_not_one_server(tmp_path: Path):
    with pytest.raises(ValueError, match="one url, but two sets of weights"):
        recipe = tomllib.loads(miniature.write(tmp_path).read_text())
        del recipe["stages"]["teacher_rl"], recipe["stages"]["student_rl"]
        recipe |= {"arms": {"bridge": {"preset": "given"}}, "comparisons": []}
        for stage in ("warmup", "distill"):
            recipe["stages"][stage]["stored_top_k"] = 8
        recipe["execution"] |= {"teacher": {"url": "http://h:1/v1/"}, "sampler": {"url": "http://h:1"}}
        (tmp_path / "synced.toml").write_text(tomli_w.dumps(recipe))
        load_recipe(tmp_path / "synced.toml")
