"""What a user is told of where a run was recorded, and what is left to do."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.progress import console


def ui_command(uri: str) -> str:
    """The command that opens the MLflow UI on a tracking store."""
    return f"open {uri}" if uri.startswith("http") else f"{Path(sys.executable).parent / 'mlflow'} ui --backend-store-uri '{uri}'"


def tell_tracked(told: Mapping[str, Any], out: Path) -> None:
    """Say under which name a model is registered, where to look at the run, and what waits for `terravox sync`.

    Args:
        told: Facts of a tracker.
        out: Folder of the run.
    """
    if "model" in told and "alias" in told:
        beside = f", from encoder {told['encoder']}" if "encoder" in told else ""
        console.print(f"registered as {told['model']} ({told['alias']}){beside}")
    if not tell_pending(told, out):
        console.print(f"look at it: {ui_command(told['uri'])}")


def tell_pending(told: Mapping[str, Any], out: Path) -> bool:
    """Say so if something waits for `terravox sync`; whether it does."""
    if told.get("pending"):
        console.print(f"[yellow]not all is in the tracking store yet[/]; when it can be reached, run: terravox sync {out}")
    return bool(told.get("pending"))
