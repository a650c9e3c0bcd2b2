"""Everything that is wrong with a store, and not only the first: each file, each chunk, and whether its parts agree."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np

from mae_core.shards import NO_CHUNK, ShardedArray, StoreError, array_from_metadata
from mae_core.store import TileStore
from mae_core.store_files import StoreFiles, digest_of, files_at
from mae_core.store_folder import StoreFolder, open_folder, store_digest
from mae_core.store_view import view_members

ARRAYS = ("pixels", "quality", "labels")


@dataclass(frozen=True)
class StoreCheck:
    """What was found.

    Attributes:
        problems: A line each, by file or by array and tiles; empty if the store is whole.
        num_files, num_bytes: What was read.
        num_tiles: Tiles that the index lists, as far as it could be read.
        num_decoded: Chunks that were unpacked.
        seconds: Time that reading took.
    """

    problems: tuple[str, ...]
    num_files: int
    num_bytes: int
    num_tiles: int
    num_decoded: int
    seconds: float


class _Checker:
    """Goes through the stores of an address and counts what it does."""

    def __init__(self, decode: bool, progress: Callable[[int, int], None]) -> None:
        self.decode, self.progress = decode, progress
        self.num_files = self.num_bytes = self.num_tiles = self.num_decoded = self.total = 0
        self.seconds = 0.0

    def folder(self, files: StoreFiles) -> Iterator[str]:
        """Problems of one store."""
        refusal, opened, manifest = "", None, _manifest(files)
        try:
            opened = open_folder(files, "sizes")
            self.num_tiles += len(opened.index.tile)
        except StoreError as error:
            refusal = str(error)
        found = []
        if manifest is not None:
            if manifest.get("store_digest") != store_digest(manifest["files"]):
                found.append("manifest.json is altered: its list of files does not give its store_digest")
            arrays = opened.arrays if opened else dict(_arrays(files))
            for name in sorted(manifest["files"]):
                began = monotonic()
                found += self.file(files, name, manifest["files"][name], arrays, opened)
                self.seconds += monotonic() - began
        if opened is not None:
            found += _disagreements(opened)
        yield from found if found or not refusal else [refusal.removeprefix(f"{files.label}: ")]

    def file(
        self, files: StoreFiles, name: str, entry: dict[str, Any], arrays: dict[str, ShardedArray], opened: StoreFolder | None
    ) -> list[str]:
        """Problems of one file and, if it is a shard that is to be looked into, of its chunks."""
        array, shard = _shard_of(name, arrays)
        label = array.label(shard) if array else name
        size = files.size(name) if files.holds(name) else None
        if size is None:
            found = [f"{label} is missing" if files.holds(name) else f"manifest.json lists {name}, which lies outside the store"]
        elif size != entry["bytes"]:
            found = [f"{label} has {size} bytes, the manifest says {entry['bytes']}"]
        else:
            self.num_files, self.num_bytes = self.num_files + 1, self.num_bytes + size
            whole = _hashes_to(files, name, str(entry["sha256"]))
            found = [] if whole else [f"{label} fails its sha256"]
            if array:
                tiles = None if opened is None else opened.index.tile[opened.index.tile // array.tiles_per_shard == shard]
                found += self.chunks(files, array, shard, tiles, unpacked=self.decode or not whole)
        self.progress(self.num_bytes, self.total)
        return found

    def chunks(self, files: StoreFiles, array: ShardedArray, shard: int, tiles: Any, *, unpacked: bool) -> list[str]:
        """Tiles of a shard whose chunk is not there or, if they are unpacked, is damaged; `tiles` None: those that the shard lists."""
        try:
            there = array.read_index(files, shard)[:, 0] != NO_CHUNK
        except StoreError as error:
            return [str(error).removeprefix(f"{files.label}: ")]
        listed = np.flatnonzero(there) + shard * array.tiles_per_shard
        wanted = listed if tiles is None else tiles
        found = [f"{array.label(shard)} holds no chunk for tile {tile}" for tile in wanted if tile not in listed]
        present = [int(tile) for tile in wanted if tile in listed]
        if unpacked and present:
            out = np.empty(array.shape[1:], array.stored_dtype)
            for tile, packed in zip(present, array.fetch(files, present), strict=True):
                self.num_decoded += 1
                try:
                    array.unpack(files, tile, packed, out)
                except StoreError as error:
                    found.append(str(error).removeprefix(f"{files.label}: "))
        return found


def check_store(address: Path | str, *, decode: bool = False, progress: Callable[[int, int], None] | None = None) -> StoreCheck:
    """What is wrong with a store, a view or what lies behind a URL; nothing is raised for a store that is damaged.

    Sizes and sha256 of all files, a chunk in the shard for each tile of the index, and metadata that agree with each other. The
    chunks of a shard that fails its sha256 are unpacked one by one, so that the tiles are named.

    Args:
        address: As `TileStore.open` takes it.
        decode: Unpack every chunk, which also proves its own checksum.
        progress: Called with bytes read and bytes in all.
    """
    checker = _Checker(decode, progress or (lambda done, total: None))
    files = files_at(address)
    try:
        members = view_members(files) or [files]
    except StoreError as error:
        return StoreCheck((str(error),), 0, 0, 0, 0, 0.0)
    manifests = [_manifest(member) for member in members]
    checker.total = sum(entry["bytes"] for manifest in manifests if manifest for entry in manifest["files"].values())
    checker.progress(0, checker.total)
    found: list[str] = []
    for member in members:
        where = f"{member.label}: " if len(members) > 1 else ""
        found += [f"{where}{problem}" for problem in checker.folder(member)]
    if len(members) > 1 and not found:
        try:
            TileStore.open(address, verify="sizes")
        except StoreError as error:
            found.append(str(error))
    counts = (checker.num_files, checker.num_bytes, checker.num_tiles, checker.num_decoded)
    return StoreCheck(tuple(found), *counts, checker.seconds)


def _manifest(files: StoreFiles) -> dict[str, Any] | None:
    """The manifest, as far as it lists files at all; what else is wrong with it, opening the store says."""
    try:
        manifest: dict[str, Any] = json.loads(files.read("manifest.json"))
        for entry in manifest["files"].values():
            int(entry["bytes"]), str(entry["sha256"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest


def _hashes_to(files: StoreFiles, name: str, sha256: str) -> bool:
    try:
        return digest_of(files, name) == sha256
    except OSError:
        return False


def _arrays(files: StoreFiles) -> Iterator[tuple[str, ShardedArray]]:
    """Layout of the arrays of a store that does not open, where their metadata can be read."""
    for name in ARRAYS:
        try:
            yield name, array_from_metadata(name, name, json.loads(files.read(f"{name}/zarr.json")))
        except (OSError, ValueError, KeyError, TypeError, StoreError):
            continue


def _shard_of(name: str, arrays: dict[str, ShardedArray]) -> tuple[ShardedArray | None, int]:
    """The array that a file is a shard of, and the shard's number; None for any other file."""
    parts = name.split("/")
    if len(parts) > 2 and parts[1] == "c" and parts[0] in arrays and parts[2].isdigit():
        return arrays[parts[0]], int(parts[2])
    return None, 0


def _disagreements(folder: StoreFolder) -> Iterator[str]:
    """What the metadata say of each other that cannot be true together."""
    pixels, tile = folder.arrays["pixels"], tuple(folder.attributes["tile"])
    channels, statistics = len(folder.channels), folder.statistics
    for array in folder.arrays.values():
        inner = (channels, *tile) if array is pixels else tile
        if array.shape != (pixels.shape[0], *inner) or array.tiles_per_shard != pixels.tiles_per_shard:
            yield (
                f"{array.name}/zarr.json has shape {array.shape} in shards of {array.tiles_per_shard}; the store's tiles of {tile} with "
                f"{channels} channels want {(pixels.shape[0], *inner)} in shards of {pixels.tiles_per_shard}"
            )
    lengths = {len(column) for column in (statistics.count, statistics.mean, statistics.std, statistics.minimum, statistics.maximum)}
    if lengths != {channels}:
        yield f"statistics.json has columns of {sorted(lengths)} values, the store has {channels} channels"
