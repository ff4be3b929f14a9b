"""Adapters: what is trained, its exact gradient, and that the merged model is the adapted one."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from headwater.config import LoRA, ModelConfig, Optimizer
from headwater.mesh import Mesh
from headwater.models.language_model import adapt, load_model
from headwater.models.lora import add_adapters, merged, save_adapter, target_layers
from headwater.rollouts.batch import Batch, micro_batches
from headwater.update import AdamW, Term, update

IDS = torch.tensor([[5, 6, 7, 8, 9], [1, 2, 3, 4, 10]])
LINEAR = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
BATCH = Batch([[5, 6, 7]], [[8, 9, 10]], {})
SMALL = LoRA(rank=4, alpha=12)


def adapters(module) -> dict[str, torch.Tensor]:
    return {n: p for n, p in module.named_parameters() if "lora_" in n}


@pytest.mark.parametrize(("targets", "per_layer"), [("all-linear", 7), (("q_proj", "down_proj"), 2)])
def test_only_adapters_are_trained_and_nothing_changes_at_first(make_model, targets, per_layer):
    plain = make_model(0)
    model = adapt(make_model(0), LoRA(rank=4, alpha=12, targets=targets), "seed")
    trained = {n for n, p in model.module.named_parameters() if p.requires_grad}
    assert trained == set(adapters(model.module)) and len(trained) == 2 * 2 * per_layer
    assert model.num_trained == sum(p.numel() for p in adapters(model.module).values())
    assert (
        model.num_parameters == plain.num_parameters + model.num_trained and plain.num_trained == plain.num_parameters
    )
    assert torch.equal(model.hidden(IDS), plain.hidden(IDS))
    optimizer = AdamW(model, Optimizer(lr=1e-3))
    assert set(optimizer.masters) == trained == {name.partition(".")[2] for name in optimizer.state()}


def test_the_seed_alone_draws_the_adapters(make_model):
    model, state = make_model(0), torch.get_rng_state()
    first = adapters(adapt(model, SMALL, "warmup 0").module)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again = adapters(adapt(make_model(0), SMALL, "warmup 0").module)
    other = adapters(adapt(make_model(0), SMALL, "distill 0").module)
    for name, weight in first.items():
        assert torch.equal(weight, again[name]) and weight.requires_grad
        assert torch.equal(weight, other[name]) == ("lora_B" in name) == (not weight.any())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_follow_from_the_dense_gradient(make_model, checkpointing):
    """W = W0 + s B A, so dL/dB = s G A^T and dL/dA = s B^T G, where G = dL/dW at the same W: float64."""
    model = make_model(0, dtype=torch.float64, lora=SMALL)
    dense = make_model(0, dtype=torch.float64).module
    layers = {n: m for n, m in model.module.named_modules() if hasattr(m, "lora_A")}
    with torch.no_grad():
        for name, layer in layers.items():
            dense.get_submodule(name).weight += 3 * layer.lora_B.default.weight @ layer.lora_A.default.weight
    if checkpointing:
        model.module.gradient_checkpointing_enable({"use_reentrant": False})
        model.module.train()
    model.hidden(IDS).square().sum().backward()
    dense.base_model(input_ids=IDS)[0].square().sum().backward()
    assert len(layers) == 14
    for name, layer in layers.items():
        a, b, g = layer.lora_A.default.weight, layer.lora_B.default.weight, dense.get_submodule(name).weight.grad
        torch.testing.assert_close(b.grad, 3 * g @ a.T, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(a.grad, 3 * b.T @ g, rtol=1e-9, atol=1e-9)
        assert layer.weight.grad is None and a.grad.abs().max() > 1e-6 and b.grad.abs().max() > 1e-6


def test_without_adapters_it_is_the_model_below_and_they_come_back(make_model):
    plain, model = make_model(0), make_model(0, lora=SMALL)
    with torch.no_grad():
        below = replace(model, without_adapters=True).hidden(IDS)
    assert torch.equal(below, plain.hidden(IDS)) and not torch.allclose(model.hidden(IDS), below, atol=1e-2)
    assert {n for n, p in model.module.named_parameters() if p.requires_grad} == set(adapters(model.module))


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_the_merged_model_is_the_adapted_one(make_model, tmp_path: Path, compute: str):
    """Merged in float32 on the float32 weights, whatever the model computed in."""
    base = make_model(0)
    base.module.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    config = ModelConfig.model_validate({"source": "file:base", "dtype": compute})
    model = load_model(config, tmp_path / "base", trained=True, lora=SMALL, seed=1)
    frozen = {p.dtype for n, p in model.module.named_parameters() if not p.requires_grad}
    assert frozen == {getattr(torch, compute)} and model.directory == tmp_path / "base"
    optimizer = AdamW(model, Optimizer(lr=1e-2))
    assert {m.dtype for m in optimizer.masters.values()} == {torch.float32}
    for master in optimizer.masters.values():
        master.data += 0.05 * torch.randn(master.shape, generator=torch.Generator().manual_seed(0))
    optimizer.unround()
    save_adapter(model.module, tmp_path / "adapter")
    found = merged(tmp_path / "base", tmp_path / "adapter").state_dict()
    start = base.module.state_dict()
    assert found.keys() == start.keys()
    for name, weight in found.items():
        a, b = (optimizer.masters.get(name.replace("weight", f"lora_{m}.default.weight")) for m in "AB")
        want = start[name] if a is None or b is None else start[name] + 3 * b @ a
        torch.testing.assert_close(weight, want.detach(), rtol=1e-6, atol=1e-6)
        assert weight.dtype == torch.float32
    module = copy.deepcopy(base.module)
    module.load_state_dict(found)
    if compute == "float32":
        torch.testing.assert_close(module(input_ids=IDS).logits, model.module(input_ids=IDS).logits, rtol=0, atol=1e-4)


def test_targets_that_are_not_there_are_named(make_model, tiny_directory):
    module = make_model(0).module
    for targets in (("q_proj", "wq"), ("lm_head",), ("embed_tokens",)):
        with pytest.raises(ValueError, match=f"{targets[-1]}.*whose linear layers are.*down_proj.*all-linear"):
            add_adapters(module, LoRA(targets=targets), 0)
    assert target_layers(module, LoRA()) == LINEAR


def test_dropout_acts_in_the_update_alone_and_repeats_with_the_step(make_model):
    def moved(dropout: float, steps: int) -> list[torch.Tensor]:
        model = make_model(0, lora=LoRA(rank=4, alpha=12, dropout=dropout), stops=())
        optimizer = AdamW(model, Optimizer(lr=1e-2))
        micro = micro_batches(BATCH, max_tokens=100)
        seen = []

        def loss(hidden, head, micro):
            seen.append(hidden.detach())
            return [Term((hidden @ head.T).square().mean(), 1.0)], {}

        for _ in range(steps):
            update(model, optimizer, micro, loss, lr=0.0, max_grad_norm=1.0, mesh=Mesh())
        assert torch.equal(model.hidden(IDS), model.hidden(IDS))
        return seen

    first, second = moved(0.3, 2)
    again = moved(0.3, 2)
    assert torch.equal(again[0], first) and torch.equal(again[1], second) and not torch.allclose(first, second)
    still = moved(0.0, 2)
    assert torch.equal(still[0], still[1])
