"""SIGKILL to a whole study, again and again, and the same command after it: nothing lost, nothing trained twice."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import miniature
import pytest
from safetensors.torch import load_file

from headwater.config import load_recipe
from headwater.run import lease
from headwater.stages.node import Job
from headwater.store import Store
from headwater.study.executors import Event, NodeFailed, execute, holder
from headwater.study.graph import plan
from headwater.study.run import to_jobs

KILLS = 20
STEPS = 4
CHANGES = [
    *(f"stages.{name}.steps={STEPS}" for name in ("teacher_rl", "warmup", "distill", "student_rl")),
    "seeds=[0, 1]",
    "stages.warmup.keep=wrong",
    "stages.warmup.rollouts_per_problem=4",
    "arms.lean={teacher='rl', bridge='warmup'}",
    "arms.raw={teacher='raw', bridge='full'}",
    "execution.executor=local:2",
]
# Commands, and with "quick" their workers, are forked from a process that has imported torch: sixty starts of Python
# take five minutes.
FORKS = """
import json, os, runpy, sys, traceback
import headwater.report.terminal, headwater.study.run, headwater.study.worker
from headwater.cli import app
from headwater.study import executors

class Forked:
    returncode = None

    def __init__(self, command, stdin, stdout, env):
        (child_in, to), (out, child_out) = os.pipe(), os.pipe()
        self.stdin, self.stdout = os.fdopen(to, "wb"), os.fdopen(out, "rb")
        if (pid := os.fork()) == 0:
            os.dup2(child_in, 0), os.dup2(child_out, 1), os.closerange(3, 1024)
            os.environ.update(env)
            sys.stdin, sys.argv = open(0, closefd=False), command[2:]
            try:
                runpy.run_module("headwater.study.worker", run_name="__main__", alter_sys=True)
            except BaseException:
                traceback.print_exc()
            os._exit(0)
        os.close(child_in), os.close(child_out)
        self.pid = pid

    def poll(self):
        if self.returncode is None and (found := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.returncode = os.waitstatus_to_exitcode(found[1])
        return self.returncode

    def wait(self):
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def kill(self):
        self.poll() is None and os.kill(self.pid, 9)

for line in sys.stdin:
    arguments, output, quick = json.loads(line)
    if (pid := os.fork()) == 0:
        os.setsid()
        handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1), os.dup2(handle, 2)
        sys.argv = ["headwater", *arguments]
        if quick:
            executors.subprocess = type("Forks", (), {"Popen": Forked, "PIPE": -1})
        try:
            app(arguments)
        except SystemExit as end:
            sys.stdout.flush(), os._exit(end.code or 0)
        except BaseException:
            traceback.print_exc(), sys.stderr.flush(), os._exit(70)
    print(pid, flush=True)
"""


@dataclass(frozen=True)
class Study:
    """The command of one study with its directories, and the process that forks it."""

    forks: subprocess.Popen[str]
    recipe: Path
    root: Path

    @property
    def store(self) -> Store:
        return Store(self.root / "store")

    @property
    def output(self) -> str:
        return (self.root / "output.txt").read_text()

    def start(self, quick: bool = False) -> int:
        """Process id, and group id, of a new run."""
        self.root.mkdir(exist_ok=True)
        changes = [part for change in CHANGES for part in ("--set", change)]
        places = ["--out", str(self.root / "out"), "--store", str(self.root / "store")]
        assert self.forks.stdin and self.forks.stdout
        arguments = ["run", str(self.recipe), *places, *changes]
        self.forks.stdin.write(json.dumps([arguments, str(self.root / "output.txt"), quick]) + "\n")
        self.forks.stdin.flush()
        return int(self.forks.stdout.readline())

    def begun(self) -> list[Path]:
        """Nodes that were begun and are not done."""
        return [path.parent for path in self.nodes("spec.json") if not (path.parent / "done.json").exists()]

    def nodes(self, name: str) -> list[Path]:
        return sorted((self.root / "store" / "nodes").glob(f"*/{name}"))

    def finished(self) -> dict[str, tuple[int, int, bytes]]:
        """Every finished node with what tells whether its record was written again."""
        return {
            path.parent.name: (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes())
            for path in self.nodes("done.json")
        }


@pytest.fixture(scope="module")
def forks() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", FORKS]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True, env=miniature.environment()) as process:
        yield process
        process.kill()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return miniature.write(tmp_path_factory.mktemp("study_kill"))


def state(pid: int) -> str:
    """R, S, T, ...; Z, or nothing, when it has ended (the forking process does not wait for it)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def wait_for(condition: Any, seconds: float = 240.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.005)


def at_work(study: Study) -> list[Path]:
    return [directory for directory in study.begun() if holder(directory)]


def finish(study: Study) -> float:
    """Run to the end; seconds of work, without the start of the processes."""
    pid = study.start(quick=True)
    wait_for(lambda: study.begun() or state(pid) == "Z")
    start = time.monotonic()
    wait_for(lambda: state(pid) == "Z")
    assert (study.root / "out" / "results.json").exists(), study.output
    return time.monotonic() - start


def kill_after(study: Study, delay: float, quick: bool) -> list[str] | None:
    """Start, and kill the group `delay` seconds after work began: methods then at work, None when it was over."""
    before = study.finished()
    pid = study.start(quick)
    wait_for(lambda: at_work(study) or state(pid) == "Z")
    end = time.monotonic() + delay
    while time.monotonic() < end and state(pid) != "Z":
        time.sleep(0.005)
    if state(pid) == "Z":
        assert (study.root / "out" / "results.json").exists(), study.output
        return None
    # Its workers are in its group. Stopped, they hold still while we look at what they hold.
    os.killpg(pid, signal.SIGSTOP)
    caught = [(path / "spec.json").read_text() for path in at_work(study)]
    os.killpg(pid, signal.SIGKILL)
    wait_for(lambda: state(pid) == "Z")
    after = study.finished()
    assert {key: after.get(key) for key in before} == before, "a finished node was written again"
    return [method_of(text) for text in caught]


def method_of(job: str) -> str:
    try:
        return json.loads(job)["spec"]["settings"].get("method", "evaluate")
    except ValueError:  # stopped while this very file was written
        return "beginning"


MEASURED = ("seconds", "device_seconds", "tokens/s", "mfu", "peak_memory", "lost", "wasted", "plan")
"""What the clock, the memory and the kills themselves decide."""


def without_seconds(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_seconds(v) for k, v in value.items() if k not in MEASURED}
    return [without_seconds(v) for v in value] if isinstance(value, list) else value


def check_equal(ours: Study, theirs: Study) -> None:
    found, expected = (json.loads((s.root / "out" / "results.json").read_text()) for s in (ours, theirs))
    assert without_seconds(found) == without_seconds(expected)
    for name in ("ledger.jsonl", "samples.jsonl", "metrics.jsonl", "evals.jsonl"):
        texts = [{p.parent.name: p.read_text() for p in s.nodes(name)} for s in (ours, theirs)]
        assert texts[0].keys() == texts[1].keys()
        for key, text in texts[0].items():
            assert without_clock(text) == without_clock(texts[1][key]), f"{name} of {key}"
    outcomes = [{key: without_seconds(json.loads(row[2])) for key, row in s.finished().items()} for s in (ours, theirs)]
    for key, outcome in outcomes[0].items():
        assert outcome | {"environment": ""} == outcomes[1][key] | {"environment": ""}
    for path in ours.nodes("model/model.safetensors"):
        weights = load_file(path), load_file(theirs.store.model(path.parents[1].name) / "model.safetensors")
        assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])


def without_clock(text: str) -> list[Any]:
    rows = [without_seconds(json.loads(line)) for line in text.splitlines()]
    return [{k: v for k, v in row.items() if k != "time"} for row in rows]


def check_counts(study: Study) -> None:
    """Each distinct stage was trained once, and the run says how many were asked for."""
    found = json.loads((study.root / "out" / "results.json").read_text())["study"]
    nodes = json.loads((study.root / "out" / "stages.json").read_text())
    distinct = {key for arm in nodes["arms"].values() for keys in arm.values() for key in keys}
    asked = sum(len(keys) for arm in nodes["arms"].values() for keys in arm.values())
    stages = [key for key, node in nodes["nodes"].items() if node["kind"] == "stage"]
    assert study.finished().keys() == nodes["nodes"].keys() and not study.begun()
    assert found["stages_trained"] == len(stages) == len(distinct) == 14
    assert found["stages_requested"] == asked == 24
    assert "14 distinct stages for 24 asked for" in " ".join(study.output.split())


@pytest.fixture(scope="module")
def undisturbed(forks: subprocess.Popen[str], recipe: Path) -> tuple[Study, float]:
    """A study that ran through, and its seconds of work."""
    study = Study(forks, recipe, recipe.parent / "undisturbed")
    return study, finish(study)


def test_an_undisturbed_study_trains_and_counts(undisturbed: tuple[Study, float]):
    study, seconds = undisturbed
    check_counts(study)
    assert seconds > 1
    reveals = [len(path.read_text().splitlines()) for path in study.nodes("ledger.jsonl")]
    assert reveals and all(reveals), "a kill test without labels proves nothing about the ledger"


def test_twenty_kills(undisturbed: tuple[Study, float], forks: subprocess.Popen[str], recipe: Path):
    """At random moments, until a study is through in spite of them; then a fresh one, until there were twenty."""
    whole, seconds = undisturbed
    rng, caught, places, studies = random.Random("study"), Counter[str](), [], 0
    while len(places) < KILLS:
        study = Study(forks, recipe, recipe.parent / f"killed{(studies := studies + 1)}")
        longest, is_through = seconds / 8, False
        while len(places) < KILLS and not is_through:
            before = len(study.finished())
            # The first with worker processes that start from nothing, as outside of this test.
            methods = kill_after(study, rng.random() * longest, quick=bool(places))
            is_through = methods is None
            if methods:
                caught.update(methods)
                places.append(len(study.finished()))
            # On a machine that has become slower than it was at first, the study must still get on.
            longest = 2 * longest if len(study.finished()) == before else seconds / 8
        if not is_through:
            finish(study)
        check_counts(study)
        check_equal(study, whole)
    print(
        f"{len(places)} kills in {studies} studies during {dict(caught)}, with {places} of {len(whole.finished())} done"
    )
    assert len(caught) >= 3 and max(places) > len(whole.finished()) // 2, "all kills fell into the beginning"


def test_two_commands_at_one_study(undisturbed: tuple[Study, float], forks: subprocess.Popen[str], recipe: Path):
    """One works, the other says who does and leaves; tried again it finds everything done."""
    study = Study(forks, recipe, recipe.parent / "twice")
    pids = [study.start(quick=True), study.start(quick=True)]
    wait_for(lambda: all(state(pid) == "Z" for pid in pids))
    refusals = re.findall(r"error: this study is being run by process (\d+) on", study.output)
    assert len(refusals) == 1 and int(refusals[0]) in pids
    assert study.output.count("done in") == len(whole := undisturbed[0].finished())
    check_equal(study, undisturbed[0])
    before = study.finished()
    finish(study)
    assert study.finished() == before and before.keys() == whole.keys()
    assert "0 to do" in study.output


@pytest.fixture
def chain(recipe: Path) -> dict[str, Job]:
    """Four stages, the first two with no parents: direct GRPO, and a bridge."""
    loaded = load_recipe(recipe, ["arms.direct.overrides.student_rl.steps=1", "execution.executor=local:2"])
    jobs = to_jobs(loaded, plan(loaded))
    bridge = plan(loaded).arms
    keys = [*bridge["direct"][0], *bridge["bridge"][0]]
    return {key: jobs[key] for key in keys}


def worker_of(store: Store, key: str) -> int:
    return int((store.path(key) / "lease").read_text().split()[1])


def test_an_idle_worker_that_dies_costs_nothing(chain: dict[str, Job], tmp_path: Path):
    store, events, first = Store(tmp_path), [], next(iter(chain))

    def on_event(event: Event) -> None:
        events.append(event)
        if event.kind == "done" and event.key == first:
            pid = worker_of(store, first)
            os.kill(pid, signal.SIGKILL)
            while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":  # on a busy machine
                time.sleep(0.01)

    execute(chain, store, next(iter(chain.values())).execution, on_event)
    assert all(map(store.is_done, chain)) and not [e for e in events if e.kind == "failed"]


def test_a_busy_worker_that_dies_fails_its_node_only(chain: dict[str, Job], tmp_path: Path):
    store, killed = Store(tmp_path), []
    execution = next(iter(chain.values())).execution

    def on_event(event: Event) -> None:
        if event.kind == "step" and not killed:
            killed.append(event.key)
            os.kill(worker_of(store, event.key), signal.SIGKILL)

    with pytest.raises(NodeFailed, match=r"its process ended with code -9"):
        execute(chain, store, execution, on_event)
    assert not store.is_done(killed[0])
    execute(chain, store, execution, lambda event: None)
    assert all(map(store.is_done, chain))


@pytest.mark.parametrize("executor", ["inline", "local:2"])
def test_a_node_of_another_study_is_waited_for(executor: str, chain: dict[str, Job], tmp_path: Path):
    """Two studies that share a stage: the second does what else it can, then waits, then goes on."""
    store, events = Store(tmp_path), []
    direct, teacher = list(chain)[:2]
    with ExitStack() as other:
        other.enter_context(lease(store.path(teacher)))

        def on_event(event: Event) -> None:
            events.append((event.kind, event.key, event.error))
            if event.kind == "waiting":
                other.close()

        execution = chain[direct].execution.model_copy(update={"executor": executor})
        execute(chain, store, execution, on_event)
    assert all(map(store.is_done, chain))
    kinds = [(kind, key) for kind, key, _ in events if kind != "step"]
    assert kinds[:4] == [("started", direct), ("done", direct), ("waiting", teacher), ("started", teacher)]
    assert f"process {os.getpid()} on" in next(error for kind, _, error in events if kind == "waiting")


def test_holder_is_who_holds(tmp_path: Path):
    assert holder(tmp_path / "absent") is None
    with lease(tmp_path):
        assert str(holder(tmp_path)).startswith(f"process {os.getpid()} on ")
    assert holder(tmp_path) is None
