"""One update equals a slow single-batch computation with torch's optimizer, whatever the cut of the batch."""

import copy
import math
from dataclasses import replace
from types import MethodType

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import log_softmax

from headwater.config import GRPO, Distill, Execution, LoRA, Optimizer
from headwater.mesh import Mesh
from headwater.models.language_model import LanguageModel
from headwater.rollouts.batch import Batch, MicroBatch, micro_batches
from headwater.run import StageRun
from headwater.scoring.weights import token_weights
from headwater.stages.common import dense_loss, scored_by
from headwater.stages.distill import sampled_loss
from headwater.stages.grpo import policy_loss, weigh
from headwater.stages.sft import token_loss
from headwater.update import AdamW, NonFiniteError, Term, learning_rate, update

# Powers of two: the float32 weights 1 / length are exact.
LENGTHS = [4, 2, 0, 8, 1, 4]
LIMIT = 8
EXECUTION = Execution(chunk_tokens=3)
SETTINGS = Optimizer(lr=1e-2, weight_decay=0.1, betas=(0.8, 0.95), max_grad_norm=0.05)


def grpo(**changes) -> GRPO:
    base = {
        "steps": 1,
        "max_new_tokens": LIMIT,
        "problems_per_step": 3,
        "group_size": 2,
        "temperature": 0.7,
        "optimizer": SETTINGS.model_dump(),
        "kl_coef": 0.3,
        "kl_estimator": "k3",
        "clip_high": 0.1,
    }
    return GRPO.model_validate(base | changes)


def make_batch(vocab: int) -> Batch:
    generator = torch.Generator().manual_seed(1)

    def draw(n: int) -> list[int]:
        return torch.randint(0, vocab, (n,), generator=generator).tolist()

    def noise(n: int) -> torch.Tensor:
        return torch.randn(n, generator=generator, dtype=torch.float64)

    first, second = draw(20), draw(12)
    return Batch(
        [first, second, draw(2), second, first, first],
        [draw(n) for n in LENGTHS],
        {
            "advantages": [noise(1).expand(n).clone() for n in LENGTHS],
            "sampler": [-6 + noise(n) for n in LENGTHS],
            "old": [-6 + noise(n) for n in LENGTHS],
            "reference": [-6 + noise(n) for n in LENGTHS],
            "teacher": [-6 + noise(n) for n in LENGTHS],
            "finished": [torch.full((n,), n != LIMIT) for n in LENGTHS],
            "weights": [torch.ones(n) for n in LENGTHS],
        },
    )


def pad_left(micro: MicroBatch) -> MicroBatch:
    """The same rows with the padding before them, and a mask."""
    length = micro.ids.shape[1]
    ends = [int(row.nonzero().max()) + 2 for row in micro.predicts]
    return replace(
        micro,
        ids=torch.stack([row.roll(length - end) for row, end in zip(micro.ids, ends, strict=True)]),
        predicts=torch.stack([row.roll(length - end) for row, end in zip(micro.predicts, ends, strict=True)]),
        attention_mask=torch.stack([(torch.arange(length) >= length - end).long() for end in ends]),
    )


def share(batch: Batch, max_tokens: int) -> list[MicroBatch]:
    micros = micro_batches(batch, max_tokens=max_tokens, share=True)
    assert all(micro.prefixes is not None for micro in micros)
    return micros


CUTS = {
    "one": lambda batch: micro_batches(batch, max_tokens=1000),
    "two": lambda batch: micro_batches(batch, max_tokens=60),
    "rows": lambda batch: micro_batches(batch, max_tokens=1),
    "reversed": lambda batch: micro_batches(batch.take(range(len(batch))[::-1]), max_tokens=24)[::-1],
    "shuffled": lambda batch: micro_batches(batch.take([3, 0, 5, 2, 1, 4]), max_tokens=24),
    "shared": lambda batch: share(batch, 1000),
    "shared by two": lambda batch: share(batch, 60),
    "left": lambda batch: [pad_left(m) for m in micro_batches(batch, max_tokens=1000)],
}


def grpo_step(settings: GRPO, model: LanguageModel, cut, steps: int = 2) -> tuple[dict, dict[str, float]]:
    """Weights and metrics after two updates on the same batch (the second has momentum)."""
    model = replace(model, module=copy.deepcopy(model.module))
    optimizer = AdamW(model, settings.optimizer)
    metrics = {}
    for _ in range(steps):
        batch, denominator = weigh(make_batch(model.vocab_size), settings, Mesh())
        loss = policy_loss(settings, EXECUTION, model.vocab_size, denominator)
        clip = settings.optimizer.max_grad_norm
        metrics = update(model, optimizer, cut(batch), loss, lr=1e-2, max_grad_norm=clip, mesh=Mesh())
    return model.module.state_dict(), metrics


def assert_same_weights(a: dict, b: dict, atol: float = 1e-10) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.fixture(scope="module")
def model64(make_model) -> LanguageModel:
    return exactly(make_model(0, dtype=torch.float64, stops=()))


def exactly(model: LanguageModel) -> LanguageModel:
    for module in model.module.modules():
        if type(module).__name__.endswith("RMSNorm"):
            # As shipped it rounds to float32, which makes 1e-7 of a last bit.
            module.forward = MethodType(exact_norm, module)
    return model


def exact_norm(self, x: torch.Tensor) -> torch.Tensor:
    return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


@pytest.fixture(scope="module")
def lora64(make_model) -> LanguageModel:
    return exactly(make_model(0, dtype=torch.float64, stops=(), lora=LoRA(rank=4, alpha=8)))


@pytest.mark.parametrize("weights", ["model64", "lora64"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("aggregate", ["token", "sequence", "constant"])
def test_grpo_update_does_not_depend_on_the_cut(request, weights, aggregate, ratio):
    model64 = request.getfixturevalue(weights)
    settings = grpo(aggregate=aggregate, ratio=ratio, overlong="mask")
    start = model64.module.state_dict()
    want, want_metrics = grpo_step(settings, model64, CUTS["one"])
    assert max((want[name] - start[name]).abs().max() for name in want) > 1e-3
    for name, cut in CUTS.items():
        got, metrics = grpo_step(settings, model64, cut)
        assert_same_weights(got, want)
        assert metrics == pytest.approx(want_metrics, rel=1e-6, abs=1e-9), name


@pytest.mark.parametrize("aggregate", ["token", "sequence", "constant"])
def test_grpo_update_equals_a_naive_computation_with_torch(model64, aggregate):
    """Two steps of clipped surrogate + k3 penalty, row by row from plain logits, stepped by torch."""
    settings = grpo(aggregate=aggregate, clip_low=0.3)
    got, metrics = grpo_step(settings, model64, CUTS["two"])

    module, vocab = copy.deepcopy(model64.module), model64.vocab_size
    matrices = [p for p in module.parameters() if p.ndim >= 2]
    vectors = [p for p in module.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.95))
    norm = torch.zeros(())
    for _ in range(2):
        batch, total = make_batch(vocab), torch.zeros((), dtype=torch.float64)
        for i, (prompt, completion) in enumerate(zip(batch.prompts, batch.completions, strict=True)):
            if not completion:
                continue
            logits = module(input_ids=torch.tensor([prompt + completion])).logits[0, :, :vocab]
            logprobs = log_softmax(logits / 0.7, -1)[len(prompt) - 1 : -1]
            policy = logprobs[torch.arange(len(completion)), torch.tensor(completion)]
            a, old, sampler, reference = (batch.fields[n][i] for n in ("advantages", "old", "sampler", "reference"))
            r = (policy - old).exp()
            surrogate = torch.min(r * a, r.clamp(0.7, 1.1) * a) * (old - sampler).exp().clamp(max=2.0)
            k3 = ((reference - policy).exp() - 1 - (reference - policy)) * (policy - old).exp().detach()
            per_token = -surrogate + 0.3 * k3
            scale = {"token": 1 / sum(LENGTHS), "sequence": 1 / len(completion) / 5, "constant": 1 / LIMIT / 6}
            total = total + scale[aggregate] * per_token.sum()
        total.backward()
        norm = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]).norm()
        for p in module.parameters():
            p.grad = None if p.grad is None else p.grad * min(1.0, 0.05 / norm.item())
        optimizer.step()
        optimizer.zero_grad()
    assert metrics["optim/loss"] == pytest.approx(total.item(), rel=1e-9)
    assert metrics["optim/grad_norm"] == pytest.approx(float(norm), rel=1e-9) and float(norm) > 0.05
    assert_same_weights(got, module.state_dict())


def other_losses(model: LanguageModel, teacher: LanguageModel, denominator: float, tmp_path) -> dict:
    base = {
        "steps": 1,
        "max_new_tokens": LIMIT,
        "problems_per_step": 3,
        "temperature": 0.7,
        "optimizer": SETTINGS.model_dump(),
    }
    run = StageRun(tmp_path, execution=EXECUTION)
    losses = {"sft": token_loss(model.vocab_size, denominator, 3)}
    for kind in ("reverse_kl", "forward_kl", "jsd"):
        settings = Distill.model_validate(base | {"divergence": kind, "beta": 0.3 if kind == "jsd" else None})
        losses[kind] = dense_loss(settings, teacher, model.vocab_size, denominator, run)
    for kind in ("sampled_token", "sampled_sequence"):
        settings = Distill.model_validate(base | {"divergence": kind})
        losses[kind] = sampled_loss(settings, model.vocab_size, denominator, 3)
    return losses


@pytest.mark.parametrize("kind", ["sft", "reverse_kl", "sampled_token"])
def test_updates_of_adapters_do_not_depend_on_the_cut(lora64, make_model, tmp_path, kind):
    teacher = make_model(1, "48x2", dtype=torch.float64, trained=False, stops=())
    results = {}
    for name, cut in CUTS.items():
        model = replace(lora64, module=copy.deepcopy(lora64.module))
        optimizer = AdamW(model, SETTINGS)
        loss = other_losses(model, teacher, float(sum(LENGTHS)), tmp_path)[kind]
        batch = cut(make_batch(model.vocab_size))
        before = scored_by(teacher, StageRun(tmp_path))
        update(model, optimizer, batch, loss, lr=1e-2, max_grad_norm=math.inf, mesh=Mesh(), before=before)
        results[name] = {n: optimizer.inner.state[m]["exp_avg"] for n, m in optimizer.masters.items()}
    for gradients in results.values():
        assert_same_weights(gradients, results["one"])


@pytest.mark.parametrize("kind", ["sft", "reverse_kl", "forward_kl", "jsd", "sampled_token", "sampled_sequence"])
def test_other_updates_do_not_depend_on_the_cut_and_equal_a_naive_computation(model64, make_model, tmp_path, kind):
    teacher = make_model(1, "48x2", dtype=torch.float64, trained=False, stops=())
    vocab, count = model64.vocab_size, sum(LENGTHS)
    results = {}
    for name, cut in CUTS.items():
        model = replace(model64, module=copy.deepcopy(model64.module))
        optimizer = AdamW(model, SETTINGS)
        loss = other_losses(model, teacher, float(count), tmp_path)[kind]
        how = {"lr": 1e-2, "max_grad_norm": math.inf, "mesh": Mesh(), "before": scored_by(teacher, StageRun(tmp_path))}
        metrics = update(model, optimizer, cut(make_batch(vocab)), loss, **how)
        # Adam's first step is lr * sign(gradient), so compare what it remembers: (1 - beta1) * gradient.
        results[name] = {n: optimizer.inner.state[m]["exp_avg"] / 0.2 for n, m in optimizer.masters.items()}, metrics
    for gradients, metrics in results.values():
        assert_same_weights(gradients, results["one"][0])
        assert metrics == pytest.approx(results["one"][1], rel=1e-6, abs=1e-9)

    module, batch = copy.deepcopy(model64.module), make_batch(vocab)
    total = torch.zeros((), dtype=torch.float64)
    for i, (prompt, completion) in enumerate(zip(batch.prompts, batch.completions, strict=True)):
        ids, n = torch.tensor([prompt + completion]), len(completion)
        if not n:
            continue
        t = 1.0 if kind == "sft" else 0.7
        q = log_softmax(module(input_ids=ids).logits[0, len(prompt) - 1 : -1, :vocab] / t, -1)
        with torch.no_grad():
            p = log_softmax(teacher.module(input_ids=ids).logits[0, len(prompt) - 1 : -1, :vocab] / t, -1)
        drawn = q[torch.arange(n), torch.tensor(completion)]
        gap = (drawn - batch.fields["teacher"][i]).detach()
        m = torch.logaddexp(p + math.log(0.3), q + math.log(0.7))
        total = (
            total
            + {
                "sft": lambda drawn=drawn: -drawn.sum(),
                "forward_kl": lambda p=p, q=q: (p.exp() * (p - q)).sum(),
                "reverse_kl": lambda p=p, q=q: (q.exp() * (q - p)).sum(),
                "jsd": lambda p=p, q=q, m=m: (0.3 * p.exp() * (p - m) + 0.7 * q.exp() * (q - m)).sum(),
                "sampled_token": lambda gap=gap, drawn=drawn: (gap * drawn).sum(),
                "sampled_sequence": lambda gap=gap, drawn=drawn: (gap.flip(0).cumsum(0).flip(0) * drawn).sum(),
            }[kind]()
        )
    (total / count).backward()
    assert_same_weights(results["two"][0], {n: p.grad for n, p in module.named_parameters()})


def test_metrics_named_max_are_the_largest_over_micro_batches(model64):
    _, together = grpo_step(grpo(), model64, CUTS["one"], steps=1)
    _, apart = grpo_step(grpo(), model64, CUTS["rows"], steps=1)
    batch = make_batch(model64.vocab_size)
    worst = max(
        float((o - s).abs().max()) for o, s in zip(batch.fields["old"], batch.fields["sampler"], strict=True) if len(o)
    )
    assert together["policy/sampler_mismatch_max"] == apart["policy/sampler_mismatch_max"] == pytest.approx(worst)


def test_adapters_are_stepped_along_the_exact_gradient(model64, lora64):
    """W = W0 + s B A: what AdamW remembers of dL/dB and dL/dA is s G A^T and s B^T G, G = dL/dW of a full update."""
    model = replace(lora64, module=copy.deepcopy(lora64.module))
    dense = replace(model64, module=copy.deepcopy(model64.module))
    layers = {n: m for n, m in model.module.named_modules() if hasattr(m, "lora_A")}
    factors = {n: (m.lora_A.default.weight.detach(), m.lora_B.default.weight.detach()) for n, m in layers.items()}
    frozen = {n: p.clone() for n, p in model.module.named_parameters() if not p.requires_grad}
    for name, (a, b) in factors.items():
        dense.module.get_submodule(name).weight.data += 2 * b @ a
    gradients = []
    for trained in (model, dense):
        optimizer = AdamW(trained, SETTINGS)
        loss = token_loss(model.vocab_size, float(sum(LENGTHS)), 3)
        batch = CUTS["two"](make_batch(model.vocab_size))
        update(trained, optimizer, batch, loss, lr=0.0, max_grad_norm=math.inf, mesh=Mesh())
        gradients.append({n: optimizer.inner.state[m]["exp_avg"] / 0.2 for n, m in optimizer.masters.items()})
    for name, (a, b) in factors.items():
        g = gradients[1][f"{name}.weight"]
        torch.testing.assert_close(gradients[0][f"{name}.lora_B.default.weight"], 2 * g @ a.T, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(gradients[0][f"{name}.lora_A.default.weight"], 2 * b.T @ g, rtol=1e-9, atol=1e-12)
    assert len(gradients[0]) == 28 and max(float(g.abs().max()) for g in gradients[0].values()) > 1e-3
    now = dict(model.module.named_parameters())
    assert all(torch.equal(now[n], p) and now[n].grad is None for n, p in frozen.items())


@pytest.mark.parametrize("aggregate", ["token", "sequence", "constant"])
def test_batches_that_train_nothing_leave_weights_and_moments_alone(model64, aggregate):
    settings = grpo(aggregate=aggregate, overlong="mask")
    model = replace(model64, module=copy.deepcopy(model64.module))
    optimizer = AdamW(model, SETTINGS)
    batch, denominator = weigh(make_batch(model.vocab_size), settings, Mesh())
    loss = policy_loss(settings, EXECUTION, model.vocab_size, denominator)
    update(model, optimizer, CUTS["two"](batch), loss, lr=1e-2, max_grad_norm=1.0, mesh=Mesh())
    before = {name: t.clone() for name, t in optimizer.state().items()}

    truncated = [torch.full((n,), False) for n in LENGTHS]
    masked, none = weigh(make_batch(model.vocab_size).with_fields(finished=truncated), settings, Mesh())
    empty, zero = weigh(make_batch(model.vocab_size).take([2]), settings, Mesh())
    nothing, nil = weigh(make_batch(model.vocab_size).take([]), settings, Mesh())
    for batch, denominator in ((masked, none), (empty, zero), (nothing, nil)):
        loss = policy_loss(settings, EXECUTION, model.vocab_size, denominator)
        metrics = update(model, optimizer, CUTS["two"](batch), loss, lr=1e-2, max_grad_norm=1.0, mesh=Mesh())
        assert (metrics["optim/loss"], metrics["optim/grad_norm"]) == (0, 0)
        for name, tensor in optimizer.state().items():
            assert torch.equal(tensor, before[name]), name
    # Equal rewards everywhere: trained tokens, no signal.
    flat = make_batch(model.vocab_size).with_fields(advantages=[torch.zeros(n) for n in LENGTHS])
    flat, denominator = weigh(flat, settings, Mesh())
    loss = policy_loss(grpo(kl_coef=0.0, kl_estimator=None), EXECUTION, model.vocab_size, denominator)
    flat = replace(flat, fields={n: v for n, v in flat.fields.items() if n != "reference"})
    update(model, optimizer, CUTS["two"](flat), loss, lr=1e-2, max_grad_norm=1.0, mesh=Mesh())
    assert all(torch.equal(tensor, before[name]) for name, tensor in optimizer.state().items())


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_non_finite_values_stop_before_the_weights_change_and_the_batch_is_saved(model64, tmp_path, where):
    model = replace(model64, module=copy.deepcopy(model64.module))
    optimizer, calls = AdamW(model, SETTINGS), []

    def loss(hidden, head, micro):
        calls.append(micro)
        total = (hidden @ head.T).sum()
        if len(calls) == 2:
            # sqrt has an infinite slope at 0.
            total = total / 0 if where == "loss" else (total - total.detach()).sqrt()
        return [Term(total, 1.0)], {}

    micros = CUTS["rows"](make_batch(model.vocab_size))
    run = StageRun(tmp_path)
    message = "(?s)the (loss|gradient norm) is (nan|-?inf).*nonfinite.safetensors.*not changed.*lower the learning rate"
    with pytest.raises(NonFiniteError, match=message), run.guarded():
        update(model, optimizer, micros, loss, lr=1e-2, max_grad_norm=1.0, mesh=Mesh())
    assert_same_weights(model.module.state_dict(), model64.module.state_dict(), atol=0)
    assert all(p.grad is None for p in model.module.parameters())
    saved = load_file(tmp_path / "nonfinite.safetensors")
    bad = micros[1] if where == "loss" else micros[0]
    assert torch.equal(saved["0.ids"], bad.ids) and torch.equal(saved["0.old"], bad.fields["old"])
    assert ("1.ids" in saved) == (where == "gradient")


def test_a_saved_batch_has_its_prompts_where_rows_share_them(tmp_path):
    batch = Batch([[5, 6, 7, 8, 9]] * 4, [[1, 2]] * 4)
    (micro,) = micro_batches(batch, max_tokens=100, share=True)
    with pytest.raises(NonFiniteError), StageRun(tmp_path).guarded():
        raise NonFiniteError("the loss is nan", [micro])
    saved = load_file(tmp_path / "nonfinite.safetensors")
    prompts = saved["0.prefixes.ids"][saved["0.prefixes.of_row"]]
    assert torch.cat([prompts, saved["0.ids"]], 1).tolist() == [[5, 6, 7, 8, 9, 1]] * 4


@pytest.mark.parametrize("limit", [1e-3, 1e9])
def test_clipping_is_torchs(model64, limit):
    ids = torch.tensor([[1, 2, 3, 4]])
    twin = copy.deepcopy(model64.module)
    twin(input_ids=ids).logits.square().sum().backward()
    norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), limit)
    model = replace(model64, module=copy.deepcopy(model64.module))
    optimizer = AdamW(model, SETTINGS)
    micro = MicroBatch(ids, torch.ones(1, 4, dtype=torch.bool), ids[0], torch.zeros(4, dtype=torch.long), [0], {})

    def loss(hidden, head, micro):
        whole = model.module.get_output_embeddings().weight
        return [Term((hidden @ whole.T).square().sum(), 1.0)], {}

    metrics = update(model, optimizer, [micro], loss, lr=1e-2, max_grad_norm=limit, mesh=Mesh())
    assert metrics["optim/grad_norm"] == pytest.approx(float(norm), rel=1e-12)
    for name, parameter in twin.named_parameters():
        # torch divides by norm + 1e-6.
        got = optimizer.inner.state[optimizer.masters[name]]["exp_avg"] / 0.2
        torch.testing.assert_close(got, parameter.grad, rtol=1e-5, atol=0)


def test_learning_rates_by_hand():
    def rates(schedule: str) -> list[float]:
        settings = Optimizer(lr=8.0, schedule=schedule, warmup_steps=2)  # pyright: ignore -- a parameter, a str
        return [learning_rate(settings, step, 10) for step in range(10)]

    assert rates("constant") == [4.0, *[8.0] * 9]
    assert rates("linear") == pytest.approx([4, 8, 8, 7, 6, 5, 4, 3, 2, 1])
    assert rates("cosine") == pytest.approx([4, 8] + [4 * (1 + math.cos(math.pi * k / 8)) for k in range(8)])
    assert rates("cosine")[6] == pytest.approx(4.0)
    assert learning_rate(Optimizer(lr=8.0, schedule="linear"), 0, 1) == 8.0
    assert learning_rate(Optimizer(lr=8.0, schedule="cosine", warmup_steps=4), 1, 2) == 4.0


def bfloat16_updates(make_model, steps: int, saved: dict | None = None) -> tuple[LanguageModel, AdamW, list]:
    model = make_model(0, stops=(), compute="bfloat16")
    optimizer, gradients = AdamW(model, SETTINGS), []
    if saved is not None:
        optimizer.restore(saved)
    batch = make_batch(model.vocab_size)
    loss = token_loss(model.vocab_size, float(sum(LENGTHS)), 100)
    for _ in range(steps):
        update(model, optimizer, CUTS["rows"](batch), loss, lr=1e-5, max_grad_norm=math.inf, mesh=Mesh())
    return model, optimizer, gradients


def test_bfloat16_weights_are_rounded_float32_masters(make_model):
    full = make_model(0, stops=())
    model, optimizer, _ = bfloat16_updates(make_model, 0)
    assert {w.dtype for w in optimizer.weights.values()} == {torch.bfloat16}
    assert {m.dtype for m in optimizer.masters.values()} == {torch.float32}
    for name, parameter in full.module.named_parameters():
        assert torch.equal(optimizer.masters[name], parameter)
        assert torch.equal(optimizer.weights[name], parameter.to(torch.bfloat16))
    model, optimizer, _ = bfloat16_updates(make_model, 8)
    moved = 0
    for name, parameter in full.module.named_parameters():
        assert torch.equal(optimizer.weights[name], optimizer.masters[name].to(torch.bfloat16))
        # 8 steps of 1e-5 change every master; half a unit in the last place of bfloat16 is 2e-3 at 1.
        moved += int((optimizer.weights[name] != parameter.to(torch.bfloat16)).sum())
        if parameter.ndim == 2:
            assert 4e-5 < (optimizer.masters[name] - parameter).abs().max() < 1.2e-4
    assert 0 < moved < 0.5 * full.num_parameters
    optimizer.unround()
    for name, parameter in model.module.named_parameters():
        assert parameter.dtype == torch.float32 and torch.equal(parameter, optimizer.masters[name])


@pytest.mark.parametrize("lot", [7, 8192])
def test_bfloat16_gradients_of_micro_batches_add_up_in_float32(make_model, monkeypatch, lot: int):
    """The masters receive exactly the float32 sum of the rounded gradient of every micro-batch."""
    monkeypatch.setattr("headwater.update.WIDENED", lot)
    model = make_model(0, stops=(), compute="bfloat16")
    optimizer = AdamW(model, SETTINGS)
    wanted = {name: torch.zeros_like(master) for name, master in optimizer.masters.items()}
    batch = make_batch(model.vocab_size)
    loss = token_loss(model.vocab_size, float(sum(LENGTHS)), 100)
    for micro in CUTS["rows"](batch):
        twin = make_model(0, stops=())
        for parameter in twin.module.parameters():  # and not the rotary frequencies
            parameter.data = parameter.data.to(torch.bfloat16)
        terms, _ = loss(twin.hidden(micro.ids)[micro.predicts], twin.head, micro)
        (terms[0].total / terms[0].denominator).backward()
        for name, parameter in twin.module.named_parameters():
            assert parameter.grad is not None and parameter.grad.dtype == torch.bfloat16
            wanted[name] += parameter.grad.float()
    update(model, optimizer, CUTS["rows"](batch), loss, lr=1e-5, max_grad_norm=math.inf, mesh=Mesh())
    for name, master in optimizer.masters.items():
        got = optimizer.inner.state[master]["exp_avg"] / 0.2
        torch.testing.assert_close(got, wanted[name], rtol=1e-6, atol=1e-12)


def test_the_teacher_is_asked_before_the_students_activations_exist(make_model, monkeypatch, tmp_path):
    """What it needs for a moment is then not beside them."""
    model, teacher = make_model(0, stops=()), make_model(1, stops=(), trained=False)
    run, hidden, asked = StageRun(tmp_path, execution=EXECUTION), LanguageModel.hidden, []
    loss = other_losses(model, teacher, float(sum(LENGTHS)), tmp_path)["reverse_kl"]
    monkeypatch.setattr(LanguageModel, "hidden", lambda m, *given: asked.append(m is teacher) or hidden(m, *given))
    rows, how = CUTS["two"](make_batch(model.vocab_size)), {"lr": 1e-3, "max_grad_norm": 1.0, "mesh": Mesh()}
    found = update(model, AdamW(model, SETTINGS), rows, loss, before=scored_by(teacher, run), **how)
    assert asked == [True, False] * len(rows) and len(rows) > 1 and found["optim/grad_norm"] > 0


def test_restored_state_goes_on_bit_for_bit(make_model):
    straight, optimizer, _ = bfloat16_updates(make_model, 5)
    _, first, _ = bfloat16_updates(make_model, 3)
    saved = {name: tensor.clone() for name, tensor in first.state().items()}
    assert {name.split(".")[0] for name in saved} == {"master", "exp_avg", "exp_avg_sq", "step"}
    resumed, second, _ = bfloat16_updates(make_model, 2, saved)
    assert_same_weights(resumed.module.state_dict(), straight.module.state_dict(), atol=0)
    want = optimizer.state()
    assert all(torch.equal(tensor, want[name]) for name, tensor in second.state().items())


def test_weights_and_denominators_of_the_stages_are_those_of_scoring():
    batch = make_batch(50)
    for aggregate in ("token", "sequence", "constant"):
        weighed, denominator = weigh(batch, grpo(aggregate=aggregate, overlong="keep"), Mesh())
        limit = LIMIT if aggregate == "constant" else None
        weights, expected = token_weights(torch.tensor(LENGTHS), aggregate, limit)
        assert denominator == expected and torch.equal(torch.cat(weighed.fields["weights"]), weights)
