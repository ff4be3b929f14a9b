"""Measures losses, sampling and training steps on one CUDA device; see benchmarks/README.md for what each number is.

Run `benchmarks/gpu_suite.sh`. Models have the real shapes of Qwen3 and random weights: speed and memory do not depend
on the values, and nothing has to be downloaded. `--tiny` runs every part in seconds, also on a CPU, to check the code.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from measure import (
    KERNELS,
    SPARSE,
    TINY,
    Row,
    Scale,
    build,
    ceilings,
    kernels,
    loss_inputs,
    ours,
    peak_memory,
    plain,
    reset_peak,
    synchronize,
    table,
    top_k,
)
from torch import Tensor

from headwater.config import GRPO, Distill, Execution, Optimizer
from headwater.mesh import Mesh
from headwater.models.language_model import LanguageModel, compile_layers
from headwater.rollouts.batch import Batch, MicroBatch, micro_batches
from headwater.rollouts.sampler import Sampling, TransformersSampler
from headwater.run import StageRun
from headwater.stages.common import dense_loss, scored_by
from headwater.stages.grpo import policy_loss
from headwater.types import Message, Problem
from headwater.update import AdamW, Loss, update


def relative(value: Tensor, exact: Tensor) -> float:
    return float(torch.linalg.vector_norm(value.double() - exact) / torch.linalg.vector_norm(exact))


def correctness(scale: Scale) -> list[Row]:
    """Norm of the difference to the float64 oracle over the oracle's norm: value and both gradients."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        x = loss_inputs(scale.oracle_tokens, scale, dtype)
        y = {n: t.detach().double() if t.is_floating_point() else t for n, t in x.items()}
        y |= {n: y[n].requires_grad_() for n in ("hidden", "head")}
        for name in KERNELS:
            teacher = top_k(x, scale.vocab) if "top" in name else None
            value, exact = ours(name, x, scale.vocab, teacher), plain(name, y, scale.vocab, teacher, torch.float64)
            grads = torch.autograd.grad(value, (x["hidden"], x["head"]))
            expected = torch.autograd.grad(exact, (y["hidden"], y["head"]))
            errors = [
                relative(value.detach(), exact.detach()),
                *(relative(g, e) for g, e in zip(grads, expected, strict=True)),
            ]
            rows.append(
                {"loss": name, "dtype": str(dtype)[6:]}
                | dict(zip(("value", "grad hidden", "grad head"), errors, strict=True))
            )
    return rows


def sampling(scale: Scale, copy_gbs: float) -> list[Row]:
    """Tokens per second of the sampler against the time to read the weights and the cache once per step."""
    rows, prompt = [], max(4, 256 // scale.divide)
    for size in dict.fromkeys(name for name, *_ in scale.sampled):
        model = build(size, scale, trained=False)
        config = model.module.config
        for batch, unequal, ends in (row[1:] for row in scale.sampled if row[0] == size):
            sampler = TransformersSampler(replace(model, eos_ids=(*range(ends), *model.eos_ids)))
            lengths = [prompt - (i % 8) * (prompt // 16) * unequal for i in range(batch // 2)]
            problems = [Problem((Message("user", f"{i} {length}"),)) for i, length in enumerate(lengths)]
            sampler.sample(problems, Sampling(("warm",), 2, 4))
            synchronize()
            reset_peak()
            start = time.perf_counter()
            rollouts = sampler.sample(problems, Sampling(("timed",), 2, scale.new_tokens))
            seconds = time.perf_counter() - start
            drawn = sum(len(r.completion_ids) for r in rollouts)
            cached = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
            read = 2 * model.num_parameters + batch * (prompt + scale.new_tokens / 2) * cached
            floor = scale.new_tokens * read / copy_gbs / 1e9
            rows.append(
                {
                    "model": size,
                    "batch": batch,
                    "mean length": drawn / batch,
                    "tokens/s": drawn / seconds,
                    "prompts": f"{min(lengths)}-{max(lengths)}",
                    "ms/step": seconds / scale.new_tokens * 1e3,
                }
                | {"floor ms/step": floor / scale.new_tokens * 1e3, "floor share": floor / seconds}
                | {"peak GB": peak_memory() / 1e9}
            )
        del model, sampler  # pyright: ignore[reportPossiblyUnbound] -- there is at least one
        reset_peak()
    return rows


def model_flops(model: LanguageModel, rows: int, prompt: int, completion: int, passes: int) -> float:
    """Multiply-adds x 2 of `passes` (1 forward, 3 forward and backward), without recomputation.

    2 x weights per token (the LM head only at loss tokens, the embedding lookup not at all), and for causal attention
    4 x layers x heads x head_dim x length / 2 per token.
    """
    config, length = model.module.config, prompt + completion
    table = config.vocab_size * config.hidden_size
    body = model.num_parameters - table * (1 if config.tie_word_embeddings else 2)
    attention = 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * length
    return passes * rows * (length * (2 * body + attention) + 2 * table * completion)


def timed_step(
    student: LanguageModel,
    loss_of: Callable[[float], Loss],
    rows: int,
    prompt: int,
    completion: int,
    budget: int,
    *,
    unequal: bool = False,
    before: Callable[[MicroBatch], MicroBatch] = lambda micro: micro,
) -> Row:
    """Median of three updates after one, with the peak memory of all of them and the time of the first.

    Completions differ in length when `unequal`, from `completion` down to a quarter, other ones at every update.
    """
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(student.vocab_size, (count,), generator=generator).tolist()

    def batch() -> Batch:
        short = torch.randint(completion // 4, completion + 1, (rows,), generator=generator).tolist()
        lengths = short if unequal else [completion] * rows

        def per_token(values: Callable[[int], Tensor]) -> list[Tensor]:
            return [values(length) for length in lengths]

        return Batch([ids(prompt) for _ in range(rows)], [ids(length) for length in lengths]).with_fields(
            weights=per_token(torch.ones),
            advantages=per_token(lambda n: torch.randn(1, generator=generator).expand(n)),
            sampler=per_token(lambda n: torch.full((n,), -11.5)),
        )

    optimizer = AdamW(student, Optimizer(lr=1e-6))
    loss, times, drawn = loss_of(float(rows * completion)), [], [batch() for _ in range(4)]
    reset_peak()
    for rollouts in drawn:
        synchronize()
        start = time.perf_counter()
        micros = micro_batches(rollouts, max_tokens=budget, device=student.device)
        update(student, optimizer, micros, loss, lr=1e-6, max_grad_norm=1.0, mesh=Mesh(), before=before)
        synchronize()
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[1:])
    tokens = statistics.mean(b.num_tokens for b in drawn)
    return {
        "rows": f"{rows} x ({prompt} + {'up to ' * unequal}{completion})",
        "micro-batch": budget,
        "checkpointing": student.checkpoint_activations,
        "first s": times[0],
        "seconds": seconds,
        "tokens/s": tokens / seconds,
        "peak GB": peak_memory() / 1e9,
    }


def grpo_update(scale: Scale, peak_tflops: float) -> list[Row]:
    """One GRPO update of 1.7B: forward, loss, backward, clipping, AdamW on float32 masters, rounding."""
    prompt, completion = (256, 1024) if scale.divide == 1 else (4, 12)
    count, out = -(-scale.step_tokens // (prompt + completion)), []
    settings = GRPO(steps=1, max_new_tokens=completion, problems_per_step=1, optimizer=Optimizer(lr=1e-6))
    plans = [(6400, False, False, False), (6400, False, True, False), (16_640, True, True, False)]
    plans += [(6400, False, False, True), (6400, False, True, True)]
    for budget, checkpoint, compiled, unequal in plans:
        student = build("1.7B", scale, trained=True, checkpoint=checkpoint, compiled=compiled)
        flops = model_flops(student, count, prompt, completion, 3)
        row = timed_step(
            student,
            lambda d, s=student: policy_loss(settings, Execution(), s.vocab_size, d),
            count,
            prompt,
            completion,
            budget // scale.divide,
            unequal=unequal,
        )
        row |= {"compiled layers": compiled}
        if not unequal:
            row |= {"model PFLOP": flops / 1e15, "MFU": flops / row["seconds"] / 1e12 / peak_tflops}
        out.append(row)
        del student
        reset_peak()
    return out


def distill_step(scale: Scale, peak_tflops: float) -> list[Row]:
    """One on-policy distillation step, 8B frozen in bfloat16 to 1.7B: scores and exact reverse KL on given rollouts."""
    tiny = scale.divide > 1
    rows = -(-scale.step_tokens // 1280)
    plans = [(4, 12, -(-scale.step_tokens // 16), 64, False)] if tiny else [
        (256, 1024, rows, 5120, False),
        (256, 1024, rows, 16_640, True),
        (512, 8192, -(-scale.step_tokens // 8704), 17_408, True),
    ]  # fmt: skip
    plans += [(length // 4, length - length // 4, 1, length, True) for length in scale.lengths]
    # Compiled last, so that nothing before it runs with the teacher's layers compiled.
    plans = [(*plan, False) for plan in plans] + ([] if tiny else [(256, 1024, rows, 5120, False, True)])
    out, teacher = [], build("8B", scale, trained=False)
    for prompt, completion, count, budget, checkpoint, compiled in plans:
        student = build("1.7B", scale, trained=True, checkpoint=checkpoint, compiled=compiled)
        teacher = compile_layers(teacher) if compiled else teacher
        settings = Distill(steps=1, max_new_tokens=completion, problems_per_step=1, optimizer=Optimizer(lr=1e-6))
        with tempfile.TemporaryDirectory() as directory:
            run = StageRun(Path(directory))
            try:
                row = timed_step(
                    student,
                    lambda d, r=run, s=settings, t=teacher: dense_loss(s, t, scale.vocab, d, r),
                    count,
                    prompt,
                    completion,
                    budget,
                    before=scored_by(teacher, run),
                )
            except torch.cuda.OutOfMemoryError:
                row = {"rows": f"{count} x ({prompt} + {completion})", "micro-batch": budget, "out of memory": True}
        flops = model_flops(student, count, prompt, completion, 3) + model_flops(teacher, count, prompt, completion, 1)
        row |= {"compiled layers": compiled}
        if "seconds" in row:
            row |= {"model PFLOP": flops / 1e15, "MFU": flops / row["seconds"] / 1e12 / peak_tflops}
        out.append(row)
        del student
        reset_peak()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--commit", default="unknown", help="recorded in the results")
    everything = "correctness,kernels,sampling,grpo,distill"
    parser.add_argument("--parts", default=everything)
    parser.add_argument("--tiny", action="store_true", help="toy sizes on any device, to check the code")
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    scale = replace(TINY, device="cuda" if cuda else "cpu") if arguments.tiny else Scale()
    torch.manual_seed(0)
    device = torch.cuda.get_device_name() if cuda else platform.machine()
    result: Row = {"device": device, "commit": arguments.commit, "torch": torch.__version__}
    result |= {"date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), "transformers": transformers.__version__}
    result |= {"python": platform.python_version(), "cuda": torch.version.cuda, "tiny": arguments.tiny}
    result["ceilings"] = ceilings(scale)
    print(json.dumps(result), flush=True)
    tflops, gbs = result["ceilings"]["matmul_tflops"], result["ceilings"]["copy_gbs"]
    parts: dict[str, Callable[[], list[Row]]] = {
        "correctness": lambda: correctness(scale),
        "kernels": lambda: kernels(scale, tflops, (*SPARSE, "reverse_kl", "jsd", "top-64 forward_kl")),
        "sampling": lambda: sampling(scale, gbs),
        "grpo": lambda: grpo_update(scale, tflops),
        "distill": lambda: distill_step(scale, tflops),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    part = "" if arguments.parts == everything else "_" + arguments.parts.replace(",", "-")
    file = f"gpu_{device.replace(' ', '-')}_{result['date'][:10]}{part}{'_tiny' if arguments.tiny else ''}.json"
    for name in arguments.parts.split(","):
        start = time.perf_counter()
        result[name] = parts[name]()
        print(table(name, result[name]), f"\n({time.perf_counter() - start:.0f} s)", flush=True)
        (arguments.out / file).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
