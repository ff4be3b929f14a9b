import json
from pathlib import Path
from typing import Any

import made_run

from headwater.report import observations, page
from headwater.report.directory import read


def lines(path: Path, values: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))


def test_terminal_and_report_say_what_was_observed(tmp_path):
    root = made_run.make(tmp_path, seeds=(0, 1), arms=("direct", "bridge"))
    run = read(root)
    teacher, warmup, _ = run.arms["bridge"]["0"]
    place = root / "nodes"
    lines(place / teacher / "metrics.jsonl", [{"step": i, "reward/frac_groups_zero_std": 1.0} for i in range(9)])
    done = json.loads((place / teacher / "done.json").read_text())
    looks = [{"step": 0, "mean": 0.25, "error": 0.1}, {"step": 5, "mean": 0.5, "error": 0.1}]
    gate = {"looks": looks, "reason": "score met the threshold", "stopped_at": 5}
    (place / teacher / "done.json").write_text(json.dumps({**done, "gate": gate}))
    for seed, shift in (("0", 0.0), ("1", 0.2)):
        measured = [{"step": i, **{f"c2/{name}": shift + i for name in observations.C2}} for i in (1, 2, 3)]
        lines(place / run.arms["bridge"][seed][1] / "monitors.jsonl", measured)
    assert warmup in run.nodes

    run = read(root)
    (line,) = [line for line in observations.health(run) if "teacher_rl" in line and "seed 0" in line]
    assert line.startswith("teacher_rl of bridge, seed 0: 100% of groups carry no gradient at step 4")
    (line,) = observations.gates(run)
    assert line.startswith("teacher_rl of bridge, seed 0: gate ended it before step 5")
    assert line.endswith("score met the threshold (0.25, 0.5)")
    table = observations.closeness(run)
    assert table is not None and table.rows == (("warmup of bridge", *["1.1 \N{RIGHTWARDS ARROW} 3.1"] * 5),)
    text = page.html(run)
    assert "Observed while it ran" in text and "score met the threshold" in text and "no gradient at step 4" in text
