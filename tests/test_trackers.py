"""Mirrors with stand-ins for the trackers: what they hear, once, and what a failure does."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from headwater.trackers import Mirror, check_installed

Values = dict[str, int | float]
Told = list[tuple[str, Values, int]]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    found: Told = []

    def log_as(name: str, fails_at: int = -1):
        def log(values: Values, step: int) -> None:
            if step == fails_at:
                raise ConnectionError("no network")
            found.append((name, values, step))

        return log

    class Writer:
        def __init__(self, place: str) -> None:
            self.place = place

        def add_scalar(self, key: str, value: float, step: int) -> None:
            found.append(("tensorboard", {key: value}, step))

        def close(self) -> None: ...

    def init(**_: Any):
        return SimpleNamespace(log=log_as("wandb"), finish=lambda: None)

    trackio = SimpleNamespace(init=lambda **_: None, log=log_as("trackio", fails_at=1), finish=lambda: None)
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    return found


def row(step: int) -> Values:
    return {"step": step, "time": 5.0, "optim/loss": step / 2}


def test_a_resumed_stage_tells_no_step_twice(told: Told, tmp_path: Path):
    for steps in (range(3), range(1, 5)):
        mirror = Mirror(["tensorboard", "wandb"], "study", "grpo-seed0", tmp_path)
        for step in steps:
            mirror.log(row(step))
        mirror.close()
    for name in ("tensorboard", "wandb"):
        assert [(v, s) for n, v, s in told if n == name] == [({"optim/loss": s / 2}, s) for s in range(5)]


def test_a_tracker_that_fails_warns_once_and_the_others_go_on(told: Told, tmp_path: Path):
    mirror = Mirror(["trackio", "wandb"], "study", "grpo-seed0", tmp_path)
    mirror.log(row(0))
    with pytest.warns(UserWarning, match="trackio failed and is left out from here on: ConnectionError") as caught:
        for step in (1, 2, 3):
            mirror.log(row(step))
    assert len(caught) == 1
    assert [s for n, _, s in told if n == "trackio"] == [0] and [s for n, _, s in told if n == "wandb"] == [0, 1, 2, 3]


def test_one_that_does_not_start_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace())
    with pytest.warns(UserWarning, match="wandb failed"):
        mirror = Mirror(["wandb"], "study", "run", tmp_path)
    mirror.log(row(0))
    mirror.close()


def test_a_missing_package_is_said_before_any_training(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"headwater\[trackers\]"):
        check_installed(["wandb"])
    check_installed([])
