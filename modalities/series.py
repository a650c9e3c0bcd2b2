"""Dates of one place, sensor and lattice become one scene with a third axis: (time, row, column)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator

from modalities.grid import Grid, Window
from modalities.landsat import LandsatSettings
from modalities.place import Placed
from modalities.raster import RasterSettings
from modalities.satellite import Found, SatelliteSettings, scan_images
from modalities.scene import AdapterSettings, Channel, LabelMap, Rejected, SceneError
from modalities.sentinel1 import Sentinel1Settings
from modalities.sentinel2 import Sentinel2Settings

Alike = tuple[str, str, tuple[tuple[str, str, str, int], ...]]
"""Reader, place, and name, unit, level and footprint of each channel: what dates must have in common besides the lattice."""


class SeriesSettings(AdapterSettings):
    """How images become time series.

    Attributes:
        of: How the images are read; without a kind, as a folder of mixed products.
        dates: Length of a series: a place's dates in order of time are cut into runs of so many.
        min_dates: What is left over becomes a shorter series from so many on, padded in the store; `dates` if left out.
        exclude: Globs of relative paths or file names that are not looked at.
    """

    kind: Literal["series"] = "series"
    of: Annotated[
        SatelliteSettings | Sentinel2Settings | Sentinel1Settings | LandsatSettings | RasterSettings, Field(discriminator="kind")
    ] = SatelliteSettings()
    dates: int = Field(ge=2, le=1000)
    min_dates: int | None = Field(None, ge=2)
    exclude: tuple[str, ...] = ()

    @field_validator("of", mode="before")
    @classmethod
    def _of_mixed_products(cls, reader: object) -> object:
        return {"kind": "satellite", **reader} if isinstance(reader, dict) else reader

    @model_validator(mode="after")
    def _no_more_than_there_are(self) -> SeriesSettings:
        if self.min_dates is not None and self.min_dates > self.dates:
            raise ValueError(f"min_dates is {self.min_dates}, but a series has {self.dates} dates only")
        return self

    @property
    def least(self) -> int:
        """Dates that a series has at least."""
        return self.dates if self.min_dates is None else self.min_dates


@dataclass(frozen=True)
class SeriesScene:
    """Images of one place on one lattice, one after the other.

    The first index counts dates: its steps are no distances in time, which is why `times` has one entry for each.
    Where scale or offset of a channel change from date to date, `read` gives physical values, as float32.
    A label map is of the place: the same for every date when read; written, it has what most dates say.
    """

    name: str
    group: str
    images: tuple[Placed, ...]

    @property
    def files(self) -> tuple[Path, ...]:
        """Those of all dates, in order."""
        return tuple(file for image in self.images for file in image.files)

    @property
    def grid(self) -> Grid:
        """(time, row, column) to (number of the date, x, y), from the first date's lattice, which is every date's."""
        flat = self.images[0].grid
        matrix = np.eye(4)
        matrix[1:, 1:] = flat.matrix
        return Grid.from_matrix((len(self.images), *flat.space), matrix, flat.frame, flat.unit)

    @property
    def block(self) -> tuple[int, ...]:
        """One date of the largest block of any."""
        return (1, *(max(sizes) for sizes in zip(*(image.block for image in self.images), strict=True)))

    @property
    def channels(self) -> tuple[Channel, ...]:
        """The first date's; as physical values where dates differ in scale or offset."""
        first = self.images[0].channels
        return first if self._stored_alike else tuple(replace(channel, scale=1.0, offset=0.0) for channel in first)

    @property
    def times(self) -> tuple[str, ...]:
        """One per date, rising."""
        return tuple(image.times[0] for image in self.images)

    @property
    def voxel_digests(self) -> tuple[str, ...]:
        """None: images are told apart by their place."""
        return ()

    @property
    def patients(self) -> tuple[str, ...]:
        """None: images show places."""
        return ()

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """That all dates fit in; float32 for physical values."""
        common = np.result_type(*(image.dtype for image in self.images))
        return np.dtype(np.float32) if common == np.float64 or not self._stored_alike else common

    @property
    def label_suffix(self) -> str:
        """That of the images."""
        return self.images[0].label_suffix

    @property
    def _stored_alike(self) -> bool:
        return len({tuple((channel.scale, channel.offset) for channel in image.channels) for image in self.images}) == 1

    def read(self, window: Window) -> tuple[NDArray[np.generic], NDArray[np.uint8]]:
        """Pixels `(channel, time, row, column)` and quality `(time, row, column)`."""
        dates, inside = _split(window, self.grid, self.name)
        space = [part.stop - part.start for part in window]
        pixels = np.empty((len(self.channels), *space), self.dtype)
        quality = np.empty(space, np.uint8)
        for place, image in enumerate(self.images[dates]):
            values, quality[place] = image.read(inside)
            if self._stored_alike:
                pixels[:, place] = values
                continue
            for number, channel in enumerate(image.channels):
                with np.errstate(over="ignore", invalid="ignore"):
                    pixels[number, place] = values[number].astype(np.float64) * channel.scale + channel.offset
        return pixels, quality

    def open_labels(self, path: Path) -> SeriesLabels:
        """The class numbers of a map on the images' lattice, the same for every date."""
        return SeriesLabels(self.images[0].open_labels(path), self.grid)

    def write_labels(self, path: Path, labels: NDArray[np.uint8], no_label: int) -> None:
        """One map of the place: for every pixel the class that most dates have, of equally many the lower number."""
        if labels.shape != self.grid.space or labels.dtype != np.uint8:
            raise SceneError(f"labels for {self.name} must be uint8 of shape {self.grid.space}, got {labels.dtype} of shape {labels.shape}")
        self.images[0].write_labels(path, most_frequent(labels, no_label), no_label)


@dataclass(frozen=True)
class SeriesLabels:
    """A map of classes, repeated for every date of a series."""

    flat: LabelMap
    grid: Grid

    def read(self, window: Window) -> NDArray[np.int64]:
        """Class numbers `(time, row, column)`; -1 where there is no label."""
        dates, inside = _split(window, self.grid, "the labels of a series")
        labels = self.flat.read(inside)
        return np.repeat(labels[None], dates.stop - dates.start, axis=0)


def most_frequent(labels: NDArray[np.uint8], no_label: int) -> NDArray[np.uint8]:
    """Per pixel of `(time, row, column)` the class that most dates have; `no_label` only where no date has another."""
    values = [int(value) for value in np.unique(labels) if value != no_label]
    best = np.full(labels.shape[1:], no_label, np.uint8)
    most = np.zeros(labels.shape[1:], np.int64)
    for value in values:
        number = np.count_nonzero(labels == value, axis=0)
        best[number > most] = value
        most = np.maximum(most, number)
    return best


def scan_series(files: Sequence[Path], folder: Path, settings: SeriesSettings) -> Found:
    """Series of the images in the files; images that are in none are rejected, file by file, with the reason.

    Images go together when the same adapter read them, they show the same place on exactly the same lattice, and their
    channels have the same names, units, levels and footprints. Of two at the same time the first by name is taken.
    """
    found = scan_images(files, folder, settings.of)
    alike: defaultdict[tuple[Alike, Grid], list[Placed]] = defaultdict(list)
    rejected: list[Rejected] = [replace(item, reason=item.reason.replace("reader.", "reader.of.")) for item in found.rejected]

    def refuse(image: Placed, reason: str) -> None:
        rejected.extend(Rejected(file.relative_to(folder).as_posix(), reason) for file in image.files)

    for image in sorted(found.scenes, key=lambda image: image.name):
        if len(image.times) == 1:
            alike[_alike(image, found.readers), image.grid].append(image)
        else:
            refuse(image, "when it was acquired is not known, so it has no place in a series")
    series: list[SeriesScene] = []
    of_kind = Counter(kind for (kind, _), images in alike.items() for _ in images)
    for (kind, _), images in alike.items():
        elsewhere = of_kind[kind] - len(images)
        dated: dict[str, Placed] = {}
        for image in images:
            if dated.setdefault(image.times[0], image) is not image:
                refuse(image, f"{dated[image.times[0]].name} shows the same place at the same time")
        for part in _runs([dated[time] for time in sorted(dated)], settings.dates):
            if len(part) >= settings.least:
                series.append(SeriesScene(part[0].name, part[0].group, tuple(part)))
            else:
                for image in part:
                    refuse(image, _too_few(len(dated), len(part), elsewhere, settings))
    readers = {scene.name: f"series of {found.readers[scene.name]}" for scene in series}
    return Found(tuple(series), tuple(rejected), found.ignored, readers, found.notes)


def _alike(image: Placed, readers: Mapping[str, str]) -> Alike:
    channels = tuple((channel.name, channel.unit, channel.level, channel.footprint) for channel in image.channels)
    return readers[image.name], image.group, channels


def _runs(images: Sequence[Placed], length: int) -> Iterator[Sequence[Placed]]:
    return (images[start : start + length] for start in range(0, len(images), length))


def _too_few(dates: int, left: int, elsewhere: int, settings: SeriesSettings) -> str:
    other = f"; {elsewhere} more images of it lie on another lattice: warp them to one" if elsewhere else ""
    of_all = "" if left == dates else f", {left} of which are left over from series of {settings.dates}"
    return f"its place has {dates} dates with these channels on this lattice{of_all}, where a series needs {settings.least}{other}"


def _split(window: Window, grid: Grid, name: str) -> tuple[slice, Window]:
    """The dates of a window, and its rows and columns.

    Raises:
        SceneError: It leaves the series.
    """
    inside = len(window) == 3 and all(0 <= part.start < part.stop <= size for part, size in zip(window, grid.space, strict=True))
    if not inside:
        raise SceneError(f"the window {window} leaves {name}, which has {' × '.join(map(str, grid.space))} dates, rows and columns")
    return window[0], window[1:]
