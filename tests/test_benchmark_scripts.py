"""The benchmark scripts run at toy sizes and fill every cell; what they measure is for a quiet machine."""

from __future__ import annotations

import math
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch

HERE = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    """Import a script as `python benchmarks/NAME.py` would."""
    monkeypatch.syspath_prepend(str(HERE))

    def load(name: str) -> ModuleType:
        return __import__(name)

    yield load
    torch.use_deterministic_algorithms(False)
    for name in ("measure", "workload", "loss_kernels", "sampling", "scaling", "vs_trl"):
        sys.modules.pop(name, None)


def finite(row: dict) -> bool:
    return all(math.isfinite(value) for value in row.values() if isinstance(value, int | float))


def test_growth_recovers_an_exponent(script):
    growth = script("measure").growth
    assert growth([(n, 5 * n**1.5) for n in (2, 8, 32)]) == pytest.approx(1.5)
    assert growth([(4, 1.0), (4, 2.0)]) is None


def test_ends_come_at_the_rate_that_was_asked_for(script):
    workload = script("workload")
    module = workload.make(workload.STUDENT, 300, 12.0, 0)
    ids = torch.randint(workload.FIRST, 300, (8, 64))
    with torch.no_grad():
        share = module(ids).logits.softmax(-1)[..., workload.END]
    assert float(share.mean()) == pytest.approx(1 / 12, rel=0.2)  # it rises a little along a sequence
    assert float(share.std() / share.mean()) < 0.3  # a nearly constant hazard: lengths are close to geometric


def test_kernels(script, tmp_path: Path):
    out = tmp_path / "kernels.json"
    found = script("loss_kernels").main(["--tiny", "--losses", "sum_over_logprobs", "reverse_kl", "--out", str(out)])
    assert [row["tokens"] for row in found["kernels"]] == [24, 24, 48, 48]
    assert all(finite(row) and row["plain ms"] > 0 for row in found["kernels"])
    assert '"commit"' in out.read_text() and len(found["growth"]) == 2


def test_sampling(script):
    found = script("sampling").main(["--tiny", "--dtype", "float32"])["sampling"]
    assert [row["sampler"] for row in found] == ["headwater", "modules", "generate"]
    ours, modules, theirs = found
    assert modules["mean length"] == ours["mean length"]
    assert finite(ours) and finite(theirs) and 0 <= ours["idle"] < 1 and 0 <= theirs["idle"] < 1
    assert theirs["prefilled"] == 2 * ours["prefilled"]  # `generate` reads a prompt once for each of its completions


def test_scaling(script):
    found = script("scaling").main(["--tiny"])
    assert {(row["method"], row["axis"]) for row in found["scaling"]} == {
        (method, axis) for method in ("grpo", "distill") for axis in ("completion", "vocab")
    }
    assert all(finite(row) and row["mean length"] in (4, 8) for row in found["scaling"])
    assert [row["shared"] for row in found["prefixes"]] == [True, False] * 2


TRL = os.environ.get("TRL_PYTHON") or (sys.executable if find_spec("trl") else None)


@pytest.mark.slow  # four processes that import TRL
@pytest.mark.skipif(TRL is None, reason="TRL lives in an environment of its own: name its interpreter in TRL_PYTHON")
def test_losses_are_those_of_trl(script):
    for row in script("vs_trl").main(["--losses", "--trl-python", TRL])["losses"]:
        if row["TRL's float32 casts"] == "widened":
            assert row["loss difference"] < 1e-6 and row["gradient difference"] < 1e-6
