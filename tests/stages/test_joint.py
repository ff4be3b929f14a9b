"""The two ends of the reward-teacher axis, the control without a teacher, and GRPO that ends at its FLOPs."""

import json

import pytest
import torch

from headwater.config import GRPO, Distill, Execution, Joint
from headwater.mesh import Mesh
from headwater.rollouts.batch import micro_batches
from headwater.rollouts.sampler import TransformersSampler
from headwater.run import StageRun
from headwater.scoring.weights import token_weights
from headwater.stages import distill, grpo, joint
from headwater.stages.common import dense_loss, scored_by
from headwater.types import Verdict

BASE = {"steps": 1, "max_new_tokens": 6, "problems_per_step": 4, "group_size": 3, "optimizer": {"lr": 1e-3}}


def gradient(model, part, loss, before=lambda micro: micro) -> torch.Tensor:
    """Of the head and everything below it, as `update` forms it before clipping."""
    model.module.zero_grad(set_to_none=True)
    for micro in map(before, micro_batches(part, max_tokens=10_000)):
        hidden = model.hidden(micro.ids, micro.attention_mask)[micro.predicts]
        terms, _ = loss(hidden, model.head, micro)
        torch.stack([(t.coef / t.denominator * t.total).double() for t in terms]).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.module.parameters()])


def test_gradient_is_the_mixture_of_both_ends(make_model, problems, tmp_path):
    """(1 - lambda) of the distillation's plus lambda of GRPO's, on one batch; the ends are they themselves."""
    student = make_model(0, dtype=torch.float64)
    teacher = make_model(1, "48x2", dtype=torch.float64, trained=False)
    settings = Joint.model_validate(BASE | {"reward_weight": 0.0, "aggregate": "sequence"})
    run = StageRun(tmp_path, execution=Execution())

    def grade(pairs):
        return [Verdict(i % 3 == 0, True, "correct", float(i % 3 == 0)) for i in range(len(pairs))]

    groups = grpo.sample_groups(settings, list(problems[:4]), TransformersSampler(student), grade, ("joint", 0, 0), run)
    batch, _ = grpo.group_batch(settings, groups)
    weights, tokens = token_weights(torch.tensor(batch.lengths), "token")
    batch = batch.with_fields(dense=list(weights.split(batch.lengths)))
    part, denominator = grpo.weigh(batch, settings, Mesh())
    assert denominator != tokens, "each loss has its own denominator"
    dense, asked = dense_loss(settings, teacher, student.vocab_size, tokens, run), scored_by(teacher, run)
    sparse = grpo.policy_loss(settings, run.execution, student.vocab_size, denominator)
    of_dense = gradient(student, part.with_fields(weights=part.fields["dense"]), dense, asked)
    of_sparse = gradient(student, part, sparse)
    assert of_dense.norm() > 1e-3 and of_sparse.norm() > 1e-3
    for weight in (0.0, 0.3, 1.0):
        both = gradient(student, part, joint.joint_loss(dense, sparse, weight), asked)
        torch.testing.assert_close(both, (1 - weight) * of_dense + weight * of_sparse, rtol=0, atol=1e-7)


def test_joint_bills_answers_and_teacher(make_model, problems, parity_grade, tmp_path):
    settings = Joint.model_validate(BASE | {"reward_weight": 0.5, "steps": 2})
    run = StageRun(tmp_path)
    joint.train(
        settings,
        student=make_model(0),
        teacher=make_model(1, trained=False),
        problems=problems[:8],
        grade=parity_grade,
        seed=0,
        run=run,
    )
    assert run.ledger.revealed == 8 and {"scored", "graded", "trained"} <= set(run.meter.state())
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {"reward/mean", "teacher/reverse_kl", "policy/entropy", "reward/frac_groups_zero_std"} <= set(rows[0])


@pytest.mark.parametrize("change", [{"kl_coef": 0.1}, {"redraws": 1}, {"updates_per_batch": 2}])
def test_joint_refuses_what_it_would_not_do(change):
    with pytest.raises(ValueError, match="the teacher is its anchor"):
        Joint.model_validate(BASE | {"reward_weight": 0.5} | change)


def test_without_a_teacher_every_drawn_token_is_pushed_down(make_model, problems, tmp_path):
    """One small step lowers the log-probs of what was drawn and asks no teacher."""
    student = make_model(0)
    settings = Distill.model_validate(BASE | {"divergence": "constant", "optimizer": {"lr": 1e-4}})
    run = StageRun(tmp_path)
    distill.train(settings, student=student, teacher=None, problems=problems[:4], seed=0, run=run)
    assert "scored" not in run.meter.state() and run.ledger.revealed == 0
    (row,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert row["optim/grad_norm"] > 0 and "teacher/sampled_reverse_kl" not in row
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]

    def logprob(model) -> float:
        total = 0.0
        for sample in samples:
            problem = next(p for p in problems if p.id == sample["problem"])
            prompt, ids = model.encode(problem.messages), model.tokenizer(sample["text"])["input_ids"]
            hidden = model.hidden(torch.tensor([prompt + ids]), None)[0, len(prompt) - 1 : -1]
            logp = (hidden @ model.head[: model.vocab_size].T).log_softmax(-1)
            total += logp.gather(1, torch.tensor(ids)[:, None]).sum().item()
        return total

    assert logprob(student) < logprob(make_model(0))
    for teacher, divergence in ((make_model(1, trained=False), "constant"), (None, "reverse_kl")):
        with pytest.raises(ValueError, match="give a teacher to all but 'constant'"):
            wrong = settings.model_copy(update={"divergence": divergence})
            distill.train(wrong, student=student, teacher=teacher, problems=problems[:4], seed=0, run=run)


def test_grpo_ends_after_the_step_that_spends_its_flops(make_model, problems, parity_grade, tmp_path):
    settings = GRPO.model_validate(BASE | {"steps": 50})

    def go(name: str, max_flops: float | None, steps: int = 50) -> tuple[int, float, dict]:
        model, run = make_model(0), StageRun(tmp_path / name, execution=Execution(save_every=1))
        one = settings.model_copy(update={"steps": steps})
        grpo.train(one, policy=model, problems=problems[:8], grade=parity_grade, seed=0, run=run, max_flops=max_flops)
        rows = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return len(rows), run.meter.flops, model.module.state_dict()

    _, three, weights = go("three", None, steps=3)
    count, spent, same = go("exact", three)
    assert (count, spent) == (3, three) and all(torch.equal(same[n], weights[n]) for n in weights)
    count, spent, _ = go("more", three + 1)
    assert count == 4 and spent > three
    # A finished stage that is asked again, for example after a crash before it was recorded, does no more steps.
    assert go("exact", three)[:2] == (3, three)
    assert grpo.steps_to_flops(3, 30.0, 100.0) == 10 and grpo.steps_to_flops(4, 120.0, 100.0) == 4
