"""The least that a preparation has to do, by others' means: rasterio or nibabel unpack the files, zarr-python packs the same tiles."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.pool import Pool
from pathlib import Path
from time import perf_counter, process_time

import numpy as np
from numpy.typing import NDArray

RASTERS = (".tif", ".tiff", ".jp2")
VOLUMES = (".nii", ".nii.gz")
WINDOW_BYTES = 64 << 20
"""A window is as many blocks as fit into this, at least one; a plain program reads that much at once."""


@dataclass(frozen=True)
class Unpacking:
    """A part of a file: rows and columns of a raster, both edges of blocks, or a whole volume."""

    file: Path
    rows: tuple[int, int] = (0, 0)
    columns: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Packing:
    """The pixels of a shard, from a finished store into a copy of its empty array."""

    store: Path
    copy: Path
    first: int
    stop: int


Unit = Unpacking | Packing


@dataclass(frozen=True)
class Spent:
    """What a unit took.

    Attributes:
        seconds: In the library, without what comes before.
        processor_seconds: Of them, those in which the process was at work.
        num_bytes: Unpacked, as the file or the store holds them.
        packed: True for packing.
    """

    seconds: float
    processor_seconds: float
    num_bytes: int
    packed: bool


@dataclass(frozen=True)
class Ceiling:
    """Seconds to unpack the files and to pack the tiles, and the processor time of both, of all workers together."""

    unpack: float
    pack: float
    processor_seconds: float


class Workers:
    """Processes that do units, as many as a preparation has workers, each with one thread."""

    def __init__(self, pool: Pool, num_workers: int) -> None:
        self._pool = pool
        self._num_workers = num_workers

    def do(self, units: Iterable[Unit]) -> Ceiling:
        """What unpacking and packing take at best: all that was spent, evenly divided among the workers."""
        spent = list(self._pool.imap_unordered(work, list(units)))
        unpacked = sum(each.seconds for each in spent if not each.packed)
        packed = sum(each.seconds for each in spent if each.packed)
        return Ceiling(unpacked / self._num_workers, packed / self._num_workers, sum(each.processor_seconds for each in spent))


@contextmanager
def ceiling_workers(num_workers: int, environment: Mapping[str, str]) -> Iterator[Workers]:
    """The workers, started; the environment is that of a preparation's workers."""
    with multiprocessing.get_context("spawn").Pool(num_workers, _begin, (dict(environment),)) as pool:
        yield Workers(pool, num_workers)


def unpacking_units(files: Iterable[Path]) -> list[Unpacking]:
    """All of the files that hold pixels, in parts; headers, sidecars and what is of another kind are left out."""
    units: list[Unpacking] = []
    for file in files:
        name = file.name.lower()
        if name.endswith(RASTERS):
            units += _windows(file)
        elif name.endswith(VOLUMES):
            units.append(Unpacking(file))
    return units


def packing_units(store: Path, copy: Path) -> list[Packing]:
    """All shards of the pixels of a store; the copy gets the metadata that say how they are packed."""
    import zarr

    (copy / "pixels").mkdir(parents=True)
    shutil.copy(store / "pixels" / "zarr.json", copy / "pixels" / "zarr.json")
    array = zarr.open_array(store / "pixels", mode="r")
    assert array.shards is not None
    step, count = array.shards[0], array.shape[0]
    return [Packing(store, copy, first, min(first + step, count)) for first in range(0, count, step)]


def work(unit: Unit) -> Spent:
    """Does a unit."""
    if isinstance(unit, Packing):
        return _pack(unit)
    if unit.file.name.lower().endswith(VOLUMES):
        return _unpack_volume(unit)
    return _unpack_raster(unit)


def write_image(file: Path, size: int, bands: int, block: int) -> None:
    """A GeoTIFF of 16 bits that packs about as well as a satellite image: smooth fields, alike from band to band, and noise."""
    import rasterio

    rng = np.random.default_rng(0)
    fields = [_smooth(rng, size, cells) for cells in (4, 32, 256)]
    place = {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 500_000, 0, -10, 5_000_000)}
    packing = {"tiled": True, "blockxsize": block, "blockysize": block, "compress": "deflate", "predictor": 2, "interleave": "band"}
    with rasterio.open(file, "w", driver="GTiff", width=size, height=size, count=bands, dtype="uint16", **place, **packing) as image:
        for band in range(1, bands + 1):
            gains = rng.uniform(300, 600, len(fields)) / (1, 2, 4)
            values = 2500 + sum(gain * field for gain, field in zip(gains, fields, strict=True)) + rng.normal(0, 12, (size, size))
            image.write(np.clip(values, 1, 10_000).astype(np.uint16), band)


def _smooth(rng: np.random.Generator, size: int, cells: int) -> NDArray[np.float32]:
    """Noise on a coarse lattice, drawn out linearly between its points."""
    coarse = rng.normal(0, 1, (cells + 1, cells + 1)).astype(np.float32)
    place = np.linspace(0, cells, size, endpoint=False, dtype=np.float32)
    low = place.astype(int)
    part = (place - low)[:, None]
    rows: NDArray[np.float32] = coarse[low] * (1 - part) + coarse[low + 1] * part
    drawn: NDArray[np.float32] = rows[:, low] * (1 - part[:, 0]) + rows[:, low + 1] * part[:, 0]
    return drawn


def _windows(file: Path) -> Iterator[Unpacking]:
    import rasterio

    with rasterio.open(file) as image:
        height, width = image.block_shapes[0]
        block_bytes = height * width * sum(np.dtype(name).itemsize for name in image.dtypes)
        across = max(1, min(-(-image.width // width), WINDOW_BYTES // block_bytes))
        down = max(1, WINDOW_BYTES // (block_bytes * across))
        for top in range(0, image.height, height * down):
            for left in range(0, image.width, width * across):
                rows, columns = (top, min(top + height * down, image.height)), (left, min(left + width * across, image.width))
                yield Unpacking(file, rows, columns)


def _unpack_raster(unit: Unpacking) -> Spent:
    import rasterio
    from rasterio.windows import Window

    began = _now()
    with rasterio.open(unit.file) as image:
        values = image.read(window=Window.from_slices(unit.rows, unit.columns))
    return Spent(*_since(began), values.nbytes, packed=False)


def _unpack_volume(unit: Unpacking) -> Spent:
    import nibabel

    began = _now()
    values = np.asarray(nibabel.load(unit.file).dataobj.get_unscaled())
    return Spent(*_since(began), values.nbytes, packed=False)


def _pack(unit: Packing) -> Spent:
    import zarr

    tiles = zarr.open_array(unit.store / "pixels", mode="r")[unit.first : unit.stop]
    array = zarr.open_array(unit.copy / "pixels", mode="r+", config={"write_empty_chunks": True})
    began = _now()
    array[unit.first : unit.stop] = tiles
    return Spent(*_since(began), np.asarray(tiles).nbytes, packed=True)


def _now() -> tuple[float, float]:
    return perf_counter(), process_time()


def _since(began: tuple[float, float]) -> tuple[float, float]:
    return perf_counter() - began[0], process_time() - began[1]


def _begin(environment: dict[str, str]) -> None:
    """One thread for a worker, as a preparation's has, and all imported before the clock runs."""
    os.environ.update(environment)
    import nibabel
    import rasterio
    import zarr
    from numcodecs import blosc  # type: ignore[import-untyped]

    blosc.use_threads = False
    zarr.config.set({"threading.max_workers": 1, "async.concurrency": 1})
    del nibabel, rasterio
