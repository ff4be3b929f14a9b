"""A GRPO step and an on-policy distillation step: this package and TRL in turns, on the same models and prompts.

    python -m venv trl && trl/bin/pip install -c constraints.txt -e . trl==1.16.0 datasets
    python benchmarks/vs_trl.py --trl-python trl/bin/python [--workloads base long vocabulary] [--out FILE]

The workloads, named before anything was measured; each step has 8 problems x 8 rollouts and prompts of 48 to 80 tokens.
Lengths are geometric with mean 3/4 of the limit and cut there; the law is in the weights (`workload.add_ends`).

- `base`: student of 15.7M (Qwen3, hidden 256, 4 layers, vocabulary 49,152), teacher of 44M, at most 64 new tokens;
- `long`: the same, at most 256 new tokens;
- `vocabulary`: the same shapes with Qwen3's 151,936 rows, at most 64 new tokens.
- `0.6B` (for a GPU, only when asked for): Qwen3-0.6B and -1.7B shapes, 151,936 rows, at most 256 new tokens.

Ours is `stages.grpo.train` / `stages.distill.train` with a StageRun; TRL's is `GRPOTrainer` / `DistillationTrainer`
(beta = 1: reverse KL, exact over the vocabulary, on-policy; its stable trainer) under `train()`. Each runs in a process
of its own, and the parent lets one take a step at a time, so memory is each one's own and all meet the same machine.
Both are first tried at every micro-batch x dtype x threads of a grid; then the best of each at float32, at bfloat16
compute over float32 weights, and overall take turns. Rewards read the text alone.

`--losses` only: loss and gradients of both on the same ids, advantages and teacher in float64.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any
from unittest import mock

import torch
from measure import SHAPES, Row, Shape, memory, peak_memory, report, reset_peak, synchronize, table
from safetensors.torch import load_file, save_file
from workload import FIRST, PAD, STUDENT, TEACHER, load, problems, prompts, reward, run_stage, save

from headwater.config import GRPO, Distill, Execution, Optimizer
from headwater.rollouts.batch import Batch, micro_batches, states
from headwater.run import StageRun
from headwater.scoring.advantages import group_advantages
from headwater.stages.common import dense_loss, scored_by
from headwater.stages.grpo import policy_loss


@dataclass(frozen=True)
class Workload:
    student: Shape = STUDENT
    teacher: Shape = TEACHER
    vocab: int = 49_152
    limit: int = 64
    prompt: int = 64
    problems: int = 8
    group: int = 8

    @property
    def rows(self) -> int:
        return self.problems * self.group


WORKLOADS = {
    "base": Workload(),
    "long": Workload(limit=256),
    "vocabulary": Workload(vocab=151_936),
    "0.6B": Workload(SHAPES["0.6B"], SHAPES["1.7B"], 151_936, 256),
}
DTYPES = ("float32", "bfloat16", "pure bfloat16")
TOY = Workload(Shape(32, 2, 2, 1, 64, True, 16), Shape(48, 2, 2, 1, 64, True, 16), 97, 8, 8, 2, 4)


@dataclass(frozen=True)
class Job:
    """What one process does. `dtype`: float32; bfloat16: computed in it over float32 weights (TRL: autocast); pure
    bfloat16 (TRL alone): weights and optimizer state too. `batch`: of a micro-batch TRL's rows, our tokens."""

    side: str
    method: str
    directory: str
    dtype: str
    threads: int
    batch: int
    checkpointing: bool = False

    @property
    def name(self) -> str:
        size = f"batch {self.batch}" if self.side == "trl" else f"{self.batch} tokens"
        return f"{self.side} {self.dtype}, {self.threads} threads, {size}{', checkpointing' * self.checkpointing}"


class Turn:
    """A worker's end of the pipe: it says what it did, and waits to be told to go on."""

    def __init__(self) -> None:
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print goes to the log

    def say(self, row: Row) -> None:
        self.out.write(json.dumps(row) + "\n")
        self.out.flush()
        if sys.stdin.readline() != "go\n":
            raise SystemExit
        self.start = time.perf_counter()

    def loaded(self, parameters: int) -> None:
        reset_peak()
        self.before = memory()
        self.say({"parameters": parameters})

    def stepped(self, mean_length: float, cut: float) -> None:
        synchronize()
        row = {"seconds": time.perf_counter() - self.start, "mean length": mean_length, "cut": cut}
        self.say(row | {"peak": peak_memory() - self.before})


def work_ours(job: Job, work: Workload, turn: Turn, device: str) -> None:
    root = Path(job.directory)
    student = load(root / "student", job.dtype, device, trained=True)
    distils = job.method == "distill"
    teacher = load(root / "teacher", job.dtype, device, trained=False) if distils else None
    turn.loaded(student.num_parameters)

    def on_step(found: Row) -> None:
        metrics = found["metrics"]
        turn.stepped(metrics["completion/len_mean"], metrics["completion/frac_truncated"])

    pool = problems(json.loads((root / "prompts.json").read_text()))
    run_stage(
        job.method,
        student,
        teacher,
        pool,
        steps=10**6,
        problems_per_step=work.problems,
        group_size=work.group,
        new_tokens=work.limit,
        micro_batch_tokens=job.batch,
        on_step=on_step,
    )


def trl_trainer(job: Job, work: Workload, device: str, loaded: Turn | None = None, *, double: bool = False) -> Any:
    """TRL's trainer as a user would set it up, at the given micro-batch, dtype and checkpointing."""
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer

    root, distils = Path(job.directory), job.method == "distill"
    tokenizer = AutoTokenizer.from_pretrained(root / "student", padding_side="left")

    def model(name: str, dtype: torch.dtype) -> Any:
        return AutoModelForCausalLM.from_pretrained(root / name, dtype=torch.float64 if double else dtype).to(device)

    student = model("student", torch.bfloat16 if job.dtype == "pure bfloat16" else torch.float32)
    teacher = model("teacher", torch.float32 if job.dtype == "float32" else torch.bfloat16) if distils else None
    if loaded is not None:
        loaded.loaded(student.num_parameters())
    texts = json.loads((root / "prompts.json").read_text())
    if distils:  # it draws one completion a row
        texts = [text for text in texts for _ in range(work.group)]
    common = {
        "output_dir": str(root / "trl"),
        "per_device_train_batch_size": job.batch,
        "gradient_accumulation_steps": work.rows // job.batch,
        "max_steps": 10**6,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "bf16": job.dtype != "float32",
        "gradient_checkpointing": job.checkpointing,
        "max_completion_length": work.limit,
        "shuffle_dataset": False,
        "use_cpu": device == "cpu",
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 10**6,
        "disable_tqdm": True,
    }
    data = datasets.Dataset.from_list([{"prompt": text} for text in texts])
    if distils:
        args = DistillationConfig(**common, beta=1.0)
        return DistillationTrainer(student, teacher, args=args, train_dataset=data, processing_class=tokenizer)

    def scores(completions: list[str], **_: object) -> list[float]:
        return [reward(text) for text in completions]

    args = GRPOConfig(**common, num_generations=work.group, beta=0.0, loss_type="dapo")
    return GRPOTrainer(student, scores, args=args, train_dataset=data, processing_class=tokenizer)


def work_trl(job: Job, work: Workload, turn: Turn, device: str) -> None:
    from transformers import TrainerCallback

    trainer = trl_trainer(job, work, device, turn)

    class Step(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            seen = trainer._metrics["train"]
            turn.stepped(seen["completions/mean_length"][-1], seen["completions/clipped_ratio"][-1])

    trainer.add_callback(Step())
    trainer.train()


@contextmanager
def casts(wide: bool) -> Iterator[None]:
    """With `wide`, casts to float32, in TRL's kernels and in transformers' norms, are casts to float64, on both sides.
    Not while models are loaded: files hold real float32."""
    if not wide:
        yield
        return
    with (
        mock.patch.object(torch, "float32", torch.float64),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        yield


def loss_ours(job: Job, given: Row, wide: bool) -> tuple[torch.Tensor, torch.nn.Module]:
    """Our loss on given rows, with what differs from TRL set to the same: no correction for the sampler's log-probs
    (TRL has none without vLLM); mean over the batch's tokens and clipping at 0.2 are both sides' defaults."""
    root = Path(job.directory)
    student = load(root / "student", "float32", "cpu", trained=True)
    student.module.double()
    lengths = [len(c) for c in given["completions"]]
    ones = [torch.ones(n, dtype=torch.float64) for n in lengths]
    credit = [a * one for a, one in zip(given["advantages"], ones, strict=True)]
    batch = Batch(given["prompts"], given["completions"]).with_fields(weights=ones, advantages=credit, sampler=ones)
    common = {"steps": 1, "max_new_tokens": max(lengths), "problems_per_step": 1, "optimizer": Optimizer(lr=1e-6)}
    if job.method == "grpo":
        loss = policy_loss(GRPO(**common, sampler_weight_cap=0), Execution(), student.vocab_size, float(sum(lengths)))
        before = scored_by(None, StageRun(root / "run"))
    else:
        teacher = load(root / "teacher", "float32", "cpu", trained=False)
        teacher.module.double()
        run = StageRun(root / "run")
        loss = dense_loss(Distill(**common), teacher, student.vocab_size, float(sum(lengths)), run)
        before = scored_by(teacher, run)
    total = torch.zeros((), dtype=torch.float64)
    with casts(wide):
        for micro in map(before, micro_batches(batch, max_tokens=64, share=student.shares_prefixes)):
            terms, _ = loss(states(student, micro), student.padded_head, micro)
            part = torch.stack([term.coef / term.denominator * term.total for term in terms]).sum()
            part.backward()
            total += part.detach()
    return total, student.module


def loss_trl(job: Job, work: Workload, given: Row, wide: bool) -> tuple[torch.Tensor, torch.nn.Module]:
    """TRL's `_compute_loss` on the same rows: prompts padded on the left, completions on the right."""
    trainer = trl_trainer(job, work, "cpu", double=True)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # as its train() would, with all rows in one micro-batch

    def padded(rows: list[list[int]], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
        side, tensors = "left" if left else "right", [torch.tensor(row) for row in rows]
        pad = torch.nn.utils.rnn.pad_sequence
        masks = [torch.ones_like(t) for t in tensors]
        return pad(tensors, True, PAD, side), pad(masks, True, 0, side)

    inputs: Row = dict(zip(("prompt_ids", "prompt_mask"), padded(given["prompts"], True), strict=True))
    inputs |= dict(zip(("completion_ids", "completion_mask"), padded(given["completions"], False), strict=True))
    count = inputs["completion_mask"].sum()
    inputs |= {"advantages": torch.tensor(given["advantages"], dtype=torch.float64), "num_items_in_batch": count}
    with casts(wide):
        if job.method == "grpo":
            loss = trainer._compute_loss(trainer.model, inputs)
        else:
            loss = trainer._compute_loss(trainer.model, inputs, count)[0]
        loss.backward()
    return loss.detach(), trainer.model


def work_losses(job: Job, work: Workload, wide: bool) -> None:
    given = json.loads((Path(job.directory) / "rows.json").read_text())
    loss, module = loss_ours(job, given, wide) if job.side == "headwater" else loss_trl(job, work, given, wide)
    found = {name: p.grad.double() for name, p in module.named_parameters() if p.grad is not None}
    save_file({"loss": loss.double().reshape(1), **found}, Path(job.directory) / f"{job.side}.safetensors")


class Worker:
    """A process that takes its steps when told to."""

    def __init__(self, job: Job, task: Row, python: str, log: IO[str]) -> None:
        command = [python, __file__, "--worker", json.dumps({"job": asdict(job), **task})]
        env = os.environ | {"OMP_NUM_THREADS": str(job.threads), "TOKENIZERS_PARALLELISM": "false"}
        self.job, self.log = job, log
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=env
        )
        self.loaded = self._read()

    def _read(self) -> Row:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise RuntimeError(f"{self.job.name} ended with {self.process.wait()}:\n{self.log.read()[-3000:]}")
        return json.loads(line)

    def step(self) -> Row:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self._read()

    def stop(self) -> None:
        self.process.communicate("stop\n")


def take_turns(jobs: list[Job], task: Row, pythons: dict[str, str], warmups: int, repeats: int) -> list[list[Row]]:
    """Rows of `repeats` steps of every job, one step of each in turn after `warmups`."""
    workers: list[Worker] = []
    with TemporaryDirectory() as logs:
        try:
            for i, job in enumerate(jobs):
                workers.append(Worker(job, task, pythons[job.side], (Path(logs) / str(i)).open("w+")))
            rows = [[worker.step() | worker.loaded for worker in workers] for _ in range(warmups + repeats)]
        finally:
            for worker in workers:
                worker.stop()
                worker.log.close()
    return [list(steps) for steps in zip(*rows[warmups:], strict=True)]


def grid(side: str, method: str, directory: str, work: Workload, asked: argparse.Namespace) -> list[Job]:
    dtypes = [d for d in asked.dtypes if side == "trl" or d != "pure bfloat16"]
    batches = sorted({min(b, work.rows) for b in asked.batches}) if side == "trl" else asked.tokens
    choices = itertools.product(dtypes, asked.threads, batches)
    return [Job(side, method, directory, dtype, threads, batch) for dtype, threads, batch in choices]


def spent_on_state(job: Job, parameters: int) -> int:
    """Bytes that gradients and optimizer state must add to the loaded weights; ours at bfloat16 keeps rounded weights
    beside the masters."""
    return (
        parameters * {"float32": 12, "bfloat16": 14 if job.side == "headwater" else 12, "pure bfloat16": 6}[job.dtype]
    )


def described(job: Job, rows: list[Row]) -> Row:
    seconds, peak = [row["seconds"] for row in rows], max(row["peak"] for row in rows)
    return {
        "who": job.name,
        "seconds": statistics.median(seconds),
        "least": min(seconds),
        "most": max(seconds),
        "mean length": statistics.mean(row["mean length"] for row in rows),
        "cut": statistics.mean(row["cut"] for row in rows),
        "peak GB": peak / 1e9,
        "above state GB": (peak - spent_on_state(job, rows[0]["parameters"])) / 1e9,
    }


def compared(ours: tuple[Job, list[Row]], theirs: tuple[Job, list[Row]], what: str) -> Row:
    """Ratios TRL / ours: of each turn's seconds, and of peak memory."""
    pairs = zip(theirs[1], ours[1], strict=True)
    ratios = [t["seconds"] / o["seconds"] for t, o in pairs]
    mine, other = described(*ours), described(*theirs)
    row: Row = {"what": what, "ours": ours[0].name, "trl": theirs[0].name, "TRL s / our s": statistics.median(ratios)}
    row |= {"least": min(ratios), "most": max(ratios)}
    return row | {f"{name} ratio": other[name] / mine[name] for name in ("peak GB", "above state GB")}


def compare(name: str, work: Workload, method: str, asked: argparse.Namespace) -> dict[str, list[Row]]:
    """Grid, then the best of each side at equal precision and overall in turns; memory also as TRL comes."""
    pythons = {"headwater": sys.executable, "trl": asked.trl_python}
    with TemporaryDirectory() as directory:
        mean = 0.75 * work.limit
        save(Path(directory) / "student", work.student, work.vocab, mean, 0)
        save(Path(directory) / "teacher", work.teacher, work.vocab, mean, 1)
        texts = prompts(8 * work.problems, work.prompt, work.vocab)
        (Path(directory) / "prompts.json").write_text(json.dumps(texts))
        task: Row = {"work": asdict(work)}
        head = {"workload": name, "method": method}
        tried: dict[Job, Row] = {}
        for side in asked.sides:
            for job in grid(side, method, directory, work, asked):
                (rows,) = take_turns([job], task, pythons, 1, asked.grid_steps)
                tried[job] = head | described(job, rows)
                print(f"{name} {method}: {job.name}: {tried[job]['seconds']:.3g} s", flush=True)
        if not asked.repeats or len(asked.sides) < len(pythons):
            return {"grid": list(tried.values())}

        def best(side: str, dtype: str | None = None) -> Job:
            fitting = [job for job in tried if job.side == side and dtype in (None, job.dtype)]
            return min(fitting, key=lambda job: tried[job]["seconds"])

        plans = {dtype: (best("headwater", dtype), best("trl", dtype)) for dtype in ("float32", "bfloat16")}
        plans["best against best"] = (best("headwater"), best("trl"))
        jobs = list(dict.fromkeys(job for pair in plans.values() for job in pair))
        # TRL's default recomputes activations: less memory, more time.
        jobs.append(replace(plans["float32"][1], checkpointing=True))
        found = dict(zip(jobs, take_turns(jobs, task, pythons, 1, asked.repeats), strict=True))
        plans["float32, TRL checkpointing"] = (plans["float32"][0], jobs[-1])
    return {
        "grid": list(tried.values()),
        "steps": [head | described(job, rows) for job, rows in found.items()],
        "ratios": [head | compared((o, found[o]), (t, found[t]), what) for what, (o, t) in plans.items()],
    }


def losses(method: str, trl_python: str) -> list[Row]:
    """Differences of loss (relative) and gradient (norm over norm) of both sides on the same rows."""
    work, found = TOY, []
    draw = torch.Generator().manual_seed(0)

    def ids(low: int, high: int) -> list[list[int]]:
        lengths = torch.randint(low, high, (work.rows,), generator=draw).tolist()
        return [torch.randint(FIRST, work.vocab, (n,), generator=draw).tolist() for n in map(int, lengths)]

    rewards = torch.randint(0, 2, (work.problems, work.group), generator=draw).double()
    given = {"completions": ids(1, work.limit + 1), "advantages": group_advantages(rewards).flatten().tolist()}
    given["prompts"] = [prompt for prompt in ids(4, 12)[: work.problems] for _ in range(work.group)]
    with TemporaryDirectory() as directory:
        root = Path(directory)
        save(root / "student", work.student, work.vocab, 6, 0)
        save(root / "teacher", work.teacher, work.vocab, 6, 1)
        (root / "rows.json").write_text(json.dumps(given))
        (root / "prompts.json").write_text(json.dumps(prompts(8, 8, work.vocab)))
        for wide in (True, False):
            for side, python in (("headwater", sys.executable), ("trl", trl_python)):
                job = Job(side, method, directory, "float32", 1, work.rows)
                task = json.dumps({"job": asdict(job), "work": asdict(work), "losses": True, "wide": wide})
                subprocess.run([python, __file__, "--worker", task], check=True, stdout=subprocess.DEVNULL)
            a, b = (load_file(root / f"{side}.safetensors") for side in ("headwater", "trl"))
            loss = float(a.pop("loss")), float(b.pop("loss"))
            assert a.keys() == b.keys()
            error = torch.stack([(a[n] - b[n]).norm() for n in a]).norm() / torch.stack([a[n].norm() for n in a]).norm()
            row: Row = {"method": method, "TRL's float32 casts": "widened" if wide else "as shipped"}
            row |= {"our loss": loss[0], "loss difference": abs(loss[0] - loss[1]) / abs(loss[0])}
            found.append(row | {"gradient difference": float(error)})
    return found


def worker(text: str) -> None:
    given = json.loads(text)
    shapes = {name: Shape(**given["work"].pop(name)) for name in ("student", "teacher")}
    job, work = Job(**given["job"]), Workload(**given["work"], **shapes)
    torch.set_num_threads(job.threads)
    if given.get("losses"):
        return work_losses(job, work, given["wide"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    (work_ours if job.side == "headwater" else work_trl)(job, work, Turn(), device)


def main(given: list[str] | None = None) -> dict[str, list[Row]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--trl-python", default=sys.executable, help="an interpreter that imports trl and headwater")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=["base", "long", "vocabulary"])
    parser.add_argument("--methods", nargs="+", choices=("grpo", "distill"), default=["grpo", "distill"])
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 16, 64], help="TRL's rows of a micro-batch")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16_384], help="our tokens of a micro-batch")
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, torch.get_num_threads()}))
    parser.add_argument("--grid-steps", type=int, default=1)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES, help="of the grid")
    parser.add_argument("--sides", nargs="+", choices=("headwater", "trl"), default=["headwater", "trl"])
    parser.add_argument("--repeats", type=int, default=5, help="turns; 0, or one of the sides: the grid alone")
    parser.add_argument("--losses", action="store_true", help="equal losses only")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to check the code")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args(given)
    if asked.worker:
        worker(asked.worker)
        return {}
    works = {name: WORKLOADS[name] for name in asked.workloads}
    if asked.tiny:
        works, asked.batches, asked.threads, asked.repeats = {"tiny": TOY}, [4], [1], 1
    results: dict[str, list[Row]] = {}
    if len(asked.sides) > 1:
        results["losses"] = [row for method in asked.methods for row in losses(method, asked.trl_python)]
        print(table("losses", results["losses"]), flush=True)
    for name, work in () if asked.losses else works.items():
        for method in asked.methods:
            for part, rows in compare(name, work, method, asked).items():
                results[part] = results.get(part, []) + rows
                print(table(part, rows), flush=True)
            report("vs_trl", asked, results, asked.out)
    report("vs_trl", asked, results, asked.out)
    return results


if __name__ == "__main__":
    main()
