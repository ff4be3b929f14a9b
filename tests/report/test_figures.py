"""Marks stand where the numbers say, and the text alternative says the numbers."""

import re
from pathlib import Path

import made_run
import pytest

from headwater.report import figures, panels, tables
from headwater.report.directory import groups, read


def test_linear_axis_is_round_and_covers_the_data():
    axis = figures.linear_axis([0.171, 0.434], "accuracy, %", scale=100)
    assert axis.low <= 0.171 and axis.high >= 0.434
    assert [text for _, text in axis.ticks] == ["10", "20", "30", "40", "50"]
    assert axis.at(axis.low) == 0 and axis.at(axis.high) == 1 and axis.at(0.3) == pytest.approx(0.5)
    assert figures.linear_axis([0.0, 0.0], "").low == 0  # a flat zero does not reach below zero
    assert figures.linear_axis([5.0], "").low < 5 < figures.linear_axis([5.0], "").high


def test_log_axis_spaces_by_ratio():
    axis = figures.log_axis([16, 64, 256], "labels", tables.count, at=[16, 64, 256])
    assert [axis.at(v) for v in (16, 64, 256)] == pytest.approx([0, 0.5, 1])
    assert [text for _, text in axis.ticks] == ["16", "64", "256"]
    for low, high in ((3e11, 9e11), (1e9, 1e15), (6.1e11, 7.3e11)):
        ticks = [v for v, _ in figures.log_axis([low, high], "FLOPs", tables.flops).ticks]
        assert 3 <= len(ticks) <= 6 and ticks == sorted(ticks)
    assert figures.linear_axis([0.0, 1.0], "").at(1.3) == 1  # drawn at the end, not beyond it
    alone = figures.log_axis([3e12], "FLOPs", tables.flops)
    assert alone.low < 3e12 < alone.high


def test_forest_draws_interval_zero_and_margin_in_their_places(tmp_path: Path):
    run = read(made_run.make(tmp_path))
    rows, _ = figures.forest(run, tables.comparison_rows(run))
    assert [row.kind for row in rows] == ["a", "a", "none"]
    axis = figures.linear_axis([0.0, 0.26, -0.02], "points", scale=100)
    whisker = re.search(r'whisker v-a" x1="([\d.]+)%" x2="([\d.]+)%"', rows[0].svg)
    assert whisker and [float(x) for x in whisker.groups()] == pytest.approx(
        [100 * axis.at(0.06), 100 * axis.at(0.10)], abs=0.01
    )
    assert f'class="zero" x1="{100 * axis.at(0):.2f}%"' in rows[0].svg
    assert f'class="margin" x1="{100 * axis.at(0.05):.2f}%"' in rows[2].svg and 'class="margin"' not in rows[0].svg
    assert "bridge − direct on chains: +8.0 [+6.0, +10.0] points, bridge better" in rows[0].svg


def test_curve_bands_and_marks(tmp_path: Path):
    panel = panels.efficiency(read(made_run.make(tmp_path, budgets=(32, 64, 128))), "chains")
    assert panel and panel.chart.count('class="band') == 4 and panel.chart.count('class="line') == 4
    assert 'x="50.00%"' in panel.chart  # 64 is half way between 32 and 128 on a log axis
    assert "bridge: 35.0 % at 32, 38.0 % at 64, 41.0 % at 128" in panel.chart
    assert panel.table.rows[0] == (
        "32",
        "27.0 [24.0, 30.0]",
        "35.0 [32.0, 38.0]",
        "39.0 [36.0, 42.0]",
        "21.0 [18.0, 24.0]",
    )
    assert panels.efficiency(read(made_run.make(tmp_path / "none")), "chains") is None


def test_cost_is_drawn_for_finished_arms_only(tmp_path: Path):
    panel = panels.cost(read(made_run.make(tmp_path, at_work=True)), "chains")
    assert panel and [row[0] for row in panel.table.rows] == ["direct", "bridge", "bridge_rl"]
    assert panel.chart.count('class="whisker') == 3 and panel.chart.count('class="rule"') == 2


def test_learning_curves_are_means_with_the_range_over_seeds(tmp_path: Path):
    run = read(made_run.make(tmp_path))
    curves = {c.stage: c for c in panels.learning(run)}
    assert list(curves) == ["student_rl", "teacher_rl", "warmup", "distill", "sft"]
    assert [p.title for p in curves["warmup"].panels] == [
        "teacher/forward_kl", "policy/entropy", "completion/len_mean", "completion/frac_truncated",
    ]  # fmt: skip  # a table: several entries a line
    reward = curves["teacher_rl"].panels[0]
    values = [made_run.metrics({"label": "grpo", "seed": s}, 0, 0)["reward/mean"] for s in (0, 1, 2)]
    assert reward.table.head == ("step", "bridge, bridge_rl, sft_control")
    assert reward.table.rows[0] == ("0", f"{sum(values) / 3:.3g} [{min(values):.3g}, {max(values):.3g}]")
    assert reward.table.rows[-1][0] == "39"


def test_long_curves_are_thinned_and_keep_their_ends():
    points = panels._over_seeds([{step: float(step) for step in range(1000)}])
    assert len(points) == 100 and points[0][0] == 0 and points[-1][0] == 999


def test_a_shared_stage_is_one_box(tmp_path: Path):
    run = read(made_run.make(tmp_path, failed=True))
    boxes = {(b.stage, b.name): b for b in groups(run)}
    assert len(boxes) == 6 and ("teacher_rl", "bridge, bridge_rl, sft_control") in boxes
    drawn = figures.graph(run)
    assert drawn.count("<rect") == 12 and drawn.count('class="edge"') == 5
    failed = boxes["sft", "sft_control"]
    assert figures.worst_state(failed) == "failed" and figures.state_text(failed) == "✕ failed 1, to do 2 of 3"
    assert "failed" in drawn and "m-sft" in drawn
    places, rows = figures._places(run, list(boxes.values()))
    assert places[boxes["teacher_rl", "bridge, bridge_rl, sft_control"]] == (0, 1)
    assert places[boxes["distill", "bridge, bridge_rl"]] == (2, 1)
    assert places[boxes["student_rl", "bridge_rl"]] == (3, 2) and rows == 4


def test_names_are_escaped_in_drawings():
    hostile = '"><script>x</script>'
    series = [figures.Series(hostile, 0, ((1.0, 0.5, 0.4, 0.6), (2.0, 0.6, 0.5, 0.7)))]
    axis = figures.linear_axis([0.0, 2.0], hostile)
    drawn = figures.chart(series, axis, axis, hostile, rules=[(1.0, hostile)]) + figures.legend(series)
    assert "<script" not in drawn
