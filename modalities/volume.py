"""Volumes as scenes: one or several scans on one lattice, in RAS+, at a stated spacing, with air flagged; whatever files they come from.

A scan is read whole; a process keeps the last scene. Names that leave this module are pseudonyms, and no message holds a file's name.
"""

from __future__ import annotations

import gzip
import threading
import zlib
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from modalities.grid import Grid, Window
from modalities.nifti_file import VolumeHeader, read_header, read_stored
from modalities.quality import Quality
from modalities.reading import Canonical, Reading
from modalities.scene import Channel, SceneError
from modalities.spacing import Respacing

T = TypeVar("T")


class VolumeSource(Protocol):
    """The files of one scan. Frozen and picklable; its representation shows no path."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that voxels are read from."""
        ...

    @property
    def header(self) -> VolumeHeader:
        """What the files said of the array when they were scanned."""
        ...

    def stored(self) -> NDArray[np.generic]:
        """The array as stored, of `header.space`; physical value = stored · `header.slope` + `header.intercept`.

        Raises:
            SceneError: The files are damaged or have changed; without their names.
        """
        ...

    def refuse_changed(self) -> None:
        """Stops where the files say something else than when they were scanned."""
        ...

    def write_like(self, path: Path, values: NDArray[np.generic], slope: float = 1.0) -> None:
        """Writes `values`, in the order of `header.space` or with an axis more, as NIfTI on the scan's lattice, whole or not at all."""
        ...


@dataclass(frozen=True)
class Found:
    """A volume that was found and not yet judged.

    Attributes:
        source: Its files.
        place: What tells it apart in the archive: a relative path, or UIDs. It leaves this program in no form but a keyed hash.
        patient, session: What names them in the archive; likewise. A session may be empty.
        sequence: Channel name (`T1w`).
        flags: What is doubtful about its geometry.
        modality: `MR`, `CT`, … where the file says so; else empty.
        acquisition: Numbers that were told of how it was measured (`echo_time_s`); for a catalogue only.
    """

    source: VolumeSource = field(repr=False)
    place: str = field(repr=False)
    patient: str = field(repr=False)
    session: str = field(repr=False)
    sequence: str
    flags: tuple[str, ...] = ()
    modality: str = ""
    acquisition: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Refused:
    """Files that make no volume, with the reason.

    Attributes:
        files: Which.
        place: As of `Found`.
        reason, code: In words and in one word.
        unwanted: It would be one, but another modality or sequence was asked for.
        patient, session, sequence, modality: As of `Found`, as far as they are known.
    """

    files: tuple[Path, ...] = field(repr=False)
    place: str = field(repr=False)
    reason: str
    code: str
    unwanted: bool = False
    patient: str = field(default="", repr=False)
    session: str = field(default="", repr=False)
    sequence: str = ""
    modality: str = ""


@dataclass(frozen=True)
class VolumeLabels:
    """Class numbers of a label volume on the grid of a scene. A label of -1 in the file means none.

    Attributes:
        path: The file.
        name: What errors call it.
        header, source: Of the file and of the scene's first source.
        respacing: Of the scene.
    """

    path: Path = field(repr=False)
    name: str
    header: VolumeHeader
    source: VolumeHeader
    respacing: Respacing

    def read(self, window: Window) -> NDArray[np.int64]:
        """See `LabelMap.read`."""
        with about(self.name):
            labels = _LABELS.get((*_stamps((self.path,)), self), self._load)
            return labels[inside(window, labels.shape)].astype(np.int64)

    def native(self) -> NDArray[np.generic]:
        """Class numbers in the order and on the lattice of the scene's source, not resampled."""
        with about(self.name):
            return self._native()

    def _load(self) -> NDArray[np.generic]:
        return self.respacing.nearest(self.source.to_canonical(self._native()))

    def _native(self) -> NDArray[np.generic]:
        return self.header.to_order_of(self.source, self._stored())

    def _stored(self) -> NDArray[np.generic]:
        values = read_stored(self.path, self.header)
        if values.dtype.kind == "f" or (self.header.slope, self.header.intercept) != (1.0, 0.0):
            physical = values.astype(np.float64) * self.header.slope + self.header.intercept
            num_odd = int((~np.isfinite(physical) | (physical != np.rint(physical))).sum())
            if num_odd:
                raise SceneError(
                    f"{num_odd} voxels hold no whole number, but labels are class numbers; is this an image or a probability map?",
                    "labels_not_whole",
                )
            values = physical.astype(np.int64)
        return values


@dataclass(frozen=True)
class VolumeScene:
    """Scans of one session on one lattice, in RAS+ at the wanted spacing: see `Respacing.to` for its lattice, `linear` for values.

    Oblique volumes keep their oblique axes. The lattice spans the measured voxel centres, so nothing is extrapolated.
    Integers stay integers, and CT comes in HU; a channel's scale and offset make the normalised value.
    `Quality.BACKGROUND` is where all scans show air; `Quality.NOT_FINITE` where any has no number, since flags are of voxels, not of
    channels: so sequences with a smaller field of view that is filled with NaN leave what all of them have seen. Likewise
    `Quality.OUTSIDE`, what a CT scanner did not see, and `EXCLUDED`, a face, whose voxels hold 0.

    Attributes:
        name, group: Pseudonyms of the scans and of the patient.
        sources: One per channel; the first one's lattice is the scene's, before it is brought to another spacing.
        readings: One per channel.
        voxel_digests: One per channel.
        flags: What is doubtful and used all the same, by reason code: those of `VolumePolicies` and `four_d`.
        num_not_finite: Voxels of the files that hold no number.
        foreground_fraction: Share of the first file's voxels that are not air.
        patients: See `Scene.patients`.
    """

    name: str
    group: str
    sources: tuple[VolumeSource, ...] = field(repr=False)
    readings: tuple[Reading, ...]
    grid: Grid
    channels: tuple[Channel, ...]
    voxel_digests: tuple[str, ...]
    dtype: np.dtype[np.generic]
    respacing: Respacing
    flags: tuple[str, ...]
    num_not_finite: int
    foreground_fraction: float
    patients: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        """See `Scene.files`."""
        marks = [marks for reading in self.readings for marks in (reading.defaced, reading.anatomy) if marks is not None]
        return tuple(dict.fromkeys([*(file for source in self.sources for file in source.files), *(mark.path for mark in marks)]))

    @property
    def header(self) -> VolumeHeader:
        """Of the first source."""
        return self.sources[0].header

    @property
    def block(self) -> tuple[int, ...]:
        """The whole volume: a gzip stream has no middle to begin in, and the plain file is read in the same way."""
        return self.grid.space

    @property
    def times(self) -> tuple[str, ...]:
        """None: the dates of patients leave no archive."""
        return ()

    @property
    def label_suffix(self) -> str:
        """Ending of a written label file."""
        return ".nii.gz"

    def read(self, window: Window) -> tuple[NDArray[np.generic], NDArray[np.uint8]]:
        """See `Scene.read`."""
        with about(self.name):
            part = inside(window, self.grid.space)
            values, quality = _VOLUMES.get((*_stamps(self.files), self.sources, self.respacing, self.readings), self._load)
            return values[(slice(None), *part)].copy(), quality[part].copy()

    def open_labels(self, path: Path) -> VolumeLabels:
        """See `Scene.open_labels`; the labels may be stored in another orientation of the image's lattice."""
        name = f"labels of {self.name}"
        with about(name):
            header = read_header(path)
            if header.num_volumes > 1:
                raise SceneError(f"labels of {header.num_volumes} volumes in one file; give one volume of class numbers", "four_d")
            if not header.covers(self.header):
                raise SceneError(
                    f"shape {header.space} with affine {header.short} is another grid than the image's of shape {self.header.space} with "
                    f"affine {self.header.short}; resample them to the image with nearest neighbour",
                    "labels_elsewhere",
                )
        labels = VolumeLabels(path, name, header, self.header, self.respacing)
        labels.read(tuple(slice(0, 1) for _ in self.grid.space))
        return labels

    def native(self, labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Labels `(*space)` of this scene's grid on the lattice of its first source, in that file's order.

        Every source voxel lies between voxels of the scene, so none has to be filled.
        """
        return self.header.from_canonical(self.respacing.nearest_back(labels)).astype(np.uint8, copy=False)

    def write_probabilities(self, path: Path, parts: NDArray[np.float32 | np.uint8], slope: float = 1.0) -> None:
        """Write `(class, *space)` of this scene's grid as NIfTI of four axes on the lattice of the first source, the class last.

        Each source voxel has the numbers of the voxel that it has its label from, so the most probable class is the label.
        """
        native = [self.header.from_canonical(self.respacing.nearest_back(part)) for part in parts]
        with about(self.name):
            self.sources[0].refuse_changed()
        self.sources[0].write_like(path, np.stack(native, axis=-1), slope)

    def write_labels(self, path: Path, labels: NDArray[np.uint8], no_label: int) -> None:
        """See `Scene.write_labels`: uint8 in the source's axis order, with its geometry."""
        if not path.name.endswith(self.label_suffix):
            raise SceneError(f"{path.name}: labels of a volume are written as {self.label_suffix}; change the ending")
        if labels.shape != self.grid.space or labels.dtype != np.uint8 or not 0 <= no_label <= 255:
            raise SceneError(
                f"{path.name}: got labels {labels.dtype} of shape {labels.shape} and no_label {no_label}; "
                f"wanted uint8 of shape {self.grid.space} and a number from 0 to 255"
            )
        with about(self.name):
            self.sources[0].refuse_changed()
        self.sources[0].write_like(path, self.native(labels))

    def _load(self) -> tuple[NDArray[np.generic], NDArray[np.uint8]]:
        planes, quality = [], np.full(self.grid.space, np.uint8(Quality.BACKGROUND))
        for source, reading in zip(self.sources, self.readings, strict=True):
            volume = canonical(source, self.header, reading)
            values, known = self.respacing.linear(reading.values(volume.stored, source.header), volume.known)
            air = self.respacing.nearest(volume.known & ~volume.body)
            quality[~air] &= ~np.uint8(Quality.BACKGROUND)
            values = reading.cut(values)
            for where, flag in ((volume.outside, Quality.OUTSIDE), (volume.excluded, Quality.EXCLUDED)):
                if where is not None:
                    here = self.respacing.nearest(where)
                    quality[here] |= np.uint8(flag)
                    known = known | here
                    values = values if flag == Quality.OUTSIDE else np.where(here, 0, values)
            quality[~known] |= np.uint8(Quality.NOT_FINITE)
            planes.append(values.astype(self.dtype, copy=False))
        return np.stack(planes), quality


def canonical(source: VolumeSource, like: VolumeHeader, reading: Reading) -> Canonical:
    """The voxels of a scan in the canonical order of a lattice that is its own or `covers` it."""
    header = source.header
    values = source.stored()
    stored = np.ascontiguousarray(like.to_canonical(values if header == like else header.to_order_of(like, values)))
    del values  # as large as the volume
    return reading.sort(stored, like, header)


def inside(window: Window, space: tuple[int, ...]) -> Window:
    """The window, if it lies inside of `space`."""
    fits = len(window) == len(space) and all(
        part.start is not None and part.stop is not None and part.step in (None, 1) and 0 <= part.start < part.stop <= size
        for part, size in zip(window, space, strict=False)
    )
    if not fits:
        raise SceneError(f"the window {window} does not lie inside the grid of {space}; give a start and a stop within it for every axis")
    return window


def _stamps(files: tuple[Path, ...]) -> tuple[tuple[Path, int, int], ...]:
    """What changes when a file does."""
    return tuple((path, status.st_mtime_ns, status.st_size) for path in files for status in [path.stat()])


@contextmanager
def reasons() -> Iterator[None]:
    """Turns what goes wrong while a file is read into a SceneError that says it without the file's name."""
    try:
        yield
    except EOFError as error:
        raise SceneError("truncated: the gzip stream ends early; copy it again", "truncated") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise SceneError(f"damaged gzip: {error}; copy it again", "damaged_gzip") from error
    except OSError as error:
        raise SceneError(f"cannot be read: {error.strerror or type(error).__name__}", "unreadable") from error


@contextmanager
def about(what: str) -> Iterator[None]:
    """Puts the pseudonym of what is read before a SceneError, and shows nothing of its cause, which could name a file."""
    try:
        with reasons():
            yield
    except SceneError as error:
        raise SceneError(f"{what}: {error}", error.code) from None


class Recent(Generic[T]):
    """The result of the last load, for all threads of a process.

    One load at a time, and what was kept goes first, so that memory is bounded by one volume and a worker's does not grow.
    """

    def __init__(self) -> None:
        self._items: dict[Hashable, T] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable, load: Callable[[], T]) -> T:
        """What `load` gave for this key, or gives now."""
        with self._lock:
            if key not in self._items:
                self._items.clear()
                self._items[key] = load()
            return self._items[key]


_VOLUMES: Recent[tuple[NDArray[np.generic], NDArray[np.uint8]]] = Recent()
_LABELS: Recent[NDArray[np.generic]] = Recent()
