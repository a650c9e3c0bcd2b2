"""Quality from a map of classes, of bits or of clouds: which pixels of a scene are bad, and a border around its clouds."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from glob import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator
from scipy.ndimage import distance_transform_edt

from modalities.grid import Grid, Window
from modalities.quality import Quality
from modalities.raster_file import BandFile, Nodata, RasterFile, read_bands
from modalities.resample import AxisMap, align, is_placed, nearest
from modalities.scene import AdapterSettings, Channel, SceneError

SCENE_CLASSES = {
    0: Quality.NODATA,
    1: Quality.SATURATED,
    2: Quality.EXCLUDED,
    3: Quality.CLOUD,
    4: Quality.EXCLUDED,
    5: Quality.EXCLUDED,
    6: Quality.EXCLUDED,
    7: Quality.EXCLUDED,
    8: Quality.CLOUD,
    9: Quality.CLOUD,
    10: Quality.CLOUD,
    11: Quality.EXCLUDED,
}
"""Sentinel-2's scene classification: 0 no data, 1 saturated or defective, 2 dark area or shadow of terrain, 3 cloud shadow, 4 vegetation,
5 bare soil, 6 water, 7 unclassified, 8 cloud of medium and 9 of high probability, 10 thin cirrus, 11 snow or ice; and the bit that a
pixel gets where settings call its class bad: what is no cloud and is left out all the same, is left out by choice."""

METRES_PER_DEGREE = 111_320.0
"""Of latitude, and of longitude at the equator; good to half a percent, which no border around a cloud needs."""


@dataclass(frozen=True)
class Bits:
    """`count` bits from position `first`, read as a number: where it is `at_least` that or more, a pixel is of `quality`."""

    first: int
    quality: Quality
    count: int = 1
    at_least: int = 1


@dataclass(frozen=True)
class ClassBand:
    """One band whose numbers say which pixels are bad; frozen and picklable like the scene that it belongs to.

    It is brought to the grid of the scene by position, each pixel taking the class that its centre lies on, whatever the
    resolution. Where the map has nodata, a pixel is `NODATA`, and where it does not reach, `OUTSIDE`: a pixel of which
    nobody knows whether it is cloud counts no more than one that is.

    Attributes:
        band: Where the numbers are.
        values: Numbers and what they mean.
        bits: Bits of the numbers and what they mean.
        reach: How far clouds are widened, in pixels of this band along rows and columns: pixels whose centre lies within that ellipse
            around the centre of a `CLOUD` pixel are `EXCLUDED`.
    """

    band: BandFile
    values: tuple[tuple[int, Quality], ...] = ()
    bits: tuple[Bits, ...] = ()
    reach: tuple[float, float] = (0.0, 0.0)

    def read(self, grid: Grid, window: Window) -> NDArray[np.uint8]:
        """Quality `(row, column)` of a window of the scene's grid; any window gives the numbers of the whole.

        Raises:
            SceneError: The file is gone or damaged, holds no classes, or is not on the ground of `grid`.
        """
        axes = self.align(grid)
        near = [axis.needed(part) for axis, part in zip(axes, window, strict=True)]
        source = tuple(
            slice(max(part.start - math.ceil(reach), 0), min(part.stop + math.ceil(reach), size))
            for part, reach, size in zip(near, self.reach, self.band.grid.space, strict=True)
        )
        values, unknown = (found[0] for found in read_bands([self.band], source))
        flags = self._flags(values, unknown)
        rows, columns, outside = nearest(axes, window)
        taken = flags[np.ix_(rows - source[0].start, columns - source[1].start)]
        return np.where(outside, np.uint8(Quality.OUTSIDE), taken)

    def align(self, grid: Grid) -> tuple[AxisMap, AxisMap]:
        """How the axes of `grid` lie on this band.

        Raises:
            SceneError: They cannot be related. The message names the file.
        """
        try:
            rows, columns = align(grid, self.band.grid, finer=True)
        except SceneError as error:
            raise SceneError(f"the map of classes {self.band.path.name} does not fit: {error}") from error
        return rows, columns

    def _flags(self, values: NDArray[np.generic], unknown: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Quality of the band's own pixels, widened."""
        flags = np.zeros(values.shape, np.uint8)
        for number, quality in self.values:
            flags |= np.where(values == number, np.uint8(quality), np.uint8(0))
        for field in self.bits:
            part = (values.astype(np.int64) >> field.first) & ((1 << field.count) - 1)
            flags |= np.where(part >= field.at_least, np.uint8(field.quality), np.uint8(0))
        flags = np.where(unknown > 0, np.uint8(Quality.NODATA), flags)
        cloud = (flags & np.uint8(Quality.CLOUD)) > 0
        if any(self.reach) and cloud.any():
            steps = [1 / reach for reach in self.reach]
            close = distance_transform_edt(~cloud, sampling=steps) <= 1 + 1e-9
            flags = np.where(close & ~cloud, flags | np.uint8(Quality.EXCLUDED), flags)
        return flags


class Widening(AdapterSettings):
    """How far around a cloud pixels are left out.

    Attributes:
        dilation_m: In metres, between the centres of pixels.
        dilation_pixels: The same in pixels of the map of classes, in place of metres: for maps without a place.
    """

    dilation_m: float = Field(0.0, ge=0, le=100_000)
    dilation_pixels: float | None = Field(None, ge=0, le=1000)

    def reach(self, grid: Grid, name: str) -> tuple[float, float]:
        """`ClassBand.reach` for a map on `grid`.

        Raises:
            SceneError: Metres are wanted of a map whose pixels have no size in metres.
        """
        if self.dilation_pixels is not None:
            return self.dilation_pixels, self.dilation_pixels
        if not self.dilation_m:
            return 0.0, 0.0
        if grid.unit not in ("m", "degree"):
            unit = "no place" if not is_placed(grid) or grid.unit == "index" else f"a CRS in {grid.unit}"
            raise SceneError(f"the map of classes {name} has {unit}, so clouds cannot be widened by metres; set dilation_pixels")
        step = grid.matrix[:2, :2]
        if grid.unit == "degree":
            latitude = grid.world(tuple((size - 1) / 2 for size in grid.space))[1]
            step = np.array([[METRES_PER_DEGREE * math.cos(math.radians(latitude))], [METRES_PER_DEGREE]]) * step
        rows, columns = np.linalg.norm(step, axis=0)
        return float(self.dilation_m / rows), float(self.dilation_m / columns)


class SceneClasses(Widening):
    """What is done with Sentinel-2's scene classification (SCL).

    Attributes:
        use: Whether it is looked at.
        bad: Classes that do not count: 0 no data, 1 saturated, 3 cloud shadow, 8 and 9 cloud, 10 thin cirrus. Snow (11) and dark areas (2)
            are data unless they are listed.
        dilation_m: In metres, between the centres of pixels; three pixels of the product.
    """

    use: bool = True
    bad: tuple[int, ...] = (0, 1, 3, 8, 9, 10)
    dilation_m: float = Field(60.0, ge=0, le=100_000)

    @field_validator("bad")
    @classmethod
    def _known(cls, bad: tuple[int, ...]) -> tuple[int, ...]:
        unknown = [str(number) for number in bad if number not in SCENE_CLASSES]
        if unknown:
            raise ValueError(f"no class of Sentinel-2's scene classification: {', '.join(unknown)}; the classes are 0 … 11")
        return bad

    def band(self, file: RasterFile, position: int = 0) -> ClassBand:
        """The class band that a file of scene classes makes."""
        meanings = {number: SCENE_CLASSES[number] for number in self.bad}
        return class_band(file, position, meanings, reach=self.reach(file.grid, file.path.name))


class MaskFile(Widening):
    """A file beside an image that says which of its pixels are bad, on a grid of any resolution.

    Attributes:
        file: Its name as seen from the image's folder: `cloud_mask.tif`, `{stem}_cloud.tif` (the image's own name without its
            ending), `../masks/{stem}.tif`, or a glob of which one file fits.
        cloud: Numbers that mean cloud, cloud shadow or cirrus.
        cloud_bits: Positions of bits, from 0, that mean the same.
        nodata: Numbers that mean that there is no data: 0 for a file that holds 1 where an image is valid.
        nodata_bits: Positions of bits that mean the same.
        required: Whether an image without such a file is rejected.
    """

    file: str = Field(min_length=1)
    cloud: tuple[int, ...] = ()
    cloud_bits: tuple[int, ...] = ()
    nodata: tuple[int, ...] = ()
    nodata_bits: tuple[int, ...] = ()
    required: bool = True

    @field_validator("cloud_bits", "nodata_bits")
    @classmethod
    def _positions(cls, bits: tuple[int, ...]) -> tuple[int, ...]:
        if any(not 0 <= bit < 63 for bit in bits):
            raise ValueError(f"positions of bits go from 0 to 62, got {bits}")
        return bits

    @model_validator(mode="after")
    def _says_something(self) -> MaskFile:
        if not (self.cloud or self.cloud_bits or self.nodata or self.nodata_bits):
            raise ValueError(f"say which numbers of {self.file} are bad: cloud=[1], nodata=[0], cloud_bits=[1, 3] or nodata_bits=[0]")
        return self

    def band(self, file: RasterFile) -> ClassBand:
        """The class band that such a file makes.

        A nodata tag of 0 is what many writers put into any file of bytes, and most masks of clouds are 0 where there is none: it counts
        only where `nodata` has it too.
        """
        meanings = dict.fromkeys(self.nodata, Quality.NODATA) | dict.fromkeys(self.cloud, Quality.CLOUD)
        bits = [Bits(bit, Quality.NODATA) for bit in self.nodata_bits] + [Bits(bit, Quality.CLOUD) for bit in self.cloud_bits]
        tag = None if file.nodata[0] == 0 else file.nodata[0]
        made = class_band(file, 0, meanings, bits, self.reach(file.grid, file.path.name))
        return replace(made, band=replace(made.band, nodata=tag))

    def beside(self, image: Path, by_folder: Mapping[str, Mapping[str, Path]]) -> list[Path]:
        """The files, by `plain_folder` and name, that are such a file of `image`."""
        wanted = Path(self.file.replace("{stem}", image.stem))
        there = by_folder.get(plain_folder(image.parent / wanted.parent), {})
        names = [wanted.name] if wanted.name in there else []
        if any(sign in self.file for sign in "*?["):
            pattern = Path(self.file.replace("{stem}", escape(image.stem))).name
            names = [name for name in there if fnmatch(name, pattern)]
        return [there[name] for name in names if there[name] != image]


def plain_folder(folder: Path) -> str:
    """The folder without `..`, as keys of `MaskFile.beside` have it."""
    return os.path.normpath(folder)


def class_band(
    file: RasterFile, position: int, values: Mapping[int, Quality], bits: Iterable[Bits] = (), reach: tuple[float, float] = (0.0, 0.0)
) -> ClassBand:
    """A class band in the data band at `position` of a file; the file's nodata is no class.

    Raises:
        SceneError: Bits are wanted of numbers that are not whole.
    """
    fields = tuple(bits)
    if fields and np.dtype(file.dtypes[position]).kind not in "iu":
        raise SceneError(f"the map of bits {file.path.name} holds {file.dtypes[position]}; bits are in whole numbers")
    nodata: Nodata = file.nodata[position]
    band = BandFile(file.path, file.indexes[position], Channel("classes"), file.grid, file.dtypes[position], nodata, block=file.block)
    return ClassBand(band, tuple(values.items()), fields, reach)
