"""The folder that a store is prepared in: whose it is, whether it is finished, and that only one run writes it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mae_core.launch import launched
from mae_core.store import StoreError, TileStore
from mae_core.store_folder import FORMAT
from mae_core.store_writer import COMMIT, NEXT, TEMPORARY, complete, encode_json, write_file
from pipelines.preparation_extension import Earlier
from pipelines.preparation_plan import PreparationPlan, refuse_other
from pipelines.tiling_plan import PreparationError


def finished_store(out: Path) -> Earlier | None:
    """The finished store in a folder, once what an earlier run began to put in place is in place; None if there is none.

    Raises:
        PreparationError: The folder holds something else, a store that has lost a file, or one that another run is at work on.
    """
    if not out.exists():
        return None
    if not out.is_dir():
        raise PreparationError(f"{out} is a file; --out wants a folder, new or empty")
    if (out / COMMIT).is_file():
        with _locked(out):
            _complete(out)
    if not (out / "manifest.json").is_file():
        return None
    manifest = _read(out / "manifest.json")
    if manifest.get("format") != FORMAT or "scenes" not in manifest.get("plan", {}):
        raise PreparationError(f"{out} holds a manifest.json that is not of a tile store, or of an older one; choose another --out")
    try:
        return Earlier(TileStore.open(out, verify="sizes"))
    except StoreError as error:
        raise PreparationError(str(error)) from error


def tidy(out: Path, earlier: Earlier) -> None:
    """Takes away what a run that was stopped at its very end left beside a finished store; what another run is at work on stays."""
    with contextlib.suppress(PreparationError, OSError):
        if _read(out / "progress" / "plan.json") == earlier.document:
            with _locked(out):
                shutil.rmtree(out / "progress")


class JustFinishedError(PreparationError):
    """Another run has finished the same store since this one looked."""


@contextlib.contextmanager
def claimed(out: Path, plan: PreparationPlan) -> Iterator[None]:
    """The folder, with the plan in it and free of half-written files, for this process alone; left in peace it is finished.

    Raises:
        PreparationError: It cannot be written, holds something else, or another run is at work in it or has just finished.
    """
    progress = out / "progress"
    if plan.earlier is None:
        _refuse_foreign(out, plan)
    try:
        progress.mkdir(parents=True, exist_ok=True)
        with _locked(out):
            now = _read(out / "manifest.json")["store_digest"] if (out / "manifest.json").is_file() else None
            if now != (None if plan.earlier is None else plan.earlier.store.digest):
                raise JustFinishedError(f"another run has just finished {out}; run this one again to see what is left to do")
            _sweep(out, plan)
            write_file(progress / "plan.json", encode_json(plan.document))
            yield
            _sweep_temporary(out)  # of workers that were killed while others went on
            shutil.rmtree(progress)
    except OSError as error:
        raise cannot_write(out, error) from error


def cannot_write(out: Path, error: OSError) -> PreparationError:
    """What is said when the disk is full or the folder cannot be written; a file is named only where it lies in the folder."""
    file = Path(os.fsdecode(error.filename)) if isinstance(error.filename, (str, bytes)) else None
    named = f" ({file.relative_to(out)})" if file is not None and file.is_relative_to(out) else ""
    return PreparationError(
        f"{out} cannot be written: {error.strerror or type(error).__name__}{named}. What is finished is kept: make room, set the rights or "
        "choose another --out, and run it again"
    )


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    # Processes that were launched together all prepare what they train on: one does it, and the others wait until it is done or dead.
    wait = 0 if launched(os.environ).world > 1 else fcntl.LOCK_NB
    with (out / "progress" / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | wait)
        except BlockingIOError as error:
            raise PreparationError(f"another run is preparing {out} right now; wait for it or choose another --out") from error
        yield


def _complete(out: Path) -> None:
    try:
        complete(out)
        _sweep_temporary(out)
        shutil.rmtree(out / "progress")
    except FileNotFoundError:  # another run was at its end and has done it
        return
    except OSError as error:
        raise cannot_write(out, error) from error
    except (ValueError, KeyError) as error:
        raise PreparationError(f"{out / COMMIT} is damaged ({error!r}); restore it, or delete the folder and prepare again") from error


def _sweep_temporary(out: Path) -> None:
    for leftover in out.rglob(f"*{TEMPORARY}"):
        leftover.unlink(missing_ok=True)


def _sweep(out: Path, plan: PreparationPlan) -> None:
    """Removes half-written and waiting files, and shards that a run began by another plan than this one added to a finished store."""
    _sweep_temporary(out)
    for waiting in out.rglob(f"*{NEXT}"):
        waiting.unlink(missing_ok=True)
    begun = out / "progress" / "plan.json"
    if plan.earlier is None or not begun.is_file() or begun.read_bytes() == encode_json(plan.document):
        return
    listed = plan.earlier.store.manifest["files"]
    for name in plan.layout.arrays:
        for folder, _, files in os.walk(out / name / "c"):
            paths = [Path(folder) / file for file in files]
            for path in (path for path in paths if path.relative_to(out).as_posix() not in listed):
                path.unlink()


def _refuse_foreign(out: Path, plan: PreparationPlan) -> None:
    names = {entry.name for entry in out.iterdir()} if out.is_dir() else set()
    if (out / "progress" / "plan.json").is_file():
        refuse_other(out, _read(out / "progress" / "plan.json"), plan.document)
    elif names - {"progress"} or any(_foreign(entry) for entry in (out / "progress").glob("*")):
        listed = ", ".join(sorted(names)[:3])
        raise PreparationError(f"{out} is not empty and holds no tile store ({listed}, …); choose another --out or empty it")


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise PreparationError(f"{path} is damaged ({error}); delete the folder and prepare again") from error
    return document if isinstance(document, dict) else {}


def _foreign(entry: Path) -> bool:
    return entry.name != "lock" and not entry.name.endswith(TEMPORARY)
