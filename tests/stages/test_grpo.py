import json

import pytest
import torch

from headwater.config import GRPO, Execution
from headwater.rollouts.sampler import TransformersSampler
from headwater.run import StageRun
from headwater.stages import grpo
from headwater.stages.common import audit_metrics
from headwater.types import Problem, Rollout, Verdict
from headwater.update import update

OPTIMIZER = {"lr": 1e-3}


def settings(**changes) -> GRPO:
    base = {"steps": 1, "max_new_tokens": 6, "problems_per_step": 4, "group_size": 2, "optimizer": OPTIMIZER}
    return GRPO.model_validate(base | changes)


def rollout(length: int, finished: bool = True) -> Rollout:
    return Rollout("p", 0, [1, 2], [3] * length, [-0.5 * (i + 1) for i in range(length)], "", finished, 0)


def verdict(score: float) -> Verdict:
    return Verdict(score == 1, True, "correct" if score == 1 else "wrong", score)


def group(problem: Problem, *rows: tuple[int, float]) -> grpo.Group:
    """Rows are (completion length, score)."""
    return problem, [rollout(n, n < 6) for n, _ in rows], [verdict(score) for _, score in rows]


def test_batch_by_hand(problems):
    groups = [group(problems[0], (2, 1.0), (3, 0.0)), group(problems[1], (1, 0.0), (6, 0.0))]
    batch, rewards = grpo.group_batch(settings(), groups)
    assert rewards.tolist() == [[1, 0], [0, 0]] and batch.lengths == [2, 3, 1, 6]
    # Mean 0.5, sample standard deviation 1 / sqrt(2).
    a = 0.5 / (0.5**0.5 + 1e-6)
    assert torch.cat(batch.fields["advantages"]).tolist() == pytest.approx([a] * 2 + [-a] * 3 + [0.0] * 7)
    assert batch.fields["sampler"][1].tolist() == [-0.5, -1.0, -1.5]
    assert [f.tolist() for f in batch.fields["finished"]] == [[True] * 2, [True] * 3, [True], [False] * 6]
    # Penalty of lengths 1..6 with a buffer of 2 before 6: 0, 0, 0, 0, -1/2, -1. Only advantages see it.
    batch, rewards = grpo.group_batch(settings(overlong="penalty", overlong_buffer=2, advantage="mean"), groups)
    assert rewards.tolist() == [[1, 0], [0, 0]]
    assert torch.cat(batch.fields["advantages"]).tolist() == pytest.approx([0.5] * 2 + [-0.5] * 3 + [0.5] + [-0.5] * 6)


def test_parts_are_disjoint_and_keep_groups_whole(problems):
    batch, _ = grpo.group_batch(settings(), [group(p, (i + 1, 1.0), (i + 1, 0.0)) for i, p in enumerate(problems[:5])])
    parts = grpo._parts(batch, settings(updates_per_batch=2))
    assert [part.lengths for part in parts] == [[1, 1, 3, 3, 5, 5], [2, 2, 4, 4]]


def test_dead_groups_are_replaced_and_every_answer_used_is_on_the_ledger(make_model, problems, tmp_path):
    """Only the groups of the last four problems can live."""
    pool = problems[:12]
    live = {p.id for p in pool[8:]}

    def grade(pairs: list[tuple[Problem, str]]) -> list[Verdict]:
        return [verdict(float(p.id in live and i % 2)) for i, (p, _) in enumerate(pairs)]

    model = make_model(0)
    run = StageRun(tmp_path)
    sampler = TransformersSampler(model)
    chosen = settings(redraws=1)
    groups, redrawn = grpo._live_groups(chosen, list(pool[:4]), pool, sampler, grade, (0, 0), run)
    assert {p.id for p, _, _ in redrawn} == {p.id for p in pool[:4]} and len(groups) == 4
    first = {p.id for p, _, _ in groups}
    assert not first & {p.id for p in pool[:4]} and 0 < len(first & live) < 4
    # More rounds find more, until the pool has no fresh problem left.
    groups, redrawn = grpo._live_groups(settings(redraws=9), list(pool[:4]), pool, sampler, grade, (0, 0), run)
    assert {p.id for p, _, _ in groups} <= live and len(groups) == 4
    seen = [p.id for p, _, _ in groups + redrawn]
    assert len(seen) == len(set(seen))

    def nothing(pairs):
        return [verdict(0.0) for _ in pairs]

    groups, redrawn = grpo._live_groups(settings(redraws=9), list(pool[:4]), pool, sampler, nothing, (0, 0), run)
    assert (len(groups), len(redrawn)) == (4, 8)

    grpo.train(settings(redraws=9), policy=model, problems=pool, grade=grade, seed=0, run=run)
    (row,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert row["reward/groups_redrawn"] > 0 and row["reward/frac_groups_zero_std"] == 0
    assert row["ledger/labels"] == 4 + row["reward/groups_redrawn"] == run.ledger.revealed


@pytest.mark.parametrize("changes", [{}, {"ratio": "sequence"}, {"updates_per_batch": 2}, {"kl_coef": 0.1}])
def test_rows_of_dead_groups_need_no_backward_pass(make_model, problems, tmp_path, monkeypatch, changes):
    """Weights and metrics are those of a backward pass through all rows, of which dead groups are half."""
    passes: list[tuple[int, int]] = []

    def grade(pairs: list[tuple[Problem, str]]) -> list[Verdict]:
        return [verdict(float(i % 2 and i // 2 % 2)) for i, _ in enumerate(pairs)]

    def counted(*args, still=(), **how):
        passes.append((sum(m.num_sequences for m in args[2]), sum(m.num_sequences for m in still)))
        return update(*args, still=still, **how)

    def train(name: str) -> tuple[dict[str, torch.Tensor], dict[str, float], float]:
        run, model = StageRun(tmp_path / name), make_model(0, dtype=torch.float64)
        anchor = make_model(1, dtype=torch.float64) if "kl_coef" in changes else None
        chosen = settings(steps=2, **changes)
        grpo.train(chosen, policy=model, problems=problems, grade=grade, seed=0, run=run, reference=anchor)
        rows = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
        kept = {k: v for k, v in rows[-1].items() if k.startswith(("policy/", "optim/", "reward/"))}
        return model.module.state_dict(), kept, run.meter.flops

    monkeypatch.setattr(grpo, "update", counted)
    weights, metrics, flops = train("still")
    live = 8 if "kl_coef" in changes else 4
    assert {(2 * a, 2 * b) if "updates_per_batch" in changes else (a, b) for a, b in passes} <= {
        (live, 8 - live),
        (8, 0),
        (0, 8),
    }
    monkeypatch.setattr(grpo, "_live_and_still", lambda batch, settings: (batch, batch.take([])))
    all_weights, all_metrics, all_flops = train("all")
    for name, value in weights.items():
        torch.testing.assert_close(value, all_weights[name], rtol=0, atol=1e-9)
    assert metrics == pytest.approx(all_metrics, rel=1e-6, abs=1e-9)
    assert flops == all_flops if "kl_coef" in changes else flops < 0.9 * all_flops


def test_on_policy_step_has_ratio_one_and_sampler_and_trainer_agree(make_model, problems, parity_grade, tmp_path):
    for updates, temperature in ((1, 1.0), (1, 0.7), (2, 1.0)):
        run = StageRun(tmp_path / f"{updates}-{temperature}")
        chosen = settings(updates_per_batch=updates, temperature=temperature, problems_per_step=6)
        grpo.train(chosen, policy=make_model(0), problems=problems, grade=parity_grade, seed=0, run=run)
        (row,) = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
        assert row["policy/sampler_mismatch_max"] < 1e-4 and row["policy/sampler_mismatch_kl"] < 1e-9
        assert row["policy/sampler_weight"] == pytest.approx(1, abs=1e-5)
        if updates == 1:
            assert row["policy/ratio"] == 1 and row["optim/grad_norm"] > 0
        else:
            assert row["policy/ratio"] != 1 and row["policy/ratio"] == pytest.approx(1, abs=0.1)


def test_an_answer_is_on_the_ledger_before_the_weights_change(
    make_model, problems, parity_grade, tmp_path, monkeypatch
):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(grpo, "update", stop)
    run = StageRun(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        grpo.train(settings(), policy=make_model(0), problems=problems, grade=parity_grade, seed=0, run=run)
    assert run.ledger.revealed == 4 and len((tmp_path / "ledger.jsonl").read_text().splitlines()) == 4


def test_epochs_cross_without_losing_or_repeating_a_problem(make_model, problems, parity_grade, tmp_path):
    """5 problems, 4 a step, 5 steps: every problem four times; at a border one may be drawn twice in a step."""
    run = StageRun(tmp_path, execution=Execution())
    pool = problems[:5]
    seen: list[tuple[str, tuple[int, ...]]] = []
    sample = TransformersSampler.sample

    def spy(self, *args, **kwargs):
        out = sample(self, *args, **kwargs)
        seen.extend((r.problem_id, tuple(r.completion_ids)) for r in out)
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransformersSampler, "sample", spy)
        # A rate so low that only the random numbers differ from step to step.
        still = settings(steps=5, optimizer={"lr": 1e-9}, max_new_tokens=12)
        grpo.train(still, policy=make_model(0), problems=pool, grade=parity_grade, seed=0, run=run)
    counts = {p.id: sum(i == p.id for i, _ in seen) for p in pool}
    assert set(counts.values()) == {8}
    assert len(set(seen)) > 0.9 * len(seen)


def test_what_cannot_work_is_refused(make_model, problems, parity_grade, tmp_path):
    model = make_model(0)
    shared = {"policy": model, "grade": parity_grade, "seed": 0, "run": StageRun(tmp_path)}
    with pytest.raises(ValueError, match="a step needs 4 problems but the pool has 3"):
        grpo.train(settings(), problems=problems[:3], **shared)
    with pytest.raises(ValueError, match="1 of 5 problems have no answer"):
        grpo.train(settings(), problems=[*problems[:4], problems[5].unlabelled()], **shared)
    with pytest.raises(ValueError, match=r"kl_coef = 0.0 and a reference: give both or neither"):
        grpo.train(settings(), problems=problems, reference=model, **shared)
    with pytest.raises(ValueError, match=r"kl_coef = 0.5 and no reference"):
        grpo.train(settings(kl_coef=0.5), problems=problems, **shared)


def test_a_second_grader_sees_what_the_first_is_fooled_by(make_model, problems, parity_grade, tmp_path):
    def strict(pairs: list[tuple[Problem, str]]) -> list[Verdict]:
        return [verdict(0.0) for _ in pairs]

    seen, ends = {}, {}
    for name, audit in {"none": None, "honest": parity_grade, "fooled": strict}.items():
        run = StageRun(tmp_path / name, execution=Execution(log_every=2), audit=audit)
        model = make_model(0)
        grpo.train(settings(steps=3), policy=model, problems=problems, grade=parity_grade, seed=0, run=run)
        seen[name] = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
        weights = torch.cat([p.detach().flatten() for p in model.module.parameters()])
        ends[name] = (weights.tolist(), run.meter.tokens, run.meter.flops, run.ledger.revealed)
    assert [row["step"] for row in seen["fooled"]] == [1, 2]
    for row, honest, plain in zip(seen["fooled"], seen["honest"], seen["none"], strict=True):
        assert row["audit/reward_gap"] == row["reward/mean"] > 0
        assert row["audit/agreement"] == pytest.approx(1 - row["reward/frac_correct"])
        assert (honest.pop("audit/agreement"), honest.pop("audit/reward_gap")) == (1, 0)
        assert honest | {"time": 0} == plain | {"time": 0}
    assert ends["none"] == ends["honest"] == ends["fooled"]


def test_an_audit_is_a_sample_of_what_the_second_grader_could_grade(problems, tmp_path):
    """20 groups of 2: every second rollout, so the first of each; the auditor gives up on the first three of them."""
    asked: list[str] = []

    def audit(pairs: list[tuple[Problem, str]]) -> list[Verdict]:
        asked.extend(p.id for p, _ in pairs)
        return [Verdict(False, False, "timeout", 0.0) if i < 3 else verdict(float(i % 2)) for i in range(len(pairs))]

    groups = [group(p, (2, 1.0), (3, 0.0)) for p in problems[:20]]
    found = audit_metrics(StageRun(tmp_path / "a", audit=audit), 0, 1, groups)
    assert asked == [p.id for p in problems[:20]]
    assert found == {"audit/agreement": pytest.approx(9 / 17), "audit/reward_gap": pytest.approx(1 - 9 / 17)}
    assert audit_metrics(StageRun(tmp_path / "b"), 0, 1, groups) == {}
    assert audit_metrics(StageRun(tmp_path / "c", audit=audit), 0, 1, groups[:1]) == {}
