"""A tile of a store as files that other programs read: GeoTIFF for images, NIfTI for volumes, each at its place in the world.

Beside the image lies `…_quality`, all bits of every voxel: neither format has a place for more than "valid or not" in the image
itself. A GeoTIFF also carries a mask band, so that a map shows only what counts; the stored values stay under it, unchanged.
"""

from __future__ import annotations

import gzip
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.transform import Affine

from modalities.grid import Grid
from modalities.raster_file import BROKEN, plain, quiet
from modalities.resample import is_placed
from modalities.scene import Channel, SceneError

RASTER, VOLUME = ".tif", ".nii.gz"
NO_LABEL = -1
"""What stands in a label file where there is no label: nodata of a GeoTIFF, and what our readers take for none in a volume."""

ONE_FILE = {"GDAL_PAM_ENABLED": "NO", "GDAL_TIFF_INTERNAL_MASK": "YES"}
"""A GeoTIFF and nothing beside it that would have to be moved along: no `.aux.xml`, no `.msk`."""

Part = tuple[str, Callable[[Path], None]]
"""What the name of one of a tile's files ends in, and what writes it."""


@dataclass(frozen=True, eq=False)
class TileImage:
    """What is known of a tile, without its padding.

    Attributes:
        pixels: `(channel, *space)` as stored.
        quality: `(*space)` of bit flags.
        labels: `(*space)` of class numbers, -1 for none; None if there are none.
        channels: In the order of the channel axis, each with the scale and offset that make its values physical.
        grid: Where the tile lies.
        no_value: Bits of the quality under which a value means nothing.
        tags: What else to write into the header of a GeoTIFF, such as the store's digest.
    """

    pixels: NDArray[np.generic]
    quality: NDArray[np.uint8]
    labels: NDArray[np.int16] | None
    channels: tuple[Channel, ...]
    grid: Grid
    no_value: int
    tags: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shapes = [part.shape for part in (self.pixels[0], self.quality, self.labels) if part is not None]
        if any(shape != self.grid.space for shape in shapes) or len(self.pixels) != len(self.channels):
            raise ValueError(f"a tile of {self.grid.space} with {len(self.channels)} channels comes with arrays of {shapes}")


def suffix_of(grid: Grid) -> str:
    """Ending of the files of a tile: `.tif` for images, `.nii.gz` for volumes in RAS+.

    Raises:
        SceneError: Neither format has a place for it.
    """
    if len(grid.space) == 2 and grid.frame != "RAS+":
        return RASTER
    if len(grid.space) == 3 and grid.frame == "RAS+":
        return VOLUME
    raise SceneError(
        f"a tile of {len(grid.space)} axes in frame {grid.frame or 'unknown'!r} is neither an image (2 axes in a CRS) nor a volume "
        "(3 axes in RAS+), so there is no file format for it here; read it from the store (zarr)"
    )


def write_tile(path: Path, image: TileImage) -> list[Path]:
    """Writes a tile and what belongs to it, the image last; each file is whole or absent, and none is written over.

    Beside `NAME.tif` lie `NAME_quality.tif` and, where there are labels, `NAME_labels.tif`. A GeoTIFF holds all channels, with names,
    scales and offsets; a NIfTI file holds one, so several channels become `NAME_CHANNEL.nii.gz`. NIfTI knows scale and offset in 32
    bits, and neither format half-precision numbers: they become float32, which holds them exactly.

    Args:
        path: The image's file, with the ending that `suffix_of` gives.
        image: What to write.

    Returns:
        The files, in the order in which they were written.

    Raises:
        SceneError: A file is there already, the ending is wrong, or the disk cannot be written.
    """
    suffix = suffix_of(image.grid)
    if not path.name.endswith(suffix):
        raise SceneError(f"{path}: a tile in {image.grid.frame or 'no frame'} is written as {suffix}; change the ending")
    stem = path.name.removesuffix(suffix)
    parts = _rasters(image) if suffix == RASTER else _volumes(image)
    files = [path.with_name(f"{stem}{part}{suffix}") for part, _ in parts]
    if len(set(files)) < len(files):
        raise SceneError(f"two files of {path} would be called the same: {', '.join(file.name for file in files)}; rename the channels")
    taken = [str(file) for file in files if file.exists()]
    if taken:
        raise SceneError(f"{', '.join(taken)} exists; choose another name, or delete it first")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for file, (_, write) in zip(files, parts, strict=True):
            _put(file, write)
    except BROKEN as error:
        raise SceneError(f"cannot write {path}: {plain(error, path)}") from error
    return files


def corner_affine(grid: Grid) -> Affine:
    """The affine of GDAL, (column, row) of pixel corners, for a grid of (row, column) of pixel centres."""
    corner = grid.matrix @ np.array([[0.0, 1.0, -0.5], [1.0, 0.0, -0.5], [0.0, 0.0, 1.0]])
    return Affine(*corner[:2].ravel())


def _put(file: Path, write: Callable[[Path], None]) -> None:
    partial = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        write(partial)
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def _stored(values: NDArray[np.generic]) -> NDArray[np.generic]:
    return values.astype(np.float32) if values.dtype == np.float16 else values


def _rasters(image: TileImage) -> list[Part]:
    parts: list[Part] = [("_quality", lambda path: _write_raster(path, image, image.quality[None], [Channel("quality")]))]
    labels = image.labels
    if labels is not None:
        parts.append(("_labels", lambda path: _write_raster(path, image, labels[None], [Channel("labels")], nodata=NO_LABEL)))
    valid = (image.quality & image.no_value) == 0
    return [*parts, ("", lambda path: _write_raster(path, image, _stored(image.pixels), image.channels, valid=valid))]


def _write_raster(
    path: Path,
    image: TileImage,
    values: NDArray[np.generic],
    channels: Sequence[Channel],
    *,
    nodata: int | None = None,
    valid: NDArray[np.bool_] | None = None,
) -> None:
    count, height, width = values.shape
    place: dict[str, Any] = {"transform": corner_affine(image.grid)} if is_placed(image.grid) else {}
    place |= {"crs": image.grid.frame} if image.grid.frame else {}
    shape = {"count": count, "height": height, "width": width, "dtype": values.dtype.name, "nodata": nodata}
    with rasterio.Env(**ONE_FILE):
        with quiet():
            target = rasterio.open(path, "w", driver="GTiff", compress="deflate", interleave="band", **shape, **place)
        with target:
            target.write(values)
            target.descriptions = [channel.name for channel in channels]
            target.scales = [channel.scale for channel in channels]
            target.offsets = [channel.offset for channel in channels]
            for band, channel in enumerate(channels, 1):
                if channel.wavelength_nm is not None:
                    target.update_tags(band, wavelength_nm=f"{channel.wavelength_nm:g}")
            target.update_tags(**image.tags)
            if valid is not None:
                target.write_mask(valid)


def _volumes(image: TileImage) -> list[Part]:
    parts: list[Part] = [("_quality", lambda path: _write_volume(path, image.grid, image.quality, Channel("quality")))]
    labels = image.labels
    if labels is not None:
        parts.append(("_labels", lambda path: _write_volume(path, image.grid, labels, Channel("labels"))))

    def one(values: NDArray[np.generic], channel: Channel) -> Part:
        name = "_" + re.sub(r"[^\w.+-]", "_", channel.name)
        return name if len(image.channels) > 1 else "", lambda path: _write_volume(path, image.grid, _stored(values), channel)

    return [*parts, *(one(values, channel) for values, channel in zip(image.pixels, image.channels, strict=True))]


def _write_volume(path: Path, grid: Grid, values: NDArray[np.generic], channel: Channel) -> None:
    """NIfTI-1 of values as stored. The affine is the sform alone: a qform cannot say the same of a sheared volume."""
    header = nib.Nifti1Header()
    header.set_data_dtype(values.dtype.newbyteorder("="))
    header.set_data_shape(values.shape)
    header.set_sform(grid.matrix, code=1)
    header.set_zooms(grid.spacing)
    header.set_xyzt_units(xyz="mm")
    header["vox_offset"] = header.single_vox_offset
    header["scl_slope"], header["scl_inter"] = channel.scale, channel.offset
    header["descrip"] = channel.name.encode()[:79]
    with path.open("wb") as raw, gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as stream:
        stream.write(header.binaryblock + bytes(4) + values.tobytes("F"))
