"""Files beside a scan that mark some of its voxels: those of a face that was taken away, those of the anatomy that matters.

Such a file has a name of its pattern (`reader.defaced`, `reader.anatomy`) and is no scan. What the first `*` of the pattern stands for
must be how the name of the scan begins: `sub-01_ses-1_desc-deface_mask.nii.gz` belongs to `sub-01_ses-1_T1w.nii.gz` and to all other
scans of that session. A pattern that does not begin with `*` (`face.nii.gz`) belongs to all scans of its folder. The scan's own folder
comes first, then all others of the same patient; of several files the one that has more of the scan's name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import translate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from modalities.medical import VolumeSettings
from modalities.nifti_file import VolumeHeader, read_header, read_stored
from modalities.scene import SceneError, matches

MOST_DEFACED = 0.5
"""A file that marks more than this share of a volume as a face marks what was kept."""


@dataclass(frozen=True)
class Marks:
    """A file that marks voxels of a scan.

    Attributes:
        path: The file.
        header: Of the file.
        by_zero: Whether zero marks, and not what is not zero.
    """

    path: Path = field(repr=False)
    header: VolumeHeader
    by_zero: bool = False

    def read(self, like: VolumeHeader) -> NDArray[np.bool_]:
        """The marked voxels, in the canonical order of a lattice that it covers.

        Raises:
            SceneError: The file has changed or is damaged; without its name.
        """
        if read_header(self.path) != self.header:
            raise SceneError("a file that marks its voxels has changed since it was scanned; scan again", "changed")
        physical = read_stored(self.path, self.header).astype(np.float32) * self.header.slope + self.header.intercept
        marked = (physical == 0) if self.by_zero else (physical != 0)
        return np.ascontiguousarray(like.to_canonical(self.header.to_order_of(like, marked))).astype(bool)


@dataclass(frozen=True)
class Beside:
    """The files of one pattern.

    Attributes:
        files: Which.
        pattern: As it was set; empty where there is none.
        what: What they mark, in words.
        by_zero: See `Marks`.
    """

    files: tuple[Path, ...] = field(repr=False)
    pattern: str
    what: str
    by_zero: bool = False

    def of(self, scan: Path, like: VolumeHeader, patient: str, patients: dict[Path, str]) -> Marks | None:
        """The file that belongs to a scan; None where there is none.

        Args:
            scan: Its file.
            like: Its header.
            patient: What names its patient.
            patients: Likewise of every file of the pattern.

        Raises:
            SceneError: It cannot be read, lies on another lattice, or several files belong to the scan as well; without their names.
        """
        near = [file for file in self.files if file.parent == scan.parent]
        far = [file for file in self.files if file.parent != scan.parent and patients[file] == patient and self.pattern.startswith("*")]
        for files in (near, far):
            ranked = [(len(name), file) for file in files for name in [self._name(file)] if _begins(scan.name, name)]
            best = [file for length, file in ranked if length == max(ranked)[0]]
            if len(best) > 1:
                raise SceneError(
                    f"{len(best)} files that mark {self.what} belong to it as well as each other; name them apart", "marks_ambiguous"
                )
            if best:
                return self._checked(best[0], like)
        return None

    def _name(self, file: Path) -> str:
        """What the first `*` of the pattern stands for; empty where the pattern does not begin with it."""
        if not self.pattern.startswith("*"):
            return ""
        for length in range(len(file.name), -1, -1):
            if re.match(translate(self.pattern[1:]), file.name[length:]):
                return file.name[:length]
        return ""

    def _checked(self, file: Path, like: VolumeHeader) -> Marks:
        header = read_header(file)
        if not header.covers(like):
            raise SceneError(
                f"the file that marks {self.what} has shape {header.space} with affine {header.short}, the scan {like.space} with "
                f"affine {like.short}; resample it to the scan with nearest neighbour",
                "marks_elsewhere",
            )
        return Marks(file, header, self.by_zero)


def split_beside(files: Sequence[Path], folder: Path, settings: VolumeSettings) -> tuple[list[Path], Beside, Beside]:
    """Files that are scans, those that mark faces, and those that mark anatomy."""
    defaced, anatomy = ([file for file in files if _fits(file, folder, pattern)] for pattern in (settings.defaced, settings.anatomy))
    marking = {*defaced, *anatomy}
    return (
        [file for file in files if file not in marking],
        Beside(tuple(defaced), settings.defaced or "", "a face", settings.defaced_where == "zero"),
        Beside(tuple(anatomy), settings.anatomy or "", "anatomy"),
    )


def _fits(file: Path, folder: Path, pattern: str | None) -> bool:
    return pattern is not None and matches(file.relative_to(folder).as_posix(), pattern)


def _begins(name: str, start: str) -> bool:
    """Whether a file's name begins with these whole words."""
    return name.startswith(start) and (not start or start[-1] in "_-." or name[len(start) : len(start) + 1] in ("_", "-", ".", ""))
