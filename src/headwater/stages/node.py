"""Run one specification: load what it names, hand it to its loop, write the result. Runs in any process."""

from __future__ import annotations

import functools
import json
import os
import platform
import subprocess
import traceback
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from headwater import assets, spec
from headwater import device as devices
from headwater.checkpoint import write_atomically
from headwater.config import GRPO, SFT, Distill, Execution, Joint, Warmup
from headwater.evals.evaluate import evaluate
from headwater.grading.audit import second_grader
from headwater.grading.pool import GraderPool
from headwater.ledger import Ledger
from headwater.mesh import Mesh, join
from headwater.meter import Meter, total
from headwater.models.gguf import convert_gguf
from headwater.models.language_model import LanguageModel, check_same_tokenizer, load_model, load_served
from headwater.monitors.closeness import closeness
from headwater.probe.measure import measure
from headwater.probe.rule import Situation, judge
from headwater.rollouts.synced import sampling_server
from headwater.run import OnLog, StageRun, lease, save_model, set_deterministic
from headwater.scoring.log_probs import View
from headwater.spec import DecisionSpec, EvaluationSpec, ModelRef, Node, Problems, StageSpec
from headwater.stages import distill, grpo, joint, sft, warmup
from headwater.store import Store
from headwater.tasks import load_task
from headwater.tasks.pool import draw_pool, part_of, pool_digest
from headwater.trackers import Mirror
from headwater.types import Problem
from headwater.update import AdamW


@dataclass(frozen=True)
class Job:
    """A specification and how to execute it; `monitor` is what a stage evaluates every `eval_every` steps,
    and on whose prompts it measures C2."""

    spec: Node
    execution: Execution
    monitor: EvaluationSpec | None = None

    def to_json(self) -> str:
        parts = {"spec": self.spec, "execution": self.execution, "monitor": self.monitor}
        return json.dumps({name: part and part.model_dump(mode="json") for name, part in parts.items()})

    @classmethod
    def from_json(cls, text: str) -> Job:
        """The job that `to_json` wrote; ValueError for anything else."""
        try:
            raw = json.loads(text)
            monitor = raw["monitor"] and EvaluationSpec.model_validate(raw["monitor"])
            return cls(spec.parse(json.dumps(raw["spec"])), Execution.model_validate(raw["execution"]), monitor or None)
        except (ValueError, KeyError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"not a job ({reason}): give the spec.json of a node of this version's store") from None


def run_node(job: Job, store: Store, *, on_log: OnLog | None = None) -> None:
    """Bring a node to its end: a finished one is left alone, a half-finished one resumes.

    Raises BlockingIOError when another process holds it, ValueError for what the user can mend.
    """
    key = spec.key(job.spec)
    directory = store.path(key)
    with lease(directory):
        if store.is_done(key):
            return
        check_device(job.execution.device)
        set_deterministic(job.execution.threads)
        devices.reset_peak(job.execution.device)
        write_atomically(directory / "spec.json", job.to_json())
        outcome = {"key": key, "label": job.spec.label, "execution": job.execution.model_dump(mode="json")}
        outcome["environment"] = environment()
        notes = directory / "error.txt"
        try:
            if isinstance(job.spec, EvaluationSpec):
                outcome |= _evaluate(job.spec, job.execution, store, directory, on_log)
            elif isinstance(job.spec, DecisionSpec):
                outcome |= _decide(job.spec, job.execution, store, directory)
            else:
                outcome |= _train(job, store, directory, on_log)
        except Exception:
            with suppress(OSError):
                notes.write_text(traceback.format_exc(), encoding="utf-8")
            raise
        notes.unlink(missing_ok=True)
        outcome["peak_memory"] = devices.peak_memory(job.execution.device)
        outcome["peak_flops"] = devices.matmul_peak(job.execution.device, job.spec.start.config.dtype)
        store.finish(key, outcome)


def check_device(device: str) -> None:
    """ValueError when torch cannot use it here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        there = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
        raise ValueError(f"execution.device = {device!r} cannot be used ({reason}); this machine has {there}") from None


def select(problems: Problems, share: float | None = None) -> list[Problem]:
    """The problems a specification names, with the `share` that a decision has fixed where it names one; ValueError
    when the data are no longer what the study was planned on."""
    left_out = set(problems.excluded)
    there = [p for p in load_task(problems.task).problems(problems.split) if p.id not in left_out]
    pool = draw_pool(there, problems.count, problems.seed)
    if not problems.labelled:
        pool = [p.unlabelled() for p in pool]
    chosen = pool if problems.share is None else part_of(pool, problems.part, problems.share)
    if pool_digest(chosen, labelled=problems.labelled) != problems.digest:
        raise ValueError(
            f"the data of task {problems.task.get('name')!r} changed since the study was planned: run it anew"
        )
    if share is not None and problems.share is None:
        chosen = part_of(pool, problems.part, share)
        chosen = chosen if chosen or problems.labelled else pool
    return chosen


def open_model(
    ref: ModelRef, store: Store, execution: Execution, *, trained: bool = False, stage: StageSpec | None = None
) -> LanguageModel:
    """The model behind a reference, from the store or from its source; with adapters where `stage` trains those.

    One that is not trained is left where it is, where `execution` names a server: only who asks that teacher has one.
    """
    directory = store.model(ref.stage) if ref.stage is not None else model_directory(ref.config.source)
    if execution.teacher is not None and not trained:
        return load_served(ref.config, directory, execution.teacher)
    return load_model(
        ref.config,
        directory,
        device=execution.device,
        trained=trained,
        checkpoint_activations=trained and execution.gradient_checkpointing,
        spread=not trained and execution.spread_teacher,
        compile=execution.compile,
        lora=stage and stage.settings.lora,
        seed=f"{stage.label} {stage.seed}" if stage else 0,
    )


def model_directory(source: str) -> Path:
    """A model source as a Hugging Face directory; GGUF files are converted once."""
    path = assets.fetch(source)
    if path.is_file():
        return convert_gguf(path)
    if not (path / "config.json").exists():
        raise ValueError(f"{source} has no config.json: name a Hugging Face model directory or a GGUF file")
    return path


def environment() -> dict[str, Any]:
    """Versions and hardware that a number was made with."""
    packages = ["headwater", "torch", "transformers", "reasoning-gym", "math-verify"]
    packages += [name for name in ("peft", "verifiers") if find_spec(name)]
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "packages": {name: version(name) for name in packages},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "commit": _commit(),
    }


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


@functools.cache
def _commit() -> str | None:
    """Of the checkout that this package is run from, `+changes` when files differ; None when it is installed."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        if subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True).returncode:
            return None
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def _grader(grader: str, execution: Execution) -> GraderPool:
    return GraderPool(
        grader,
        workers=execution.grader_workers,
        timeout_s=execution.grader_timeout_s,
        memory_mb=execution.grader_memory_mb,
    )


def _evaluate(
    node: EvaluationSpec, execution: Execution, store: Store, directory: Path, on_log: OnLog | None
) -> dict[str, Any]:
    problems = select(node.problems)
    model = open_model(node.start, store, execution)
    meter = Meter()
    with _grader(node.grader, execution) as pool:
        result = evaluate(
            node.settings,
            model=model,
            problems=problems,
            grade=pool.grade,
            seed=node.seed,
            meter=meter,
            max_tokens=execution.sampler_tokens,
            directory=directory,
            on_batch=lambda done, metrics: on_log(done, len(problems), metrics) if on_log else None,
        )
    return {"result": result, "meter": meter.state()}


def _decide(node: DecisionSpec, execution: Execution, store: Store, directory: Path) -> dict[str, Any]:
    problems, ledger, meter = select(node.problems), Ledger(directory / "ledger.jsonl"), Meter()
    student, teacher = (open_model(ref, store, execution) for ref in (node.start, node.teacher))
    check_same_tokenizer(student, teacher)
    ledger.reveal(0, [p.id for p in problems])
    models = {"student": student, "teacher": teacher}
    seen_by = {"meter": meter, "max_tokens": execution.sampler_tokens}
    with _grader(node.grader, execution) as pool:
        measured, seen = measure(node, **models, problems=problems, grade=pool.grade, **seen_by)
    prompts = {"pool": problems, "held out": select(node.held_out)} if node.held_out else {}
    look = {"max_new_tokens": node.max_new_tokens, "temperature": node.temperature, "seed": node.seed}
    c2 = {name: closeness(**models, problems=some, **look, **seen_by) for name, some in prompts.items()}
    situation = Situation(node.labels, node.dense_prompts, node.trained, node.least)
    found = judge(measured, situation, tuple(sorted(node.settings.shares)))
    return {
        "result": {**found, "models": seen, "c2": c2, "problems": len(problems), "labels": node.labels},
        "share": found["share"],
        "meter": meter.state(),
        "revealed": ledger.revealed,
        "distinct": len(ledger.problems),
    }


def _train(job: Job, store: Store, directory: Path, on_log: OnLog | None) -> dict[str, Any]:
    node, execution = job.spec, job.execution
    assert isinstance(node, StageSpec)
    problems = select(node.problems, store.outcome(node.decision)["share"] if node.decision else None)
    policy = open_model(node.start, store, execution, trained=True, stage=node)
    teacher = open_model(node.teacher, store, execution) if node.teacher else None
    graders = [_grader(node.grader, execution)] if node.grader else []
    monitor_pool = [_grader(job.monitor.grader, execution)] if job.monitor and execution.eval_every else []
    second = execution.audit_grader or second_grader(node.grader)
    audits = [_grader(second, execution)] if second and isinstance(node.settings, GRPO) else []
    mesh = join(execution.device)
    title = f"{node.label}-seed{node.seed}-{spec.key(node)[:8]}"
    mirror = Mirror(execution.trackers, execution.project, title, directory) if mesh.is_writer else None
    run = StageRun(
        directory,
        execution=execution,
        mesh=mesh,
        on_log=on_log,
        evaluate=_monitor(job.monitor, policy, monitor_pool[0]) if job.monitor and monitor_pool else None,
        monitor=_closeness(job, policy, teacher, mesh),
        mirror=mirror,
        audit=audits[0].grade if audits else None,
    )
    try:
        # A side of a split that has no labels takes no step.
        samples = problems and isinstance(node.settings, GRPO | Distill | Joint)
        served = execution.sampler if samples else None
        with sampling_server(served, policy, mesh, directory / "vllm.log") as run.sampler:
            optimizer = (
                _dispatch(node, policy, teacher, problems, graders, store, run)
                if problems
                else AdamW(policy, node.settings.optimizer)
            )
    finally:
        for opened in [*graders, *audits, *monitor_pool, *([mirror] if mirror else [])]:
            opened.close()
    save_model(policy, optimizer, store.model(spec.key(node)))
    labels = {"revealed": run.ledger.revealed, "distinct": len(run.ledger.problems)}
    gate = {"gate": run.gate} if run.gate else {}
    return {"meter": run.meter.state(), "devices": run.mesh.size, **labels, **gate}


def _dispatch(
    node: StageSpec,
    policy: LanguageModel,
    teacher: LanguageModel | None,
    problems: list[Problem],
    graders: list[GraderPool],
    store: Store,
    run: StageRun,
) -> AdamW:
    grade = graders[0].grade if graders else None
    match node.settings:
        case Joint() as settings:
            assert teacher is not None and grade is not None
            return joint.train(
                settings, student=policy, teacher=teacher, problems=problems, grade=grade, seed=node.seed, run=run
            )
        case GRPO() as settings:
            assert grade is not None
            return grpo.train(
                settings,
                policy=policy,
                problems=problems,
                grade=grade,
                seed=node.seed,
                run=run,
                reference=_reference(node, policy, store, run.execution) if settings.kl_coef else None,
                max_flops=total([store.outcome(k)["meter"] for k in node.match])["flops"] if node.match else None,
            )
        case Warmup() as settings:
            assert teacher is not None
            return warmup.train(
                settings, student=policy, teacher=teacher, problems=problems, seed=node.seed, run=run, grade=grade
            )
        case Distill() as settings:
            return distill.train(
                settings, student=policy, teacher=teacher, problems=problems, seed=node.seed, run=run, grade=grade
            )
        case SFT() as settings:
            return sft.train(
                settings, student=policy, problems=problems, seed=node.seed, run=run, teacher=teacher, grade=grade
            )


def _reference(node: StageSpec, policy: LanguageModel, store: Store, execution: Execution) -> LanguageModel:
    """The model that the stage starts from: under the adapters it is still there."""
    return replace(policy, without_adapters=True) if policy.lora else open_model(node.start, store, execution)


def _monitor(monitor: EvaluationSpec, policy: LanguageModel, pool: GraderPool):
    problems = select(monitor.problems)

    def observe(done: int) -> dict[str, float]:
        result = evaluate(
            monitor.settings, model=policy, problems=problems, grade=pool.grade, seed=monitor.seed, meter=Meter()
        )
        styles = {f"style/{name}": row["share"] for name, row in result["styles"].items()}
        return {"eval/avg@k": result["avg@k"], "eval/truncated": result["truncated"], **styles}

    return observe


def _closeness(job: Job, policy: LanguageModel, teacher: LanguageModel | None, mesh: Mesh):
    """Condition C2 on prompts of the evaluation, as rows of monitors.jsonl; influences nothing and is not billed."""
    node, execution = job.spec, job.execution
    if teacher is None or job.monitor is None or not execution.monitor_problems or not isinstance(node, StageSpec):
        return None
    if teacher.served or getattr(node.settings, "alignment", "tokens") == "spans":
        return None  # a KL token by token needs one tokenizer, and the teacher's whole distribution
    prompts = [p.unlabelled() for p in select(job.monitor.problems)[: execution.monitor_problems]]
    view = View(1.0, execution.micro_batch_tokens, execution.chunk_tokens)

    def observe() -> dict[str, float]:
        return closeness(
            policy,
            teacher,
            prompts,
            max_new_tokens=node.settings.max_new_tokens,
            temperature=node.settings.temperature,
            seed=node.seed,
            view=view,
            max_tokens=execution.sampler_tokens,
            mesh=mesh,
        )

    return observe
