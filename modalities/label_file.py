"""Class numbers from polygons and points in a GeoPackage, GeoJSON or Shapefile, burnt onto the grid of an image."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyogrio
from numpy.typing import NDArray
from pydantic import Field, field_validator
from pyogrio.errors import DataLayerError, DataSourceError, FieldError, GeometryError
from rasterio.crs import CRS
from rasterio.errors import CRSError

from modalities.grid import Grid, Window
from modalities.label_raster import BLOCK, NoOverlapError, blocks, carry, check_window, describe
from modalities.raster_file import REMOTE, plain
from modalities.resample import is_placed
from modalities.scene import AdapterSettings, SceneError
from modalities.shapes import Shapes, burn, metres_per_unit, on_grid, parse

DRIVERS = {".gpkg": "GPKG", ".geojson": "GeoJSON", ".json": "GeoJSON", ".shp": "ESRI Shapefile"}
"""The one driver that reads a file of each ending; its first bytes are looked at before it is opened."""

MAX_BYTES = 1 << 31
MAX_FEATURES = 5_000_000
"""A layer is held in memory by every process that burns it."""

BROKEN = (DataSourceError, DataLayerError, FieldError, GeometryError, OSError, UnicodeDecodeError)
WHOLE = re.compile(r"[+-]?\d{1,9}")


class LabelOptions(AdapterSettings):
    """How label files are read."""

    files: str = Field("", description="Pattern of the names of label volumes, such as *lesion*.nii.gz (default: all that are no scans)")
    rename: tuple[str, str] | None = Field(
        None, description="Regular expression and replacement that make the name of a label volume from its image's, up to the first dot"
    )
    reproject: bool = Field(True, description="Rasters on another grid: take the nearest pixel and say so, or refuse them")
    layer: str = Field("", description="Layer of a vector file, or variable of a MATLAB file, where there are several")
    attribute: str = Field("", description="Attribute that holds the class of a feature, as a number or a text; empty: the only one")
    value: int | None = Field(None, ge=0, le=32767, description="Class number of every feature, in place of an attribute")
    numbers: dict[str, int] = Field({}, description="Class number of each text; others are no label (default: 1, 2, … by alphabet)")
    order: str = Field("", description="Attribute that says which of two features lies on top, the higher one (default: the later one)")
    all_touched: bool = Field(False, description="Polygons cover every pixel that they touch, not only those whose centre lies inside")
    radius_m: float = Field(0.0, ge=0, le=1e6, description="Metres around a point that have its class; 0: the pixel that it lies in")
    background: int | None = Field(None, ge=0, le=32767, description="Class number where no feature lies (default: no label there)")
    crs: str = Field("", description="CRS of vector files that say none or a wrong one, such as EPSG:4326")

    @field_validator("rename")
    @classmethod
    def _pattern(cls, value: tuple[str, str] | None) -> tuple[str, str] | None:
        if value is not None:
            try:
                re.sub(*value, "")
            except re.error as error:
                raise ValueError(f"not a regular expression and its replacement: {error}") from error
        return value


@dataclass(frozen=True)
class VectorFile:
    """One layer of a vector file that can be read. Frozen and small, so that it can be sent to a worker, who reads it there.

    Attributes:
        path: The file.
        stamp: Bytes and time of its last change when it was looked at.
        layer: Name of the layer.
        frame: CRS of its coordinates.
        attribute: That holds the class; empty where every feature has the same.
        order: Attribute that features are sorted by before they are drawn; empty for the order of the file.
    """

    path: Path
    stamp: tuple[int, int]
    layer: str
    frame: str
    attribute: str
    order: str


@dataclass(frozen=True, eq=False)
class Layer:
    """What a layer holds, in the order in which it is drawn.

    Attributes:
        shapes: Polygons and points, in the layer's CRS.
        classes: What the attribute says of each feature: text, number or nothing.
        refused: Features that cannot be drawn, counted by reason.
    """

    shapes: Shapes
    classes: NDArray[Any]
    refused: Mapping[str, int]


@dataclass(frozen=True)
class VectorLabels:
    """Class numbers burnt from a vector file onto the grid of a scene.

    It is burnt in blocks that lie at fixed places of the grid, so any window gives the numbers of the whole.

    Attributes:
        file: The layer.
        grid: Of the scene.
        options: How features are burnt.
        numbers: Class number of each text, where the attribute holds texts.
    """

    file: VectorFile
    grid: Grid
    options: LabelOptions = field(hash=False)
    numbers: tuple[tuple[str, int], ...] = ()

    def read(self, window: Window) -> NDArray[np.int64]:
        """Class numbers; `background`, else -1, where no feature lies, and -1 under features without a class."""
        check_window(window, self.grid, str(self.file.path))
        labels = np.empty([part.stop - part.start for part in window], np.int64)
        for part in blocks(window, BLOCK):
            into = tuple(slice(own.start - whole.start, own.stop - whole.start) for own, whole in zip(part, window, strict=True))
            labels[into] = self._block(part)
        return labels

    def _block(self, part: Window, by_value: int = 0) -> NDArray[np.int32]:
        begin = [own.start // BLOCK * BLOCK for own in part]
        whole = tuple(slice(start, min(start + BLOCK, size)) for start, size in zip(begin, self.grid.space, strict=True))
        empty = -1 if self.options.background is None else self.options.background
        shapes, classes = drawn(self)
        found = burn(shapes, classes, whole, empty, all_touched=self.options.all_touched, by_value=by_value)
        return found[tuple(slice(own.start - start, own.stop - start) for own, start in zip(part, begin, strict=True))]

    def disputed(self) -> int:
        """Pixels of the scene that lie under features of different classes."""
        return sum(int((self._block(part, 1) != self._block(part, -1)).sum()) for part in blocks(self.grid.full, BLOCK))


def open_vector(path: Path, options: LabelOptions) -> VectorFile:
    """The layer that is meant of a vector file.

    Raises:
        SceneError: It is no vector file, or not one to be read safely; it has several layers or attributes and none is chosen; it does
            not say its CRS.
    """
    try:
        _refuse(path)
        source = _source(path)
        stamp = (path.stat().st_size, path.stat().st_mtime_ns)
        layers = [str(name) for name, kind in pyogrio.list_layers(source) if kind is not None]
        if not layers or (options.layer and options.layer not in layers):
            raise SceneError(f"{path} has layers with geometry {layers}; label_options.layer={options.layer!r} is none of them")
        if len(layers) > 1 and not options.layer:
            raise SceneError(f"{path} has {len(layers)} layers: {', '.join(layers)}; say which by label_options.layer")
        layer = options.layer or layers[0]
        info = pyogrio.read_info(source, layer=layer, force_feature_count=True, force_total_bounds=True)
    except BROKEN as error:
        raise SceneError(f"the labels {path} cannot be used: {plain(error, path)}") from error
    if info["driver"] != DRIVERS[path.suffix.lower()]:
        raise SceneError(f"{path} would be read by GDAL's {info['driver']}, which is not one of {sorted(set(DRIVERS.values()))}")
    if info["features"] > MAX_FEATURES:
        raise SceneError(f"{path} holds {info['features']} features, more than {MAX_FEATURES}; cut it to the ground of the images")
    attribute = _chosen(path, layer, [str(name) for name in info["fields"]], options)
    return VectorFile(path, stamp, layer, _frame(path, info, options), attribute, options.order)


@lru_cache(maxsize=4)
def read_layer(file: VectorFile) -> Layer:
    """All features of a layer, in the order in which they are drawn.

    Raises:
        SceneError: The file cannot be read, or has changed since it was looked at.
    """
    wanted = list(dict.fromkeys(name for name in (file.attribute, file.order) if name))
    try:
        if (file.path.stat().st_size, file.path.stat().st_mtime_ns) != file.stamp:
            raise SceneError(f"{file.path} has changed since it was looked at; start again")
        meta, _, geometries, columns = pyogrio.raw.read(_source(file.path), layer=file.layer, columns=wanted, force_2d=True)
    except BROKEN as error:
        raise SceneError(f"cannot read the labels {file.path}: {plain(error, file.path)}") from error
    found = dict(zip((str(name) for name in meta["fields"]), columns, strict=True))
    sequence = np.arange(len(geometries))
    if file.order:
        by = found[file.order]
        if by.dtype.kind not in "iufb":
            raise SceneError(f"{file.path}: label_options.order={file.order} holds {by.dtype}, not numbers; choose another attribute")
        sequence = np.argsort(np.where(np.isnan(by.astype(np.float64)), -np.inf, by), kind="stable")
    shapes, refused = parse([geometries[i] for i in sequence])
    classes = found[file.attribute][sequence] if file.attribute else np.zeros(len(sequence), np.int64)
    if classes.dtype.kind not in "iufbO":
        raise SceneError(f"{file.path}: attribute {file.attribute} holds {classes.dtype}; a class is a number or a text")
    return Layer(shapes, classes, refused)


def number_texts(files: Iterable[VectorFile], options: LabelOptions) -> tuple[tuple[str, int], ...]:
    """The class number of each text that the attribute holds in any of the files; empty where it holds numbers.

    Texts that are all whole numbers are these numbers; others are counted from 1 by alphabet, so that neither the order of features
    nor that of files matters.

    Raises:
        SceneError: `label_options.numbers` names no text that is there.
    """
    if options.value is not None:
        return ()
    texts: set[str] = set()
    for file in files:
        classes = read_layer(file).classes
        if classes.dtype.kind == "O":
            texts |= {str(text).strip() for text in classes if text is not None} - {""}
    if options.numbers and texts:
        if not texts & options.numbers.keys():
            raise SceneError(f"label_options.numbers names {', '.join(options.numbers)}; the labels hold {', '.join(sorted(texts)[:12])}")
        return tuple(sorted((text, number) for text, number in options.numbers.items()))
    if all(WHOLE.fullmatch(text) for text in texts):
        return tuple(sorted((text, int(text)) for text in texts))
    return tuple((text, number) for number, text in enumerate(sorted(texts), 1))


def open_vector_labels(
    file: VectorFile, grid: Grid, name: str, options: LabelOptions, numbers: tuple[tuple[str, int], ...]
) -> tuple[VectorLabels, str]:
    """The layer's class numbers on an image's grid, and what is to be told of it; an empty text for nothing.

    Raises:
        NoOverlapError: No feature touches the image.
        SceneError: The image has no place, or a class is no whole number.
    """
    if not is_placed(grid) or not grid.frame:
        raise SceneError(f"{name} has no CRS and affine, so nothing says where the features of {file.path} lie on it; give it a place")
    labels = VectorLabels(file, grid, options, numbers)
    shapes, _ = drawn(labels)
    left, top, right, bottom = shapes.boxes.T
    if not ((left < grid.space[1]) & (right > 0) & (top < grid.space[0]) & (bottom > 0)).any():
        raise NoOverlapError(f"no feature of {file.path} lies on {name} ({describe(grid)})")
    disputed = labels.disputed()
    on_top = f"the higher {file.order}" if file.order else "the later feature"
    return (
        labels,
        f"{disputed} pixels lie under features of different classes; {on_top} is on top (label_options.order)" if disputed else "",
    )


@lru_cache(maxsize=8)
def drawn(labels: VectorLabels) -> tuple[Shapes, NDArray[np.int64]]:
    """The parts near a scene in its pixels, and the class number of every feature of the layer; -1 for none."""
    layer = read_layer(labels.file)
    shapes = layer.shapes
    if len(shapes.part_feature):
        low, high = _box(labels.grid, labels.file.frame, labels.options.radius_m)
        boxes = shapes.boxes
        shapes = shapes.only(((boxes[:, :2] <= high) & (boxes[:, 2:] >= low)).all(axis=1))
    if len(shapes.part_feature):
        shapes = on_grid(shapes, labels.file.frame, labels.grid, labels.options.radius_m)
    return shapes, _class_numbers(labels.file, layer.classes, labels.options, dict(labels.numbers))


def summary(file: VectorFile, options: LabelOptions, numbers: tuple[tuple[str, int], ...]) -> str:
    """What a layer holds, in words."""
    layer = read_layer(file)
    given = f"class {options.value}" if options.value is not None else f"class from attribute {file.attribute}"
    told = [f"{file.path.name}, layer {file.layer}: {len(layer.classes)} features in {file.frame[:60]}, {given}"]
    if layer.refused:
        counted = ", ".join(f"{count} {reason}" for reason, count in sorted(layer.refused.items()))
        told.append(f"{sum(layer.refused.values())} of them left out: {counted}")
    if without := int((_class_numbers(file, layer.classes, options, dict(numbers)) < 0).sum()):
        told.append(f"{without} have no class, so there is no label under them")
    return "; ".join(told)


def _class_numbers(file: VectorFile, classes: NDArray[Any], options: LabelOptions, numbers: Mapping[str, int]) -> NDArray[np.int64]:
    if options.value is not None:
        return np.full(len(classes), options.value, np.int64)
    if classes.dtype.kind == "O":
        return np.array([-1 if text is None else numbers.get(str(text).strip(), -1) for text in classes], np.int64)
    values = np.where(np.isnan(classes.astype(np.float64)), -1, classes) if classes.dtype.kind == "f" else classes.astype(np.int64)
    broken = values[(values != np.rint(values)) | (values > np.iinfo(np.int32).max)]
    if broken.size:
        raise SceneError(f"{file.path}: attribute {file.attribute} holds {broken[0]}; a class number is whole, 0 to 32767")
    return np.asarray(np.maximum(values, -1), dtype=np.int64)


def _box(grid: Grid, frame: str, radius_m: float) -> NDArray[np.float64]:
    """Least and greatest x and y, in a CRS, of a grid with some room around it; all there is where the CRS does not reach it."""
    # A disc that reaches into the scene can belong to a point outside of it.
    room = 0.5 + (radius_m / (metres_per_unit(grid).min() * min(grid.spacing)) if radius_m else 0.0)
    rows, columns = (place.ravel() for place in np.meshgrid(*(np.linspace(-room, n - 1 + room, 33) for n in grid.space), indexing="ij"))
    x, y = grid.matrix[:2, :2] @ np.stack([rows, columns]) + grid.matrix[:2, 2:]
    places = carry(grid.frame, frame, x, y)
    if not np.isfinite(places).all():
        return np.array([[-np.inf, -np.inf], [np.inf, np.inf]])
    low, high = places.min(axis=1), places.max(axis=1)
    return np.stack([low - 0.05 * (high - low), high + 0.05 * (high - low)])


def _chosen(path: Path, layer: str, fields: list[str], options: LabelOptions) -> str:
    """The attribute that holds the class."""
    listed = ", ".join(fields) or "none"
    if options.order and options.order not in fields:
        raise SceneError(f"{path}, layer {layer}, has attributes {listed}; label_options.order={options.order} is none of them")
    if options.value is not None:
        if options.attribute:
            raise SceneError(f"label_options gives attribute={options.attribute} and value={options.value}; give one of them")
        return ""
    if options.attribute and options.attribute not in fields:
        raise SceneError(f"{path}, layer {layer}, has attributes {listed}; label_options.attribute={options.attribute} is none of them")
    if not options.attribute and len(fields) != 1:
        what = "give label_options.value=1 for one class" if not fields else "say which holds the class by label_options.attribute"
        raise SceneError(f"{path}, layer {layer}, has attributes {listed}; {what}")
    return options.attribute or fields[0]


def _frame(path: Path, info: Mapping[str, Any], options: LabelOptions) -> str:
    """The CRS of a layer, whose coordinates must be such as it allows."""
    told = options.crs or info["crs"]
    if not told:
        raise SceneError(f"{path} does not say its CRS (a Shapefile says it in a .prj beside it); add it, or give label_options.crs=EPSG:…")
    try:
        crs = CRS.from_user_input(told)
    except CRSError as error:
        raise SceneError(f"{path}: the CRS {told[:80]} is not known: {error}; give label_options.crs=EPSG:…") from error
    west, south, east, north = info["total_bounds"] or (0, 0, 0, 0)
    if crs.is_geographic and (max(-west, east) > 540 or max(-south, north) > 90.001):
        raise SceneError(
            f"{path} says its coordinates are degrees ({str(told)[:40]}), but they run from {west:.6g}, {south:.6g} to "
            f"{east:.6g}, {north:.6g}: another CRS; give it by label_options.crs=EPSG:…"
        )
    epsg = crs.to_epsg()
    return f"EPSG:{epsg}" if epsg else str(crs.to_wkt())


def _refuse(path: Path) -> None:
    """Stops at what is not a plain file of one of the three formats, before GDAL sees it."""
    driver, absolute = DRIVERS[path.suffix.lower()], str(path.absolute())
    if absolute.startswith("/vsi") or REMOTE.match(str(path)) or "!" in absolute:
        raise SceneError(f"{path} is not a path of the file system, or has a ! in it; rename it")
    if path.stat().st_size > MAX_BYTES:
        raise SceneError(
            f"{path} has {path.stat().st_size / 2**30:.1f} GiB, more than {MAX_BYTES >> 30}; cut it to the ground of the images"
        )
    with path.open("rb") as stream:
        first = stream.read(1 << 16)
    if driver == "GPKG":
        fits = first.startswith(b"SQLite format 3\0")
    elif driver == "GeoJSON":
        fits = first.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{") and b"gdal_streamed_alg" not in first
    else:
        fits = first.startswith(b"\0\0\x27\x0a")
    if not fits:
        raise SceneError(f"{path} begins with {first[:12]!r}, not like a {driver} file; the labels cannot be used")


def _source(path: Path) -> str:
    """What GDAL is told to open; the prefix keeps every other driver from a text file."""
    return ("GeoJSON:" if DRIVERS[path.suffix.lower()] == "GeoJSON" else "") + str(path.absolute())
