"""Two gloo ranks do what one process does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from headwater.mesh import Mesh, join

STAGES = ["grpo", "one-row", "repeats", "warmup", "sft"]


@pytest.fixture(scope="module")
def results(tiny_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    script = Path(__file__).parent / "mesh_ranks.py"
    done = subprocess.run(
        [sys.executable, script, tiny_directory, one, two],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return one, two


def read(path: Path):
    return json.loads(path.read_text())


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_shards_are_disjoint_and_cover_everything():
    items = list("abcdefg")
    shards = [Mesh(rank, 3).shard(items) for rank in range(3)]
    assert shards == [["a", "d", "g"], ["b", "e"], ["c", "f"]]
    alone = join("cpu")
    assert alone == Mesh(0, 1) and alone.is_writer and not Mesh(1, 2).is_writer
    assert alone.shard(items) == items == alone.gather(items) and alone.collect(3) == [3]
    assert alone.all_sum(torch.tensor(2.0)) == 2


def test_collectives(results):
    _, two = results
    for rank in range(2):
        record = read(two / f"collectives.{rank}.json")
        assert record["trips"] == [[f"{i}" for i in range(n)] for n in range(8)]
        assert (record["total"], record["ranks"], record["writer"]) == ([2, 1], [0, 1], rank == 0)


@pytest.mark.parametrize("stage", STAGES)
def test_weights_do_not_depend_on_the_number_of_ranks(results, stage):
    one, two = results
    want = load_file(one / f"{stage}.0")
    for rank in range(2):
        got = load_file(two / f"{stage}.{rank}")
        assert got.keys() == want.keys()
        for name, tensor in want.items():
            torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_metrics_ledger_and_meter_are_the_whole_batchs(results, stage):
    one, two = results
    want, got = lines(one / stage / "metrics.jsonl"), lines(two / stage / "metrics.jsonl")
    assert len(want) == len(got) >= 2
    for a, b in zip(want, got, strict=True):
        assert a.keys() == b.keys()
        assert {n: v for n, v in b.items() if n != "time"} == pytest.approx(
            {n: v for n, v in a.items() if n != "time"}, rel=1e-5, abs=1e-6
        )
    for rank in range(2):
        assert read(two / f"{stage}.{rank}.json") == read(one / f"{stage}.0.json")
    for name in ("ledger.jsonl", "samples.jsonl"):
        exists = (one / stage / name).exists()
        assert exists == (two / stage / name).exists() == (exists and bool((one / stage / name).read_text()))
        assert not exists or (one / stage / name).read_text() == (two / stage / name).read_text()
    assert (one / stage / "ledger.jsonl").exists() == (stage in ("grpo", "warmup", "sft"))
    if stage == "grpo":
        assert sum(row["reward/groups_redrawn"] for row in want) > 0


def test_a_rank_that_meets_nan_stops_all(results):
    for rank in range(2):
        assert read(results[1] / f"nonfinite.{rank}.json") == {"raised": True, "same": True}
