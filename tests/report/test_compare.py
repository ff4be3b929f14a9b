"""Run directories made by hand, whose differences are known."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from typer.testing import CliRunner, Result

from headwater.cli import app
from headwater.evals.statistics import holm, paired_difference
from headwater.report.compare import compare

SCORES = {
    ("direct", "0"): [0.0, 0.5, 0.25, 0.5],
    ("direct", "1"): [0.25, 0.25, 0.5, 0.5],
    ("bridge", "0"): [0.5, 0.75, 0.5, 1.0],
    ("bridge", "1"): [0.75, 0.5, 0.75, 0.75],
}
PROBLEMS = ["p0", "p1", "p2", "p3"]


def headwater(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def write(
    root: Path,
    *,
    scores: dict[tuple[str, str], list[float]] = SCORES,
    problems: list[str] = PROBLEMS,
    digest: str = "d0",
    grader: str = "g",
    temperature: float = 1.0,
    recipe: dict[str, Any] | None = None,
    environment: dict[str, Any] | None = None,
    keys: str = "x",
) -> Path:
    """A run of arms over seeds with one stage and one evaluation each; `keys` begins the stages' keys."""
    base = {"name": "study", "pool": {"labels": 8}, "execution": {"threads": 1}}
    nodes: dict[str, Any] = {}
    arms: dict[str, Any] = {}
    (root / "evals").mkdir(parents=True)
    for (arm, seed), values in scores.items():
        stage, evaluation = f"{keys}{arm}{seed}", f"e{arm}{seed}"
        known = {"seed": int(seed), "parents": [], "steps": None}
        nodes[stage] = {"title": f"student_rl, seed {seed}", "kind": "stage", "label": "grpo", "stage": "student_rl"}
        nodes[stage] |= known
        nodes[evaluation] = {
            "title": f"sums after student_rl, seed {seed}", "kind": "evaluate", "label": "evaluate", "stage": None,
            **known,
        }  # fmt: skip  # a table: several entries a line
        pool = {"digest": f"pool{keys}{seed}", "seed": int(seed), "count": 8, "split": "train", "part": "all"}
        held_out = {"digest": digest, "seed": None, "count": len(problems), "split": "test", "part": "all"}
        specs = {
            stage: {"problems": pool, "revision": 1},
            evaluation: {
                "problems": held_out,
                "settings": {"temperature": temperature},
                "revision": 1,
                "grader": grader,
                "grader_digest": None,
            },
        }
        for key, spec in specs.items():
            (root / "nodes" / key).mkdir(parents=True)
            (root / "nodes" / key / "spec.json").write_text(json.dumps({"spec": spec}))
        file = f"evals/{evaluation}.json"
        # In another order than the other run's, which a comparison must undo.
        (root / file).write_text(json.dumps(dict(sorted(zip(problems, values, strict=True), reverse=keys == "y"))))
        row = {"num_problems": len(problems), "per_problem": file}
        arms.setdefault(arm, {"seeds": {}})["seeds"][seed] = {"evals": {"sums": row}}
    (root / "recipe.toml").write_text(tomli_w.dumps(base | (recipe or {})))
    (root / "environment.json").write_text(
        json.dumps({"python": "3.11", "packages": {"headwater": "0.1"}, "command": [str(root)]} | (environment or {}))
    )
    (root / "stages.json").write_text(json.dumps({"nodes": nodes, "arms": {}}))
    (root / "results.json").write_text(json.dumps({"arms": arms, "models": {}}))
    return root


def test_equal_runs_have_no_difference(tmp_path: Path):
    found = compare(write(tmp_path / "a"), write(tmp_path / "b"))
    assert found["configuration"] == found["code"] == found["data"] == found["not_compared"] == []
    assert found["stages"] == {"same": 4, "a": 4, "b": 4}
    assert [(r["name"], r["difference"], r["ci95"], r["verdict"]) for r in found["differences"]] == [
        ("direct", 0.0, [0.0, 0.0], "not distinguishable"),
        ("bridge", 0.0, [0.0, 0.0], "not distinguishable"),
    ]


def test_differences_are_paired_by_seed_and_problem(tmp_path: Path):
    better = {place: [min(1.0, v + 0.25 + 0.05 * i) for i, v in enumerate(row)] for place, row in SCORES.items()}
    better["direct", "2"] = [1.0] * 4  # a seed that only one has
    found = compare(write(tmp_path / "a", scores=better, keys="y"), write(tmp_path / "b"))
    rows = {row["name"]: row for row in found["differences"]}
    expected = {}
    for arm in ("direct", "bridge"):
        ours, theirs = (np.array([s[arm, seed] for seed in ("0", "1")]) for s in (better, SCORES))
        expected[arm] = paired_difference(ours, theirs)
        assert rows[arm]["difference"] == pytest.approx(float((ours - theirs).mean())) != 0
        assert rows[arm]["ci95"] == pytest.approx(list(expected[arm].ci95))
        assert (rows[arm]["num_seeds"], rows[arm]["num_problems"]) == (2, 4)
    assert [r["p_adjusted"] for r in found["differences"]] == pytest.approx(
        holm([e.p_value for e in expected.values()])
    )
    assert rows["direct"]["difference"] == pytest.approx((0.25 + 0.30 + 0.35 + 0.40) / 4)
    assert rows["direct"]["verdict"] == "a better" and rows["direct"]["over"] == "seeds and problems"
    assert found["stages"] == {"same": 0, "a": 5, "b": 4}


def test_what_differs_is_named_by_dotted_keys(tmp_path: Path):
    a = write(tmp_path / "a")
    b = write(
        tmp_path / "b",
        recipe={"pool": {"labels": 16, "unlabelled": 4}, "execution": {"threads": 2}},
        environment={"packages": {"headwater": "0.2"}, "commit": "abc"},
        keys="z",
    )
    spec = b / "nodes" / "zdirect0" / "spec.json"
    spec.write_text(spec.read_text().replace('"revision": 1', '"revision": 2'))
    found = compare(a, b)
    assert found["configuration"] == [
        {"key": "pool.labels", "a": 8, "b": 16},
        {"key": "pool.unlabelled", "a": "-", "b": 4},
    ]
    assert {row["key"]: (row["a"], row["b"]) for row in found["code"]} == {
        "packages.headwater": ("0.1", "0.2"),
        "commit": ("-", "abc"),
        "revision.grpo": ("1", "1, 2"),
        "execution.threads": (1, 2),
    }
    assert [row["key"] for row in found["data"]] == ["student_rl, seed 0", "student_rl, seed 1"]
    assert found["data"][0]["a"] == "poolx0 (8 of train, all)" and found["data"][0]["b"] == "poolz0 (8 of train, all)"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"problems": ["q0", "q1", "q2", "q3"]}, "other problems (4 and 4)"),
        ({"digest": "d1"}, "the same prompts with other answers"),
        ({"grader": "h"}, "another grader"),
        ({"temperature": 0.3}, "other evaluation settings"),
    ],
)
def test_numbers_of_different_tasks_are_refused(changes: dict[str, Any], why: str, tmp_path: Path):
    found = compare(write(tmp_path / "a"), write(tmp_path / "b", **changes))
    assert found["differences"] == [] and len(found["not_compared"]) == 2
    assert all(row["task"] == "sums" and why in row["why"] for row in found["not_compared"])


def test_arms_and_seeds_of_one_only(tmp_path: Path):
    ours = {place: row for place, row in SCORES.items() if place[0] == "direct"}
    theirs = {("direct", "7"): SCORES["direct", "0"], ("lean", "7"): SCORES["direct", "0"]}
    found = compare(
        write(tmp_path / "a", scores={**ours, ("wide", "0"): [1.0] * 4}), write(tmp_path / "b", scores=theirs)
    )
    assert (found["only_a"], found["only_b"]) == (["wide"], ["lean"])
    assert found["not_compared"] == [{"name": "direct", "task": "sums", "why": "no seed that both have"}]


def test_a_run_without_results_yet(tmp_path: Path):
    a, b = write(tmp_path / "a"), write(tmp_path / "b")
    (b / "results.json").unlink()
    found = compare(a, b)
    assert found["differences"] == [] and found["only_a"] == ["direct", "bridge"] and found["stages"]["same"] == 4


def test_the_command_prints_text_and_json(tmp_path: Path):
    a, b = write(tmp_path / "a", recipe={"note": "[bold]"}), write(tmp_path / "b", digest="d1")
    text = headwater("compare", a, b)
    assert text.exit_code == 0, text.output
    assert "4 stages are the same: of 4 in A, of 4 in B" in text.output
    assert "not compared: direct on sums: the same prompts" in " ".join(text.output.split()) and "[bold]" in text.output
    assert json.loads(headwater("compare", a, b, "--format", "json").output) == compare(a, b)


def test_bad_input(tmp_path: Path):
    a = write(tmp_path / "a")
    wrong = [((a, tmp_path / "none"), "is no directory: give a run"), ((a, a, "--format", "xml"), "'text', 'json'")]
    for arguments, part in wrong:
        refused = headwater("compare", *arguments)
        assert refused.exit_code == 2 and part in " ".join(refused.output.split())
    (a / "stages.json").write_text('{"nodes"')
    assert "cannot be read" in headwater("compare", a, a).output
