"""Runs that MLflow has not got, or not wholly, are told to it: after an outage, or from a cluster without a way out."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path

from pydantic import Field

from mae_core.delivery import Delivery
from mae_core.publisher import BusyError, Publisher, UnusableError
from mae_core.settings import Settings
from mae_core.spool import FOLDER, Spool, progress_of, spools_in
from mae_core.tracking import TrackingError, TrackingSettings, facts_of, tracking_uri
from mae_core.tracking_store import OFFLINE
from pipelines.command_line import run
from pipelines.progress import console
from pipelines.run_folder import RESULT, RunError, recall, write_json

DESCRIPTION = "runs of an outage, or of a cluster without a way out, are told to MLflow; safe to run twice"


class SyncSettings(Settings):
    """Settings of `sync`."""

    runs: tuple[Path, ...] = Field(min_length=1, description="Folders of runs, also as first words: terravox sync RUN...")
    tracking: TrackingSettings = TrackingSettings()


def work(settings: SyncSettings) -> int:
    """Do it; 1 if something is left that MLflow could have got."""
    left = 0
    for folder in settings.runs:
        for spool in _begun(folder):
            left += not _tell(spool, address(spool, folder, settings.tracking), folder)
        _complete(folder)
    return min(left, 1)


def spools_of(folder: Path) -> list[Spool]:
    """Spools of a run: its own, those of its parts (the arms of a fine-tuning) behind it, or of a single label map by its `.tracking`."""
    places = [folder, folder / FOLDER, *sorted(folder.glob(f"*/{FOLDER}")), *sorted(folder.glob(f"*.{FOLDER}"))]
    return [spool for place in places for spool in spools_in(place)]


def address(spool: Spool, folder: Path, settings: TrackingSettings) -> str:
    """Where a spool is to be told: what the user says, else where the run was to be recorded.

    Raises:
        RunError: Neither says it.
        TrackingError: It is no address.
    """
    begin, _ = next(spool.read())
    recorded = begin["uri"]
    given = settings.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not given and recorded == OFFLINE:
        raise RunError(f"{folder} was recorded offline; say where it is to go: tracking.uri=ADDRESS, or MLFLOW_TRACKING_URI")
    if not given and "…@" in (recorded or ""):
        raise RunError(f"{folder}: the password of {recorded} is kept nowhere; give tracking.uri=ADDRESS, or MLFLOW_TRACKING_URI")
    uri = tracking_uri(settings.model_copy(update={"uri": given or recorded}), folder)
    if uri == OFFLINE:
        raise RunError("tracking.uri=offline is no place to tell runs to; give an address")
    return uri


def _begun(folder: Path) -> list[Spool]:
    if not folder.is_dir():
        raise RunError(f"{folder} is not the folder of a run")
    found = spools_of(folder)
    if not found:
        raise RunError(f"{folder} holds nothing that was to be tracked (no {FOLDER}/run-…); give the folder of a run")
    return sorted(found, key=lambda spool: next(spool.read())[0]["parent"] is not None)


def _tell(spool: Spool, uri: str, folder: Path) -> bool:
    """Tell a spool; whether all that may be told is told."""
    name = os.path.relpath(spool.folder, folder.parent)
    publisher = Publisher(spool, partial(Delivery, uri, spool), console.print)
    try:
        publisher.publish()
    except UnusableError as error:
        console.print(f"[yellow]{name} is not told[/]: {error}")
        return False
    except BusyError as error:
        console.print(f"[yellow]{name} is left alone[/]: {error}")
        return False
    except Exception as error:  # whatever the store answers, the next run may be taken
        console.print(f"[yellow]{name} is not told wholly[/] ({publisher.why(error)}); run the same command again")
        return False
    finally:
        publisher.release()
    facts = facts_of(spool)
    told = f"{name}: run {facts['run_id']} in {facts['uri']}" + (f", registered as {facts['model']}" if "model" in facts else "")
    console.print(f"{told}; it has not ended, and what no checkpoint covers waits until it goes on" if publisher.pending else told)
    return True


def _complete(folder: Path) -> None:
    """Put into the results of a run what was not known when they were written."""
    spools = spools_of(folder)
    pending = any(progress_of(spool).offset < spool.size() for spool in spools)
    for spool in spools:
        key = spool.known().key
        single = spool.folder.parent.name.removesuffix(f".{FOLDER}")
        for path in (spool.base / RESULT, spool.base / f"{single}.{RESULT}"):
            result = recall(path.parent, path.name)
            told = result.get("mlflow", {})
            if not told.get("pending") or told.get("run_id") not in (key, progress_of(spool).run_id):
                continue
            kept = {name: value for name, value in told.items() if name != "pending" or pending}
            write_json(path, {**result, "mlflow": {**kept, **facts_of(spool)}})


def arguments(words: Sequence[str]) -> list[str]:
    """The words in the grammar of all verbs: all first words that are no setting are runs."""
    runs = list(takewhile(lambda word: not word.startswith("-") and ("=" not in word or Path(word).exists()), words))
    return [*([f"runs={json.dumps(runs)}"] if runs else []), *words[len(runs) :]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb; its exit code."""
    words = arguments(sys.argv[1:] if argv is None else argv)
    return run("sync", SyncSettings, work, description=DESCRIPTION, expected=(TrackingError, RunError), argv=words)


if __name__ == "__main__":
    sys.exit(main())
