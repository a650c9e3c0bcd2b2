"""The folder that a store is prepared in: whose it is, whether it is finished, and that only one run writes it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mae_core.store import FORMAT, StoreError, TileStore
from mae_core.store_writer import TEMPORARY, encode_json, write_file
from pipelines.preparation_plan import PreparationPlan, differences
from pipelines.tiling_plan import PreparationError


def finished_manifest(out: Path, plan: PreparationPlan) -> dict[str, Any] | None:
    """The manifest, if the folder holds the finished store of this plan; None if there is work to do.

    Raises:
        PreparationError: The folder holds something else, another plan's store, or a store that has lost a file.
    """
    if not out.exists():
        return None
    if not out.is_dir():
        raise PreparationError(f"{out} is a file; --out wants a folder, new or empty")
    names = {entry.name for entry in out.iterdir()}
    if "manifest.json" in names:
        manifest = _read(out / "manifest.json")
        if manifest.get("format") != FORMAT or "plan" not in manifest:
            raise PreparationError(f"{out} holds a manifest.json that is not of a tile store; choose another --out")
        _same(out, manifest["plan"], plan)
        try:
            store = TileStore.open(out, verify="sizes")
        except StoreError as error:
            raise PreparationError(str(error)) from error
        shutil.rmtree(out / "progress", ignore_errors=True)
        return store.manifest
    if (out / "progress" / "plan.json").is_file():
        _same(out, _read(out / "progress" / "plan.json"), plan)
    elif names - {"progress"} or any(_foreign(entry) for entry in (out / "progress").glob("*")):
        listed = ", ".join(sorted(names)[:3])
        raise PreparationError(f"{out} is not empty and holds no tile store ({listed}, …); choose another --out or empty it")
    return None


@contextlib.contextmanager
def claimed(out: Path, plan: PreparationPlan) -> Iterator[None]:
    """The folder, with the plan in it and free of half-written files, for this process alone; left in peace it is finished.

    Raises:
        PreparationError: It cannot be written, or another run is at work in it.
    """
    progress = out / "progress"
    try:
        progress.mkdir(parents=True, exist_ok=True)
        lock = (progress / "lock").open("w")
    except OSError as error:
        raise cannot_write(out, error) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for leftover in out.rglob(f"*{TEMPORARY}"):
                leftover.unlink()
            write_file(progress / "plan.json", encode_json(plan.document))
        except BlockingIOError as error:
            raise PreparationError(f"another run is preparing {out} right now; wait for it or choose another --out") from error
        except OSError as error:
            raise cannot_write(out, error) from error
        yield
    shutil.rmtree(progress)


def cannot_write(out: Path, error: OSError) -> PreparationError:
    """What is said when the disk is full or the folder cannot be written."""
    return PreparationError(
        f"{out} cannot be written: {error}. What is finished is kept: make room, set the rights or choose another --out, and run it again"
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise PreparationError(f"{path} is damaged ({error}); delete the folder and prepare again") from error
    return document if isinstance(document, dict) else {}


def _same(out: Path, found: dict[str, Any], plan: PreparationPlan) -> None:
    wanted = json.loads(encode_json(plan.document))
    if found != wanted:
        lines = "".join(f"\n  {line}" for line in differences(found, wanted))
        raise PreparationError(f"{out} was prepared by another plan; choose another --out or delete the folder. What differs:{lines}")


def _foreign(entry: Path) -> bool:
    return entry.name != "lock" and not entry.name.endswith(TEMPORARY)
