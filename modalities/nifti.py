"""NIfTI volumes as scenes: one file is one sequence; RAS+, at a stated spacing, with air flagged.

A file is read whole, because nobody can begin in the middle of a gzip stream; a process keeps the last volume.
Names that leave this module are pseudonyms by an *unkeyed* hash: they keep file names out of stores and tracking, but whoever
knows a file name can recognise it. A keyed hash comes with the rest of the privacy work.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import threading
import zlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from modalities.grid import Grid, Window
from modalities.intensity import foreground, num_classes, robust_mean_std
from modalities.nifti_file import MAX_SPACING_MM, MIN_SPACING_MM, VolumeHeader, read_header, read_stored, write_like
from modalities.quality import Quality
from modalities.scene import AdapterSettings, Channel, Rejected, SceneError
from modalities.spacing import Respacing

T = TypeVar("T")
_SEQUENCES = {"t1": "T1w", "t1w": "T1w", "t2": "T2w", "t2w": "T2w", "flair": "FLAIR", "pd": "PD", "pdw": "PD"} | {
    name.lower(): name for name in ("T1ce", "T2star", "bold", "dwi", "adc", "swi", "angio")
}
_TOKEN = re.compile(rf"(?i)(?<![a-z0-9])({'|'.join(_SEQUENCES)})(?![a-z0-9])")
_ENTITY = re.compile(r"(?i)(?<![a-z0-9])(space|acq|desc|from|to|ref|rec)-[a-z0-9]+")
"""BIDS entities whose value may name a sequence other than the file's."""


class MriSettings(AdapterSettings):
    """How a folder of NIfTI volumes is read.

    Attributes:
        spacing_mm: Spacing of the scenes along the axes that lie closest to R, A and S; None keeps each file's own.
        exclude: Patterns of file names or relative paths to leave out, as in a shell.
        group_pattern: Regular expression, searched in the relative path; its first group that matches names the patient, whatever
            the case. Where nothing matches, the path without its sequence (`T1`, `FLAIR`…) does.
        sequence: Channel name of all files; None takes it from each file's name (`MR` where there is none).
        min_planes: Fewest voxels on an axis of a usable volume.
        orientation_unknown: What to do where sform and qform code are both 0: reject, or use the affine that nibabel
            assumes (left-handed, centred) and flag the scene `orientation_unknown`.
        max_voxels: Most voxels of a volume as stored and as resampled; looked at before any data is read.
    """

    kind: Literal["mri"] = "mri"
    spacing_mm: tuple[float, float, float] | None = (1.0, 1.0, 1.0)
    exclude: tuple[str, ...] = ()
    group_pattern: str = r"(?i)(?:^|[/_-])(sub-[a-z0-9]+|patient[-_]?[0-9]+)"
    sequence: str | None = Field(default=None, min_length=1)
    min_planes: int = Field(default=5, ge=1)
    orientation_unknown: Literal["reject", "use_affine"] = "use_affine"
    max_voxels: int = Field(default=1 << 28, ge=1)

    @field_validator("spacing_mm")
    @classmethod
    def _spacing(cls, value: tuple[float, float, float] | None) -> tuple[float, float, float] | None:
        if value is not None and not all(MIN_SPACING_MM <= v <= MAX_SPACING_MM for v in value):
            raise ValueError(f"every spacing must lie between {MIN_SPACING_MM} and {MAX_SPACING_MM} mm")
        return value

    @field_validator("group_pattern")
    @classmethod
    def _pattern(cls, value: str) -> str:
        try:
            groups = re.compile(value).groups
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        if not groups:
            raise ValueError("it needs a group in parentheses around what names the patient")
        return value


@dataclass(frozen=True)
class VolumeLabels:
    """Class numbers of a label volume on the grid of a scene. A label of -1 in the file means none."""

    path: Path = field(repr=False)
    header: VolumeHeader
    source: VolumeHeader
    respacing: Respacing

    def read(self, window: Window) -> NDArray[np.int64]:
        """See `LabelMap.read`."""
        with _about(self.path):
            labels = _LABELS.get((*_stamp(self.path), self), self._load)
            return labels[_inside(window, labels.shape)].astype(np.int64)

    def _load(self) -> NDArray[np.generic]:
        values = read_stored(self.path, self.header)
        if values.dtype.kind == "f" or (self.header.slope, self.header.intercept) != (1.0, 0.0):
            physical = values.astype(np.float64) * self.header.slope + self.header.intercept
            num_odd = int((~np.isfinite(physical) | (physical != np.rint(physical))).sum())
            if num_odd:
                raise SceneError(
                    f"{num_odd} voxels hold no whole number, but labels are class numbers; is this an image or a probability map?"
                )
            values = physical.astype(np.int64)
        in_source = self.header.to_order_of(self.source, values)
        return self.respacing.nearest(self.source.to_canonical(in_source))


@dataclass(frozen=True)
class VolumeScene:
    """A NIfTI volume in RAS+ at the wanted spacing: see `Respacing.to` for its lattice, `Respacing.linear` for its values.

    Oblique volumes keep their oblique axes. The lattice spans the measured voxel centres, so nothing is extrapolated
    and `Quality.OUTSIDE` does not occur. Integers stay integers; the channel's scale and offset make the z-score over
    the foreground between its 0.5 and 99.5 percentile, in which the file's own slope and intercept cancel but for their sign.

    Attributes:
        name, group: Pseudonyms of the relative path and of the patient.
        header: What the file said when it was scanned; a file that says something else later is an error.
        flags: What is doubtful and used all the same: `orientation_unknown`, `sform_qform_disagree`, `not_finite`.
        num_not_finite: Voxels of the file that hold no number.
        foreground_fraction: Share of the file's voxels that are not air.
    """

    name: str
    group: str
    files: tuple[Path, ...] = field(repr=False)
    grid: Grid
    channels: tuple[Channel, ...]
    dtype: np.dtype[np.generic]
    header: VolumeHeader
    respacing: Respacing
    flags: tuple[str, ...]
    num_not_finite: int
    foreground_fraction: float

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
        with _about(self.files[0]):
            inside = _inside(window, self.grid.space)
            values, quality = _VOLUMES.get((*_stamp(self.files[0]), self.header, self.respacing), self._load)
            return values[(np.newaxis, *inside)].copy(), quality[inside].copy()

    def open_labels(self, path: Path) -> VolumeLabels:
        """See `Scene.open_labels`; the labels may be stored in another orientation of the image's lattice."""
        with _about(path):
            header = read_header(path)
            if not header.covers(self.header):
                raise SceneError(
                    f"labels of shape {header.space} with affine {header.short} lie on another grid than {self.files[0].name} "
                    f"of shape {self.header.space} with affine {self.header.short}; resample them to the image with nearest neighbour"
                )
        labels = VolumeLabels(path, header, self.header, self.respacing)
        labels.read(tuple(slice(0, 1) for _ in self.grid.space))
        return labels

    def write_labels(self, path: Path, labels: NDArray[np.uint8], no_label: int) -> None:
        """See `Scene.write_labels`: uint8 in the source's axis order, with its affine, codes, units and NIfTI version.

        Every source voxel lies between voxels of the scene, so none has to be filled with `no_label`. The same labels give the
        same bytes.
        """
        if not path.name.endswith(self.label_suffix):
            raise SceneError(f"{path.name}: labels of a volume are written as {self.label_suffix}; change the ending")
        if labels.shape != self.grid.space or labels.dtype != np.uint8 or not 0 <= no_label <= 255:
            raise SceneError(
                f"{path.name}: got labels {labels.dtype} of shape {labels.shape} and no_label {no_label}; "
                f"wanted uint8 of shape {self.grid.space} and a number from 0 to 255"
            )
        with _about(self.files[0]):
            if read_header(self.files[0]) != self.header:
                raise SceneError("its header has changed since it was scanned; scan again")
        native = self.header.from_canonical(self.respacing.nearest_back(labels))
        write_like(self.files[0], path, native.astype(np.uint8, copy=False))

    def _load(self) -> tuple[NDArray[np.generic], NDArray[np.uint8]]:
        stored, finite, body = _canonical(self.files[0], self.header)
        values, known = self.respacing.linear(stored, finite)
        quality = np.where(known, np.uint8(0), np.uint8(Quality.NOT_FINITE))
        air = self.respacing.nearest(finite & ~body)
        quality[air.astype(bool)] |= np.uint8(Quality.BACKGROUND)
        return values, quality


def scan_volumes(files: Sequence[Path], folder: Path, settings: MriSettings) -> tuple[list[VolumeScene], list[Rejected]]:
    """A scene for every usable volume among `files`, and every other one with its reason; names are relative to `folder`.

    Reads every file to its end: the checksum of a gzip stream, numbers that are not finite and the z-score need it.
    """
    scenes, rejected = [], []
    for file in files:
        relative = file.relative_to(folder).as_posix()
        try:
            with _reasons():
                scenes.append(_scan_one(file, relative, settings))
        except SceneError as error:
            rejected.append(Rejected(relative, str(error)))
    return scenes, rejected


def _scan_one(path: Path, relative: str, settings: MriSettings) -> VolumeScene:
    header = read_header(path)
    if "orientation_unknown" in header.flags and settings.orientation_unknown == "reject":
        raise SceneError("orientation unknown: sform and qform code are both 0; repair the header or set orientation_unknown=use_affine")
    if min(header.space) < settings.min_planes:
        raise SceneError(f"{min(header.space)} planes on an axis of {header.space}; min_planes is {settings.min_planes}")
    canonical = header.canonical
    respacing = Respacing.to(canonical.space, canonical.spacing, settings.spacing_mm)
    for space, what in ((header.space, "stored"), (respacing.target, f"at {settings.spacing_mm} mm")):
        if np.prod(space, dtype=object) > settings.max_voxels:
            raise SceneError(f"{space} voxels {what} are more than max_voxels={settings.max_voxels}")
    stored, finite, body = _canonical(path, header)
    num_finite = int(np.count_nonzero(finite))
    if not num_finite:
        raise SceneError("no voxel holds a finite number")
    low, high = stored[finite].min(), stored[finite].max()
    if low == high:
        raise SceneError("all voxels are zero" if low == 0 else f"constant: all voxels hold {low}")
    classes = num_classes(stored)
    if classes is not None:
        raise SceneError(f"looks like a label map ({classes} values); keep labels in a folder of their own or exclude them")
    mean, std = robust_mean_std(stored[body])
    if std == 0.0:
        raise SceneError(f"the foreground is constant ({mean:g})")
    scale = float(np.sign(header.slope)) / std
    return VolumeScene(
        name=f"scan-{_pseudonym(relative)}",
        group=f"subject-{_pseudonym(_patient(relative, settings.group_pattern))}",
        files=(path,),
        grid=Grid.from_matrix(respacing.target, canonical.matrix @ respacing.matrix, "RAS+", "mm"),
        channels=(Channel(settings.sequence or _sequence(path.name), scale=scale, offset=-mean * scale),),
        dtype=stored.dtype,
        header=header,
        respacing=respacing,
        flags=header.flags if num_finite == finite.size else (*header.flags, "not_finite"),
        num_not_finite=finite.size - num_finite,
        foreground_fraction=float(np.count_nonzero(body) / body.size),
    )


def _canonical(path: Path, header: VolumeHeader) -> tuple[NDArray[np.generic], NDArray[np.bool_], NDArray[np.bool_]]:
    """Stored values in RAS+ order with 0 for what is not finite; what is finite; what is foreground."""
    if read_header(path) != header:
        raise SceneError("its header has changed since it was scanned; scan again")
    stored = np.ascontiguousarray(header.to_canonical(read_stored(path, header)))
    finite = np.isfinite(stored)
    body = foreground(stored if header.slope > 0 else -stored.astype(np.float64))
    stored[~finite] = 0
    return stored, finite, body


def _pseudonym(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def _patient(relative: str, pattern: str) -> str:
    """What names the patient in a relative path: the first group of `pattern` that matched, else the path without its sequence."""
    found = re.search(pattern, relative)
    named = next((text for text in found.groups() if text), None) if found else None
    if named is not None:
        return named.casefold()
    parts = [_TOKEN.sub("", part).strip("_-. ") for part in re.sub(r"(?i)\.nii(\.gz)?$", "", relative).split("/")]
    return "/".join(part for part in parts if part)


def _sequence(name: str) -> str:
    found = _TOKEN.findall(_ENTITY.sub("", name))
    return _SEQUENCES[found[-1].lower()] if found else "MR"


def _inside(window: Window, space: tuple[int, ...]) -> Window:
    fits = len(window) == len(space) and all(
        part.start is not None and part.stop is not None and part.step in (None, 1) and 0 <= part.start < part.stop <= size
        for part, size in zip(window, space, strict=False)
    )
    if not fits:
        raise SceneError(f"the window {window} does not lie inside the grid of {space}; give a start and a stop within it for every axis")
    return window


def _stamp(path: Path) -> tuple[Path, int, int]:
    """What changes when a file does."""
    status = path.stat()
    return path, status.st_mtime_ns, status.st_size


@contextmanager
def _reasons() -> Iterator[None]:
    """Turns what goes wrong while a file is read into a SceneError that says it without the file's name."""
    try:
        yield
    except EOFError as error:
        raise SceneError("truncated: the gzip stream ends early; copy it again") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise SceneError(f"damaged gzip: {error}; copy it again") from error
    except OSError as error:
        raise SceneError(f"cannot be read: {error.strerror or error}") from error


@contextmanager
def _about(path: Path) -> Iterator[None]:
    """Puts the file's name before a SceneError."""
    try:
        with _reasons():
            yield
    except SceneError as error:
        raise SceneError(f"{path.name}: {error}") from error


class _Recent(Generic[T]):
    """The result of the last load, for all threads of a process.

    One load at a time, and what was kept goes first, so that memory is bounded by one volume and a worker's does not grow.
    """

    def __init__(self) -> None:
        self._items: dict[Hashable, T] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable, load: Callable[[], T]) -> T:
        with self._lock:
            if key not in self._items:
                self._items.clear()
                self._items[key] = load()
            return self._items[key]


_VOLUMES: _Recent[tuple[NDArray[np.generic], NDArray[np.uint8]]] = _Recent()
_LABELS: _Recent[NDArray[np.generic]] = _Recent()
