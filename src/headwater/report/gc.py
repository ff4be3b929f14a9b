"""`headwater gc` in a terminal: a table of what can go, and its removal on request."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from headwater.assets import cache_dir
from headwater.store import Store
from headwater.study.gc import KINDS, Item, Kind, named, remove, run_directories, survey

SAFE: tuple[Kind, ...] = ("leftover", "checkpoints")
"""Kinds that cost no training to lose."""
MEANING: dict[Kind, str] = {
    "leftover": "leftovers of killed work, older than a day",
    "checkpoints": "checkpoints of finished stages (their models stay)",
    "unused stage": "stages that no run here needs",
    "unused evaluation": "evaluations that no run here needs",
}


def sweep(console: Console, runs: Sequence[Path], store: Store, *, unused: bool, yes: bool) -> None:
    """Print what of the store can go; with `yes` remove what is safe, with `unused` also nodes that no run needs.

    Raises ValueError for a directory that holds no run, and for `unused` without any run: everything would go.
    """
    kept = run_directories([Path("runs"), *runs])
    for run in runs:
        if not run_directories([run]):
            raise ValueError(f"{run} holds no run (no stages.json): give run directories, or directories of them")
    if unused and not kept:
        raise ValueError(
            "no run directory is under ./runs and none was named, so every node would count as unused: name the runs "
            f"to keep; to give up all of them, delete {store.root}"
        )
    found = survey(store, named(kept) if kept else None, cache_dir())
    console.print(
        f"{store.root}: {found.num_nodes} nodes, {decimal(found.num_bytes)}; {len(found.held)} held by a process, "
        f"which are left alone; {len(kept)} run directories say what is needed",
        markup=False,
    )
    table = Table("what", "how many", "size", "training to do again")
    for kind in KINDS:
        items = [item for item in found.items if item.kind == kind]
        hours = "" if kind in SAFE else f"{sum(item.seconds for item in items) / 3600:.2f} h"
        unknown = not kept and kind not in SAFE
        table.add_row(
            MEANING[kind],
            "not known" if unknown else str(len(items)),
            "" if unknown else decimal(sum(item.num_bytes for item in items)),
            "" if unknown else hours,
        )
    console.print(table)
    chosen = [item for item in found.items if unused or item.kind in SAFE]
    if unused:
        for item in chosen:
            if item.kind not in SAFE:
                console.print(f"  {item.key}  {decimal(item.num_bytes):>9}  {item.title}", markup=False)
    if yes:
        _remove(console, chosen, store)
    else:
        console.print(
            f"nothing was removed: --yes removes {len(chosen)} of these, {decimal(sum(i.num_bytes for i in chosen))}"
            + ("" if unused else "; unused nodes go with --unused only, since runs in other places may need them"),
            markup=False,
        )


def _remove(console: Console, items: Sequence[Item], store: Store) -> None:
    gone = [item for item in items if remove(item, store)]
    console.print(f"removed {len(gone)}, {decimal(sum(item.num_bytes for item in gone))}", markup=False)
    for item in items:
        if item not in gone:
            console.print(f"left alone, a process holds it now: {item.path}", markup=False)
