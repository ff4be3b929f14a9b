"""Checkpoints that are whole or absent: written aside, hashed, renamed; verified when read."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from headwater.assets import sha256_file

KEPT = 2
"""Checkpoints kept, so that one that rots on disk costs a period and not the stage."""


def save(root: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write checkpoint `step` under `root` and drop all but the newest two.

    Raises OSError with what to do when the disk is full; earlier checkpoints stay.
    """
    root.mkdir(parents=True, exist_ok=True)
    target, aside = root / f"{step:08d}", root / f".writing-{step:08d}"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        save_file(
            {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()},
            aside / "tensors.safetensors",
        )
        (aside / "state.json").write_text(json.dumps({"step": step, **state}), encoding="utf-8")
        sums = {path.name: sha256_file(path) for path in sorted(aside.iterdir())}
        (aside / "manifest.json").write_text(json.dumps(sums), encoding="utf-8")
        for path in (*aside.iterdir(), aside):
            _sync(path)
    except Exception as error:
        shutil.rmtree(aside, ignore_errors=True)
        if _is_full(error):
            raise disk_full(root, f"checkpoint {step}") from error
        raise
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)
    _sync(root)
    for old in _steps(root)[:-KEPT]:
        shutil.rmtree(root / f"{old:08d}", ignore_errors=True)


def load_newest(root: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and state of the newest checkpoint, or None when there is none.

    Raises ValueError naming the folder and the fix when a file is missing or does not match its SHA-256.
    """
    if not (steps := _steps(root)):
        return None
    folder = root / f"{steps[-1]:08d}"
    back = f"step {steps[-2]}" if len(steps) > 1 else "the start of the stage"
    try:
        sums = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        wrong = [
            name for name, value in sums.items() if not (folder / name).exists() or sha256_file(folder / name) != value
        ]
    except (OSError, json.JSONDecodeError):
        wrong = ["manifest.json"]
    if wrong:
        raise ValueError(
            f"checkpoint {folder} is corrupt: {', '.join(wrong)} does not match its checksum; "
            f"delete that folder to resume from {back}"
        )
    return load_file(folder / "tensors.safetensors"), json.loads((folder / "state.json").read_text(encoding="utf-8"))


def write_atomically(path: Path, text: str) -> None:
    """Replace a file in one step: readers see the old text or the new."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(text, encoding="utf-8")
        _sync(aside)
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        if _is_full(error):
            raise disk_full(path.parent, path.name) from error
        raise


def disk_full(folder: Path, what: str) -> OSError:
    free = shutil.disk_usage(folder).free / 2**20
    return OSError(
        errno.ENOSPC,
        f"no space left for {what} in {folder} ({free:.0f} MiB free): free some space, or move the store with --store, "
        "and run the same command again; it resumes from the last whole checkpoint",
    )


def _steps(root: Path) -> list[int]:
    return sorted(int(path.name) for path in root.glob("[0-9]*") if path.is_dir()) if root.is_dir() else []


def _is_full(error: BaseException) -> bool:
    # safetensors reports a full disk as its own error with the system's text.
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
