"""NIfTI files as volumes: one file is one sequence of one session; what is in its name, and its voxels."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from modalities.medical import VolumeSettings
from modalities.nifti_file import VolumeHeader, read_header, read_stored, write_like
from modalities.scene import SceneError, matches
from modalities.volume import Found, Refused, reasons

ENDINGS = (".nii", ".nii.gz")
_SEQUENCES = {"t1": "T1w", "t1w": "T1w", "t2": "T2w", "t2w": "T2w", "flair": "FLAIR", "pd": "PD", "pdw": "PD"} | {
    name.lower(): name for name in ("T1ce", "T2star", "bold", "dwi", "adc", "swi", "angio")
}
_TOKEN = re.compile(rf"(?i)(?<![a-z0-9])({'|'.join(_SEQUENCES)})(?![a-z0-9])")
_OTHER = re.compile(r"(?i)(?<![a-z0-9])(ct|pet)(?![a-z0-9])")
_ENTITY = re.compile(r"(?i)(?<![a-z0-9])(space|acq|desc|from|to|ref|rec)-[a-z0-9]+")
"""BIDS entities whose value may name a sequence other than the file's."""


@dataclass(frozen=True)
class NiftiSource:
    """A NIfTI file that holds one volume.

    A file is read whole, because nobody can begin in the middle of a gzip stream.
    """

    path: Path = field(repr=False)
    header: VolumeHeader

    @property
    def files(self) -> tuple[Path, ...]:
        """See `VolumeSource.files`."""
        return (self.path,)

    def stored(self) -> NDArray[np.generic]:
        """See `VolumeSource.stored`."""
        self.refuse_changed()
        return read_stored(self.path, self.header)

    def refuse_changed(self) -> None:
        """See `VolumeSource.refuse_changed`."""
        if read_header(self.path) != self.header:
            raise SceneError("its header has changed since it was scanned; scan again", "changed")

    def write_like(self, path: Path, values: NDArray[np.uint8]) -> None:
        """See `VolumeSource.write_like`: the affine, codes, units and NIfTI version of the file; the same labels give the same bytes."""
        write_like(self.path, path, values)


def find_nifti(files: Sequence[Path], folder: Path, settings: VolumeSettings) -> tuple[list[Found], list[Refused]]:
    """The volume in every NIfTI file among `files` by its header alone, and the files whose header cannot be used."""
    found, refused = [], []
    for file in files:
        relative = file.relative_to(folder).as_posix()
        patient = patient_of(relative, settings.group_pattern)
        try:
            with reasons():
                source = NiftiSource(file, read_header(file))
        except SceneError as error:
            refused.append(Refused((file,), relative, str(error), error.code))
            continue
        sequence = _named_sequence(relative, settings)
        found.append(Found(source, relative, patient, "", sequence, source.header.flags, modality_of(relative)))
    return found, refused


def patient_of(relative: str, pattern: str) -> str:
    """What names the patient in a relative path: the first group of `pattern` that matched, else the path without its sequence."""
    found = re.search(pattern, relative)
    named = next((text for text in found.groups() if text), None) if found else None
    if named is not None:
        return named.casefold()
    return without_sequence(re.sub(r"(?i)\.nii(\.gz)?$", "", relative))


def without_sequence(relative: str) -> str:
    """A path without what names a sequence in it (`T1`, `FLAIR`)."""
    parts = [_TOKEN.sub("", part).strip("_-. ") for part in relative.split("/")]
    return "/".join(part for part in parts if part)


def _named_sequence(relative: str, settings: VolumeSettings) -> str:
    by_glob = next((name for glob, name in settings.sequence_names.items() if matches(relative, glob)), None)
    return by_glob or settings.sequence or sequence_of(relative)


def sequence_of(relative: str) -> str:
    """The sequence that a file's name tells (`T1w`, `FLAIR`), else the innermost folder that is called like one, else `MR`."""
    *folders, name = relative.split("/")
    found = [*(part for part in folders if part.lower() in _SEQUENCES), *_TOKEN.findall(_ENTITY.sub("", name))]
    return _SEQUENCES[found[-1].lower()] if found else "MR"


def modality_of(relative: str) -> str:
    """`CT`, `PT` or `MR` where a word of a file's name, or a folder that is called like a sequence, tells it; else empty."""
    other = _OTHER.findall(relative.rpartition("/")[2])
    if other:
        return {"ct": "CT", "pet": "PT"}[other[-1].lower()]
    return "" if sequence_of(relative) == "MR" else "MR"
