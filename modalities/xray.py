"""X-ray pictures as scenes of two axes that lie on no map, in grey values of which more means denser, whatever the file calls black."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from modalities.grey_png import read_png, write_png
from modalities.grid import Grid, Window
from modalities.quality import Quality
from modalities.scene import Channel, SceneError
from modalities.spacing import Respacing
from modalities.volume import Recent, about, inside, reasons


class Picture(Protocol):
    """The file of one picture. Frozen and picklable; its representation shows no path."""

    @property
    def path(self) -> Path:
        """The file."""
        ...

    @property
    def padding(self) -> int | None:
        """Stored value that fills what was not exposed; None for none."""
        ...

    def stored(self) -> NDArray[Any]:
        """The grey values `(row, column)` as stored.

        Raises:
            SceneError: The file is damaged or has changed; without its name.
        """
        ...

    def meant(self, stored: NDArray[Any]) -> NDArray[Any]:
        """What stored values stand for, but for a slope and an intercept, which move no order and no share of a range."""
        ...

    def fed(self, stored: NDArray[Any]) -> NDArray[Any]:
        """What a scene holds: `meant`, or what it is shown as where that is asked for and is no straight line."""
        ...


@dataclass(frozen=True)
class PngPicture:
    """A grey PNG; nobody knows what its values were made of or how large a pixel is."""

    path: Path = field(repr=False)
    space: tuple[int, int]
    padding: int | None = None

    def stored(self) -> NDArray[Any]:
        """See `Picture.stored`."""
        values = read_png(self.path)
        if values.shape != self.space:
            raise SceneError("its size has changed since it was scanned; scan again", "changed")
        return values

    def meant(self, stored: NDArray[Any]) -> NDArray[Any]:
        """See `Picture.meant`: nobody says more."""
        return stored

    def fed(self, stored: NDArray[Any]) -> NDArray[Any]:
        """See `Picture.fed`."""
        return stored


@dataclass(frozen=True)
class FoundPicture:
    """A picture that was found and not yet judged.

    Attributes:
        picture: Its file.
        space: Rows and columns.
        place, patient, session: What names it, its patient and the visit in the archive; they leave this program in no form but a keyed
            hash. A session may be empty.
        channel: Name of the channel.
        modality: `CR`, `DX`, `MG`; empty where the file does not say.
        flags: What is doubtful about it.
        spacing_mm: Between rows and between columns; None where nobody knows.
        slope, intercept: Physical value = `picture.meant` · slope + intercept.
        is_inverted: Whether higher values are meant to be shown darker.
        window: Lowest and highest physical value that it is to be cut to; None for none.
        is_shown: Whether `picture.fed` gives what is shown, in which slope, intercept and window have done their part.
    """

    picture: Picture = field(repr=False)
    space: tuple[int, int]
    place: str = field(repr=False)
    patient: str = field(repr=False)
    session: str = field(default="", repr=False)
    channel: str = "XR"
    modality: str = ""
    flags: tuple[str, ...] = ()
    spacing_mm: tuple[float, float] | None = None
    slope: float = 1.0
    intercept: float = 0.0
    is_inverted: bool = False
    window: tuple[float, float] | None = None
    is_shown: bool = False


@dataclass(frozen=True)
class XrayLabels:
    """Class numbers of a PNG of the size of a picture, on the grid of its scene."""

    path: Path = field(repr=False)
    respacing: Respacing

    def read(self, window: Window) -> NDArray[np.int64]:
        """See `LabelMap.read`; every pixel has a number."""
        with about("the labels"), reasons():
            labels = _LABELS.get((self, *_stamp(self.path)), self._load)
            return labels[inside(window, labels.shape)].astype(np.int64)

    def native(self) -> NDArray[Any]:
        """Class numbers on the pixels of the file, not resampled."""
        with about("the labels"):
            return self._stored()

    def _load(self) -> NDArray[Any]:
        return self.respacing.nearest(self._stored())

    def _stored(self) -> NDArray[Any]:
        values = read_png(self.path, palette=True)
        if values.shape != self.respacing.source:
            raise SceneError(
                f"a label picture of {values.shape} for a picture of {self.respacing.source}; bring it to the same size", "labels_elsewhere"
            )
        return values


@dataclass(frozen=True)
class XrayScene:
    """A picture at the wanted spacing, as `Respacing.to` puts it.

    `Quality.OUTSIDE` is what was not exposed: the padding value of a DICOM file, and rows and columns along an edge that hold the
    value of the corner and nothing else, as blackened or cut-off borders do. A border with noise in it (the shadow of a collimator)
    counts as picture.

    Attributes:
        name, group: Pseudonyms of the picture and of the patient.
        picture: Its file.
        grid: Rows and columns in mm, or in pixels where nobody knows how large one is; without a frame, for it lies on no map.
        channels: One.
        voxel_digests: One.
        dtype: Of what is fed.
        respacing: From the file's pixels to those of the scene.
        low, high: What is fed is cut to these.
        patients: See `Scene.patients`.
    """

    name: str
    group: str
    picture: Picture = field(repr=False)
    grid: Grid
    channels: tuple[Channel, ...]
    voxel_digests: tuple[str, ...]
    dtype: np.dtype[np.generic]
    respacing: Respacing
    low: float = -np.inf
    high: float = np.inf
    patients: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        """See `Scene.files`."""
        return (self.picture.path,)

    @property
    def block(self) -> tuple[int, ...]:
        """The whole picture: no part of it unpacks alone."""
        return self.grid.space

    @property
    def times(self) -> tuple[str, ...]:
        """None: the dates of patients leave no archive."""
        return ()

    @property
    def spacing(self) -> tuple[float, ...]:
        """Distance between rows and between columns of the file: in mm, or 1 where nobody knows it (`grid.unit` is then not mm)."""
        return tuple(float(size) / step for size, step in zip(self.grid.spacing, self.respacing.step, strict=True))

    @property
    def label_suffix(self) -> str:
        """Ending of a written label file."""
        return ".png"

    def read(self, window: Window) -> tuple[NDArray[np.generic], NDArray[np.uint8]]:
        """See `Scene.read`."""
        with about(self.name), reasons():
            part = inside(window, self.grid.space)
            values, quality = _PICTURES.get((self, *_stamp(self.picture.path)), self._load)
            return values[part][None].copy(), quality[part].copy()

    def open_labels(self, path: Path) -> XrayLabels:
        """See `Scene.open_labels`: a PNG of the same size, whose values are class numbers."""
        labels = XrayLabels(path, self.respacing)
        with about(f"labels of {self.name}"):
            labels.read(tuple(slice(0, 1) for _ in self.grid.space))
        return labels

    def native(self, labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Labels `(row, column)` of this scene's grid on the pixels of its file."""
        return np.asarray(self.respacing.nearest_back(labels), np.uint8)

    def write_labels(self, path: Path, labels: NDArray[np.uint8], no_label: int) -> None:
        """See `Scene.write_labels`: a PNG of the size of the file."""
        if not path.name.endswith(self.label_suffix):
            raise SceneError(f"labels of an X-ray picture are written as {self.label_suffix}, not as {path.suffix or 'none'}; change it")
        if labels.shape != self.grid.space or labels.dtype != np.uint8 or not 0 <= no_label <= 255:
            raise SceneError(
                f"{self.name}: got labels {labels.dtype} of shape {labels.shape} and no_label {no_label}; "
                f"wanted uint8 of shape {self.grid.space} and a number from 0 to 255"
            )
        write_png(path, self.native(labels))

    def _load(self) -> tuple[NDArray[Any], NDArray[np.uint8]]:
        stored = self.picture.stored()
        exposed = exposed_of(stored, self.picture.padding)
        values, known = self.respacing.linear(self.picture.fed(stored), exposed)
        low, high = self.low, self.high
        if values.dtype.kind in "iu":
            limits = np.iinfo(values.dtype)
            low, high = max(np.ceil(low), limits.min), min(np.floor(high), limits.max)
        known = known & self.respacing.nearest(exposed)
        quality = np.where(known, np.uint8(0), np.uint8(Quality.OUTSIDE))
        return np.clip(values, values.dtype.type(low), values.dtype.type(high)), quality


def exposed_of(stored: NDArray[Any], padding: int | None) -> NDArray[np.bool_]:
    """Where a picture was exposed: not where it holds the padding value, nor rows and columns at its edges that hold a corner's alone."""
    exposed = np.ones(stored.shape, dtype=bool) if padding is None else stored != padding
    for corner in {stored[0, 0].item(), stored[0, -1].item(), stored[-1, 0].item(), stored[-1, -1].item()}:
        for axis in (0, 1):
            lines = (stored == corner).all(axis=1 - axis)
            for order in (slice(None), slice(None, None, -1)):
                count = int(np.argmin(lines[order])) if not lines.all() else len(lines)
                edge = slice(0, count) if order.step is None else slice(len(lines) - count, len(lines))
                exposed[(edge, slice(None)) if axis == 0 else (slice(None), edge)] = False
    return exposed


def _stamp(path: Path) -> tuple[Path, int, int]:
    status = path.stat()
    return path, status.st_mtime_ns, status.st_size


_PICTURES: Recent[tuple[NDArray[Any], NDArray[np.uint8]]] = Recent()
_LABELS: Recent[NDArray[Any]] = Recent()
