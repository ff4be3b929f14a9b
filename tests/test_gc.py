"""What gc calls superfluous, what it never touches, and what a crash in the middle of it leaves."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import miniature
import pytest
from typer.testing import CliRunner, Result

from headwater import spec
from headwater.cli import app
from headwater.config import load_recipe
from headwater.run import lease
from headwater.stages.node import run_node
from headwater.store import Store
from headwater.study import gc
from headwater.study.graph import plan
from headwater.study.run import run, to_jobs

DAY_S = 86_400


def headwater(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`one` and `two`: runs that share a store; `two` has an arm `lean` of its own and lacks `direct`."""
    root = tmp_path_factory.mktemp("gc")
    recipe = miniature.write(root)
    changes = ["comparisons=[]", "execution.save_every=1"]
    run(load_recipe(recipe, changes), root / "runs" / "one", Store(root / "store"))
    text = recipe.read_text()
    head, _, tail = text.partition("[arms.direct]")
    (root / "two.toml").write_text(head + "[arms.bridge]" + tail.partition("[arms.bridge]")[2])
    more = [*changes, "arms.lean={teacher='raw', bridge='warmup'}"]
    run(load_recipe(root / "two.toml", more), root / "runs" / "two", Store(root / "store"))
    return root


@pytest.fixture
def place(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the runs and their store, as the working directory."""
    for name in ("runs", "store"):
        shutil.copytree(original / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HEADWATER_CACHE", str(tmp_path / "cache"))
    return tmp_path


def keys_of(run_directory: Path) -> set[str]:
    return set(json.loads((run_directory / "stages.json").read_text())["nodes"])


def stages_of(run_directory: Path, arm: str) -> list[str]:
    return json.loads((run_directory / "stages.json").read_text())["arms"][arm]["0"]


def nodes(place: Path) -> set[str]:
    return {path.name for path in (place / "store" / "nodes").iterdir()}


def old(path: Path) -> None:
    then = time.time() - 2 * DAY_S
    for one in [path, *path.rglob("*")]:
        os.utime(one, (then, then))


def test_without_yes_nothing_goes(place: Path):
    before = sorted(path for path in place.rglob("*"))
    done = headwater("gc", "--store", "store", "--unused")
    assert done.exit_code == 0 and "nothing was removed" in done.output
    assert sorted(path for path in place.rglob("*")) == before


def test_unused_are_the_nodes_that_no_run_names(place: Path):
    one, two = (keys_of(place / "runs" / name) for name in ("one", "two"))
    store = Store(place / "store")
    assert nodes(place) == one | two and one - two and two - one and one & two
    found = gc.survey(store, two, place / "cache")
    lost = {item.key: item for item in found.items if item.kind.startswith("unused")}
    assert lost.keys() == one - two
    direct = stages_of(place / "runs" / "one", "direct")[0]
    seconds = sum(row["seconds"] for row in store.outcome(direct)["meter"].values())
    assert lost[direct].kind == "unused stage" and lost[direct].seconds == pytest.approx(seconds) and seconds > 0
    on_disk = sum(p.stat().st_size for p in store.path(direct).rglob("*") if p.is_file())
    assert sum(i.num_bytes for i in found.items if i.key == direct) == on_disk
    inside = sum(p.stat().st_size for p in (store.path(direct) / "checkpoints").rglob("*") if p.is_file())
    assert lost[direct].num_bytes == on_disk - inside > 10_000
    assert found.num_bytes == sum(p.stat().st_size for p in (store.root / "nodes").rglob("*") if p.is_file())


def test_yes_alone_keeps_every_model_and_result(place: Path):
    store = Store(place / "store")
    had = [p for p in (store.root / "nodes").rglob("*") if p.is_file() and "checkpoints" not in p.parts]
    assert list((store.root / "nodes").glob("*/checkpoints"))
    shutil.rmtree(place / "runs" / "one")
    done = headwater("gc", "--store", "store", "--yes")
    assert done.exit_code == 0, done.output
    assert [p for p in (store.root / "nodes").rglob("*") if p.is_file()] == had


def test_unused_goes_when_asked_for_and_the_run_is_whole_after_it(place: Path, original: Path):
    two = keys_of(place / "runs" / "two")
    shutil.rmtree(place / "runs" / "one")
    done = headwater("gc", "--store", "store", "--yes", "--unused")
    assert done.exit_code == 0, done.output
    assert nodes(place) == two and not list((place / "store" / "nodes").glob("*/checkpoints"))
    resumed = headwater("resume", "runs/two", "--store", "store")
    assert resumed.exit_code == 0 and "0 to do" in resumed.output


def test_runs_elsewhere_are_kept_when_named(place: Path):
    (place / "elsewhere").mkdir()
    shutil.move(place / "runs" / "one", place / "elsewhere" / "one")
    assert headwater("gc", "elsewhere", "--store", "store", "--yes", "--unused").exit_code == 0
    assert nodes(place) == keys_of(place / "elsewhere" / "one") | keys_of(place / "runs" / "two")


def test_a_linked_run_directory_counts(place: Path):
    (place / "disk").mkdir()
    shutil.move(place / "runs" / "one", place / "disk" / "one")
    (place / "runs" / "one").symlink_to(place / "disk" / "one")
    assert headwater("gc", "--store", "store", "--yes", "--unused").exit_code == 0
    assert nodes(place) == keys_of(place / "disk" / "one") | keys_of(place / "runs" / "two")


def test_what_cannot_be_known_is_refused(place: Path):
    before = nodes(place)
    (place / "empty").mkdir()
    refused = headwater("gc", "empty", "--store", "store", "--yes", "--unused")
    assert refused.exit_code == 2 and "empty holds no run" in refused.output
    (place / "runs" / "one" / "stages.json").unlink()
    refused = headwater("gc", "--store", "store", "--yes", "--unused")
    assert refused.exit_code == 2 and "has no readable stages.json" in refused.output
    shutil.rmtree(place / "runs")
    refused = headwater("gc", "--store", "store", "--yes", "--unused")
    assert refused.exit_code == 2 and "every node would count as unused" in refused.output
    shown = headwater("gc", "--store", "store")
    assert shown.exit_code == 0 and "not known" in shown.output
    assert nodes(place) == before


def test_a_held_node_and_its_parents_stay(place: Path):
    """Somebody else's study is at work after the stages that no run here names."""
    store = Store(place / "store")
    chain = stages_of(place / "runs" / "one", "finished")
    with lease(store.path(chain[-1])):
        found = gc.survey(store, set(), place / "cache")
        assert found.held.keys() == {chain[-1]} and str(os.getpid()) in found.held[chain[-1]]
        whole = [item for item in found.items if item.key and item.path == store.path(item.key)]
        assert {item.key for item in whole} == nodes(place) - set(chain)
        assert chain[-1] not in {item.key for item in found.items}


def test_a_node_taken_after_the_survey_stays(place: Path):
    store = Store(place / "store")
    key = stages_of(place / "runs" / "one", "direct")[0]
    item = next(i for i in gc.survey(store, set(), place / "cache").items if i.path == store.path(key))
    with lease(store.path(key)):
        assert not gc.remove(item, store)
    assert store.is_done(key) and store.model(key).exists()
    assert gc.remove(item, store) and not store.path(key).exists()


@pytest.mark.parametrize("moment", ["rename", "rmtree"])
def test_a_kill_in_between_leaves_a_node_that_is_trained_again(place: Path, original: Path, moment: str):
    store = Store(place / "store")
    key = stages_of(place / "runs" / "one", "direct")[0]
    weights = (store.model(key) / "model.safetensors").read_bytes()
    item = next(i for i in gc.survey(store, set(), place / "cache").items if i.path == store.path(key))
    if (pid := os.fork()) == 0:

        def die(*arguments: object, **options: object) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        if moment == "rename":
            Path.rename = die  # pyright: ignore[reportAttributeAccessIssue] -- this process has an instant to live
        else:
            gc.shutil.rmtree = die  # pyright: ignore[reportAttributeAccessIssue] -- as above
        gc.remove(item, store)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert not store.is_done(key)
    loaded = load_recipe(place / "runs" / "one" / "recipe.toml")
    graph = plan(loaded)
    assert spec.key(graph.nodes[key]) == key
    run_node(to_jobs(loaded, graph)[key], store)
    assert store.is_done(key) and (store.model(key) / "model.safetensors").read_bytes() == weights
    left = [i for i in gc.survey(store, keys_of(place / "runs" / "one"), place / "cache").items if i.kind == "leftover"]
    assert len(left) == (moment == "rmtree")
    for leftover in left:
        assert gc.remove(leftover, store) and not leftover.path.exists()


def test_leftovers_are_old_and_hidden(place: Path):
    """Of every kind one that is old and one that is new: the old go, the new and everything whole stay."""
    store = Store(place / "store")
    key = stages_of(place / "runs" / "one", "direct")[0]
    node, cache = store.path(key), place / "cache"
    for age in ("old", "new"):
        paths = [node / f".model-{age}", cache / f".fetch-{age}", cache / "converted" / f".convert-{age}"]
        for path in paths:
            path.mkdir(parents=True)
            (path / "part").write_text("12345")
        (node / f".done.json.{age}").write_text("123")
        paths.append(node / f".done.json.{age}")
        if age == "old":
            for path in paths:
                old(path)
    (cache / "files").mkdir()
    found = [i for i in gc.survey(store, None, cache).items if i.kind == "leftover"]
    assert sorted(i.path.name for i in found) == [".convert-old", ".done.json.old", ".fetch-old", ".model-old"]
    assert sum(i.num_bytes for i in found) == 18
    assert all(gc.remove(item, store) for item in found)
    assert (node / ".model-new").exists() and (cache / ".fetch-new").exists() and (cache / "files").exists()
    assert store.is_done(key)


def test_checkpoints_of_an_unfinished_node_stay(place: Path):
    store = Store(place / "store")
    key = stages_of(place / "runs" / "one", "direct")[0]
    item = next(i for i in gc.survey(store, None, place / "cache").items if i.key == key)
    assert item.kind == "checkpoints" and item.num_bytes > 10_000
    (store.path(key) / "done.json").unlink()
    assert not [i for i in gc.survey(store, None, place / "cache").items if i.key == key]
    gc.remove(item, store)
    assert item.path.exists(), "it was finished at the survey and is not any more"
