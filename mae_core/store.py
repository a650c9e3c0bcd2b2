"""The tile store, read side: a zarr v3 group whose every chunk is one tile and whose every promise is checked.

`mae_core.store_writer` writes it and `mae_core.shards` knows the file of a shard. A store may be read from threads, forked and
spawned processes alike. Any zarr v3 reader gives the same arrays, but answers a missing chunk with zeros, which is refused here.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int16, Int64, Shaped, UInt8
from numpy.typing import NDArray

from mae_core.shards import NO_CHUNK, ShardedArray, StoreError, array_from_metadata

__all__ = ["Split", "Statistics", "StoreError", "Tile", "TileIndex", "TileStore"]

FORMAT = "terravox-tiles"
FORMAT_VERSION = 1
Split = Literal["train", "val"]


@dataclass(frozen=True, eq=False)
class Tile:
    """One stored tile.

    Attributes:
        tile: Stable id: the position in the arrays.
        pixels: In the stored dtype; physical value = pixels · scale + offset.
        quality: Bit flags, 0 where the value counts.
        labels: Class numbers, -1 where there is none; None if the store has no labels.
        present: False for a channel that the scene does not have; its pixels are zero.
        scale, offset: Per channel.
        extent: Real data from the tile's start; beyond it the tile is padding.
    """

    tile: int
    pixels: Shaped[np.ndarray, " channel *space"]
    quality: UInt8[np.ndarray, "*space"]
    labels: Int16[np.ndarray, "*space"] | None
    present: Bool[np.ndarray, " channel"]
    scale: Float32[np.ndarray, " channel"]
    offset: Float32[np.ndarray, " channel"]
    extent: tuple[int, ...]


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
        present, scale, offset: `(row, channel)`.
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
    present: Bool[np.ndarray, " row channel"]
    scale: Float64[np.ndarray, " row channel"]
    offset: Float64[np.ndarray, " row channel"]


@dataclass(frozen=True, eq=False)
class Statistics:
    """Per channel, over the counted voxels of the training tiles, of the physical value.

    A channel without any such voxel has count 0, mean 0 and std 1, so that it can be normalised and says nothing.
    """

    count: Int64[np.ndarray, " channel"]
    mean: Float64[np.ndarray, " channel"]
    std: Float64[np.ndarray, " channel"]
    minimum: Float64[np.ndarray, " channel"]
    maximum: Float64[np.ndarray, " channel"]


@dataclass(frozen=True, eq=False)
class TileStore:
    """A finished store, opened for reading; holds no open file, so it can be pickled and shared by threads.

    Attributes:
        path: Folder of the store.
        digest: Digest over the checksums of all its files: two stores with the same digest are the same.
        attributes: Attributes of the group, as `zarr.json` has them.
        arrays: Layout of `pixels`, `quality` and, where there are any, `labels`.
        index: One row per tile.
        statistics: Of the training tiles.
        manifest: Files with bytes and sha256, counts of tiles by what became of them.
    """

    path: Path
    digest: str
    attributes: dict[str, Any]
    arrays: dict[str, ShardedArray]
    index: TileIndex
    statistics: Statistics
    manifest: dict[str, Any]

    @staticmethod
    def open(path: Path, verify: Literal["checksums", "sizes"] = "checksums") -> TileStore:
        """The store in a folder, checked.

        Args:
            path: Folder of the store.
            verify: `"sizes"` checks that every file is there and has its size, and the checksums of index, statistics and
                metadata; `"checksums"` also reads every shard and compares its sha256.

        Raises:
            StoreError: The store is unfinished, unknown, altered or incomplete.
        """
        path = Path(path)
        manifest = _read_manifest(path)
        files: dict[str, dict[str, Any]] = manifest["files"]
        plain = [name for name in files if not _is_shard(name)]
        _refuse(path, _problems(path, files, plain, {}, hashed=True))
        attributes, arrays = _read_metadata(path, plain)
        shards = [name for name in files if _is_shard(name)]
        _refuse(path, _problems(path, files, shards, arrays, hashed=verify == "checksums"))
        index = _read_index(path, arrays["pixels"].shape)
        _check_index(path, index, arrays, manifest)
        return TileStore(path, manifest["store_digest"], attributes, arrays, index, _read_statistics(path), manifest)

    @property
    def channels(self) -> tuple[str, ...]:
        """Channel names, in the order of the channel axis."""
        return tuple(channel["name"] for channel in self.attributes["channels"])

    @property
    def space(self) -> tuple[int, ...]:
        """Size of a tile per spatial axis."""
        return self.arrays["quality"].shape[1:]

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """Element type of the pixels."""
        return np.dtype(self.arrays["pixels"].dtype)

    @property
    def kind(self) -> str:
        """Modality that the store was prepared from: `sentinel2`, `raster`, `mri`, …; empty if it was not said."""
        return str(self.attributes["kind"])

    @cached_property
    def no_value(self) -> int:
        """The quality bits under which a pixel means nothing and is fed as zero."""
        return int(self.attributes["no_value"])

    def __len__(self) -> int:
        """Number of tiles."""
        return len(self.index.tile)

    def rows(self, split: Split) -> NDArray[np.int64]:
        """Row numbers of one side of the split, rising."""
        return np.flatnonzero(self.index.split == split).astype(np.int64)

    def read(self, row: int) -> Tile:
        """The tile of a row of the index.

        Raises:
            StoreError: A chunk is missing or damaged; never answered with a fill value.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a store of {len(self)} tiles")
        tile = int(self.index.tile[row])
        labels = self.arrays["labels"].read(self.path, tile) if "labels" in self.arrays else None
        return Tile(
            tile,
            self.arrays["pixels"].read(self.path, tile),
            self.arrays["quality"].read(self.path, tile),
            labels,
            self.index.present[row],
            self.index.scale[row].astype(np.float32),
            self.index.offset[row].astype(np.float32),
            tuple(int(size) for size in self.index.extent[row]),
        )

    def verify(self) -> list[str]:
        """Everything that is wrong with the files, by size, sha256 and presence of each tile's chunk; empty if all is well."""
        files = self.manifest["files"]
        problems = _problems(self.path, files, list(files), self.arrays, hashed=True)
        for array in self.arrays.values():
            for shard in np.unique(self.index.tile // array.tiles_per_shard):
                try:
                    chunks = array.read_index(self.path, int(shard))
                except StoreError as error:
                    problems.append(str(error))
                    continue
                tiles = self.index.tile[self.index.tile // array.tiles_per_shard == shard]
                missing = tiles[chunks[tiles % array.tiles_per_shard, 0] == NO_CHUNK]
                problems += [f"{array.label(int(shard))} holds no chunk for tile {tile}" for tile in missing]
        return problems


def store_digest(files: dict[str, dict[str, Any]]) -> str:
    """Digest of a store: sha256 over the sorted list of paths and their sha256."""
    lines = "".join(f"{name} {files[name]['sha256']}\n" for name in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _is_shard(name: str) -> bool:
    return PurePosixPath(name).parts[1:2] == ("c",)


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise StoreError(f"{path} is not a folder; a tile store is the folder that prepare wrote")
    if not (path / "manifest.json").is_file():
        unfinished = (path / "progress").is_dir()
        todo = "it is not finished: run prepare again" if unfinished else "it is not a tile store; run prepare to make one"
        raise StoreError(f"{path} has no manifest.json: {todo}")
    try:
        manifest: dict[str, Any] = json.loads((path / "manifest.json").read_bytes())
        found = (manifest["format"], manifest["format_version"])
        digests = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path}/manifest.json is damaged ({error!r}); restore it or prepare again") from error
    if found != (FORMAT, FORMAT_VERSION):
        raise StoreError(f"{path} is of format {found[0]} {found[1]}, this version reads {FORMAT} {FORMAT_VERSION}; prepare it again")
    for name in digests:
        if not (path / name).resolve().is_relative_to(path.resolve()):
            raise StoreError(f"{path}/manifest.json lists {name}, which lies outside the store")
    if manifest.get("store_digest") != store_digest(manifest["files"]):
        raise StoreError(f"{path}/manifest.json is altered: its list of files does not give its store_digest")
    return manifest


def _problems(
    path: Path, files: dict[str, dict[str, Any]], names: list[str], arrays: dict[str, ShardedArray], *, hashed: bool
) -> list[str]:
    """What is wrong with the named files of a store."""
    problems = []
    for name in sorted(names):
        file, label = path / name, name
        if _is_shard(name) and name.split("/")[0] in arrays:
            label = arrays[name.split("/")[0]].label(int(name.split("/")[2]))
        if not file.is_file():
            problems.append(f"{label} is missing")
        elif file.stat().st_size != files[name]["bytes"]:
            problems.append(f"{label} has {file.stat().st_size} bytes, the manifest says {files[name]['bytes']}")
        elif hashed and sha256_of(file) != files[name]["sha256"]:
            problems.append(f"{label} fails its sha256")
    return problems


def _refuse(path: Path, problems: list[str]) -> None:
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise StoreError(f"{path} is damaged: {'; '.join(problems[:5])}{more}. Restore it from a copy, or delete it and prepare again")


def _read_metadata(path: Path, plain: list[str]) -> tuple[dict[str, Any], dict[str, ShardedArray]]:
    """Attributes of the group and layout of its arrays; refuses what this reader cannot decode, before any chunk is read."""
    wanted = ["zarr.json", "pixels/zarr.json", "quality/zarr.json", "index.parquet", "statistics.json"]
    absent = [name for name in wanted if name not in plain]
    if absent:
        raise StoreError(f"{path}/manifest.json does not list {', '.join(absent)}")
    attributes: dict[str, Any] = json.loads((path / "zarr.json").read_bytes())["attributes"]
    arrays = {}
    for name in ["pixels", "quality", *(["labels"] if attributes["has_labels"] else [])]:
        file = path / name / "zarr.json"
        arrays[name] = array_from_metadata(str(file), name, json.loads(file.read_bytes()))
    return attributes, arrays


def _read_index(path: Path, shape: tuple[int, ...]) -> TileIndex:
    from pyarrow import parquet

    table = parquet.read_table(path / "index.parquet", use_threads=False)

    def text(name: str) -> NDArray[Any]:
        return np.array(table[name].to_pylist(), dtype=np.str_)

    def plain(name: str, dtype: type) -> NDArray[Any]:
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
        present=lists("present", np.bool_),
        scale=lists("scale", np.float64),
        offset=lists("offset", np.float64),
    )
    widths = (index.origin.shape[1], index.extent.shape[1], index.present.shape[1], index.scale.shape[1], index.offset.shape[1])
    if widths != (len(shape) - 2, len(shape) - 2, shape[1], shape[1], shape[1]):
        raise StoreError(f"{path}/index.parquet does not fit arrays of shape {shape}: its lists have lengths {widths}")
    return index


def _check_index(path: Path, index: TileIndex, arrays: dict[str, ShardedArray], manifest: dict[str, Any]) -> None:
    """Every row has its shards in the manifest, and no row is missing."""
    accepted = manifest["tiles"]["accepted"]
    if len(index.tile) != accepted or not len(index.tile):
        raise StoreError(f"{path}/index.parquet has {len(index.tile)} rows, the manifest says {accepted}; restore it or prepare again")
    for array in arrays.values():
        if (np.diff(index.tile) <= 0).any() or index.tile[0] < 0 or index.tile[-1] >= array.shape[0]:
            raise StoreError(f"{path}/index.parquet lists tiles out of order or beyond the {array.shape[0]} of {array.name}")
        for shard in np.unique(index.tile // array.tiles_per_shard):
            if array.key(int(shard)) not in manifest["files"]:
                raise StoreError(f"{path}: {array.label(int(shard))} is not in the manifest, but the index lists tiles of it")


def _read_statistics(path: Path) -> Statistics:
    document = json.loads((path / "statistics.json").read_bytes())
    empty = {"mean": 0.0, "std": 1.0, "min": 0.0, "max": 0.0}
    columns = {key: np.array([default if v is None else v for v in document[key]], np.float64) for key, default in empty.items()}
    return Statistics(np.array(document["count"], np.int64), *columns.values())
