"""The arms table and its exports hold the run's numbers, and never hide an arm."""

import csv
import io
import json
from pathlib import Path

import made_run
import pytest

from headwater.report import tables
from headwater.report.directory import read


def test_bases_and_teachers_come_first_and_every_arm_is_there(tmp_path: Path):
    rows = tables.arm_rows(read(made_run.make(tmp_path, at_work=True)), "chains")
    assert [(r.name, r.role) for r in rows] == [
        ("base student", "base"), ("base teacher", "base"), ("teacher of bridge", "teacher"),
        ("direct", "arm"), ("bridge", "arm"), ("bridge_rl", "arm"), ("sft_control", "arm"),
    ]  # fmt: skip  # a table: several entries a line
    unfinished = rows[-1]
    assert unfinished.mean is None and unfinished.tokens is None and unfinished.below == ()
    bridge = rows[4]
    assert bridge.mean == 0.41 and bridge.ci95 == pytest.approx((0.38, 0.44)) and bridge.gap == (0.5, (0.4, 0.6))
    assert (bridge.distinct, bridge.revealed, bridge.tokens) == (128, 960, 300_000 + 900_000)
    assert bridge.flops == pytest.approx(1.8e12) and bridge.seconds == 120
    assert bridge.unparsed == 0.02 and bridge.wrong == pytest.approx(0.57) and bridge.truncated == 0.01


def test_stage_rows_carry_their_own_bill_and_accuracy(tmp_path: Path):
    rows = tables.arm_rows(read(made_run.make(tmp_path)), "chains")
    stages = next(r for r in rows if r.name == "bridge").below
    assert [s.name for s in stages] == ["teacher_rl", "warmup", "distill"]
    assert [s.mean for s in stages] == [0.8, 0.8, 0.41]
    assert [s.distinct for s in stages] == [128, 0, 0]
    assert [s.tokens for s in stages] == [300_000, 400_000, 500_000]
    shared = next(r for r in rows if r.name == "bridge_rl").below  # all but the last are the bridge's own
    assert [s.mean for s in shared] == [0.8, 0.8, 0.41, 0.45] and [s.gap for s in shared] == [None] * 4
    assert next(r for r in rows if r.name == "direct").below == ()  # one stage: the arm itself


def test_csv_has_one_row_per_model_or_arm_and_task(tmp_path: Path):
    rows = list(csv.DictReader(io.StringIO(tables.as_csv(read(made_run.make(tmp_path, at_work=True))))))
    assert [row["name"] for row in rows][-2:] == ["bridge_rl", "sft_control"] and len(rows) == 7
    bridge = next(row for row in rows if row["name"] == "bridge")
    assert float(bridge["mean"]) == 0.41 and float(bridge["tokens"]) == 1_200_000 and bridge["num_seeds"] == "3"
    assert float(bridge["pass@1"]) == 0.41 and float(bridge["share_worked"]) == 0.7
    assert rows[-1]["mean"] == "" and rows[0]["labels_distinct"] == ""


def test_json_is_the_results_with_the_headline(tmp_path: Path):
    root = made_run.make(tmp_path)
    found, kept = json.loads(tables.as_json(read(root))), json.loads((root / "results.json").read_text())
    assert {name: found[name] for name in kept} == kept
    assert found["headline"][0].startswith("bridge beats direct by 8.0 points [6.0, 10.0] on chains at 128 labels")
    assert len(found["further"]) == 2 and "Confirmed" in found["predictions"][0]


def test_markdown_holds_arms_and_comparisons(tmp_path: Path):
    text = tables.as_markdown(read(made_run.make(tmp_path)))
    assert "| bridge | 41.0 [38.0, 44.0] | 50.0 [40.0, 60.0] | 128 | 960 | 1,200,000 | 1.8 T | 2 min |" in text
    assert "| bridge − direct | chains | +8.0 [+6.0, +10.0] | &lt; .001 | 3 |" in text
    assert "not distinguishable; at most +5.0 points: confirmed" in text


def test_match_table_says_more_than(tmp_path: Path):
    table = tables.match_table(read(made_run.make(tmp_path, budgets=(64, 128))))
    assert table and table.rows == (
        ("bridge@128", "chains", "128", "direct", "more than 128", "more than 128"),
        ("bridge@64", "chains", "64", "direct", "90", "64 to 120"),
    )
    ends = {"range": [16, 512], "value": None}
    assert tables.match({**ends, "ci95": [None, 16.0]}) == "fewer than 16"
    assert tables.match({**ends, "ci95": [None, None]}) == "outside the budgets"
    assert tables.match_bounds({**ends, "ci95": [None, None]}) == "nothing between 16 and 512 is ruled out"
    assert tables.match_bounds({**ends, "ci95": [None, 40.0]}) == "fewer than 40"


def test_bills_add_up_per_arm_and_study(tmp_path: Path):
    table = tables.bill_table(read(made_run.make(tmp_path, seeds=(4,), arms=("bridge",))))
    assert table and table.rows == (
        ("bridge", "4", "teacher_rl", "128", "960"), ("bridge", "4", "warmup", "0", "0"),
        ("bridge", "4", "distill", "0", "0"),
        ("bridge", "4", "arm (union)", "128", "960"), ("whole study", "all", "each stage once", "300", "2,400"),
    )  # fmt: skip  # a table: several entries a line


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (9.4, "9 s"),
        (99.4, "99 s"),
        (120, "2 min"),
        (5940, "99 min"),
        (6060, "1 h 41 min"),
        (200_000, "2 d 7 h"),
        (None, "–"),
    ],
)
def test_durations(value: float | None, text: str):
    assert tables.duration(value) == text


def test_flops_and_p_values():
    assert [tables.flops(v) for v in (8.84e11, 3.2e15, 1e6, 12.0)] == ["884 G", "3.2 P", "1 M", "12"]
    assert [tables.p_value(v) for v in (0.0341, 1e-9, 1.0)] == [".034", "< .001", "1.000"]
