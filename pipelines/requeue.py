"""What a batch script finds in the folder of a run that was asked to stop, where a launcher's own exit code says nothing."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel

from mae_core.launch import launched
from mae_core.stopping import REQUEUE, Stopped

STOPPED = "stopped.json"
"""In the folder of a run whose last attempt stopped on a signal and wants to be run again; torchrun ends with 1 whatever happened."""


def tell_stop(verb: str, settings: BaseModel, stopped: Stopped) -> None:
    """Say that the verb stopped, and leave word in the run's folder, if the verb has one and has begun.

    Where all processes of a job stop together, the first speaks for them.
    """
    if stopped.together and launched(os.environ).rank:
        return
    print(f"terravox {verb}: {stopped}; run the same command again to go on", file=sys.stderr)
    from pipelines.run_folder import CONFIG, write_json  # loads torch, for which no verb is to wait

    folder = _folder(settings)
    if folder is not None and (folder / CONFIG).is_file():
        write_json(folder / STOPPED, {"exit_code": REQUEUE})


def forget_stop(settings: BaseModel) -> None:
    """Take away the word of an earlier attempt, before this one does anything."""
    folder = _folder(settings)
    if folder is not None:
        with suppress(OSError):  # no folder yet, or one that cannot be written, which is said in time
            (folder / STOPPED).unlink(missing_ok=True)


def _folder(settings: BaseModel) -> Path | None:
    out = getattr(settings, "out", None)
    return out if isinstance(out, Path) else None
