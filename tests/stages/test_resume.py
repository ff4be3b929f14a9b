"""A stage that was stopped and resumed is bit for bit the one that never stopped."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from headwater.config import GRPO, SFT, Distill, Execution, Joint, Warmup
from headwater.run import StageRun
from headwater.stages import distill, grpo, joint, sft, warmup

STEPS = 5
METHOD = {"steps": STEPS, "max_new_tokens": 8, "optimizer": {"lr": 3e-3, "schedule": "cosine", "warmup_steps": 2}}
ROLLOUTS = METHOD | {"sequences_per_step": 4}
STUDENT = METHOD | {"problems_per_step": 5, "group_size": 2}
CONSTANT = METHOD | {"optimizer": {"lr": 3e-3}}


def gate(watch: str, **settings: float) -> dict[str, Any]:
    return {"gate": {"watch": watch, "problems": 3, "samples": 2} | settings}


CASES = {
    "grpo": GRPO.model_validate(METHOD | {"problems_per_step": 5, "group_size": 3}),
    "grpo with everything": GRPO.model_validate(
        METHOD
        | {"problems_per_step": 4, "group_size": 2, "redraws": 2, "kl_coef": 0.1, "updates_per_batch": 2}
        | {"overlong": "penalty", "overlong_buffer": 3, "temperature": 0.8, "aggregate": "sequence"}
    ),
    "warmup": Warmup.model_validate(ROLLOUTS),
    "warmup stored top-k": Warmup.model_validate(ROLLOUTS | {"stored_top_k": 4, "rollouts_per_problem": 2}),
    "warmup correct": Warmup.model_validate(ROLLOUTS | {"keep": "correct", "rollouts_per_problem": 3}),
    "distill": Distill.model_validate(STUDENT | {"divergence": "reverse_kl"}),
    "distill jsd": Distill.model_validate(STUDENT | {"divergence": "jsd", "beta": 0.3}),
    "distill sampled": Distill.model_validate(STUDENT | {"divergence": "sampled_token"}),
    "distill constant": Distill.model_validate(STUDENT | {"divergence": "constant"}),
    "joint": Joint.model_validate(STUDENT | {"reward_weight": 0.3, "aggregate": "sequence"}),
    "sft": SFT.model_validate(ROLLOUTS | {"keep": "wrong", "rollouts_per_problem": 3}),
    "grpo gated": GRPO.model_validate(
        CONSTANT
        | {"problems_per_step": 4, "group_size": 3}
        | gate("score", every=2, samples=3, min_mixed=0.01, patience=9)
    ),
    "warmup gated": Warmup.model_validate(CONSTANT | {"sequences_per_step": 4} | gate("kl", every=2, patience=9)),
    "distill gated": Distill.model_validate(
        CONSTANT | {"problems_per_step": 4, "group_size": 2} | gate("score", every=2, patience=9)
    ),
    "distill gated by KL": Distill.model_validate(
        CONSTANT | {"problems_per_step": 4, "group_size": 2} | gate("kl", every=1, min_delta=0.9, patience=2)
    ),
    "sft solutions": SFT.model_validate(ROLLOUTS | {"tokens": "solutions"}),
}
SHORT = ("grpo with everything", "warmup", "distill", "joint", "sft")
LORA = {"lora": {"rank": 4, "dropout": 0.2}}
CASES |= {f"lora {name}": type(s).model_validate(s.model_dump() | LORA) for name, s in CASES.items() if name in SHORT}


class Stop(Exception):
    pass


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def attempt(settings, make_model, problems, grade, directory: Path, *, stop: int | None, compute: str):
    """The trained model and run, or None where it was stopped after `stop` steps, in the log or (negative) in the
    evaluation. All objects are new."""

    def on_log(done: int, steps: int, metrics: dict[str, float]) -> None:
        assert steps == STEPS
        if done == stop:
            raise Stop

    def evaluate(done: int) -> dict[str, float]:
        if done == -(stop or 0):
            raise Stop
        return {"norm": model.head.detach().norm().item()}

    model = make_model(0, compute=compute, lora=settings.lora)
    other = make_model(1, "32x2" if settings.method == "grpo" else "48x2", trained=False)
    run = StageRun(
        directory,
        execution=Execution(save_every=2, eval_every=2, micro_batch_tokens=200),
        on_log=on_log,
        evaluate=evaluate,
        monitor=lambda: {"norm": model.head.detach().norm().item()},
    )
    shared = {"problems": problems[:7], "seed": 3, "run": run}
    try:
        match settings:
            case Joint():
                joint.train(settings, student=model, teacher=other, grade=grade, **shared)
            case GRPO():
                reference = other if settings.kl_coef else None
                reference = replace(model, without_adapters=True) if settings.lora and reference else reference
                grpo.train(settings, policy=model, grade=grade, reference=reference, **shared)
            case Distill():
                teacher = None if settings.divergence == "constant" else other
                distill.train(settings, student=model, teacher=teacher, grade=grade, **shared)
            case Warmup():
                warmup.train(settings, student=model, teacher=other, grade=grade, **shared)
            case SFT():
                teacher = other if settings.tokens == "teacher" else None
                sft.train(settings, student=model, teacher=teacher, grade=grade, **shared)
    except Stop:
        return None
    return model, run


@pytest.mark.parametrize("name", CASES)
def test_resumed_equals_uninterrupted(name, make_model, problems, parity_grade, tmp_path):
    solved = [type(p)(p.messages, p.answer, {"solution": f"{p.answer}."}) for p in problems]
    compute = "bfloat16" if name in ("distill", "grpo with everything", "lora grpo with everything") else "float32"

    def go(directory: str, stop: int | None = None):
        settings = CASES[name]
        return attempt(settings, make_model, solved, parity_grade, tmp_path / directory, stop=stop, compute=compute)

    straight = go("straight")
    # Before the first checkpoint (of step 2), in the evaluation and the log of the second, and a step later.
    stops, steps = ((1, -2, 3), 3) if name == "distill gated by KL" else ((1, -4, 4, 5), STEPS)
    assert [go("stopped", stop) for stop in stops] == [None] * len(stops)
    resumed = go("stopped")
    assert straight is not None and resumed is not None

    start = dict(make_model(0, compute=compute, lora=CASES[name].lora).module.named_parameters())
    for (key, want), got in zip(straight[0].module.named_parameters(), resumed[0].module.parameters(), strict=True):
        assert torch.equal(want, got), key
    assert any(not torch.equal(p, start[n].to(p.dtype)) for n, p in straight[0].module.named_parameters())

    for file in ("metrics.jsonl", "evals.jsonl", "samples.jsonl", "ledger.jsonl", "monitors.jsonl", "gates.jsonl"):
        want, got = (lines(tmp_path / d / file) for d in ("straight", "stopped"))
        for row in want + got:
            row.pop("time", None)
        assert got == want, file
        assert want or file in ("ledger.jsonl", "gates.jsonl")
    assert [row["step"] for row in lines(tmp_path / "stopped" / "metrics.jsonl")] == list(range(steps))
    assert [row["updates"] for row in lines(tmp_path / "stopped" / "evals.jsonl")] == [2, 4][: steps // 2]
    assert [row["step"] for row in lines(tmp_path / "stopped" / "monitors.jsonl")] == [0, steps]
    assert straight[1].gate == resumed[1].gate and (straight[1].gate is not None) == ("gated" in name)
    if straight[1].gate is not None:
        seen = [row["step"] for row in straight[1].gate["looks"]]
        assert seen == ([0, 1, 2, 3] if steps == 3 else [0, 2, 4])
        assert straight[1].gate["stopped_at"] == (3 if steps == 3 else None)

    for role, row in straight[1].meter.state().items():
        got = resumed[1].meter.state()[role]
        assert (got["tokens"], got["flops"]) == (row["tokens"], row["flops"]), role
    assert straight[1].meter.state().keys() == resumed[1].meter.state().keys() - {"lost"}
    assert resumed[1].meter.state()["lost"]["flops"] > 0
    assert straight[1].ledger.revealed == resumed[1].ledger.revealed
    labels = {
        "grpo",
        "grpo with everything",
        "grpo gated",
        "distill gated",
        "warmup correct",
        "joint",
        "sft",
        "sft solutions",
    }
    assert (straight[1].ledger.revealed > 0) == (name.removeprefix("lora ") in labels)
    if "everything" in name:
        assert sum(row["reward/groups_redrawn"] for row in lines(tmp_path / "stopped" / "metrics.jsonl")) > 0


def test_training_does_not_depend_on_execution_settings(make_model, problems, parity_grade, tmp_path):
    """Other cuts of batches give the same run up to rounding; evaluating and saving more often changes nothing."""
    settings = CASES["grpo"].model_copy(update={"steps": 2})
    results = []
    for i, execution in enumerate(
        (
            Execution(),
            Execution(save_every=1, eval_every=1),
            Execution(micro_batch_tokens=50, sampler_tokens=100, chunk_tokens=3),
        )
    ):
        model = make_model(0, dtype=torch.float64)
        run = StageRun(tmp_path / str(i), execution=execution, evaluate=lambda done: {})
        grpo.train(settings, policy=model, problems=problems[:7], grade=parity_grade, seed=3, run=run)
        results.append(list(model.module.parameters()))
    for a, b, c in zip(*results, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=0, atol=1e-7)
