"""Class numbers from a raster on the grid of an image: pixel by pixel where the lattices agree, else the nearest pixel on the ground."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.warp import transform

from modalities.grid import Grid, Window
from modalities.raster_file import BROKEN, BandFile, RasterFile, inspect, read_bands, same_frame
from modalities.resample import ALIGNED, is_placed, relate
from modalities.scene import Channel, LabelMap, SceneError

NODE_STEP = 16
"""Pixels between places that are carried to another CRS exactly; between them the way is straight to a few millimetres on the ground."""

BENT = 0.01
"""Share of a label pixel by which that way may be wrong; beyond it every pixel is carried by itself."""

BLOCK = 512
SOURCE_SIDE = 4096
"""Rows and columns of the image that are worked on at once, and, roughly, of label pixels that are held for them."""


class NoOverlapError(SceneError):
    """The labels cover no part of the image."""


@dataclass(frozen=True)
class RasterLabels:
    """Class numbers from a raster on the lattice of a scene, `first` being the scene's first pixel in it."""

    band: BandFile
    grid: Grid
    first: tuple[int, int]

    def read(self, window: Window) -> NDArray[np.int64]:
        """Class numbers; -1 at nodata, under the raster's mask, beyond its edge and for negative numbers."""
        check_window(window, self.grid, str(self.band.path))
        labels = np.full([part.stop - part.start for part in window], -1, np.int64)
        begin = [part.start + first for part, first in zip(window, self.first, strict=True)]
        source = tuple(slice(max(b, 0), min(b + n, size)) for b, n, size in zip(begin, labels.shape, self.band.grid.space, strict=True))
        if any(part.stop <= part.start for part in source):
            return labels
        into = tuple(slice(part.start - b, part.stop - b) for part, b in zip(source, begin, strict=True))
        labels[into] = _class_numbers(self.band, source)
        return labels


@dataclass(frozen=True)
class NearestLabels:
    """Class numbers of the label pixel that the centre of each of the scene's pixels lies on, wherever and however turned it is.

    Every pixel is found by its own place, so any window gives the numbers of the whole.

    Attributes:
        band: The labels.
        grid: Of the scene.
        step: Pixels between those carried to the labels' CRS exactly; 1 for all of them.
    """

    band: BandFile
    grid: Grid
    step: int = NODE_STEP

    def read(self, window: Window) -> NDArray[np.int64]:
        """Class numbers; -1 at nodata, under the raster's mask, beyond its edge and for negative numbers."""
        check_window(window, self.grid, str(self.band.path))
        labels = np.full([part.stop - part.start for part in window], -1, np.int64)
        linear, _ = relate(self.grid, self.band.grid) if same_frame(self.grid.frame, self.band.grid.frame) else _slope(self)
        finest = max(float(np.abs(linear).max()), 1e-6)
        for part in blocks(window, int(np.clip(SOURCE_SIDE / finest, NODE_STEP, BLOCK))):
            into = tuple(slice(own.start - whole.start, own.stop - whole.start) for own, whole in zip(part, window, strict=True))
            labels[into] = self._block(part)
        return labels

    def _block(self, window: Window) -> NDArray[np.int64]:
        # Rounding first, so that a pixel on the line between two label pixels does not fall here or there by the last bit.
        index = np.floor(np.round(label_index(self.grid, self.band.grid, window, self.step), 6) + 0.5)
        size = np.array(self.band.grid.space).reshape(2, 1, 1)
        inside = (np.isfinite(index) & (index >= 0) & (index < size)).all(axis=0)
        labels = np.full(inside.shape, -1, np.int64)
        if inside.any():
            rows, columns = index[:, inside].astype(np.int64)
            top, left = int(rows.min()), int(columns.min())
            source = (slice(top, int(rows.max()) + 1), slice(left, int(columns.max()) + 1))
            labels[inside] = _class_numbers(self.band, source)[rows - top, columns - left]
        return labels


def open_raster_labels(path: Path, grid: Grid, name: str, *, reproject: bool = True) -> tuple[LabelMap, str]:
    """The class numbers in a single-band raster on an image's grid, and what was done to them; an empty text for nothing.

    The raster may reach further than the image, or less far.

    Args:
        path: The raster.
        grid: Of the image.
        name: What the image is called.
        reproject: Whether labels on another lattice or in another CRS are taken.

    Raises:
        NoOverlapError: The two lie apart.
        SceneError: It cannot be read, is no raster of class numbers, or lies on another grid and may not be reprojected.
    """
    header = _header(path)
    labels = header.grid
    band = BandFile(path, header.indexes[0], Channel("labels"), labels, header.dtypes[0], header.nodata[0], block=header.block)
    apart = NoOverlapError(f"{path} covers no part of {name}: labels {describe(labels)}, image {describe(grid)}")
    alike = same_frame(grid.frame, labels.frame)
    unplaced = not is_placed(grid) or not is_placed(labels)
    if alike and not (unplaced and grid.space != labels.space):
        linear, offset = relate(grid, labels)
        whole = np.round(offset)
        if (np.abs(linear - np.eye(2)) * np.array(grid.space)).max() <= ALIGNED and np.abs(offset - whole).max() <= ALIGNED:
            first, size = whole.astype(int), np.array(labels.space)
            if (first >= size).any() or (first + np.array(grid.space) <= 0).any():
                raise apart
            return RasterLabels(band, grid, (int(first[0]), int(first[1]))), ""
    other = f"{path} does not lie on the grid of {name}: the labels have {describe(labels)}, the image has {describe(grid)}"
    if unplaced or not (alike or (grid.frame and labels.frame)):
        raise SceneError(f"{other}; without a CRS on both sides nothing relates them. Write the labels with the image's CRS and affine")
    if not reproject:
        raise SceneError(f"{other}. Reproject them with nearest neighbour to the image's grid, or give label_options.reproject=true")
    found = NearestLabels(band, grid)
    if not _touches(found):
        raise apart
    if not alike and _bend(found) > BENT:
        found = NearestLabels(band, grid, 1)
    return found, f"reprojected with nearest neighbour from {describe(labels)} to {describe(grid)}"


def blocks(window: Window, side: int) -> Iterator[Window]:
    """Parts of a window, cut where rows and columns of the whole grid are multiples of `side`."""
    starts = [[part.start, *range((part.start // side + 1) * side, part.stop, side)] for part in window]
    for top, bottom in zip(starts[0], [*starts[0][1:], window[0].stop], strict=True):
        for left, right in zip(starts[1], [*starts[1][1:], window[1].stop], strict=True):
            yield slice(top, bottom), slice(left, right)


def label_index(grid: Grid, labels: Grid, window: Window, step: int) -> NDArray[np.float64]:
    """Row and column `(2, *window)` in a label raster of the centres of an image's pixels; whole numbers are centres of label pixels."""
    if same_frame(grid.frame, labels.frame):
        linear, offset = relate(grid, labels)
        rows, columns = np.ogrid[window[0].start : window[0].stop, window[1].start : window[1].stop]
        return np.stack([linear[axis, 0] * rows + linear[axis, 1] * columns + offset[axis] for axis in range(2)])
    nodes = [np.arange(part.start // step, (part.stop - 1) // step + 1 + (step > 1)) * step for part in window]
    exact = _carried(grid, labels, np.stack(np.meshgrid(*nodes, indexing="ij")).astype(np.float64))
    if step == 1:
        return exact
    for axis, part in enumerate(window):
        where = np.arange(part.start, part.stop)
        low = where // step - part.start // step
        share = np.expand_dims((where % step) / step, (0, 2 - axis))
        with np.errstate(invalid="ignore"):
            exact = exact.take(low, axis + 1) * (1 - share) + exact.take(low + 1, axis + 1) * share
    return exact


def _carried(grid: Grid, labels: Grid, index: NDArray[np.float64]) -> NDArray[np.float64]:
    """Exact places `(2, …)` in the label raster of places `(2, …)` in the image; not finite where the labels' CRS does not reach."""
    flat = index.reshape(2, -1)
    matrix = grid.matrix
    x, y = matrix[:2, :2] @ flat + matrix[:2, 2:]
    world = carry(grid.frame, labels.frame, x, y)
    inverse = np.linalg.inv(labels.matrix[:2, :2])
    with np.errstate(invalid="ignore"):
        return (inverse @ (world - labels.matrix[:2, 2:])).reshape(index.shape)


def carry(frame: str, into: str, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Coordinates `(2, n)` in the CRS `into` of coordinates in the CRS `frame`, x before y in both; infinite where it has none.

    Raises:
        SceneError: One of the two is no CRS.
    """
    try:
        ends = CRS.from_user_input(frame), CRS.from_user_input(into)
    except BROKEN as error:
        raise SceneError(f"no way leads from CRS {frame[:60]} to {into[:60]}: {error}") from error
    return _carry(ends, np.stack([x, y]))


def _carry(ends: tuple[CRS, CRS], places: NDArray[np.float64]) -> NDArray[np.float64]:
    try:
        return np.array(transform(*ends, *places.tolist())[:2], dtype=np.float64)
    except BROKEN:
        # One place that a CRS does not reach spoils all that go with it, so the two halves go by themselves.
        half = places.shape[1] // 2
        if not half:
            return np.full(places.shape, np.inf)
        return np.concatenate([_carry(ends, places[:, :half]), _carry(ends, places[:, half:])], axis=1)


def check_window(window: Window, grid: Grid, name: str) -> None:
    """Refuses a window that leaves a grid of rows and columns."""
    if len(window) != 2 or any(not 0 <= part.start < part.stop <= size for part, size in zip(window, grid.space, strict=True)):
        raise SceneError(f"the window {window} leaves {name}, which has {grid.space[0]} rows and {grid.space[1]} columns")


def describe(grid: Grid) -> str:
    """CRS, size and pixel size in words."""
    pixel = " × ".join(f"{step:.10g}" for step in grid.spacing)
    frame = grid.frame if len(grid.frame) < 40 else CRS.from_user_input(grid.frame).to_dict().get("proj", "of its own")
    return f"CRS {frame or 'none'}, {grid.space[0]}×{grid.space[1]} pixels of {pixel}"


def _header(path: Path) -> RasterFile:
    try:
        header = inspect(path, path.name, colour_table=True)
    except SceneError as error:
        raise SceneError(f"the labels {path} cannot be used: {error}") from error
    if header.count != 1 or np.dtype(header.dtypes[0]).kind not in "iuf":
        raise SceneError(f"{path} has {header.count} bands of {header.dtypes[0]}; labels are one band of whole numbers")
    return header


def _class_numbers(band: BandFile, source: Window) -> NDArray[np.int64]:
    """Class numbers of a window of the file; -1 for none."""
    values, flags = (found[0] for found in read_bands([band], source))
    wide = values.astype(np.float64 if values.dtype.kind == "f" else np.int64)
    usable = np.where(flags == 0, wide, -1)
    broken = usable[usable != np.rint(usable)]
    if broken.size:
        raise SceneError(f"{band.path} holds numbers that are not whole, such as {broken[0]}; labels are class numbers")
    return np.maximum(usable, -1).astype(np.int64)


def _corners(grid: Grid) -> NDArray[np.float64]:
    """Rows and columns `(2, 33, 33)` spread over the whole grid from edge to edge."""
    return np.stack(np.meshgrid(*(np.linspace(-0.5, size - 0.5, 33) for size in grid.space), indexing="ij"))


def _touches(labels: NearestLabels) -> bool:
    """Whether the boxes around both overlap, seen from the label raster and from the image."""
    for one, other in ((labels.grid, labels.band.grid), (labels.band.grid, labels.grid)):
        if same_frame(one.frame, other.frame):
            linear, offset = relate(one, other)
            places = linear @ _corners(one).reshape(2, -1) + offset[:, None]
        else:
            places = _carried(one, other, _corners(one)).reshape(2, -1)
        places = places[:, np.isfinite(places).all(axis=0)]
        if not places.size or (places.max(axis=1) <= -0.5).any() or (places.min(axis=1) >= np.array(other.space) - 0.5).any():
            return False
    return True


def _bend(labels: NearestLabels) -> float:
    """Label pixels by which the straight way between nodes is wrong at most, at the middles of cells spread over the image."""
    rows, columns = (np.unique(np.linspace(0, max(size - 1, 0) // NODE_STEP, 17).astype(int)) * NODE_STEP for size in labels.grid.space)
    corners = np.stack(np.meshgrid(rows, columns, indexing="ij")).astype(np.float64)

    def at(down: float, right: float) -> NDArray[np.float64]:
        return _carried(labels.grid, labels.band.grid, corners + NODE_STEP * np.array([down, right]).reshape(2, 1, 1))

    with np.errstate(invalid="ignore"):
        off = np.abs(at(0.5, 0.5) - (at(0, 0) + at(0, 1) + at(1, 0) + at(1, 1)) / 4)
    return float(np.where(np.isfinite(off), off, np.inf).max())


def _slope(labels: NearestLabels) -> tuple[NDArray[np.float64], None]:
    """Label pixels per pixel of the image, row by row and column by column, in the middle of the image."""
    middle = np.array(labels.grid.space, dtype=np.float64)[:, None] / 2
    places = _carried(labels.grid, labels.band.grid, middle + np.array([[0, 1, 0], [0, 0, 1]]))
    slope = places[:, 1:] - places[:, :1]
    return np.where(np.isfinite(slope), slope, 1.0), None
