"""The file of a shard: chunks of one tile each, then an index of offset and length per chunk with its crc32c.

This is the `sharding_indexed` codec of zarr v3 with inner codecs bytes, zstd, crc32c; zarr-python reads and writes the same
bytes. It is done here directly because zarr-python answers a missing chunk with the fill value, keeps a whole shard in memory
to write it, decodes on one event-loop thread and hangs in a forked process. Nothing here holds an open file or a thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16", "float32")
"""Element types that a store may hold; anything else is refused before a chunk is read."""

NO_CHUNK = 2**64 - 1
"""Offset and length, in a shard's index, of a chunk that was not written."""


class StoreError(RuntimeError):
    """A store is unfinished, altered or not one of ours. The message names the file, the array and the tiles."""


@dataclass(frozen=True)
class ShardedArray:
    """Shape and place of one array of a store: one tile per chunk, `tiles_per_shard` chunks per file.

    Attributes:
        name: Name of the array, which is its folder.
        shape: `(tile, *tile_shape)`.
        dtype: Name of the element type, one of `DTYPES`.
        tiles_per_shard: Chunks in a file.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    tiles_per_shard: int

    @property
    def stored_dtype(self) -> np.dtype[np.generic]:
        """Element type as it lies on disk, little-endian."""
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def num_shards(self) -> int:
        """Files that the array has at most."""
        return -(-self.shape[0] // self.tiles_per_shard)

    def key(self, shard: int) -> str:
        """Path of a shard below the store."""
        return "/".join([self.name, "c", str(shard), *["0"] * (len(self.shape) - 1)])

    def label(self, shard: int) -> str:
        """What an error calls a shard: `pixels shard c/3/0/0/0 (tiles 48–63)`."""
        first = shard * self.tiles_per_shard
        last = min(first + self.tiles_per_shard, self.shape[0]) - 1
        return f"{self.name} shard {self.key(shard).removeprefix(self.name + '/')} (tiles {first}–{last})"

    def read_index(self, store: Path, shard: int) -> NDArray[np.uint64]:
        """Offset and length `(tiles_per_shard, 2)` of every chunk of a shard; `NO_CHUNK` where there is none.

        Raises:
            StoreError: The shard is missing, cut short, or its index fails the checksum.
        """
        size = 16 * self.tiles_per_shard + 4
        try:
            with (store / self.key(shard)).open("rb") as stream:
                total = stream.seek(0, 2)
                stream.seek(max(0, total - size))
                tail = stream.read(size)
        except OSError as error:
            raise StoreError(f"{store}: {self.label(shard)} cannot be read: {error.strerror}") from error
        if len(tail) < size or crc32c(tail[:-4]) != int.from_bytes(tail[-4:], "little"):
            raise StoreError(f"{store}: {self.label(shard)} is damaged: its chunk index fails the checksum; restore it or prepare again")
        return np.frombuffer(tail, "<u8", count=2 * self.tiles_per_shard).reshape(-1, 2)

    def read(self, store: Path, tile: int) -> NDArray[np.generic]:
        """The chunk `(*tile_shape)` of one tile.

        Raises:
            StoreError: The chunk is missing or damaged.
        """
        shard, place = divmod(tile, self.tiles_per_shard)
        where = f"{store}: {self.label(shard)}"
        offset, length = (int(value) for value in self.read_index(store, shard)[place])
        if offset == NO_CHUNK:
            raise StoreError(f"{where} holds no chunk for tile {tile}, which the index lists; restore the shard or prepare again")
        try:
            with (store / self.key(shard)).open("rb") as stream:
                size = stream.seek(0, 2)
                if length < 5 or offset + length > size:
                    raise StoreError(f"{where}: the chunk of tile {tile} lies outside the file")
                stream.seek(offset)
                chunk = stream.read(length)
        except OSError as error:
            raise StoreError(f"{where} cannot be read: {error.strerror}") from error
        from numcodecs import Zstd  # type: ignore[import-untyped]

        if len(chunk) != length or crc32c(chunk[:-4]) != int.from_bytes(chunk[-4:], "little"):
            raise StoreError(f"{where}: the chunk of tile {tile} fails its crc32c; restore the shard or prepare again")
        out = np.empty(self.shape[1:], self.stored_dtype)
        if _content_size(chunk) != out.nbytes:
            raise StoreError(f"{where}: the chunk of tile {tile} holds {_content_size(chunk)} bytes, wanted {out.nbytes}")
        try:
            Zstd().decode(chunk[:-4], out)
        except (RuntimeError, ValueError) as error:
            raise StoreError(f"{where}: the chunk of tile {tile} cannot be decompressed: {error}") from error
        return out.astype(self.dtype, copy=False)


def crc32c(data: bytes) -> int:
    """The Castagnoli checksum that zarr's `crc32c` codec appends."""
    from numcodecs.checksum32 import CRC32C  # type: ignore[import-untyped]

    return int(CRC32C.checksum(np.frombuffer(data, np.uint8)))


def array_from_metadata(where: str, name: str, document: dict[str, Any]) -> ShardedArray:
    """The layout that a `zarr.json` describes.

    Raises:
        StoreError: The element type, a codec or the layout is not one that is decoded here; `where` says of which file.
    """
    dtype = document["data_type"]
    if dtype not in DTYPES:
        raise StoreError(f"{where}: element type {dtype!r} is not allowed; allowed: {', '.join(DTYPES)}")
    codecs = document["codecs"]
    if [codec["name"] for codec in codecs] != ["sharding_indexed"]:
        raise StoreError(f"{where}: codecs {[codec['name'] for codec in codecs]} are not allowed; allowed: sharding_indexed")
    inner = codecs[0]["configuration"]
    found = [[codec["name"] for codec in inner[key]] for key in ("codecs", "index_codecs")]
    if found != [["bytes", "zstd", "crc32c"], ["bytes", "crc32c"]]:
        raise StoreError(f"{where}: codecs {found} are not allowed; allowed: bytes, zstd, crc32c with an index of bytes, crc32c")
    shape, shard = tuple(document["shape"]), tuple(document["chunk_grid"]["configuration"]["chunk_shape"])
    endians = {codec.get("configuration", {}).get("endian", "little") for key in ("codecs", "index_codecs") for codec in inner[key]}
    key = document["chunk_key_encoding"]
    plain = (endians, inner.get("index_location", "end"), key["name"], key.get("configuration", {}).get("separator", "/"))
    if plain != ({"little"}, "end", "default", "/") or tuple(inner["chunk_shape"]) != (1, *shape[1:]) or shard[1:] != shape[1:]:
        raise StoreError(f"{where}: the layout is not one tile per chunk, little-endian, with the index at the end")
    if prod(shape[1:]) < 1 or shard[0] < 1:
        raise StoreError(f"{where}: shape {shape} in shards of {shard} holds nothing")
    return ShardedArray(name, shape, dtype, shard[0])


def _content_size(frame: bytes) -> int:
    """Bytes that a zstd frame says it holds (RFC 8878, section 3.1.1.1); -1 if it does not say."""
    if len(frame) < 14 or frame[:4] != b"\x28\xb5\x2f\xfd":
        return -1
    flags = frame[4]
    single = flags >> 5 & 1
    width = (1 if single else 0, 2, 4, 8)[flags >> 6]
    start = 5 + (0 if single else 1) + (0, 1, 2, 4)[flags & 3]
    if width == 0:
        return -1
    return int.from_bytes(frame[start : start + width], "little") + (256 if width == 2 else 0)
