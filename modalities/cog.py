"""Cloud-optimised GeoTIFFs on a scene's grid, written row by row in constant memory and taken up again after a kill."""

from __future__ import annotations

import errno
import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable
from xml.sax.saxutils import escape, quoteattr

import numpy as np
import rasterio
import rasterio.shutil
from numpy.typing import NDArray
from rasterio.windows import Window as RasterWindow

from modalities.grid import Grid, Window
from modalities.raster_file import BROKEN, opened, plain, quiet
from modalities.scene import SceneError

BLOCK = 512
"""Rows and columns of a tile of what is written."""

CACHE_BYTES = 1 << 27
"""What GDAL may keep of blocks while it reads and writes; its own default is a twentieth of the machine's memory."""

PALETTE = (
    (0, 114, 178),
    (230, 159, 0),
    (0, 158, 115),
    (204, 121, 167),
    (86, 180, 233),
    (213, 94, 0),
    (240, 228, 66),
    (102, 102, 102),
)
"""Colours that colour-blind readers tell apart (Okabe and Ito 2008, with grey for black)."""

UNFINISHED = ".unfinished"
"""Ending of the hidden folder beside a file that is being written."""

DIGEST_TAG = "TERRAVOX_DIGEST"
"""Metadata item that says what a file was made from and how."""

Rgb = tuple[int, int, int]


@runtime_checkable
class OnMap(Protocol):
    """A scene whose results can be written as rasters on its grid."""

    @property
    def grid(self) -> Grid:
        """Its lattice."""
        ...

    def place(self) -> dict[str, Any]:
        """`crs` and `transform` of a file on this grid, as rasterio wants them; empty where the scene has no place."""
        ...


@dataclass(frozen=True)
class RasterBand:
    """One band of a raster that is written.

    Attributes:
        name: Its description.
        scale, offset: Physical value = stored value · scale + offset.
        unit: Of the physical value; empty where nobody said.
    """

    name: str
    scale: float = 1.0
    offset: float = 0.0
    unit: str = ""


@dataclass(frozen=True)
class Layout:
    """What a raster is to be.

    Attributes:
        space: Rows and columns.
        place: `crs` and `transform`, or nothing.
        bands: In order.
        dtype: Of the stored values.
        nodata: Stored value for "nothing here"; NaN for floats, None for none.
        overviews: `nearest` for numbers that name something, `average` for measurements.
        classes: Number and name of each class in a map of classes.
        colours: Red, green and blue of each class; chosen by `palette` where empty.
        tags: Metadata of the file.
        compress: Both lose nothing; old readers may not know zstd.
    """

    space: tuple[int, int]
    place: Mapping[str, Any]
    bands: tuple[RasterBand, ...]
    dtype: str
    nodata: float | None
    overviews: Literal["nearest", "average"]
    classes: tuple[tuple[int, str], ...] = ()
    colours: tuple[Rgb, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)
    compress: Literal["deflate", "zstd"] = "deflate"

    @property
    def colour_of(self) -> dict[int, Rgb]:
        """Colour by class number."""
        colours = self.colours if len(self.colours) == len(self.classes) else palette(len(self.classes))
        return {value: colour for (value, _), colour in zip(self.classes, colours, strict=True)}


def palette(count: int) -> tuple[Rgb, ...]:
    """So many colours: `PALETTE`, then the same darker and lighter in turn."""
    out: list[Rgb] = []
    for number in range(count):
        turn, place = divmod(number, len(PALETTE))
        colour = np.array(PALETTE[place], float)
        strength = 0.6 ** ((turn + 1) // 2)
        shade = colour * strength if turn % 2 else 255 - (255 - colour) * strength
        red, green, blue = (int(value) for value in np.rint(shade))
        out.append((red, green, blue))
    return tuple(out)


class RasterWriter:
    """Writes a raster in strips of columns, each from the top down, and makes a COG of it at the end.

    Rows are kept until they fill whole tiles. What has been written lies in a hidden folder beside the file, with a note how
    far it is, so that a writer of the same `key` goes on there; one of another key, or of an empty one, begins anew. `path` itself
    is replaced at the very end, whole.

    Attributes:
        position: First column of the strip that is being written and the first row of it that is not on disk yet.
    """

    def __init__(self, path: Path, layout: Layout, key: str) -> None:
        """Begin, or go on where another process was ended.

        Raises:
            SceneError: The folder cannot be written, or another process is writing the same file.
        """
        self.path, self.layout, self.key = path, layout, key
        self.folder = path.with_name(f".{path.name}{UNFINISHED}")
        self.partial = self.folder / "rows.tif"
        self._kept: list[NDArray[Any]] = []
        with _writing(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / "lock").open("w")
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                self._lock.close()
                raise SceneError(f"{path} is being written by another process; wait for it, or choose another place") from error
            self.position = (self._found() if key else None) or self._begun()

    def write(self, window: Window, values: NDArray[Any]) -> None:
        """Take in the next rows of a strip, `(band, row, column)`.

        Raises:
            SceneError: The disk is full or not writable.
        """
        rows, columns = window
        kept = sum(part.shape[1] for part in self._kept)
        column, row = self.position
        if (rows.start, columns.start) != (row + kept, column):
            raise ValueError(f"{self.path.name}: rows {rows.start} of column {columns.start} do not follow row {row + kept} of {column}")
        self._kept.append(values)
        ready = rows.stop if rows.stop == self.layout.space[0] else rows.stop // BLOCK * BLOCK
        if ready > row:
            self._flush(ready, columns)

    def go_to(self, column: int, row: int) -> None:
        """Write again from an earlier place on: where several files are to be equally far."""
        if (column, row) > self.position or row % BLOCK:
            raise ValueError(f"{self.path.name}: cannot go on at row {row} of column {column}, only {self.position} are written")
        self._kept, self.position = [], (column, row)

    def finish(self) -> None:
        """Make the COG and put it in its place.

        Raises:
            SceneError: The disk is full or not writable; the rows are kept for the next attempt.
        """
        layout, made = self.layout, self.folder / "cog.tif"
        options = {
            "BLOCKSIZE": str(BLOCK),
            "COMPRESS": layout.compress.upper(),
            "PREDICTOR": "NO" if layout.overviews == "nearest" else "YES",
            "OVERVIEW_RESAMPLING": layout.overviews.upper(),
            "BIGTIFF": "IF_SAFER",
        }
        with _writing(self.path):
            made.unlink(missing_ok=True)
            with rasterio.Env(GDAL_PAM_ENABLED="NO", GDAL_CACHEMAX=CACHE_BYTES), quiet():
                rasterio.shutil.copy(self.partial, made, driver="COG", strict=False, **options)
            side = self.path.with_name(f"{self.path.name}.aux.xml")
            if layout.classes:
                (self.folder / side.name).write_text(_attribute_table(layout), encoding="utf-8")
                (self.folder / side.name).replace(side)
            else:
                side.unlink(missing_ok=True)
            made.replace(self.path)
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Let others write the file; rows that are on disk stay for the next attempt."""
        self._lock.close()
        if self.position == (0, 0):
            shutil.rmtree(self.folder, ignore_errors=True)

    def discard(self) -> None:
        """Remove what has been written."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _flush(self, stop: int, columns: slice) -> None:
        column, row = self.position
        values = np.concatenate(self._kept, axis=1)
        part = RasterWindow.from_slices((row, stop), (columns.start, columns.stop))
        with _writing(self.path):
            with rasterio.Env(GDAL_PAM_ENABLED="NO", GDAL_CACHEMAX=CACHE_BYTES), quiet():
                target = rasterio.open(self.partial, "r+")
            with target:
                target.write(values[:, : stop - row], window=part)
            self._kept = [values[:, stop - row :]] if row + values.shape[1] > stop else []
            self.position = (columns.stop, 0) if stop == self.layout.space[0] else (column, stop)
            self._note()

    def _found(self) -> tuple[int, int] | None:
        """Where an earlier process got to, if it wrote the same thing and all of it is there."""
        try:
            note = json.loads((self.folder / "progress.json").read_text())
            with opened(self.partial) as source:
                fits = note["key"] == self.key and source.shape == self.layout.space and source.count == len(self.layout.bands)
            return (int(note["column"]), int(note["row"])) if fits else None
        except (*BROKEN, ValueError, KeyError, TypeError):
            return None

    def _begun(self) -> tuple[int, int]:
        """An empty file of what is wanted; its tiles are not stored until they are written."""
        layout, (height, width) = self.layout, self.layout.space
        for name in ("progress.json", "rows.tif", "cog.tif"):
            (self.folder / name).unlink(missing_ok=True)
        shape = {"height": height, "width": width, "count": len(layout.bands), "dtype": layout.dtype, "nodata": layout.nodata}
        kind = {"tiled": True, "blockxsize": BLOCK, "blockysize": BLOCK, "compress": "deflate", "zlevel": 1, "interleave": "pixel"}
        with rasterio.Env(GDAL_PAM_ENABLED="NO"), quiet():
            target = rasterio.open(self.partial, "w", driver="GTiff", sparse_ok=True, bigtiff="IF_SAFER", **shape, **kind, **layout.place)
        with target:
            target.update_tags(**layout.tags)
            for number, band in enumerate(layout.bands, 1):
                target.set_band_description(number, band.name)
                target.set_band_unit(number, band.unit)
            if any((band.scale, band.offset) != (1, 0) for band in layout.bands):
                target.scales = [band.scale for band in layout.bands]
                target.offsets = [band.offset for band in layout.bands]
            if layout.classes:
                target.write_colormap(1, layout.colour_of)
        self.position = (0, 0)
        self._note()
        return self.position

    def _note(self) -> None:
        aside = self.folder / "progress.tmp"
        aside.write_text(json.dumps({"key": self.key, "column": self.position[0], "row": self.position[1]}))
        aside.replace(self.folder / "progress.json")


def write_raster(path: Path, layout: Layout, values: NDArray[Any]) -> None:
    """Write a whole raster, `(band, row, column)`, as a COG.

    Raises:
        SceneError: The disk is full or not writable; nothing is left behind.
    """
    writer = RasterWriter(path, layout, "")
    try:
        writer.write((slice(0, layout.space[0]), slice(0, layout.space[1])), values)
        writer.finish()
    finally:
        writer.discard()


def made_from(path: Path) -> str:
    """What the file says that it was made from and how (`DIGEST_TAG`); empty where there is no such file."""
    try:
        with opened(path) as source:
            return str(source.tags().get(DIGEST_TAG, ""))
    except BROKEN:
        return ""


def count_values(path: Path) -> dict[int, int]:
    """How often each number occurs in a raster of bytes, read tile by tile.

    Raises:
        SceneError: The file is gone or damaged.
    """
    total = np.zeros(256, np.int64)
    try:
        with opened(path) as source:
            for _, part in source.block_windows(1):
                total += np.bincount(source.read(1, window=part).ravel(), minlength=256)
    except BROKEN as error:
        raise SceneError(f"cannot read {path} again: {plain(error, path)}") from error
    return {int(value): int(total[value]) for value in np.flatnonzero(total)}


@contextmanager
def little_cache() -> Iterator[None]:
    """GDAL keeps few blocks in memory meanwhile, whatever the machine has."""
    with rasterio.Env(GDAL_CACHEMAX=CACHE_BYTES):
        yield


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except BROKEN as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        hint = "; free some space and run again" if full else ""
        raise SceneError(f"cannot write {path}: {plain(error, path)}{hint}") from error


def _attribute_table(layout: Layout) -> str:
    """GDAL's side file with the classes' names, twice: as category names and as a table with colours, since programs look for either."""
    names = dict(layout.classes)
    categories = "".join(f"      <Category>{escape(names.get(value, ''))}</Category>\n" for value in range(max(names) + 1))
    heads = (("Value", 0, 5), ("Class", 2, 2), ("Red", 0, 6), ("Green", 0, 7), ("Blue", 0, 8))
    fields = "".join(
        f'      <FieldDefn index="{number}"><Name>{name}</Name><Type>{kind}</Type><Usage>{usage}</Usage></FieldDefn>\n'
        for number, (name, kind, usage) in enumerate(heads)
    )
    rows = "".join(
        f"      <Row index={quoteattr(str(number))}>{_cells(value, name, layout.colour_of[value])}</Row>\n"
        for number, (value, name) in enumerate(layout.classes)
    )
    return (
        f'<PAMDataset>\n  <PAMRasterBand band="1">\n    <CategoryNames>\n{categories}    </CategoryNames>\n'
        f'    <GDALRasterAttributeTable tableType="thematic">\n{fields}{rows}    </GDALRasterAttributeTable>\n'
        "  </PAMRasterBand>\n</PAMDataset>\n"
    )


def _cells(value: int, name: str, colour: Sequence[int]) -> str:
    return "".join(f"<F>{escape(str(cell))}</F>" for cell in (value, name, *colour))
