"""A row for every scan that was found, used or not, under pseudonyms: what a catalogue lists. Here are those of volumes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from modalities.nifti import ENDINGS
from modalities.pseudonyms import Pseudonyms
from modalities.sessions import session_folder
from modalities.volume import Found, Refused, VolumeScene
from modalities.volume_checks import Volume
from modalities.xray import XrayScene

COLUMNS: Mapping[str, str] = {
    "patient": "text",
    "session": "text",
    "scan": "text",
    "scene": "text",
    "group": "text",
    "file": "text",
    "kind": "text",
    "format": "text",
    "modality": "text",
    "sequence": "text",
    "status": "text",
    "code": "text",
    "reason": "text",
    "flags": "texts",
    "duplicate_of": "text",
    "shape": "numbers",
    "spacing_mm": "decimals",
    "orientation": "text",
    "obliquity_deg": "decimal",
    "anisotropy": "decimal",
    "dtype": "text",
    "num_files": "number",
    "bytes": "number",
    "value_min": "decimal",
    "value_max": "decimal",
    "foreground_mean": "decimal",
    "foreground_std": "decimal",
    "foreground_fraction": "decimal",
    "num_not_finite": "number",
    "repetition_time_s": "decimal",
    "echo_time_s": "decimal",
    "inversion_time_s": "decimal",
    "flip_angle_deg": "decimal",
    "field_strength_t": "decimal",
    "voxel_digest": "text",
}
"""Every column with what it holds; the same for every format. What is not known is None, or empty for text and lists.

patient, session, scan, scene, file: pseudonyms. A scene holds one or several scans; `file` is what a message about a refused file calls it.
group: What no split divides: the patient, or patients who share a scan.
kind: `volume`, or `picture` of an X-ray.
status: `accepted`, `rejected`, or `ignored`, which is what was not asked for.
shape, spacing_mm, orientation: per axis of the stored array, rows first in a picture; the orientation says to which side, of R, A, S and
    L, P, I, indices grow, and is empty for a picture, which lies nowhere. Where nobody knows how large a pixel is, spacing is empty.
obliquity_deg: Largest angle between an axis and the one of R, A, S that lies closest. anisotropy: Largest by least spacing.
value_min, value_max: Of all voxels that are numbers, in physical units; the foreground is what is not air, in a picture what was exposed.
duplicate_of: The scan that holds the same values on as many voxels: the first in this table, of those that are used before others.
voxel_digest: See `voxel_digest`; it is not keyed.
"""

UNSEEN = frozenset({"derivative", "source_data", "not_data", "bidsignore"})
"""Codes of files that were set aside by their place, unopened: of these only NIfTI files are known to be volumes."""
NO_VOLUMES = frozenset({"dicomdir", "copied_file", "marks_nothing"})
"""Codes of files that are no volumes of their own."""


def make_rows(
    found: Sequence[Found], volumes: Iterable[Volume], scenes: Iterable[VolumeScene], refused: Sequence[Refused], names: Pseudonyms
) -> tuple[Mapping[str, Any], ...]:
    """A row for each volume, in the order of `in_order`.

    Args:
        found: All of them, with whatever became of them.
        volumes: Those that were judged usable.
        scenes: Those that were made of them.
        refused: What makes no volume or no scene; of which some were found before they were refused.
        names: Makes the pseudonyms.
    """
    judged = {id(volume.found): volume for volume in volumes}
    scene_of = {id(source): scene for scene in scenes for source in scene.sources}
    reasons = {item.place: item for item in refused}
    rows = [_of_found(item, judged.get(id(item)), scene_of.get(id(item.source)), reasons.get(item.place), names) for item in found]
    known = {item.place for item in found}
    rows += [refused_row(item, names, "volume") for item in refused if item.place not in known and _is_volume(item)]
    return in_order(rows)


def in_order(rows: Iterable[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    """Rows sorted by pseudonyms, so that nothing can be told from their order; copies are marked by the first that is used."""
    told = sorted((dict(row) for row in rows), key=lambda row: (row["patient"], row["session"], row["scan"]))
    first: dict[str, str] = {}
    for row in sorted(told, key=lambda row: bool(row["status"] != "accepted")):
        if row["voxel_digest"]:
            original = first.setdefault(row["voxel_digest"], row["scan"])
            row["duplicate_of"] = "" if original == row["scan"] else original
    return tuple(told)


class Placed(Protocol):
    """What was found in an archive; see `Found`."""

    @property
    def place(self) -> str:
        """What tells it apart in the archive."""
        ...

    @property
    def patient(self) -> str:
        """What names the patient; empty where nobody knows."""
        ...

    @property
    def session(self) -> str:
        """What names the session; empty where nobody says."""
        ...


def session_of(item: Placed) -> str:
    """What names the session within the patient: as it was told, else by the folder."""
    return item.session or session_folder(item.place)


def blank_row(item: Placed, names: Pseudonyms) -> dict[str, Any]:
    """A row that says whose an item is, and nothing more."""
    empty = {"text": "", "texts": (), "numbers": (), "decimals": ()}
    row: dict[str, Any] = {column: empty.get(what) for column, what in COLUMNS.items()}
    row["patient"] = names.of("subject", item.patient) if item.patient else ""
    row["session"] = names.of("session", item.patient, session_of(item)) if item.patient else ""
    row["scan"], row["file"] = names.of("scan", item.place), names.of("file", item.place)
    return row


def _of_found(found: Found, volume: Volume | None, scene: VolumeScene | None, refused: Refused | None, names: Pseudonyms) -> dict[str, Any]:
    header = found.source.header
    axes = header.grid.matrix[:3, :3]
    spacing = [round(float(size), 4) for size in header.grid.spacing]
    straight = np.abs(axes / np.linalg.norm(axes, axis=0)).max(axis=0).min()
    row = blank_row(found, names) | {
        "kind": "volume",
        "format": format_of(found.source.files),
        "modality": found.modality,
        "sequence": found.sequence,
        "flags": found.flags if volume is None else volume.flags,
        "shape": header.space,
        "spacing_mm": tuple(spacing),
        "orientation": header.orientation,
        "obliquity_deg": round(float(np.degrees(np.arccos(min(straight, 1.0)))), 2),
        "anisotropy": round(max(spacing) / min(spacing), 3),
        "dtype": np.dtype(header.dtype).name,
        "num_files": len(found.source.files),
        "bytes": sum(file.stat().st_size for file in found.source.files),
    }
    row |= dict(found.acquisition)
    if volume is not None:
        row |= {
            "value_min": volume.values.least,
            "value_max": volume.values.greatest,
            "foreground_mean": volume.values.mean,
            "foreground_std": volume.values.deviation,
            "foreground_fraction": volume.foreground_fraction,
            "num_not_finite": volume.num_not_finite,
            "voxel_digest": volume.voxel_digest,
        }
    return row | outcome(scene, refused)


def refused_row(item: Refused, names: Pseudonyms, kind: str) -> dict[str, Any]:
    """The row of what was refused before anything of it was known but whose it is."""
    return blank_row(item, names) | {
        "kind": kind,
        "format": "other" if item.code == "other_format" else format_of(item.files),
        "modality": item.modality,
        "sequence": item.sequence,
        "num_files": len(item.files),
        "bytes": sum(file.stat().st_size for file in item.files if file.exists()),
        **outcome(None, item),
    }


def outcome(scene: VolumeScene | XrayScene | None, refused: Refused | None) -> dict[str, Any]:
    """What became of a scan that was found: its scene, or why it has none."""
    if scene is not None:
        return {"scene": scene.name, "group": scene.group, "status": "accepted"}
    if refused is None:
        raise AssertionError("a scan was found that is neither in a scene nor refused")
    return {"status": "ignored" if refused.unwanted else "rejected", "code": refused.code, "reason": refused.reason}


def format_of(files: Sequence[Path]) -> str:
    """`nifti`, `png` or `dicom`, of which only the last is known by content alone."""
    name = files[0].name.lower()
    return "nifti" if name.endswith(ENDINGS) else "png" if name.endswith(".png") else "dicom"


def _is_volume(item: Refused) -> bool:
    return item.code not in NO_VOLUMES and (item.code not in UNSEEN or format_of(item.files) == "nifti")
