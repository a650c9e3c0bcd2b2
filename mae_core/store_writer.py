"""The tile store, write side: shards written whole or not at all, then index, statistics and, last, the manifest.

Every file is written beside its place, synced to disk and renamed, so that a run killed anywhere leaves whole files and `*.tmp`.
A finished store can be added to: its shards are left alone, and all other files lie ready as `*.next` before the first takes its
place, so that what was there opens until the last moment, and what is begun then can be taken to its end.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
from numpy.typing import NDArray

from mae_core.chunks import Compression, crc32c, default_codec
from mae_core.histogram import PERCENTS, Histogram
from mae_core.shards import DTYPES, NO_CHUNK, ShardedArray
from mae_core.store_folder import FORMAT, FORMAT_VERSION, HISTOGRAM, UNKNOWN, sha256_of, store_digest

TEMPORARY = ".tmp"
"""Ending of a file that is being written; what still has it after a kill is rubbish."""

NEXT = ".next"
"""Ending of a file that is whole and waits to take its place."""

COMMIT = "progress/commit.json"
"""The manifest to be, below the store, from when everything is written until everything has its place."""


@dataclass(frozen=True)
class StoreLayout:
    """What is fixed before the first tile is written.

    Attributes:
        num_tiles: Positions on the tile axis, those that will stay empty included.
        channels: Names, in the order of the channel axis.
        tile: Size of a tile per spatial axis.
        axes: Name of each spatial axis.
        dtype: Element type of the pixels, one of `mae_core.shards.DTYPES`.
        tiles_per_shard: Tiles in a file.
        has_labels: Whether there is an array of class numbers.
        compression: How chunks are packed.
    """

    num_tiles: int
    channels: tuple[str, ...]
    tile: tuple[int, ...]
    axes: tuple[str, ...]
    dtype: str
    tiles_per_shard: int
    has_labels: bool
    compression: Compression = "fast"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"a tile store cannot hold {self.dtype}; allowed: {', '.join(DTYPES)}")
        if len(self.axes) != len(self.tile):
            raise ValueError(f"tile {self.tile} has {len(self.tile)} axes, axes names {self.axes}")

    @property
    def arrays(self) -> dict[str, ShardedArray]:
        """The arrays of the store by name."""
        shapes = {"pixels": ((len(self.channels), *self.tile), self.dtype), "quality": (self.tile, "uint8")}
        if self.has_labels:
            shapes["labels"] = (self.tile, "int16")
        return {
            name: ShardedArray(name, (self.num_tiles, *shape), dtype, self.tiles_per_shard, default_codec(dtype, self.compression))
            for name, (shape, dtype) in shapes.items()
        }

    @property
    def num_shards(self) -> int:
        """Shards of the tile axis; shard `n` of every array has one writer."""
        return -(-self.num_tiles // self.tiles_per_shard)


class ShardWriter:
    """One shard of every array, tile by tile: holds one encoded tile in memory; the files appear when the block is left in peace.

    A shard without a tile has no file. What an earlier try left in the place stands until then. Two writers of one shard, such as a dask
    worker that was given up too early and the one that took its task, do not disturb each other: both bring the same bytes.
    """

    def __init__(self, store: Path, layout: StoreLayout, shard: int) -> None:
        self._store = store
        self._shard = shard
        self._tiles_per_shard = layout.tiles_per_shard
        self._arrays = layout.arrays
        self._streams: dict[str, IO[bytes]] = {}
        self._digests = {name: hashlib.sha256() for name in self._arrays}
        self._index = {name: np.full((layout.tiles_per_shard, 2), NO_CHUNK, "<u8") for name in self._arrays}
        self.files: dict[str, dict[str, Any]] = {}
        """Bytes and sha256 of every file written, by its path below the store; filled when the block is left."""

    def __enter__(self) -> Self:
        return self

    def add(self, tile: int, pixels: NDArray[np.generic], quality: NDArray[np.uint8], labels: NDArray[np.int16] | None) -> None:
        """Appends a tile, padded to the tile size; each tile once.

        Raises:
            ValueError: The tile is of another shard, or an array has another shape or element type than the layout says.
            OSError: The disk is full or the folder cannot be written.
        """
        given = {"pixels": pixels, "quality": quality} | ({} if labels is None else {"labels": labels})
        if given.keys() != self._arrays.keys():
            raise ValueError(f"tile {tile} comes with {sorted(given)}, the store has {sorted(self._arrays)}")
        for name, values in given.items():
            array = self._arrays[name]
            if values.shape != array.shape[1:] or values.dtype != np.dtype(array.dtype):
                raise ValueError(f"{name} of tile {tile} are {values.dtype}{values.shape}, wanted {array.dtype}{array.shape[1:]}")
        shard, place = divmod(tile, self._tiles_per_shard)
        if shard != self._shard or self._index["pixels"][place, 0] != NO_CHUNK:
            raise ValueError(f"tile {tile} is not one of shard {self._shard}, or came twice")
        for name, values in given.items():
            chunk = self._arrays[name].encode(values)
            self._index[name][place] = self._write(name, chunk), len(chunk)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            for stream in self._streams.values():
                with contextlib.suppress(OSError):
                    stream.close()
                Path(stream.name).unlink(missing_ok=True)

    def _finish(self) -> None:
        for name in self._arrays.keys() - self._streams.keys():
            (self._store / self._arrays[name].key(self._shard)).unlink(missing_ok=True)
        for name, stream in self._streams.items():
            index = self._index[name].tobytes()
            end = self._write(name, index + crc32c(index).to_bytes(4, "little"))
            key = self._arrays[name].key(self._shard)
            self.files[key] = {"bytes": end + len(index) + 4, "sha256": self._digests[name].hexdigest()}
            _commit(stream, self._store / key)

    def _write(self, name: str, data: bytes) -> int:
        """Appends to the file of an array; gives the offset at which the data lie."""
        if name not in self._streams:
            file = self._store / self._arrays[name].key(self._shard)
            file.parent.mkdir(parents=True, exist_ok=True)
            self._streams[name] = _aside(file).open("wb")
        offset = self._streams[name].tell()
        self._streams[name].write(data)
        self._digests[name].update(data)
        return offset


def write_file(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all: beside its place, synced, renamed, and the folder synced."""
    with writing(path) as stream:
        stream.write(data)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[IO[bytes]]:
    """A stream whose content becomes `path` when the block is left in peace, and nothing otherwise."""
    temporary = _aside(path)
    with temporary.open("wb") as stream:
        try:
            yield stream
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _commit(stream, path)


def _aside(path: Path) -> Path:
    """A name beside a file that no other writer takes."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}{TEMPORARY}")


def encode_json(document: Mapping[str, Any]) -> bytes:
    """JSON that is the same for the same content: sorted keys, no NaN."""
    return (json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def merge_moments(parts: Sequence[Mapping[str, Sequence[float | None]]], num_channels: int) -> dict[str, list[Any]]:
    """Count, mean, std (of the population), min and max per channel from those of disjoint parts, in float64.

    Each part has `count`, `mean`, `m2` (sum of squared distances from the mean), `min` and `max`, a number per channel; the last
    two are None where the count is 0. The result depends on the order of the parts only, not on when each was measured.
    Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
    """
    count, mean, m2 = np.zeros(num_channels), np.zeros(num_channels), np.zeros(num_channels)
    low, high = np.full(num_channels, np.inf), np.full(num_channels, -np.inf)
    for part in parts:
        added = np.asarray(part["count"], np.float64)
        total = np.maximum(count + added, 1)
        delta = np.asarray(part["mean"], np.float64) - mean
        mean = mean + np.where(added > 0, delta * added / total, 0)
        m2 = m2 + np.where(added > 0, np.asarray(part["m2"], np.float64) + delta**2 * count * added / total, 0)
        count = count + added
        low = np.minimum(low, [np.inf if value is None else value for value in part["min"]])
        high = np.maximum(high, [-np.inf if value is None else value for value in part["max"]])

    def numbers(values: NDArray[np.float64]) -> list[float | None]:
        return [float(value) if num else None for value, num in zip(values, count, strict=True)]

    std = np.sqrt(m2 / np.maximum(count, 1))
    return {
        "count": [int(num) for num in count],
        "mean": numbers(mean),
        "std": numbers(std),
        "min": numbers(low),
        "max": numbers(high),
    }


def wait_with(store: Path, histogram: Histogram, num_channels: int) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Percentiles for the statistics, and bytes and sha256 by path of the file of a histogram, which then waits for `complete`."""
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table({"channel": histogram.channel, "value": histogram.value, "count": histogram.count})
    with writing(store / (HISTOGRAM + NEXT)) as stream:
        parquet.write_table(table, stream, compression="zstd")
    path = store / (HISTOGRAM + NEXT)
    rows = [row.tolist() if np.isfinite(row).all() else None for row in histogram.percentiles(num_channels)]
    return (
        {"percents": list(PERCENTS), "percentiles": rows},
        {HISTOGRAM: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}},
    )


def finish(
    store: Path,
    layout: StoreLayout,
    *,
    attributes: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    statistics: Mapping[str, Any],
    shards: Mapping[str, dict[str, Any]],
    manifest: Mapping[str, Any],
) -> dict[str, Any]:
    """Writes metadata, index and statistics and then the manifest, which makes the store complete; gives the manifest.

    Args:
        store: Folder whose shards are all written; it may hold a finished store that has fewer of them.
        layout: What the shards were written by.
        attributes: Of the group; `kind`, `channels` and `no_value` are read back by `TileStore`.
        rows: One per tile, by rising tile id, with the columns of `mae_core.store.TileIndex`; those of `UNKNOWN` may be left out.
        statistics: What `merge_moments` and `wait_with` give.
        shards: Bytes and sha256 by path of every shard file, and of what waits.
        manifest: What else the manifest says; `tiles.accepted` is checked on opening.
    """
    written = dict(shards)

    def put(name: str, data: bytes) -> None:
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        write_file(store / (name + NEXT), data)
        written[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    for name, data in _metadata(layout, attributes).items():
        put(name, data)
    put("statistics.json", encode_json({"channels": list(layout.channels), **statistics}))
    index = store / ("index.parquet" + NEXT)
    _write_index(index, rows)
    written["index.parquet"] = {"bytes": index.stat().st_size, "sha256": sha256_of(index)}
    document = {
        **manifest,
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "files": written,
        "store_digest": store_digest(written),
    }
    (store / COMMIT).parent.mkdir(exist_ok=True)
    write_file(store / COMMIT, encode_json(document))
    return complete(store)


def complete(store: Path) -> dict[str, Any]:
    """Gives every waiting file its place, the manifest last, and gives the manifest; done twice, or begun and done again, it is the same.

    Raises:
        OSError: There is nothing to complete (`COMMIT` is not there), or the folder cannot be written.
        ValueError: `COMMIT` is damaged.
    """
    document: dict[str, Any] = json.loads((store / COMMIT).read_bytes())
    for name in sorted(document["files"]):
        waiting = store / (name + NEXT)
        if "/c/" not in name and waiting.is_file():
            _rename(waiting, store / name)
    write_file(store / "manifest.json", encode_json(document))
    (store / COMMIT).unlink()
    with contextlib.suppress(OSError):  # it holds more where shards were prepared
        (store / COMMIT).parent.rmdir()
    return document


def _metadata(layout: StoreLayout, attributes: Mapping[str, Any]) -> dict[str, bytes]:
    """The `zarr.json` of the group and of each array, made by zarr in memory so that they can be written whole."""
    import zarr
    from zarr.codecs import Crc32cCodec
    from zarr.core.buffer import Buffer
    from zarr.storage import MemoryStore

    documents: dict[str, Buffer] = {}
    memory = MemoryStore(documents)
    own = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "has_labels": layout.has_labels,
        "tile": list(layout.tile),
        "axes": list(layout.axes),
    }
    group = zarr.create_group(store=memory, zarr_format=3, attributes={**attributes, **own})
    for name, array in layout.arrays.items():
        inner = array.shape[1:]
        group.create_array(
            name,
            shape=array.shape,
            chunks=(1, *inner),
            shards=(array.tiles_per_shard, *inner),
            dtype=array.dtype,
            compressors=[_zarr_codec(array), Crc32cCodec()],
            fill_value=-1 if name == "labels" else 0,
            config={"write_empty_chunks": True},
            dimension_names=("tile", *(("channel",) if name == "pixels" else ()), *layout.axes),
        )
    names = ["zarr.json", *(f"{name}/zarr.json" for name in layout.arrays)]
    return {name: encode_json(json.loads(documents[name].to_bytes())) for name in names}


def _zarr_codec(array: ShardedArray) -> Any:
    from zarr.codecs import BloscCodec, ZstdCodec

    codec = array.codec
    if codec.name == "zstd":
        return ZstdCodec(level=codec.level)
    return BloscCodec(cname=codec.compressor, clevel=codec.level, shuffle=codec.shuffle, typesize=array.stored_dtype.itemsize, blocksize=0)


def _write_index(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    whole, real = pa.int64(), pa.float64()
    schema = pa.schema(
        [
            ("tile", whole),
            *((name, pa.string()) for name in ("scene", "group", "split")),
            *((name, pa.list_(whole)) for name in ("origin", "extent", "owned")),
            ("affine", pa.list_(real)),
            *((name, pa.string()) for name in ("frame", "unit")),
            *((name, real) for name in ("valid_fraction", "cloud_fraction", "latitude", "longitude")),
            ("time", pa.string()),
            ("times", pa.list_(pa.string())),
            ("present", pa.list_(pa.bool_())),
            *((name, pa.list_(real)) for name in ("scale", "offset")),
            ("voxel_digests", pa.list_(pa.string())),
        ]
    )
    columns = {name: [row.get(name, UNKNOWN[name]) if name in UNKNOWN else row[name] for row in rows] for name in schema.names}
    table = pa.table(columns, schema=schema)
    with writing(path) as stream:
        parquet.write_table(table, stream, compression="zstd")


def _commit(stream: IO[bytes], path: Path) -> None:
    """Syncs what was written and gives it its name."""
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()
    _rename(Path(stream.name), path)


def _rename(source: Path, target: Path) -> None:
    """Gives a file its name and syncs the folder."""
    source.replace(target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
