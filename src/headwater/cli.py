"""The command line: run, resume, tune, eval, overlap, export, report, watch, stage."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from headwater import __version__
from headwater.config import Recipe, load_recipe
from headwater.messages import explained as _explained

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)

Sets = Annotated[
    list[str] | None, typer.Option("--set", help="Override a key: --set pool.labels=64", metavar="KEY=VALUE")
]
StoreDir = Annotated[Path | None, typer.Option("--store", help="Where finished stages live (default: per-user data).")]
Out = Annotated[Path | None, typer.Option("--out", help="Run directory (default: runs/NAME).")]
Form = Annotated[Literal["text", "json"], typer.Option("--format", help="For people, or for programs.")]
On = Annotated[str | None, typer.Option("--on", help="Executor: inline or local:N.", metavar="EXECUTOR")]


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Headwater: spend scarce labels on the teacher, carry what it learned into the student."""
    # One display of progress: ours. Inherited by worker processes; a user's own setting wins.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if version:
        console.print(f"headwater {__version__}")
        raise typer.Exit


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe (TOML).")],
    set_: Sets = None,
    out: Out = None,
    store: StoreDir = None,
    on: On = None,
    dry: Annotated[bool, typer.Option("--dry-run", help="Check everything, print the graph, train nothing.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse stages that were executed otherwise.")] = False,
) -> None:
    """Run a study; the same command goes on where it was stopped."""
    with _explained():
        _run(_loaded(recipe, set_, on), out, store, dry, strict)


@app.command()
def plan(
    recipe: Annotated[Path, typer.Argument(help="A recipe (TOML).")],
    set_: Sets = None,
    profile: Annotated[
        str | None, typer.Option(help="a100, h100, h200, b200, l40s, rtx4090, or a TOML file: instead of this machine.")
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate/--no-calibrate", help="Ask the real models, for tens of seconds.")
    ] = True,
    form: Form = "text",
    store: StoreDir = None,
) -> None:
    """Say what a study will cost before it runs: steps, labels, tokens, FLOPs, memory, time and price."""
    with _explained():
        loaded = load_recipe(recipe, set_ or [])
        from headwater.report.terminal import print_plan
        from headwater.study.calibrate import calibrate as measured
        from headwater.study.graph import plan as to_graph
        from headwater.study.outlook import outlook, profile_of

        device, graph = profile_of(profile) if profile else None, to_graph(loaded)
        found = outlook(loaded, graph, measured(loaded, graph, _store(store), measure=calibrate), device)
        _print(form, found, lambda: print_plan(console, loaded, found))


@app.command()
def resume(
    directory: Annotated[Path, typer.Argument(help="A run directory.")],
    store: StoreDir = None,
    on: On = None,
) -> None:
    """Go on with the run in a directory."""
    with _explained():
        _run(_loaded(directory / "recipe.toml", None, on), directory, store, dry=False, strict=False)


@app.command()
def tune(
    recipe: Annotated[Path, typer.Argument(help="A recipe with [tuning].")],
    set_: Sets = None,
    out: Out = None,
    store: StoreDir = None,
    on: On = None,
) -> None:
    """Try the recipe's grid of learning rates, the same for every stage, on its tuning problems."""
    with _explained():
        loaded = _loaded(recipe, set_, on)
        from headwater.report.terminal import Progress, print_tuning
        from headwater.study.tune import tune as tune_rates

        where = out or Path("runs") / f"{loaded.name}-tuning"
        with Progress(console, loaded) as progress:
            found = tune_rates(loaded, where, _store(store), on_event=progress.on_event, on_plan=progress.on_plan)
        print_tuning(console, found, where)


@app.command()
def doctor(
    recipe: Annotated[Path, typer.Argument(help="A recipe (TOML).")],
    set_: Sets = None,
    problems: Annotated[int, typer.Option(min=2, help="How many are sampled on.")] = 16,
    rewards: Annotated[
        bool, typer.Option("--reward-sample/--no-reward-sample", help="Grade samples: looks at their answers.")
    ] = True,
    offline: Annotated[bool, typer.Option("--offline", help="Take models and data from the caches only.")] = False,
    form: Form = "text",
    strict: Annotated[bool, typer.Option("--strict", help="Warnings fail too.")] = False,
    store: StoreDir = None,
) -> None:
    """Prove on the real models and a few problems that a recipe can work; exit code 1 when something is wrong."""
    if offline:
        os.environ |= {"HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1"}
    with _explained():
        loaded = load_recipe(recipe, set_ or [])
        from headwater.doctor.checkup import examine
        from headwater.report.terminal import print_findings

        found = examine(loaded, _store(store), problems=problems, rewards=rewards)
        _print(form, [asdict(f) for f in found], lambda: print_findings(console, found))
    if {"error", "warning" if strict else "error"} & {f.level for f in found}:
        raise typer.Exit(1)


@app.command()
def probe(
    recipe: Annotated[Path, typer.Argument(help="A recipe (TOML).")],
    set_: Sets = None,
    problems: Annotated[int | None, typer.Option(help="Labelled problems to look at (default: [probe]).")] = None,
    samples: Annotated[int | None, typer.Option(help="Completions of each.")] = None,
    arm: Annotated[str | None, typer.Option(help="Whose pair (default: the first arm with a teacher).")] = None,
    form: Form = "text",
    store: StoreDir = None,
) -> None:
    """Say, before labels are spent, whether they should go to the teacher; a sample of them is spent on it."""
    with _explained():
        given = {"problems": problems, "samples": samples}
        changes = [f"probe.{name}={value}" for name, value in given.items() if value is not None]
        loaded = load_recipe(recipe, [*(set_ or []), *changes])
        from headwater.report.probe import as_text
        from headwater.study.measure import probe_pair

        found = probe_pair(loaded, arm, _store(store))
        _print(form, found, lambda: typer.echo(as_text(found)))


@app.command(name="eval")
def eval_(
    model: Annotated[str, typer.Argument(help="A model source (hf:, file:, wheel:, world:) or a path.")],
    targets: Annotated[
        list[str], typer.Argument(help="A recipe, whose evaluations to use, or benchmarks.", metavar="TARGET...")
    ],
    samples: Annotated[int | None, typer.Option(help="A problem, for avg@k, pass@k, maj@k.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Default 512.")] = None,
    problems: Annotated[int | None, typer.Option(help="The first so many (default: all).")] = None,
    temperature: Annotated[float | None, typer.Option(help="Default 0 with one sample, else 1.")] = None,
    template: Annotated[str | None, typer.Option(help="chat, or none for a base model.")] = None,
    shots: Annotated[int | None, typer.Option(help="Worked examples before each problem.")] = None,
    set_: Sets = None,
    seed: Annotated[int, typer.Option(help="Of the sampling streams.")] = 0,
    store: StoreDir = None,
    out: Annotated[Path | None, typer.Option(help="Directory for results.json and the samples.")] = None,
    lm_eval: Annotated[Path | None, typer.Option(help="Directory for files as lm-evaluation-harness has them.")] = None,
    form: Form = "text",
) -> None:
    """Evaluate a model on a recipe's evaluations or on benchmarks; the same command goes on where it was stopped."""
    with _explained():
        from headwater.report.measured import print_measured, write_lm_eval, write_measured
        from headwater.report.terminal import Progress
        from headwater.study.measure import evaluate_model, of_benchmarks

        asked = {"samples": samples, "max_new_tokens": max_new_tokens, "problems": problems, "temperature": temperature}
        given = {name: value for name, value in asked.items() if value is not None}
        prompting = {"template": template} if template else {}
        if any(target.endswith(".toml") for target in targets):
            if len(targets) > 1 or given or prompting or shots is not None:
                raise ValueError("a recipe stands alone and says itself how to sample: change it with --set")
            recipe = load_recipe(Path(targets[0]), set_ or [])
        else:
            task = {} if shots is None else {"shots": shots}
            given = {"max_new_tokens": 512, **given}
            recipe = of_benchmarks(targets, task=task, evaluation=given, model=prompting, overrides=set_ or [])
        with Progress(Console(stderr=True, highlight=False), recipe) as progress:
            watch = {"on_event": progress.on_event, "on_plan": progress.on_plan}
            found = evaluate_model(model, recipe, seed, _store(store), **watch)
        if out:
            write_measured(found, out)
        if lm_eval:
            write_lm_eval(found, lm_eval)
        _print(form, found, lambda: print_measured(console, model, found))


@app.command(name="audit-grader")
def audit_grader(
    path: Annotated[Path, typer.Argument(help="A samples.jsonl of an evaluation, or a run directory.")],
    task: Annotated[str | None, typer.Option(help="Only evaluations of this name.")] = None,
    against: Annotated[str, typer.Option(help="The second grader: module:function or file.py:function.")] = "",
    out: Annotated[Path | None, typer.Option(help="Write every disagreement here (JSON lines).")] = None,
    show: Annotated[int, typer.Option(help="Disagreements to print.")] = 10,
) -> None:
    """Grade recorded samples again with a second grader; list where the two disagree."""
    with _explained():
        from headwater.grading import audit
        from headwater.grading.pool import GraderPool

        samples = audit.read_samples(path, task)
        with GraderPool(against or audit.SECOND_GRADER, workers=1) as pool:
            found, disputed = audit.audit(samples, pool.grade)
        rows = [audit.as_row(sample, verdict) for sample, verdict in disputed]
        kappa = "undefined (both say one thing of all)" if found.kappa is None else f"{found.kappa:.3f}"
        typer.echo(f"{found.samples} samples, agreement {found.rate:.2%}, Cohen's kappa {kappa}")
        typer.echo(f"right for the run's grader alone: {found.only_first}; for the second alone: {found.only_second}")
        for row in rows[:show]:
            typer.echo("\n" + json.dumps(row, indent=1, ensure_ascii=True))
        if out is not None:
            out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            typer.echo(f"{len(rows)} disagreements: {out}")


@app.command()
def overlap(
    recipe: Annotated[Path, typer.Argument(help="A recipe (TOML).")],
    set_: Sets = None,
    threshold: Annotated[float, typer.Option(help="What counts as overlap, a share in (0, 1].")] = 0.8,
    examples: Annotated[int, typer.Option(help="Pairs to show of each kind.")] = 3,
    form: Form = "text",
) -> None:
    """Show training problems that resemble evaluation problems, and how long prompts and solutions are in tokens."""
    with _explained():
        from headwater.report.data import print_survey, survey

        found = survey(load_recipe(recipe, set_ or []), threshold, examples)
        _print(form, found, lambda: print_survey(console, found))


@app.command()
def export(
    directory: Annotated[Path, typer.Argument(help="A run directory.")],
    arm: Annotated[str, typer.Argument(help="ARM, whose student to export, or ARM/STAGE.")],
    to: Annotated[Path, typer.Argument(help="Directory to write; must not exist.")],
    seed: Annotated[int | None, typer.Option(help="Which seed (default: the first).")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    adapter: Annotated[bool, typer.Option("--adapter", help="Only what LoRA stages added, for peft.")] = False,
    store: StoreDir = None,
) -> None:
    """Write a trained model as a Hugging Face directory with a model card."""
    from headwater.export import export_model

    with _explained():
        export_model(directory, arm, seed, to, _store(store), dtype=dtype, adapter=adapter)
        loader = "PeftModel.from_pretrained(base, " if adapter else "AutoModelForCausalLM.from_pretrained("
        console.print(f"{to}: load it with {loader}{str(to)!r})", soft_wrap=True)


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(help="A run directory.")],
    form: Annotated[str, typer.Option("--format", help="html, md, json or csv.")] = "html",
    out: Annotated[Path | None, typer.Option(help="File to write (html: RUN/report.html, else the terminal).")] = None,
) -> None:
    """Write what a run found as a page for people, or as tables; needs the run directory alone."""
    from headwater.report import page

    with _explained():
        if form == "html" and out is None:
            typer.echo(page.write(directory))
        elif out is None:
            typer.echo(page.text(directory, form))
        else:
            out.write_text(page.text(directory, form), encoding="utf-8")
            typer.echo(out)


@app.command()
def watch(
    directory: Annotated[Path, typer.Argument(help="A run directory, of a study at work or a finished one.")],
    port: Annotated[int, typer.Option(help="On 127.0.0.1; 0 takes a free one.")] = 0,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page.")] = True,
) -> None:
    """Show the report while a study runs, in a browser on this machine; Ctrl-C ends it."""
    from headwater.report.watch import watch as serve

    with _explained():
        serve(directory, port, browser=browser)


@app.command()
def gc(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(help="Run directories to keep whole, besides all under ./runs.", metavar="RUN"),
    ] = None,
    store: StoreDir = None,
    unused: Annotated[bool, typer.Option("--unused", help="Also remove nodes that none of these runs needs.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Remove; without it only say what would go.")] = False,
) -> None:
    """Say what the store holds that can go: leftovers of killed work, checkpoints of finished stages, unused nodes."""
    with _explained():
        from headwater.report.gc import sweep

        sweep(console, runs or [], _store(store), unused=unused, yes=yes)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="A run directory.", metavar="A")],
    b: Annotated[Path, typer.Argument(help="Another one.", metavar="B")],
    form: Form = "text",
) -> None:
    """Say how two runs differ: configuration, code, data, and the numbers on what both were measured on."""
    with _explained():
        from headwater.report.compare import compare as compare_runs
        from headwater.report.compare import print_comparison

        found = compare_runs(a, b)
        _print(form, found, lambda: print_comparison(console, found))


@app.command(hidden=True)
def stage(spec: Annotated[Path, typer.Argument(help="A node's spec.json.")], store: StoreDir = None) -> None:
    """Run one node from its specification: what executors call on other machines."""
    from headwater.stages.node import Job, run_node

    with _explained():
        kept = _store(store)
        kept.check_writable()
        run_node(Job.from_json(spec.read_text(encoding="utf-8")), kept)


def _loaded(path: Path, overrides: list[str] | None, executor: str | None) -> Recipe:
    return load_recipe(path, [*(overrides or []), *([f'execution.executor="{executor}"'] if executor else [])])


def _print(form: str, found: object, for_people: Callable[[], None]) -> None:
    if form == "json":
        typer.echo(json.dumps(found, indent=1))
    else:
        for_people()


def _run(recipe: Recipe, out: Path | None, store: Path | None, dry: bool, strict: bool) -> None:
    # Here and not above: --help and a misspelt recipe should not wait for torch, nor processes for this one.
    from headwater.study.processes import started

    where, kept = out or Path("runs") / recipe.name, _store(store)
    count = recipe.execution.executor.partition(":")[2]
    with started(0 if dry else int(count or 0), kept.root) as processes:
        from headwater.report import page
        from headwater.report.terminal import Progress, dry_run, print_findings, print_results
        from headwater.study.graph import plan
        from headwater.study.run import run as run_study

        if dry:
            dry_run(console, recipe, plan(recipe, offline=True), kept)
            return
        try:
            with Progress(console, recipe) as progress:
                hooks: dict[str, Any] = {"on_event": progress.on_event, "on_plan": progress.on_plan}
                hooks["on_warning"] = lambda warning: print_findings(console, [warning])
                how: dict[str, Any] = {"strict": strict, "calibrated": True, "processes": processes}
                found = run_study(recipe, where, kept, **hooks, **how)
            print_results(console, recipe, found, where)
        finally:
            if (where / "results.json").exists():  # a run that failed has a report too
                console.print(f"report: {page.write(where)}", markup=False, soft_wrap=True)


def _store(path: Path | None):
    from headwater.store import Store, default_root

    return Store(path or default_root())
