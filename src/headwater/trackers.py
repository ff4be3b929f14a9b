"""Optional mirrors of metrics.jsonl in trackers; a mirror that fails is left out with one warning, training goes on."""

from __future__ import annotations

import importlib
import importlib.util
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

Log = Callable[[dict[str, int | float], int], object]


def check_installed(names: Sequence[str]) -> None:
    """ValueError for a tracker whose package is missing."""
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise ValueError(
            f"execution.trackers names {missing}, which are not installed: pip install 'headwater[trackers]'"
        )


class Mirror:
    """The trackers of one node: one run of the project each, every step once however often the node resumes."""

    def __init__(self, names: Sequence[str], project: str, run: str, directory: Path) -> None:
        self._place = (project, run, directory)
        self._seen = directory / "tracked.json"
        self._last: dict[str, int] = {}
        with suppress(OSError, ValueError):
            self._last = json.loads(self._seen.read_text(encoding="utf-8"))
        self._open: dict[str, tuple[Log, Callable[[], Any]]] = {}
        for name in names:
            self._guard(name, lambda name=name: self._open.update({name: _start(name, *self._place)}))

    def log(self, row: Mapping[str, int | float]) -> None:
        """Mirror a row of metrics.jsonl, where its step was not seen before."""
        step, values = int(row["step"]), {k: v for k, v in row.items() if k not in ("step", "time")}
        for name, (send, _) in list(self._open.items()):
            if step > self._last.get(name, -1):
                self._guard(name, lambda send=send: send(values, step))
                self._last[name] = step
        with suppress(OSError):
            self._seen.write_text(json.dumps(self._last), encoding="utf-8")

    def close(self) -> None:
        for name, (_, end) in list(self._open.items()):
            self._guard(name, end)

    def _guard(self, name: str, work: Callable[[], Any]) -> None:
        try:
            work()
        except Exception as error:
            self._open.pop(name, None)
            warnings.warn(f"{name} failed and is left out from here on: {error!r}", stacklevel=2)


def _start(name: str, project: str, run: str, directory: Path) -> tuple[Log, Callable[[], Any]]:
    if name == "tensorboard":
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(directory / "tensorboard"))
        return lambda values, step: [writer.add_scalar(k, v, step) for k, v in values.items()], writer.close
    module = importlib.import_module(name)
    if name == "wandb":
        handle = module.init(project=project, name=run, id=run.replace(" ", "-"), resume="allow", dir=str(directory))
        return lambda values, step: handle.log(values, step=step), handle.finish
    module.init(project=project, name=run, resume="allow")
    return lambda values, step: module.log(values, step=step), module.finish
