"""Every stage on one rank and on two, results to files: `mesh_ranks.py MODEL DIRECTORY DIRECTORY`; see test_mesh.py."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from headwater.config import GRPO, SFT, Distill, Execution, ModelConfig, Warmup
from headwater.mesh import Mesh, join
from headwater.models.language_model import LanguageModel, load_model
from headwater.rollouts.batch import Batch, MicroBatch, micro_batches
from headwater.run import StageRun
from headwater.stages import distill, grpo, sft, warmup
from headwater.tasks.chains import Chains
from headwater.types import Problem, Verdict
from headwater.update import AdamW, NonFiniteError, Term, update

OPTIMIZER = {"lr": 1e-3, "weight_decay": 0.1}
METHOD = {"steps": 2, "max_new_tokens": 6, "optimizer": OPTIMIZER}
ROLLOUTS = METHOD | {"sequences_per_step": 3, "rollouts_per_problem": 3, "keep": "correct"}
STAGES: dict[str, GRPO | Distill | Warmup | SFT] = {
    # Odd numbers of problems and rows, and a single row, so that the ranks' shares differ and one has none.
    "grpo": GRPO.model_validate(
        METHOD
        | {"problems_per_step": 5, "group_size": 3, "redraws": 2, "updates_per_batch": 2}
        | {"kl_coef": 0.1, "aggregate": "sequence"}
    ),
    "one-row": Distill.model_validate(METHOD | {"problems_per_step": 1, "group_size": 1}),
    "repeats": Distill.model_validate(
        METHOD | {"steps": 3, "problems_per_step": 5, "group_size": 1, "divergence": "sampled_sequence"}
    ),
    "warmup": Warmup.model_validate(ROLLOUTS | {"stored_top_k": 5}),
    "sft": SFT.model_validate(ROLLOUTS),
}
STOPS = tuple("!#$%&ABCDEFGHIJKLMNOPQRSTUVWXYZ")


def load(directory: Path, *, trained: bool = False) -> LanguageModel:
    config = ModelConfig(source=f"file:{directory}", stop_tokens=STOPS)
    model = load_model(config, directory, trained=trained)
    with torch.no_grad():
        for parameter in model.module.double().parameters():
            parameter.mul_(3 if parameter.ndim == 2 else 1)
            # The frozen one is another model.
            parameter.add_(0 if trained else 0.03)
    return model


def grade(pairs: list[tuple[Problem, str]]) -> list[Verdict]:
    rights = [len(text) % 2 == 0 for _, text in pairs]
    return [Verdict(right, True, "correct" if right else "wrong", float(right)) for right in rights]


def train(name: str, mesh: Mesh, source: Path, out: Path) -> None:
    settings, model, other = STAGES[name], load(source, trained=True), load(source)
    # Three problems in five places come again within a step.
    problems = Chains(train=7).problems("train")
    problems = problems[:3] * 2 if name == "repeats" else problems
    execution = Execution(micro_batch_tokens=100, sampler_tokens=200, chunk_tokens=5, save_every=1)
    run = StageRun(out / name, execution=execution, mesh=mesh)
    shared: dict[str, Any] = {"problems": problems, "seed": 0, "run": run}
    if isinstance(settings, GRPO):
        grpo.train(settings, policy=model, reference=other, grade=grade, **shared)
    elif isinstance(settings, Distill):
        distill.train(settings, student=model, teacher=other, **shared)
    elif isinstance(settings, Warmup):
        warmup.train(settings, student=model, teacher=other, grade=grade, **shared)
    else:
        sft.train(settings, student=model, teacher=other, grade=grade, **shared)
    save_file({n: p.detach().clone() for n, p in model.module.named_parameters()}, out / f"{name}.{mesh.rank}")
    meter = {role: [row["tokens"], row["flops"]] for role, row in run.meter.state().items()}
    record = {"meter": meter, "revealed": run.ledger.revealed}
    (out / f"{name}.{mesh.rank}.json").write_text(json.dumps(record))


def collectives(mesh: Mesh, out: Path) -> None:
    trips = [mesh.gather(mesh.shard([f"{i}" for i in range(n)])) for n in range(8)]
    total = mesh.all_sum(torch.tensor([1.0, mesh.rank], dtype=torch.float64)).tolist()
    record = {"trips": trips, "total": total, "ranks": mesh.collect(mesh.rank), "writer": mesh.is_writer}
    (out / f"collectives.{mesh.rank}.json").write_text(json.dumps(record))


def non_finite(mesh: Mesh, source: Path, out: Path) -> None:
    """Only the last rank's loss is NaN: all ranks must stop, and none may wait for another."""
    model = load(source, trained=True)
    optimizer = AdamW(model, STAGES["sft"].optimizer)
    before = {n: p.detach().clone() for n, p in model.module.named_parameters()}
    batch = Batch([[1, 2], [3]], [[4, 5], [6]]).shard(mesh)

    def loss(hidden: torch.Tensor, head: torch.Tensor, micro: MicroBatch):
        bad = float("nan") if mesh.rank == mesh.size - 1 else 1.0
        return [Term(hidden.sum() * bad, 1.0)], {}

    raised = False
    try:
        micros = micro_batches(batch, max_tokens=100)
        update(model, optimizer, micros, loss, lr=1e-3, max_grad_norm=1.0, mesh=mesh)
    except NonFiniteError:
        raised = True
    same = all(torch.equal(before[n], p) for n, p in model.module.named_parameters())
    (out / f"nonfinite.{mesh.rank}.json").write_text(json.dumps({"raised": raised, "same": same}))


def rank(index: int, size: int, port: int, source: Path, out: Path) -> None:
    torch.set_num_threads(1)
    if size > 1:
        names = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": size, "MASTER_PORT": port}
        os.environ |= {k: str(v) for k, v in names.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "test"}
    mesh = join("cpu")
    collectives(mesh, out)
    for name in STAGES:
        train(name, mesh, source, out)
    non_finite(mesh, source, out)


def main() -> None:
    source = Path(sys.argv[1])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Forked before any thread exists: the imports above are paid once.
    context = multiprocessing.get_context("fork")
    jobs = []
    for size, out in ((1, Path(sys.argv[2])), (2, Path(sys.argv[3]))):
        jobs += [context.Process(target=rank, args=(i, size, port, source, out)) for i in range(size)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    sys.exit(max(abs(job.exitcode or 0) for job in jobs))


if __name__ == "__main__":
    main()
