"""The one thing every adapter gives and everything after it knows: a lazy array with channels, place and quality."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from modalities.grid import Grid, Window


class SceneError(ValueError):
    """A file cannot be used. The message names the file, what came, what was wanted and what to do.

    Attributes:
        code: The reason in one word that programs count by (`truncated`, `sheared`); empty where there is none.
    """

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code


class AdapterSettings(BaseModel):
    """What every adapter's settings share: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class Channel:
    """A named plane of a scene.

    Attributes:
        name: The field's own name (`B04`, `T1w`).
        wavelength_nm: Centre wavelength for optical bands, else None.
        resolution_m: Native ground sampling distance for remote sensing, else None.
        scale, offset: Physical value = stored value · scale + offset (reflectance for optical bands,
            foreground z-score for MRI).
        unit: Of the physical value: `reflectance`, `dB`, `m`, …; empty where nobody said.
        level: Processing that the value has gone through, where the same name can mean several (`L1C`: top of atmosphere,
            `L2A`: surface); else empty.
        footprint: Voxels of the scene's grid, along each of its last two axes, that hold one and the same measurement: 2 for a 20 m
            band kept at its native resolution on a 10 m grid; 1 where every voxel has a value of its own.
    """

    name: str
    wavelength_nm: float | None = None
    resolution_m: float | None = None
    scale: float = 1.0
    offset: float = 0.0
    unit: str = ""
    level: str = ""
    footprint: int = 1


@dataclass(frozen=True)
class Rejected:
    """A file that was found and cannot be used, with the reason. `file` is relative to the scanned folder; of scans, a pseudonym.

    `unwanted`: It could be, but its channel was not asked for, while others of its scene are; a catalogue ignores it.
    `code`: The reason in one word, as in `SceneError`.
    `num_files`: How many files this stands for: a series of slices is refused as one.
    """

    file: str
    reason: str
    unwanted: bool = False
    code: str = ""
    num_files: int = 1


class LabelMap(Protocol):
    """Class numbers on the grid of a scene. Frozen and picklable like the scene itself."""

    def read(self, window: Window) -> NDArray[np.int64]:
        """Class numbers `(*space)` of a window of the scene's grid; -1 where there is no label."""
        ...


class Scene(Protocol):
    """A scan or an image on disk. Frozen and picklable: it holds paths, never open files."""

    @property
    def name(self) -> str:
        """Stable identifier, unique within a catalogue, the same on every machine."""
        ...

    @property
    def group(self) -> str:
        """What must not be divided between training and held-out data: a patient, a place."""
        ...

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that the scene is read from."""
        ...

    @property
    def grid(self) -> Grid:
        """The lattice that `read` speaks of."""
        ...

    @property
    def block(self) -> tuple[int, ...]:
        """The least that the source unpacks for any voxel, per spatial axis, in voxels of `grid` and never beyond it.

        Blocks lie side by side from the first voxel; windows whose edges are edges of blocks unpack none twice.
        """
        ...

    @property
    def channels(self) -> tuple[Channel, ...]:
        """In the order of the first axis that `read` gives."""
        ...

    @property
    def times(self) -> tuple[str, ...]:
        """When it was acquired, ISO 8601 in UTC (`2020-02-23T03:27:39Z`): one time, one per index of the first axis of a series, or none.

        Empty where it is not known, and always for patients, whose dates leave no archive.
        """
        ...

    @property
    def voxel_digests(self) -> tuple[str, ...]:
        """Of all values as they were measured, one per scan that it is made of, whatever their files are called; empty for images."""
        ...

    @property
    def patients(self) -> tuple[str, ...]:
        """Pseudonyms of all who are one group because they share a scan, the group's own among them; empty where nobody does."""
        ...

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """Of what `read` gives: the source's own, so integers stay integers (float64 becomes float32)."""
        ...

    def read(self, window: Window) -> tuple[NDArray[np.generic], NDArray[np.uint8]]:
        """Pixels `(channel, *space)` in `dtype` and quality flags `(*space)` of a window that lies inside the grid.

        Raises:
            SceneError: The file is gone or damaged, or the window leaves the grid.
        """
        ...

    def open_labels(self, path: Path) -> LabelMap:
        """The label map in `path`, brought to this scene's grid.

        Raises:
            SceneError: The labels are unreadable, not whole numbers, or lie on another grid than the scene's source.
        """
        ...

    def write_labels(self, path: Path, labels: NDArray[np.uint8], no_label: int) -> None:
        """Write class numbers given on this scene's grid back in the geometry of the source file.

        Args:
            path: File to write; its ending is `label_suffix`. Written beside and renamed, so it is whole or absent.
            labels: `(*space)` of this scene's grid.
            no_label: The class number that says "nothing here" (nodata of a raster, background of a volume).
        """
        ...

    @property
    def label_suffix(self) -> str:
        """Ending of a written label file: `.tif` or `.nii.gz`."""
        ...


def matches(relative: str, *globs: str) -> bool:
    """True when a path within the scanned folder, or its file name, is that of one of the globs."""
    name = PurePosixPath(relative).name
    return any(fnmatch(relative, glob) or fnmatch(name, glob) for glob in globs)


def utc(time: datetime) -> str:
    """A time as `Scene.times` has it, ISO 8601 in UTC to the second; one that knows no zone is taken as UTC.

    Raises:
        ValueError: It has no place in UTC, as the first and the last day of all have in some zones.
    """
    try:
        there = (time if time.tzinfo else time.replace(tzinfo=UTC)).astimezone(UTC)
    except OverflowError as error:
        raise ValueError(f"{time} lies outside of the years 1 to 9999 in UTC") from error
    return f"{there.replace(tzinfo=None).isoformat(timespec='seconds')}Z"


def iso_time(text: str) -> str:
    """`utc` of any ISO 8601 form; empty for what is no time."""
    try:
        return utc(datetime.fromisoformat(text.strip()))
    except ValueError:
        return ""


def fingerprint(files: Iterable[Path]) -> str:
    """Digest of files by size, first and last 64 KiB: cheap, the same on every machine, blind to a change in the middle."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        size = file.stat().st_size
        digest.update(f"{size}\n".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(1 << 16))
            if size > 1 << 17:
                stream.seek(-(1 << 16), 2)
                digest.update(stream.read())
    return digest.hexdigest()
