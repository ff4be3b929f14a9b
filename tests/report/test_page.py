"""The page holds together whatever is missing, and nothing that a model wrote becomes markup."""

import json
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import made_run
import pytest
from typer.testing import CliRunner

from headwater.cli import app
from headwater.report import page
from headwater.report.directory import read
from headwater.report.progress import progress
from headwater.report.rollouts import cases, failures, grading, interruptions, unfinished


class Elements(HTMLParser):
    """Every start tag with its attributes, and the text of `pre`."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.pre: list[str] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "pre":
            self.inside = True
            self.pre.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag != "pre"

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.pre[-1] += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Elements:
    root = made_run.make(tmp_path_factory.mktemp("full"), budgets=(32, 64, 128))
    return Elements(page.write(root).read_text(encoding="utf-8"))


def sections(text: str) -> list[str | None]:
    return [a.get("id") for a in Elements(text).named("section")]


def test_sections_come_in_order(full: Elements):
    assert [a.get("id") for a in full.named("section")] == [
        "headline", "arms", "differences", "labels", "learning", "cost", "graph", "rollouts",
        "failures", "bills", "reproduce",
    ]  # fmt: skip  # a table: several entries a line
    linked = [a["href"] for a in full.named("a")]
    assert linked == ["#main", *(f"#{a['id']}" for a in full.named("section"))]


def test_the_page_needs_nothing_from_outside(full: Elements):
    for tag, attributes in full.tags:
        for name in ("src", "href", "action", "data", "srcset", "poster"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:")), (tag, name, value)
        # The policy allows neither; one that slipped in would silently not work.
        assert not [name for name in attributes if name == "style" or name.startswith("on")], tag
    policy = next(a["content"] for a in full.named("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy and policy.startswith("default-src 'none'") and "unsafe" not in policy
    assert "connect-src 'none'" in policy and policy.count("'sha256-") == 2
    css, script = page._inlined()
    assert "url(" not in css and "@import" not in css and "eval" not in script and "innerHTML" not in script


def test_structure_for_those_who_do_not_see(full: Elements):
    names = Counter(tag for tag, _ in full.tags)
    assert names["h1"] == names["main"] == names["header"] == names["footer"] == names["nav"] == 1
    levels = [int(tag[1]) for tag, _ in full.tags if tag in ("h1", "h2", "h3", "h4", "h5")]
    assert levels[0] == 1 and all(after - before <= 1 for before, after in pairwise(levels))
    assert all(a.get("scope") in ("col", "row") for a in full.named("th"))
    ids = Counter(a["id"] for _, a in full.tags if "id" in a)
    assert max(ids.values()) == 1
    labelled = {a["for"] for a in full.named("label")}
    assert {a["id"] for a in full.named("select")} == labelled
    assert all(ids[a["aria-labelledby"]] == 1 for _, a in full.tags if "aria-labelledby" in a)
    drawings = [a for a in full.named("svg") if "plot" in (a.get("class") or "") or a.get("class") == "graph"]
    assert len(drawings) > 20 and all(a.get("aria-label") or a.get("aria-hidden") for a in drawings)
    assert names["caption"] == names["table"] and names["figcaption"] == names["figure"]
    assert next(a for a in full.named("p") if a.get("role") == "status")["aria-live"] == "polite"


def test_model_output_stays_text(full: Elements):
    assert not full.named("img") and not full.named("b") and len(full.named("script")) == 1
    shown = made_run.HOSTILE.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert [text for text in full.pre if text.startswith("</script><img")]
    hostile = next(text for text in full.pre if text.startswith("</script><img"))
    assert hostile.split() == shown.replace("\ufffd", "?").split() and "\n  & " in hostile  # spaces are kept
    assert any("line one\n    two of 2\n" in text for text in full.pre)


def test_rollouts_are_capped_and_say_so(tmp_path: Path):
    found = cases(read(made_run.make(tmp_path)), "chains")
    assert found and (len(found.cases), found.total, found.seed) == (12, 32, "0")
    assert found.models == ("base student", "trained teacher", "direct", "bridge", "bridge_rl", "sft_control")
    second = found.cases[1].answers[0].samples[1]
    assert len(second.text) == 1500 and second.cut == len("line one\n    two of 1\n") + 500
    assert second.verdict == "unparsed, cut by the length limit" and not second.correct
    first = found.cases[0].answers[0]
    assert (first.right, first.total, first.samples[0].verdict) == (1, 2, "correct, worked")


def test_size(tmp_path: Path):
    assert page.write(made_run.make(tmp_path)).stat().st_size < 300_000


def test_a_failed_run_tells_what_and_why(tmp_path: Path):
    run = read(made_run.make(tmp_path, failed=True))
    assert failures(run) == [("sft, seed 0", "loss is not finite <at step 3>")]
    assert unfinished(run) == ["sft_control"]
    assert interruptions(run) == [
        "2 invocations wrote here (begun 2027-01-15 08:00:00 UTC, 2027-01-15 08:06:45 UTC); "
        "0 came to an end by themselves."
    ]
    table = grading(run)
    assert table and ("teacher_rl", "0.6 %", "0.0 %", "0.0 %", "rollouts, mean over steps") in table.rows
    assert ("chains base student", "6", "0", "0", "192 samples") in table.rows
    text = page.html(run)
    assert "loss is not finite &lt;at step 3&gt;" in text and "the Hub is out of reach" in text
    assert "not finished" in text and 'id="progress"' in text


def test_a_finished_run_in_one_go_says_that_nothing_failed(tmp_path: Path):
    root = made_run.make(tmp_path)
    for path in root.glob("nodes/*/done.json"):
        path.write_text(path.read_text().replace('"timeout"', '"partial"'))
    for path in root.glob("nodes/*/metrics.jsonl"):
        path.write_text(path.read_text().replace("0.25", "0.0"))
    assert "Nothing: every node finished, no run was interrupted" in page.html(read(root))
    with (root / "events.jsonl").open("a") as file:  # the same command again, which had nothing left to do
        file.write('{"time": 1, "kind": "run", "command": []}\n{"time": 2, "kind": "end"}\n')
    assert interruptions(read(root)) == []


def test_one_seed_is_said_to_be_one(tmp_path: Path):
    text = page.html(read(made_run.make(tmp_path, seeds=(0,))))
    assert "over problems only: another training run could come out differently" in text
    assert "Intervals are over problems only: one seed." in text


@pytest.mark.parametrize(
    "missing", ["recipe.toml", "environment.json", "events.jsonl", "stages.json", "results.json", "nodes", "evals"]
)
def test_what_is_missing_is_left_out(tmp_path: Path, missing: str):
    root = made_run.make(tmp_path, seeds=(0,), arms=("direct", "bridge"), budgets=(64, 128))
    before, path = sections(page.html(read(root))), root / missing
    if path.is_dir():
        path.rename(tmp_path / "away")
    elif path.exists():
        path.unlink()
    after = sections(page.html(read(root)))
    assert set(after) - {"progress"} <= set(before) and "headline" in after and "reproduce" in after
    for form in ("md", "csv", "json"):
        assert page.text(root, form)


@pytest.mark.parametrize("name", ["results.json", "stages.json", "events.jsonl"])
def test_half_written_files_are_read_as_far_as_they_go(tmp_path: Path, name: str):
    root = made_run.make(tmp_path, seeds=(0,), arms=("direct", "bridge"))
    text = (root / name).read_text()
    (root / name).write_text(text[: len(text) // 2])
    assert "headline" in sections(page.html(read(root)))


def test_recipe_alone_is_a_page(tmp_path: Path):
    (tmp_path / "recipe.toml").write_text(made_run.RECIPE.format(seeds=[0]))
    text = page.html(read(tmp_path))
    assert "No declared comparison can be answered yet." in text and sections(text) == [
        "progress",
        "headline",
        "reproduce",
    ]


def test_what_is_no_run_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="is no directory: give a run directory"):
        page.write(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"holds no run \(no recipe.toml"):
        page.write(tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="format 'pdf': use one of html, md, json, csv"):
        page.text(made_run.make(tmp_path), "pdf")


def test_progress_counts_and_estimates_from_the_same_kind(tmp_path: Path):
    root = made_run.make(tmp_path, at_work=True)
    run = read(root)
    begun = max(event["time"] for event in run.events)
    seen = progress(run, begun + 12)
    assert (seen.counts["done"], seen.counts["running"], seen.counts["to do"], seen.total) == (36, 1, 5, 42)
    (row,) = seen.running
    # Ten steps at a second each, thirty to go; no sft stage has ended, so the other two are not known.
    assert (row.title, row.step, row.steps, row.left) == ("sft, seed 0", 10, 40, pytest.approx(30))
    assert seen.left is None and seen.news == begun + 11 and not seen.silent
    assert progress(run, begun + 1000).silent
    place = next(node.key for node in run.nodes.values() if node.state == "running")
    done = [{"time": begun + 40, "kind": "done", "key": place, "error": ""}]
    with (root / "events.jsonl").open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in done))
    later = progress(read(root), begun + 40)
    # Two sft stages at 40 s, three evaluations at 5 s, one at a time.
    assert later.counts["done"] == 37 and later.left == pytest.approx(2 * 40 + 3 * 5)


def test_a_killed_invocation_leaves_nothing_running(tmp_path: Path):
    root = made_run.make(tmp_path, at_work=True)
    with (root / "events.jsonl").open("a") as file:
        file.write(json.dumps({"time": 2e9, "kind": "run", "key": None, "error": "", "command": []}) + "\n")
    counts = progress(read(root), 2e9).counts
    assert counts["running"] == 0 and counts["stopped"] == 1


def test_no_torch():
    code = "import sys, headwater.report.page, headwater.report.watch\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_command(tmp_path: Path):
    root = made_run.make(tmp_path / "run")
    runner = CliRunner()
    done = runner.invoke(app, ["report", str(root)])
    assert done.exit_code == 0 and done.output.strip() == str(root / "report.html")
    assert (root / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert runner.invoke(app, ["report", str(root), "--format", "md"]).output.startswith("# made\n")
    assert runner.invoke(app, ["report", str(root), "--format", "csv", "--out", str(tmp_path / "x.csv")]).exit_code == 0
    assert (tmp_path / "x.csv").read_text().startswith("name,role,task,mean")
    for arguments in (
        ["report", str(tmp_path / "no")],
        ["report", str(root), "--format", "x"],
        ["watch", str(tmp_path)],
    ):
        assert runner.invoke(app, arguments).exit_code == 2
