"""What became of the scans of an archive, on the console: patients, sessions, sequences, geometry, flags and reasons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape

from modalities.volume_account import by_reason, by_sequence, flags, num_distinct, num_status
from pipelines.progress import console


def tell_scans(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the account of a catalogue's rows; every name in it is a pseudonym."""
    accepted = [row for row in rows if row["status"] == "accepted"]
    counts = ", ".join(f"{num_status(rows, status)} {status}" for status in ("accepted", "rejected", "ignored"))
    console.print(f"[bold]{len(rows)} volumes found[/]: {counts}")
    console.print(
        f"accepted: {num_distinct(accepted, 'patient')} patients, {num_distinct(accepted, 'session')} sessions, "
        f"{num_distinct(accepted, 'scene')} scenes"
    )
    for entry in by_sequence(rows):
        console.print(
            f"  [bold]{escape(entry.modality)} {escape(entry.sequence)}[/]: {entry.scans} scans of {entry.patients} patients "
            f"in {entry.sessions} sessions"
        )
        lines = {"spacing": f"{entry.spacing} mm", "shape": entry.shapes, "axes": entry.orientations, "type": entry.dtypes}
        for name, text in lines.items():
            console.print(f"    {name:<8} {escape(text)}")
    doubtful = flags(rows)
    if doubtful:
        console.print(f"used all the same: {', '.join(f'{flag} ({count})' for flag, count in doubtful.items())}")
    for reason in by_reason(rows):
        files = "" if reason.files == reason.volumes else f" of {reason.files} files"
        head = f"{reason.status} [bold]{reason.code or 'unknown'}[/]: {reason.volumes} volumes{files}, such as {reason.first}"
        console.print(f"{head}: {escape(reason.reason)}")
