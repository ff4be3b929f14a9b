"""One self-contained HTML page from a run directory: no network, no torch; model output is escaped."""

from __future__ import annotations

import base64
import hashlib
import shlex
import time
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from headwater.report import figures, headline, observations, panels, rollouts, tables
from headwater.report.directory import Number, Run, groups, read
from headwater.report.progress import progress

HERE = Path(__file__).parent


def write(run_directory: Path) -> Path:
    """Write `run_directory/report.html` and return its path. Raises ValueError when the directory holds no run."""
    path = run_directory / "report.html"
    _replace(path, text(run_directory, "html"))
    return path


def text(run_directory: Path, form: str) -> str:
    """The report as `html`, `md`, `json` or `csv`.

    Raises ValueError for another format, and for a directory that is missing or holds no run.
    """
    makers = {"html": html, "md": tables.as_markdown, "json": tables.as_json, "csv": tables.as_csv}
    if form not in makers:
        raise ValueError(f"format {form!r}: use one of {', '.join(makers)}")
    found = makers[form](read(run_directory))
    return found.encode("utf-8", "replace").decode()  # a model may say half a surrogate pair


def html(run: Run, *, live: bool = False, now: Number | None = None) -> str:
    """A run as a page; a section without data is left out. `now` (Unix seconds) dates it."""
    css, script = _inlined()
    now = time.time() if now is None else now
    return _template().render(
        **_content(run, now), css=_trusted(css), script=_trusted(script), policy=policy(live=live), live=live, now=now
    )


@cache
def _template() -> jinja2.Template:
    """Compiled once: the live page is made again and again."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "count": tables.count, "duration": tables.duration, "flops": tables.flops, "share": tables.share,
        "when": tables.when, "interval": tables.interval, "shell": lambda argv: shlex.join(map(str, argv)),
    }  # fmt: skip  # a table: several entries a line
    return environment.get_template("page.html.jinja")


def policy(*, live: bool = False) -> str:
    """The content security policy of the page: its own style sheet and script, by their digests, and nothing else."""
    css, script = map(_hash, _inlined())
    reach = "'self'" if live else "'none'"
    first = "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'"
    return f"{first}; style-src '{css}'; script-src '{script}'; connect-src {reach}"


def _inlined() -> tuple[str, str]:
    css, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return css, script


def _content(run: Run, now: Number) -> dict[str, Any]:
    """What the template shows, section by section."""
    tasks = tables.tasks(run)
    forest_rows, forest_axis = figures.forest(run, tables.comparison_rows(run))
    found = [rollouts.cases(run, task) for task in tasks]
    return {
        "run": run,
        "note": str(run.recipe.get("note", "")).strip(),
        "progress": None if run.complete else progress(run, now),
        "headlines": headline.headlines(run),
        "further": headline.further(run),
        "decisions": headline.decisions(run.results),
        "predictions": [p for row in run.results.get("comparisons", []) if (p := headline.prediction(row))],
        "declared": len(run.recipe.get("comparisons", [])),
        "arms": [(task, rows) for task in tasks if (rows := tables.arm_rows(run, task))],
        "style_text": tables.style_text,
        "passes": [t for task in tasks if (t := _pass_table(run, task))],
        "forest": forest_rows,
        "forest_axis": forest_axis,
        "comparison_table": tables.Table(
            "Declared paired differences", tables.COMPARISON_HEAD, tuple(tables.comparison_rows(run))
        ),
        "efficiency": [p for task in tasks if (p := panels.efficiency(run, task))],
        "matches": tables.match_table(run),
        "learning": panels.learning(run),
        "seeds_note": panels.seeds_note(run),
        "cost": [p for task in tasks if (p := panels.cost(run, task))],
        "graph": figures.graph(run),
        "graph_table": _graph_table(run),
        "asked": run.results.get("study", {}).get("stages_requested") or run.requested,
        "trained": len(run.stages),
        "evaluations": sum(node.kind == "evaluate" for node in run.nodes.values()),
        "cases": [c for c in found if c],
        "limits": (rollouts.SHOWN_SAMPLES, rollouts.SHOWN_CHARACTERS),
        "health": observations.health(run),
        "gates": observations.gates(run),
        "closeness": observations.closeness(run),
        "failures": rollouts.failures(run),
        "unfinished": rollouts.unfinished(run),
        "interruptions": rollouts.interruptions(run),
        "grading": rollouts.grading(run),
        "bills": tables.bill_table(run),
        "commands": [e["command"] for e in run.events if e.get("kind") == "run" and e.get("command")],
    }


def _pass_table(run: Run, task: str) -> tables.Table | None:
    rows = [row for row in tables.arm_rows(run, task) if row.passes]
    ks = sorted({k for row in rows for k in row.passes}, key=int)
    if len(ks) < 2:
        return None
    cells = [
        (row.name, *(tables.interval(*row.passes[k]) if k in row.passes else tables.DASH for k in ks)) for row in rows
    ]
    return tables.Table(f"pass@k on {task}, %", ("", *(f"pass@{k}" for k in ks)), tuple(cells))


def _graph_table(run: Run) -> tables.Table:
    rows = [(box.stage, box.method, box.name, figures.state_text(box)) for box in groups(run)]
    return tables.Table("Stages of the study", ("stage", "method", "arms", "state"), tuple(rows), numeric=False)


def _trusted(text: str) -> Markup:
    """Our own style sheet and script, which need no escaping: neither may hold an end tag."""
    assert "</" not in text
    return Markup(text)


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _replace(path: Path, text: str) -> None:
    """Written whole or not at all: somebody may be reading it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
