"""One store where it lies, read and checked: manifest, metadata, index, statistics, and the layout of its shards.

Every promise of the manifest is checked before a chunk is unpacked; what does not hold is refused by name.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float64, Int64, Shaped
from numpy.typing import NDArray

from mae_core.histogram import PERCENTS, Histogram
from mae_core.shards import ShardedArray, StoreError, array_from_metadata
from mae_core.store_files import LocalFiles, StoreFiles, digest_of

FORMAT = "terravox-tiles"
HISTOGRAM = "histogram.parquet"
"""How often each value occurs in the training tiles, from which percentiles are taken anew when a store grows or joins others."""
FORMAT_VERSION = 1
Verify = Literal["checksums", "sizes"]
UNKNOWN: dict[str, Any] = {
    "cloud_fraction": np.nan,
    "time": "",
    "times": (),
    "latitude": np.nan,
    "longitude": np.nan,
    "voxel_digests": (),
}
"""Columns of the index that older stores lack, and what stands in them where a fact is not known."""


@dataclass(frozen=True, eq=False)
class TileIndex:
    """One row per tile that exists, as columns of equal length; `index.parquet` holds the same.

    Attributes:
        tile: Stable id, rising.
        scene, group, split: Names; a group is on one side of the split only.
        origin, extent, owned: `(row, axis)` in voxels of the scene: first voxel, size of real data, and the leading part
            of it that no later tile repeats (owned boxes cover a scene once).
        affine: `(row, (axes + 1)²)`: the tile's own index-to-world matrix, row by row.
        frame, unit: What world coordinates mean.
        valid_fraction: Share of voxels of the extent that count.
        cloud_fraction: Share of voxels of the extent under a cloud or its border; NaN where nobody looked.
        time: When it was acquired, ISO 8601 in UTC, of a series its first date; empty where it is not known.
        times: Of a series, the time of each index of the first axis, as a tuple; else empty.
        latitude, longitude: Of the middle of the extent, in degrees on WGS 84; NaN where it has no place.
        present, scale, offset: `(row, channel)`.
        voxel_digests: Of the scans that its scene is made of, as a tuple: what they are known by under any name; empty for images.
    """

    tile: Int64[np.ndarray, " row"]
    scene: Shaped[np.ndarray, " row"]
    group: Shaped[np.ndarray, " row"]
    split: Shaped[np.ndarray, " row"]
    origin: Int64[np.ndarray, " row axis"]
    extent: Int64[np.ndarray, " row axis"]
    owned: Int64[np.ndarray, " row axis"]
    affine: Float64[np.ndarray, " row entry"]
    frame: Shaped[np.ndarray, " row"]
    unit: Shaped[np.ndarray, " row"]
    valid_fraction: Float64[np.ndarray, " row"]
    cloud_fraction: Float64[np.ndarray, " row"]
    time: Shaped[np.ndarray, " row"]
    times: Shaped[np.ndarray, " row"]
    latitude: Float64[np.ndarray, " row"]
    longitude: Float64[np.ndarray, " row"]
    present: Bool[np.ndarray, " row channel"]
    scale: Float64[np.ndarray, " row channel"]
    offset: Float64[np.ndarray, " row channel"]
    voxel_digests: Shaped[np.ndarray, " row"]


@dataclass(frozen=True, eq=False)
class Statistics:
    """Per channel, over the counted voxels of the training tiles, of the physical value.

    A channel without any such voxel has count 0, mean 0 and std 1, so that it can be normalised and says nothing. `percentiles` are
    those of `mae_core.histogram.PERCENTS`, within 1e-5 of themselves (3e-4 for real and wide numbers); NaN where nobody counted.
    """

    count: Int64[np.ndarray, " channel"]
    mean: Float64[np.ndarray, " channel"]
    std: Float64[np.ndarray, " channel"]
    minimum: Float64[np.ndarray, " channel"]
    maximum: Float64[np.ndarray, " channel"]
    percentiles: Float64[np.ndarray, "channel percent"]


@dataclass(frozen=True, eq=False)
class StoreFolder:
    """A finished store in one place; holds no open file.

    Attributes:
        files: Where it lies.
        digest: Digest over the checksums of all its files: two stores with the same digest are the same.
        attributes: Attributes of the group, as `zarr.json` has them.
        arrays: Layout of `pixels`, `quality` and, where there are any, `labels`.
        index: One row per tile.
        statistics: Of the training tiles.
        manifest: Files with bytes and sha256, counts of tiles by what became of them.
    """

    files: StoreFiles
    digest: str
    attributes: dict[str, Any]
    arrays: dict[str, ShardedArray]
    index: TileIndex
    statistics: Statistics
    manifest: dict[str, Any]

    @property
    def channels(self) -> tuple[str, ...]:
        """Channel names, in the order of the channel axis."""
        return tuple(channel["name"] for channel in self.attributes["channels"])


def open_folder(files: StoreFiles, verify: Verify) -> StoreFolder:
    """The store that lies somewhere, checked.

    Args:
        files: Where.
        verify: `"sizes"` checks that every file is there and has its size, and the checksums of index, statistics and
            metadata; `"checksums"` also reads every shard and compares its sha256.

    Raises:
        StoreError: The store is unfinished, unknown, altered or incomplete.
    """
    try:
        manifest = _read_manifest(files)
        listed: dict[str, dict[str, Any]] = manifest["files"]
        plain = [name for name in listed if not _is_shard(name)]
        _refuse(files, _problems(files, listed, plain, {}, hashed=True))
        attributes, arrays = _read_metadata(files, plain)
        shards = [name for name in listed if _is_shard(name)]
        _refuse(files, _problems(files, listed, shards, arrays, hashed=verify == "checksums"))
        index = _read_index(files, arrays["pixels"].shape)
        _check_index(files, index, arrays, manifest)
        return StoreFolder(
            files, manifest["store_digest"], attributes, arrays, index, statistics_of(json.loads(files.read("statistics.json"))), manifest
        )
    except OSError as error:
        raise StoreError(f"{files.label} cannot be read: {error}") from error


def store_digest(files: dict[str, dict[str, Any]]) -> str:
    """Digest of a store: sha256 over the sorted list of paths and their sha256."""
    lines = "".join(f"{name} {files[name]['sha256']}\n" for name in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def statistics_of(document: Mapping[str, Any]) -> Statistics:
    """Statistics from the columns of `statistics.json`, where None stands for "no voxel"."""
    empty = {"mean": 0.0, "std": 1.0, "min": 0.0, "max": 0.0}
    columns = {key: np.array([default if v is None else v for v in document[key]], np.float64) for key, default in empty.items()}
    unknown = [None] * len(PERCENTS)
    given = [*document.get("percentiles", []), *[None] * len(document["count"])][: len(document["count"])]
    rows = [row or unknown for row in given]
    percentiles = np.array([[np.nan if value is None else value for value in row] for row in rows], np.float64).reshape(-1, len(PERCENTS))
    mean, std, low, high = columns.values()
    return Statistics(np.array(document["count"], np.int64), mean, std, low, high, percentiles)


def read_histogram(folder: StoreFolder) -> Histogram | None:
    """The values of the training tiles; None for a store from before they were counted.

    Raises:
        OSError: The file cannot be read.
    """
    from pyarrow import parquet

    if HISTOGRAM not in folder.manifest["files"]:
        return None
    table = parquet.read_table(io.BytesIO(folder.files.read(HISTOGRAM)), use_threads=False)
    columns = (table[name].to_numpy() for name in ("channel", "value", "count"))
    return Histogram(*(np.asarray(column, dtype) for column, dtype in zip(columns, (np.int32, np.float32, np.int64), strict=True)))


def _is_shard(name: str) -> bool:
    return name.split("/")[1:2] == ["c"]


def _read_manifest(files: StoreFiles) -> dict[str, Any]:
    where = files.label
    if isinstance(files, LocalFiles) and not files.folder.is_dir():
        raise StoreError(f"{where} is not a folder; a tile store is the folder that prepare wrote")
    if files.size("progress/commit.json") is not None:
        raise StoreError(f"{where}: prepare was cut off in its last moment; run the same prepare again, it finishes at once")
    if files.size("manifest.json") is None:
        unfinished = files.size("progress/plan.json") is not None or (
            isinstance(files, LocalFiles) and (files.folder / "progress").is_dir()
        )
        todo = "it is not finished: run prepare again" if unfinished else "it is not a tile store; run prepare to make one"
        raise StoreError(f"{where} has no manifest.json: {todo}")
    try:
        manifest: dict[str, Any] = json.loads(files.read("manifest.json"))
        found = (manifest["format"], manifest["format_version"])
        digests = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{where}/manifest.json is damaged ({error!r}); restore it or prepare again") from error
    if found != (FORMAT, FORMAT_VERSION):
        raise StoreError(f"{where} is of format {found[0]} {found[1]}, this version reads {FORMAT} {FORMAT_VERSION}; prepare it again")
    for name in digests:
        if not files.holds(name):
            raise StoreError(f"{where}/manifest.json lists {name}, which lies outside the store")
    if manifest.get("store_digest") != store_digest(manifest["files"]):
        raise StoreError(f"{where}/manifest.json is altered: its list of files does not give its store_digest")
    return manifest


def _problems(
    files: StoreFiles, listed: dict[str, dict[str, Any]], names: list[str], arrays: dict[str, ShardedArray], *, hashed: bool
) -> list[str]:
    """What is wrong with the named files of a store."""
    problems = []
    for name in sorted(names):
        label = name
        if _is_shard(name) and name.split("/")[0] in arrays:
            label = arrays[name.split("/")[0]].label(int(name.split("/")[2]))
        size = files.size(name)
        if size is None:
            problems.append(f"{label} is missing")
        elif size != listed[name]["bytes"]:
            problems.append(f"{label} has {size} bytes, the manifest says {listed[name]['bytes']}")
        elif hashed and digest_of(files, name) != listed[name]["sha256"]:
            problems.append(f"{label} fails its sha256")
    return problems


def _refuse(files: StoreFiles, problems: list[str]) -> None:
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        remedy = "Restore it from a copy, or delete it and prepare again"
        raise StoreError(f"{files.label} is damaged: {'; '.join(problems[:5])}{more}. {remedy}")


def _read_metadata(files: StoreFiles, plain: list[str]) -> tuple[dict[str, Any], dict[str, ShardedArray]]:
    """Attributes of the group and layout of its arrays; refuses what this reader cannot decode, before any chunk is read."""
    wanted = ["zarr.json", "pixels/zarr.json", "quality/zarr.json", "index.parquet", "statistics.json"]
    absent = [name for name in wanted if name not in plain]
    if absent:
        raise StoreError(f"{files.label}/manifest.json does not list {', '.join(absent)}")
    attributes: dict[str, Any] = json.loads(files.read("zarr.json"))["attributes"]
    arrays = {}
    for name in ["pixels", "quality", *(["labels"] if attributes["has_labels"] else [])]:
        file = f"{name}/zarr.json"
        arrays[name] = array_from_metadata(f"{files.label}/{file}", name, json.loads(files.read(file)))
    return attributes, arrays


def _read_index(files: StoreFiles, shape: tuple[int, ...]) -> TileIndex:
    from pyarrow import parquet

    table = parquet.read_table(io.BytesIO(files.read("index.parquet")), use_threads=False)
    older = set(UNKNOWN) - set(table.column_names)

    def text(name: str) -> NDArray[Any]:
        column = table[name].combine_chunks().dictionary_encode()  # few names, of which some are long: each is held once
        names: NDArray[Any] = np.array(column.dictionary.to_pylist(), dtype=object)[column.indices.to_numpy()]
        return names

    def tuples(name: str) -> NDArray[Any]:
        rows: NDArray[Any] = np.empty(table.num_rows, dtype=object)
        known: dict[tuple[str, ...], tuple[str, ...]] = {}  # the tiles of a scene share theirs
        rows[:] = [()] * len(rows) if name in older else [known.setdefault(tuple(row), tuple(row)) for row in table[name].to_pylist()]
        return rows

    def plain(name: str, dtype: type) -> NDArray[Any]:
        if name in older:
            return np.full(table.num_rows, UNKNOWN[name], dtype)
        return np.asarray(table[name].to_numpy(), dtype=dtype)

    def lists(name: str, dtype: type) -> NDArray[Any]:
        flat = table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return np.asarray(flat, dtype=dtype).reshape(table.num_rows, -1 if table.num_rows else 0)

    index = TileIndex(
        tile=plain("tile", np.int64),
        scene=text("scene"),
        group=text("group"),
        split=text("split"),
        origin=lists("origin", np.int64),
        extent=lists("extent", np.int64),
        owned=lists("owned", np.int64),
        affine=lists("affine", np.float64),
        frame=text("frame"),
        unit=text("unit"),
        valid_fraction=plain("valid_fraction", np.float64),
        cloud_fraction=plain("cloud_fraction", np.float64),
        time=np.full(table.num_rows, "", dtype=object) if "time" in older else text("time"),
        times=tuples("times"),
        latitude=plain("latitude", np.float64),
        longitude=plain("longitude", np.float64),
        present=lists("present", np.bool_),
        scale=lists("scale", np.float64),
        offset=lists("offset", np.float64),
        voxel_digests=tuples("voxel_digests"),
    )
    widths = (index.origin.shape[1], index.extent.shape[1], index.present.shape[1], index.scale.shape[1], index.offset.shape[1])
    if widths != (len(shape) - 2, len(shape) - 2, shape[1], shape[1], shape[1]):
        raise StoreError(f"{files.label}/index.parquet does not fit arrays of shape {shape}: its lists have lengths {widths}")
    return index


def _check_index(files: StoreFiles, index: TileIndex, arrays: dict[str, ShardedArray], manifest: dict[str, Any]) -> None:
    """Every row has its shards in the manifest, and no row is missing."""
    accepted = manifest["tiles"]["accepted"]
    if len(index.tile) != accepted or not len(index.tile):
        raise StoreError(
            f"{files.label}/index.parquet has {len(index.tile)} rows, the manifest says {accepted}; restore it or prepare again"
        )
    for array in arrays.values():
        if (np.diff(index.tile) <= 0).any() or index.tile[0] < 0 or index.tile[-1] >= array.shape[0]:
            raise StoreError(f"{files.label}/index.parquet lists tiles out of order or beyond the {array.shape[0]} of {array.name}")
        for shard in np.unique(index.tile // array.tiles_per_shard):
            if array.key(int(shard)) not in manifest["files"]:
                raise StoreError(f"{files.label}: {array.label(int(shard))} is not in the manifest, but the index lists tiles of it")
