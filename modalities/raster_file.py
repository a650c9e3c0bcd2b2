"""One raster file: what its header says and what its pixels are. Everything that GDAL must be told or forbidden is here."""

from __future__ import annotations

import math
import re
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio._err import CPLE_BaseError
from rasterio.crs import CRS
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.errors import CRSError, NotGeoreferencedWarning, RasterioError
from rasterio.windows import Window as RasterWindow

from modalities import archive
from modalities.grid import Grid, Window
from modalities.quality import Quality
from modalities.scene import Channel, SceneError

Nodata = float | Literal["nan"] | None
"""A declared nodata value. NaN is written out, because a NaN is not equal to itself and scenes are compared."""

DRIVERS = {
    b"II*\0": "GTiff",
    b"MM\0*": "GTiff",
    b"II+\0": "GTiff",
    b"MM\0+": "GTiff",
    b"\0\0\0\x0c": "JP2OpenJPEG",
    b"\xff\x4f\xff\x51": "JP2OpenJPEG",
}
"""First bytes of a file and the one GDAL driver that may open it (`GTiff` reads COGs). No other driver is ever tried,
so that a VRT or another description that points elsewhere does nothing, whatever its name says."""

ENDINGS = (".tif", ".tiff", ".jp2")
"""Of files of these kinds, in small letters."""

MAX_EXPANSION = 2000
MIN_BOMB_BYTES = 1 << 28
"""A file that declares more than 256 MiB of pixels and more than 2000 times its own size is refused: deflate cannot
pack tighter than 1032 to 1, so beyond it the image is all but empty, or made to fill the memory."""

MAX_BLOCK_BYTES = 1 << 30
"""Any read unpacks whole blocks; one block (all bands of it where they are interleaved) may take up to 1 GiB, which
leaves room for a 10980² image of four 16-bit bands in a single strip."""

MAX_BANDS = 1024
"""More than any imaging spectrometer has; a damaged header easily says 65535, which takes minutes to look through."""

REMOTE = re.compile(r"[A-Za-z][\w.+-]*:/")
"""A path that begins with a protocol, also after `pathlib` made one slash of two."""

BROKEN = (RasterioError, CRSError, CPLE_BaseError, UnicodeDecodeError, OSError)
"""What rasterio raises for a file that is gone, damaged or of another kind: bare errors of GDAL and broken text included."""

_OPENING = threading.RLock()


@dataclass(frozen=True)
class RasterFile:
    """What the header of a raster says; the tuples have one entry per data band (an alpha band is not one).

    Attributes:
        path: The file.
        relative: The same, relative to the scanned folder.
        grid: Its lattice; without CRS or affine the frame is empty and the unit `"index"`.
        resolution_m: Size of a pixel; None where the CRS does not measure in lengths.
        indexes: Numbers of the bands in the file, from 1.
        descriptions: Names of the bands; empty where there is none.
        dtypes: Of the stored values.
        nodata: The value declared for nothing.
        scales, offsets: The file's own tags; 1 and 0 where there are none.
        block: Rows and columns of the largest block of any band; a strip is as wide as the file.
        tags: The file's own metadata, that of the domain IMAGERY too.
        num_gcps: Ground control points. They place no pixel exactly, so the grid does not know of them.
    """

    path: Path
    relative: str
    grid: Grid
    resolution_m: float | None
    indexes: tuple[int, ...]
    descriptions: tuple[str, ...]
    dtypes: tuple[str, ...]
    nodata: tuple[Nodata, ...]
    scales: tuple[float, ...]
    offsets: tuple[float, ...]
    block: tuple[int, int]
    tags: Mapping[str, str]
    num_gcps: int = 0

    @property
    def count(self) -> int:
        """Number of data bands."""
        return len(self.indexes)


@dataclass(frozen=True)
class BandFile:
    """One channel in one file.

    Attributes:
        path: The file.
        index: Number of the band in it, from 1.
        channel: What it is called and how it is scaled.
        grid: Lattice of that file.
        dtype: Of the stored values.
        nodata: Stored value that means "nothing here"; None for none.
        saturated: Stored value that means "too bright to tell"; None for none.
        validity_index: Band of the same file that is 0 where there is no data; None for none.
        block: Rows and columns that the file unpacks at least.
    """

    path: Path
    index: int
    channel: Channel
    grid: Grid
    dtype: str
    nodata: Nodata = None
    saturated: float | None = None
    validity_index: int | None = None
    block: tuple[int, int] = (1, 1)


def inspect(path: Path, relative: str, *, colour_table: bool = False) -> RasterFile:
    """The header of a raster whose last block could be read.

    Args:
        path: The file.
        relative: What it is called in the folder that is scanned.
        colour_table: Whether numbers that stand for colours are welcome, as they are in a map of classes.

    Raises:
        SceneError: Not a readable raster, or not one to be read safely. The message does not name the file.
    """
    try:
        with opened(path) as source:
            _refuse(source, archive.size(path))
            if ColorInterp.palette in source.colorinterp and not colour_table:
                raise SceneError("its values are entries of a colour table, not measurements; expand it to RGB or remove the table")
            header = _header(source, path, relative)
            height, width = source.shape
            rows, columns = source.block_shapes[0]
            top, left = (height - 1) // rows * rows, (width - 1) // columns * columns
            source.read(list(header.indexes), window=RasterWindow(left, top, width - left, height - top))
    except BROKEN as error:
        raise SceneError(f"not a readable GeoTIFF, COG or JPEG 2000 ({plain(error, path)})") from error
    return header


def read_bands(bands: Sequence[BandFile], window: Window) -> tuple[NDArray[np.generic], NDArray[np.uint8]]:
    """Stored values and quality, both `(band, row, column)`, of bands of one file.

    Raises:
        SceneError: The file is gone, damaged, or no longer what was catalogued.
    """
    path = bands[0].path
    part = RasterWindow.from_slices(*window)
    try:
        with opened(path) as source:
            if source.shape != bands[0].grid.space or source.count < max(band.index for band in bands):
                raise SceneError(f"{path} has changed since it was catalogued: {source.count} bands of {source.shape}; catalogue it again")
            values = source.read([band.index for band in bands], window=part)
            flags = np.zeros(values.shape, np.uint8)
            for band, one, own in zip(bands, values, flags, strict=True):
                _flag(band, one, own)
            _flag_declared(source, bands, part, flags)
    except BROKEN as error:
        raise SceneError(f"cannot read {path} at {_slices(window)}: {plain(error, path)}; copy it anew from its source") from error
    return values, flags


def holds_only(path: Path, index: int, allowed: tuple[int, ...]) -> bool:
    """True when a band holds no other values than these; it is read block by block until one is found."""
    with opened(path) as source:
        return all(np.isin(source.read(index, window=part), allowed).all() for _, part in source.block_windows(index))


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """The dataset, opened by the one driver that the first bytes call for; siblings and remote paths are not touched.

    A path through a zip (`archive`) is the only one that leads into GDAL's virtual file systems.
    """
    if str(path.absolute()).startswith("/vsi") or REMOTE.match(str(path)):
        raise OSError(f"{path} is not a path of the file system")
    with archive.stream(path) as stream:
        first = stream.read(4)
    if first not in DRIVERS:
        raise OSError("the file is empty" if not first else f"it begins with {first!r}, not like a TIFF or a JPEG 2000")
    with rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR", GDAL_PAM_ENABLED="NO"):
        with quiet():
            source = rasterio.open(archive.gdal_name(path), driver=DRIVERS[first])
        with source:
            yield source


@contextmanager
def quiet() -> Iterator[None]:
    """No warning that a file has no georeference; that is said by an empty `Grid.frame`.

    The filters of warnings belong to the whole process, hence the lock, which a thread that has it may take again.
    """
    with _OPENING, warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        yield


def plain(error: Exception, path: Path) -> str:
    """The reason of an error in one line, without the folder."""
    text = str(error.__cause__ or error)
    for form in (str(path.absolute()), str(path)):
        text = text.replace(form, path.name)
    return " ".join(text.split()).rstrip(".")


def usable(scale: float, offset: float) -> tuple[float, float]:
    """Scale and offset as the tags of a file give them.

    Raises:
        SceneError: They are no numbers to reckon with.
    """
    if not (math.isfinite(scale) and math.isfinite(offset) and scale):
        raise SceneError(f"its tags give scale {scale:g} and offset {offset:g}, which no value survives; mend the tags, or say them")
    return scale, offset


def same_frame(one: str, other: str) -> bool:
    """True when two frames are the same CRS, in whatever words, or both are unknown."""
    if one == other or not (one and other):
        return one == other
    with rasterio.Env():
        return bool(CRS.from_user_input(one) == CRS.from_user_input(other))


def _refuse(source: Any, size: int) -> None:
    if source.count > MAX_BANDS:
        raise SceneError(f"it has {source.count} bands, more than {MAX_BANDS}; split it, or it is damaged")
    dtypes = source.dtypes
    if any(dtype.startswith("complex") for dtype in dtypes):
        raise SceneError(f"its values are complex numbers ({dtypes[0]}); export amplitude or power")
    if source.subdatasets:
        raise SceneError(f"it holds {len(source.subdatasets)} images (pages), only one can be meant; write each to a file of its own")
    pixel_bytes = sum(np.dtype(dtype).itemsize for dtype in dtypes)
    declared = source.height * source.width * pixel_bytes
    if declared > MIN_BOMB_BYTES and declared > MAX_EXPANSION * size:
        raise SceneError(
            f"it declares {declared / 2**30:.1f} GiB of pixels in a file of {size} bytes, more than {MAX_EXPANSION} times its size; "
            "it is all but empty or made to fill the memory"
        )
    rows, columns = source.block_shapes[0]
    block = rows * columns * (pixel_bytes if source.profile.get("interleave") == "pixel" else np.dtype(dtypes[0]).itemsize)
    if block > MAX_BLOCK_BYTES:
        raise SceneError(
            f"one block of it unpacks to {block / 2**30:.1f} GiB, more than {MAX_BLOCK_BYTES / 2**30:.0f}; "
            "rewrite it tiled (gdal_translate -co TILED=YES)"
        )


def _header(source: Any, path: Path, relative: str) -> RasterFile:
    bands = [i for i, colour in enumerate(source.colorinterp) if colour != ColorInterp.alpha]
    if not bands:
        raise SceneError("it has no band but an alpha band")

    def of_data(entries: Sequence[Any]) -> Iterator[Any]:
        return (entries[i] for i in bands)

    grid = _grid(source)
    factor = source.crs.linear_units_factor[1] if grid.frame and source.crs.is_projected else None
    return RasterFile(
        path,
        relative,
        grid,
        None if factor is None else float(np.mean(grid.spacing)) * factor,
        tuple(i + 1 for i in bands),
        tuple((text or "").strip() for text in of_data(source.descriptions)),
        tuple(str(dtype) for dtype in of_data(source.dtypes)),
        tuple(_nodata(value) for value in of_data(source.nodatavals)),
        tuple(float(scale) for scale in of_data(source.scales)),
        tuple(float(offset) for offset in of_data(source.offsets)),
        (max(rows for rows, _ in source.block_shapes), max(columns for _, columns in source.block_shapes)),
        {**source.tags(ns="IMAGERY"), **source.tags()},
        len(source.gcps[0]),
    )


def _grid(source: Any) -> Grid:
    """Corner convention to centre convention, and (column, row) to (row, column)."""
    affine, crs = source.transform, source.crs
    corner = np.array([[affine.b, affine.a, affine.c], [affine.e, affine.d, affine.f], [0.0, 0.0, 1.0]])
    sane = np.abs(corner).max() < 1e15 and abs(affine.a * affine.e - affine.b * affine.d) > 1e-30
    if not sane:
        raise SceneError(f"its affine {tuple(affine)[:6]} does not span a plane; write it anew")
    matrix = corner @ np.array([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5], [0.0, 0.0, 1.0]])
    if crs is None or affine.is_identity:
        return Grid.from_matrix(source.shape, matrix, "", "index")
    epsg = crs.to_epsg()
    unit = "degree" if crs.is_geographic else {"metre": "m", "meter": "m"}.get(crs.linear_units.lower(), crs.linear_units)
    return Grid.from_matrix(source.shape, matrix, f"EPSG:{epsg}" if epsg else crs.to_wkt(), unit)


def _nodata(value: float | None) -> Nodata:
    return "nan" if value is not None and math.isnan(value) else value


def _flag(band: BandFile, values: NDArray[np.generic], flags: NDArray[np.uint8]) -> None:
    """Adds what the stored values of a band say about themselves."""
    if band.nodata == "nan":
        flags |= _bits(np.isnan(values), Quality.NODATA)
    elif band.nodata is not None:
        with np.errstate(over="ignore"):
            exact = np.asarray(band.nodata).astype(values.dtype) if values.dtype.kind == "f" else band.nodata
        flags |= _bits(values == exact, Quality.NODATA)
    if values.dtype.kind == "f":
        flags |= _bits(~np.isfinite(values) & (flags == 0), Quality.NOT_FINITE)
    if band.saturated is not None:
        flags |= _bits(values == band.saturated, Quality.SATURATED)


def _flag_declared(source: Any, bands: Sequence[BandFile], part: RasterWindow, flags: NDArray[np.uint8]) -> None:
    """Adds what alpha, validity and mask bands of the file say, to `(band, row, column)`; most files have none.

    GDAL lets a nodata value outrank an alpha band, so that band is read as such.
    """
    for i, colour in enumerate(source.colorinterp):
        if colour == ColorInterp.alpha:
            flags |= _bits(source.read(i + 1, window=part) == 0, Quality.NODATA)
    all_kinds = source.mask_flag_enums
    for i, band in enumerate(bands):
        kinds = set(all_kinds[band.index - 1])
        if not kinds & {MaskFlags.all_valid, MaskFlags.alpha} and kinds != {MaskFlags.nodata}:
            flags[i] |= _bits(source.read_masks(band.index, window=part) == 0, Quality.NODATA)
        if band.validity_index is not None:
            flags[i] |= _bits(source.read(band.validity_index, window=part) == 0, Quality.NODATA)


def _bits(where: NDArray[np.bool_], flag: Quality) -> NDArray[np.uint8]:
    return where.astype(np.uint8) * np.uint8(flag)


def _slices(window: Window) -> str:
    return ", ".join(f"{axis} {part.start}…{part.stop}" for axis, part in zip(("rows", "columns"), window, strict=True))
