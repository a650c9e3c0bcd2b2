"""What became of the scans of an archive, on the console: patients, sessions, sequences, geometry, flags and reasons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape

from modalities.volume_account import by_reason, by_sequence, counted, flags, num_distinct, num_status
from pipelines.progress import console


def tell_scans(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the account of a catalogue's rows; every name in it is a pseudonym."""
    accepted = [row for row in rows if row["status"] == "accepted"]
    for kind, noun in (("volume", "volume"), ("picture", "X-ray picture")):
        own = [row for row in rows if row["kind"] == kind]
        counts = ", ".join(f"{num_status(own, status)} {status}" for status in ("accepted", "rejected", "ignored"))
        if own:
            console.print(f"[bold]{counted(len(own), noun)} found[/]: {counts}")
    distinct = ", ".join(counted(num_distinct(accepted, column), column) for column in ("patient", "session", "scene"))
    console.print(f"accepted: {distinct}")
    for entry in by_sequence(rows):
        head = f"  [bold]{escape(entry.modality)} {escape(entry.sequence)}[/]: {counted(entry.scans, 'scan')} of "
        console.print(f"{head}{counted(entry.patients, 'patient')} in {counted(entry.sessions, 'session')}")
        lines = {"spacing": entry.spacing, "shape": entry.shapes, "axes": entry.orientations, "type": entry.dtypes}
        for name, text in lines.items():
            if text:
                console.print(f"    {name:<8} {escape(text)}")
    doubtful = flags(rows)
    if doubtful:
        console.print(f"used all the same: {', '.join(f'{flag} ({count})' for flag, count in doubtful.items())}")
    for reason in by_reason(rows):
        files = "" if reason.files == reason.scans else f" of {counted(reason.files, 'file')}"
        head = f"{reason.status} [bold]{reason.code or 'unknown'}[/]: {counted(reason.scans, reason.kind)}{files}, such as {reason.first}"
        console.print(f"{head}: {escape(reason.reason)}")
