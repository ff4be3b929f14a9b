"""SIGKILL in the middle of a stage, then the same command again: nothing is lost and nothing differs."""

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import miniature
import pytest
import torch
from safetensors.torch import load_file

from headwater import spec
from headwater.config import load_recipe
from headwater.spec import StageSpec
from headwater.stages.node import Job, run_node
from headwater.store import Store
from headwater.study.graph import plan

STEPS = 12
CHANGES = [
    *(f"stages.{name}.steps={STEPS}" for name in ("teacher_rl", "warmup", "distill", "student_rl")),
    "stages.teacher_rl.redraws=1",
    "stages.teacher_rl.updates_per_batch=2",
    "stages.warmup.keep=wrong",
    "stages.warmup.sequences_per_step=1",
    "stages.warmup.rollouts_per_problem=4",
    f"stages.sft={{method='sft', steps={STEPS}, sequences_per_step=4, max_new_tokens=6, optimizer={{lr=0.01}}}}",
    "arms.sft={teacher='rl', bridge='sft'}",
    "execution.save_every=3",
    "execution.eval_every=4",
    "execution.eval_problems=2",
]
METHODS = ("grpo", "warmup", "distill", "sft")


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """A stage of every method; parents are taken out, so that each runs by itself."""
    recipe = load_recipe(miniature.write(tmp_path_factory.mktemp("kill")), CHANGES)
    graph = plan(recipe)
    found: dict[str, Job] = {}
    for node in graph.nodes.values():
        if isinstance(node, StageSpec):
            alone = node.model_copy(update={"start": node.start.model_copy(update={"stage": None})})
            if alone.teacher:
                alone = alone.model_copy(update={"teacher": alone.teacher.model_copy(update={"stage": None})})
            found.setdefault(node.settings.method, Job(alone, recipe.execution, graph.monitors[0]))
    return found


@pytest.fixture(scope="module")
def whole(jobs: dict[str, Job], tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The store after uninterrupted runs."""
    store = Store(tmp_path_factory.mktemp("whole"))
    for job in jobs.values():
        run_node(job, store)
    return store


def start(job: Job, root: Path) -> subprocess.Popen[bytes]:
    path = root / "job.json"
    root.mkdir(parents=True, exist_ok=True)
    path.write_text(job.to_json())
    command = [*miniature.HEADWATER, "stage", str(path), "--store", str(root)]
    return subprocess.Popen(command, env=miniature.environment(), stdout=subprocess.DEVNULL)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.002)


def kill_at(job: Job, root: Path, step: int, delay: float) -> bool:
    """Start the stage, kill it `delay` seconds after it logged `step`; whether that came before its end."""
    store, key = Store(root), spec.key(job.spec)
    metrics = store.path(key) / "metrics.jsonl"
    process = start(job, root)
    wait_for(lambda: metrics.exists() and f'"step": {step},' in metrics.read_text(), process)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return not store.is_done(key)


def check_equal(job: Job, ours: Store, theirs: Store) -> None:
    key = spec.key(job.spec)
    weights = [load_file(store.model(key) / "model.safetensors") for store in (ours, theirs)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    for name in ("ledger.jsonl", "rollouts.jsonl", "samples.jsonl", "evals.jsonl", "metrics.jsonl"):
        texts = [path.read_text() if (path := s.path(key) / name).exists() else "" for s in (ours, theirs)]
        if name == "rollouts.jsonl":
            texts = [text.partition("\n")[2] for text in texts]  # its first line is the meter, with seconds
        assert miniature.without_time(texts[0]) == miniature.without_time(texts[1]), name
    bills = [s.outcome(key)["meter"] for s in (ours, theirs)]
    # What was done twice after a kill is billed apart.
    counts = [{role: (r["tokens"], r["flops"]) for role, r in bill.items() if role != "lost"} for bill in bills]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("method", METHODS)
def test_uninterrupted_runs_train_log_and_count(method: str, jobs: dict[str, Job], whole: Store):
    job = jobs[method]
    assert isinstance(job.spec, StageSpec) and job.spec.settings.method == method
    key = spec.key(job.spec)
    rows = [json.loads(line) for line in (whole.path(key) / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(STEPS))
    assert all(row["optim/grad_norm"] > 0 for row in rows), "a kill test of weights that stand still proves nothing"
    assert len((whole.path(key) / "evals.jsonl").read_text().splitlines()) == STEPS // 4
    assert bool(whole.ledger(key).revealed) == (method in ("grpo", "warmup"))
    before = load_file(Path(job.spec.start.config.source.removeprefix("file:")) / "model.safetensors")
    after = load_file(whole.model(key) / "model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in after)


@pytest.mark.parametrize("method", METHODS)
def test_killed_and_resumed_equals_uninterrupted(method: str, jobs: dict[str, Job], whole: Store, tmp_path: Path):
    rng = random.Random(f"kill {method}")
    job, store = jobs[method], Store(tmp_path)
    assert kill_at(job, tmp_path, rng.randrange(3, STEPS - 4), rng.random() * 0.02), "the kill came too late"
    assert not (store.model(spec.key(job.spec))).exists()
    run_node(job, store)
    check_equal(job, store, whole)


def test_killed_between_the_model_and_its_record(jobs: dict[str, Job], whole: Store, tmp_path: Path):
    """The last instants: the model is there, `done.json` is not."""
    job, store = jobs["distill"], Store(tmp_path)
    run_node(job, store)
    directory = store.path(spec.key(job.spec))
    (directory / "done.json").unlink()
    (directory / ".model").mkdir()
    (directory / ".model" / "model.safetensors").write_text("torn")
    run_node(job, store)
    check_equal(job, store, whole)


def test_a_stage_has_one_writer(jobs: dict[str, Job], tmp_path: Path):
    """A second process is told who holds the stage; when the holder is killed the lease is free at once."""
    job, store = jobs["grpo"], Store(tmp_path)
    process = start(job, tmp_path)
    lease = store.path(spec.key(job.spec)) / "lease"
    wait_for(lambda: lease.exists() and "process" in lease.read_text(), process)
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(BlockingIOError, match=f"is being trained by process {process.pid} on"):
        run_node(job, store)
    process.kill()
    process.wait()
    run_node(job, store)
    assert store.is_done(spec.key(job.spec))


def children(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


PARENT = """
import os, subprocess, sys
worker = subprocess.Popen([sys.executable, "-m", "headwater.study.worker", sys.argv[1], str(os.getpid())], stdin=-1)
worker.stdin.write(open(sys.argv[2], "rb").read() + b"\\n")
worker.stdin.flush()
worker.wait()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the death signal is Linux's")
def test_a_busy_worker_and_its_grader_die_with_the_parent(jobs: dict[str, Job], tmp_path: Path):
    job = jobs["grpo"]
    assert isinstance(job.spec, StageSpec)
    endless = job.spec.settings.model_copy(update={"steps": 1_000_000})
    job = Job(job.spec.model_copy(update={"settings": endless}), job.execution)
    (tmp_path / "job.json").write_text(job.to_json())
    command = [sys.executable, "-c", PARENT, str(tmp_path), str(tmp_path / "job.json")]
    parent = subprocess.Popen(command, env=miniature.environment(), stdout=subprocess.DEVNULL)
    metrics = Store(tmp_path).path(spec.key(job.spec)) / "metrics.jsonl"
    try:
        wait_for(metrics.exists, parent)
        workers = children(parent.pid)
        graders = [pid for worker in workers for pid in children(worker)]
        assert len(workers) == len(graders) == 1
    finally:
        parent.kill()
        parent.wait()
    end = time.monotonic() + 10
    while any(map(alive, workers + graders)):
        assert time.monotonic() < end, "workers or graders outlive the command"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(2))
def test_many_kills(method: str, seed: int, jobs: dict[str, Job], whole: Store, tmp_path: Path):
    """Three kills of one stage at random moments, from before its first step to its last."""
    rng = random.Random(f"many {method} {seed}")
    job, key = jobs[method], spec.key(jobs[method].spec)
    kills = 0
    for low in (0, 3, 7):
        kills += kill_at(job, tmp_path, rng.randrange(low, low + 4), rng.random() * 0.1)
    assert kills >= 2
    process = start(job, tmp_path)
    assert process.wait() == 0 and Store(tmp_path).is_done(key)
    check_equal(job, Store(tmp_path), whole)
