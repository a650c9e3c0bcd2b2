"""A folder of scans becomes scenes: found by format, judged voxel by voxel, put together by session; all under pseudonyms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modalities.medical import MriSettings
from modalities.nifti import ENDINGS, find_nifti
from modalities.pseudonyms import pseudonyms
from modalities.scene import Rejected, SceneError
from modalities.sessions import put_together
from modalities.volume import Refused, VolumeScene, reasons
from modalities.volume_checks import Volume, examine


@dataclass(frozen=True)
class Scanned:
    """What became of the files of an archive.

    Attributes:
        scenes: Usable ones.
        rejected: Others, under pseudonyms, each with reason and code.
        ignored: Files of another kind.
        notes: Lines to be told.
        rows: A row for every volume that was found, used or not, under pseudonyms: what a catalogue lists.
        names: What each pseudonym stands for. Never written but to a crosswalk that the user asks for.
    """

    scenes: tuple[VolumeScene, ...]
    rejected: tuple[Rejected, ...]
    ignored: tuple[Path, ...] = field(repr=False)
    notes: tuple[str, ...] = ()
    rows: tuple[Mapping[str, Any], ...] = ()
    names: Mapping[str, str] = field(default_factory=dict, repr=False)


def scan_volumes(files: Sequence[Path], folder: Path, settings: MriSettings) -> Scanned:
    """A scene for every usable volume among `files`, and every other one with its reason.

    Reads every file to its end: the checksum of a gzip stream, numbers that are not finite and the z-score need it.
    """
    names = pseudonyms()
    nifti = [file for file in files if file.name.lower().endswith(ENDINGS)]
    found, refused = find_nifti(nifti, folder, settings)
    ignored = sorted(set(files) - set(nifti))
    volumes: list[Volume] = []
    for item in found:
        try:
            with reasons():
                volumes.append(examine(item, settings))
        except SceneError as error:
            refused.append(Refused(item.source.files, item.place, str(error), error.code))
    together = put_together(volumes, settings, names)
    refused += together.refused
    rejected = [Rejected(names.of("file", item.place), item.reason, item.unwanted, item.code, len(item.files)) for item in refused]
    return Scanned(together.scenes, tuple(rejected), tuple(ignored), together.notes)
