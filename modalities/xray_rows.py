"""A row for every X-ray picture that was found, used or not, under pseudonyms: what a catalogue of scans lists beside volumes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from modalities.pseudonyms import Pseudonyms
from modalities.volume import Refused
from modalities.volume_checks import Values
from modalities.volume_rows import blank_row, in_order, outcome, refused_row
from modalities.xray import FoundPicture, PngPicture, XrayScene


@dataclass(frozen=True)
class Judged:
    """A picture that was read to its end and can be used.

    Attributes:
        found: Where it comes from.
        scene: What it became.
        dtype: Of its stored values.
        values: What it holds; for a catalogue. Its foreground is what was exposed.
        exposed_fraction: Share of its pixels that were exposed.
    """

    found: FoundPicture
    scene: XrayScene
    dtype: np.dtype[np.generic]
    values: Values
    exposed_fraction: float


def make_picture_rows(
    found: Sequence[FoundPicture], judged: Mapping[str, Judged], scenes: Sequence[XrayScene], refused: Sequence[Refused], names: Pseudonyms
) -> tuple[Mapping[str, Any], ...]:
    """A row for each picture, in the order of `in_order`.

    Args:
        found: All of them, with whatever became of them.
        judged: Those that could be used, by the name of their scene.
        scenes: Those that are used.
        refused: What is no picture to be used; of which some were found before they were refused.
        names: Makes the pseudonyms.
    """
    scene_of = {scene.name: scene for scene in scenes}
    reasons = {item.place: item for item in refused}
    rows = []
    for item in found:
        name = names.of("scan", item.place)
        rows.append(_of_found(item, judged.get(name), names) | outcome(scene_of.get(name), reasons.get(item.place)))
    known = {item.place for item in found}
    rows += [refused_row(item, names, "picture") for item in refused if item.place not in known]
    return in_order(rows)


def _of_found(found: FoundPicture, judged: Judged | None, names: Pseudonyms) -> dict[str, Any]:
    file = found.picture.path
    row = blank_row(found, names) | {
        "kind": "picture",
        "format": "png" if isinstance(found.picture, PngPicture) else "dicom",
        "modality": found.modality,
        "sequence": found.channel,
        "flags": found.flags,
        "shape": found.space,
        "num_files": 1,
        "bytes": file.stat().st_size,
    }
    if found.spacing_mm is not None:
        spacing = tuple(round(float(size), 4) for size in found.spacing_mm)
        row |= {"spacing_mm": spacing, "anisotropy": round(max(spacing) / min(spacing), 3)}
    if judged is not None:
        row |= {
            "dtype": judged.dtype.name,
            "value_min": judged.values.least,
            "value_max": judged.values.greatest,
            "foreground_mean": judged.values.mean,
            "foreground_std": judged.values.deviation,
            "foreground_fraction": judged.exposed_fraction,
            "num_not_finite": 0,
            "voxel_digest": judged.scene.voxel_digests[0],
        }
    return row
