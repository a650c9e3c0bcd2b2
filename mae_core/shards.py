"""The file of a shard: chunks of one tile each, then an index of offset and length per chunk with its crc32c.

This is the `sharding_indexed` codec of zarr v3 with the inner codecs of `mae_core.chunks`; zarr-python reads and writes the same
bytes. It is done here directly because zarr-python answers a missing chunk with the fill value, keeps a whole shard in memory
to write it, decodes on one event-loop thread and hangs in a forked process. Nothing here holds an open file or a thread.

Other readers of the same stores, whole shards, two cores, over unpacking the chunks and nothing else (`python pipelines/benchmark.py
load`; ten-band images of 128² / volumes of 64³): zarr-python 3.1 0.10 / 0.12, the same with zarrs 0.2 0.54 / 0.76, tensorstore 0.1.86
0.60 / 0.43, this with `mae_core.loader` 0.70 / 0.83. The fast ones too answer a missing chunk with the fill value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mae_core.chunks import CHECKSUM_BYTES, ChunkCodec, codec_of, crc32c
from mae_core.store_files import StoreFiles

DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16", "float32")
"""Element types that a store may hold; anything else is refused before a chunk is read."""

NO_CHUNK = 2**64 - 1
"""Offset and length, in a shard's index, of a chunk that was not written."""

GAP_BYTES = 256 << 10
"""Chunks that lie no further apart than this are read in one go: on disks and networks a read of its own costs more than the gap."""


class StoreError(RuntimeError):
    """A store is unfinished, altered or not one of ours. The message names the file, the array and the tiles."""


Packed = memoryview | StoreError
"""A chunk as it lies in its file, or why it cannot be had."""


@dataclass(frozen=True)
class ShardedArray:
    """Shape and place of one array of a store: one tile per chunk, `tiles_per_shard` chunks per file.

    Attributes:
        name: Name of the array, which is its folder.
        shape: `(tile, *tile_shape)`.
        dtype: Name of the element type, one of `DTYPES`.
        tiles_per_shard: Chunks in a file.
        codec: What a chunk is packed with.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    tiles_per_shard: int
    codec: ChunkCodec

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

    def encode(self, values: NDArray[np.generic]) -> bytes:
        """The chunk of a tile's array."""
        return self.codec.encode(np.ascontiguousarray(values, dtype=self.stored_dtype))

    def read_index(self, files: StoreFiles, shard: int) -> NDArray[np.uint64]:
        """Offset and length `(tiles_per_shard, 2)` of every chunk of a shard; `NO_CHUNK` where there is none.

        Raises:
            StoreError: The shard is missing, cut short, or its index fails the checksum.
        """
        size = 16 * self.tiles_per_shard + CHECKSUM_BYTES
        try:
            tail = files.read(self.key(shard), -size)
        except OSError as error:
            raise StoreError(f"{files.label}: {self.label(shard)} cannot be read: {error.strerror or error}") from error
        if len(tail) < size or crc32c(tail[:-CHECKSUM_BYTES]) != int.from_bytes(tail[-CHECKSUM_BYTES:], "little"):
            raise StoreError(
                f"{files.label}: {self.label(shard)} is damaged: its chunk index fails the checksum; restore it or prepare again"
            )
        return np.frombuffer(tail, "<u8", count=2 * self.tiles_per_shard).reshape(-1, 2)

    def fetch(self, files: StoreFiles, tiles: Sequence[int]) -> list[Packed]:
        """The chunks of some tiles of one shard, read front to back in as few parts as gaps allow.

        What cannot be had is told in its place, so that one damaged tile does not hide the others.
        """
        shard = tiles[0] // self.tiles_per_shard
        where = f"{files.label}: {self.label(shard)}"
        try:
            index = self.read_index(files, shard)
        except StoreError as error:
            return [error] * len(tiles)
        found: list[Packed] = [StoreError(f"{where} cannot be read")] * len(tiles)
        wanted: list[tuple[int, int, int]] = []
        places = np.asarray(tiles) - shard * self.tiles_per_shard
        for number, (offset, length) in enumerate(index[places].tolist()):
            if offset == NO_CHUNK:
                found[number] = StoreError(
                    f"{where} holds no chunk for tile {tiles[number]}, which the index lists; restore the shard or prepare again"
                )
            elif length > self._largest_chunk or offset > 2**62:
                found[number] = StoreError(
                    f"{where}: the chunk of tile {tiles[number]} lies outside the file or is larger than a tile can be"
                )
            else:
                wanted.append((offset, length, number))
        for start, stop, part in _runs(sorted(wanted)):
            try:
                data = files.view(self.key(shard), start, stop - start)
            except OSError as error:
                failed = StoreError(f"{where} cannot be read: {error.strerror or error}")
                for _, _, number in part:
                    found[number] = failed
                continue
            for offset, length, number in part:
                chunk = data[offset - start : offset - start + length]
                whole = len(chunk) == length
                found[number] = chunk if whole else StoreError(f"{where}: the chunk of tile {tiles[number]} lies outside the file")
        return found

    def unpack(self, files: StoreFiles, tile: int, packed: Packed, out: NDArray[np.generic]) -> None:
        """Unpack the chunk of a tile into `out`, contiguous and in the stored element type.

        Raises:
            StoreError: The chunk is missing or damaged; `out` may be spoilt then.
        """
        if isinstance(packed, StoreError):
            raise packed
        try:
            self.codec.decode(packed, out)
        except ValueError as error:
            raise StoreError(f"{files.label}: {self.label(tile // self.tiles_per_shard)}: the chunk of tile {tile} {error}") from error

    @cached_property
    def _largest_chunk(self) -> int:
        """More than any codec makes of a tile that cannot be packed."""
        size = prod(self.shape[1:]) * self.stored_dtype.itemsize
        return size + size // 8 + (1 << 16)


def _runs(wanted: Sequence[tuple[int, int, int]]) -> Iterator[tuple[int, int, list[tuple[int, int, int]]]]:
    """Start, stop and members of the stretches that chunks `(offset, length, number)`, by rising offset, are read in."""
    part: list[tuple[int, int, int]] = []
    stop = 0
    for offset, length, number in wanted:
        if part and offset > stop + GAP_BYTES:
            yield part[0][0], stop, part
            part = []
        stop = max(stop, offset + length) if part else offset + length
        part.append((offset, length, number))
    if part:
        yield part[0][0], stop, part


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
    index = [codec["name"] for codec in inner["index_codecs"]]
    if index != ["bytes", "crc32c"]:
        raise StoreError(f"{where}: codecs {index} of the index are not allowed; allowed: bytes, crc32c")
    try:
        codec = codec_of(inner["codecs"])
    except ValueError as error:
        raise StoreError(f"{where}: {error}") from error
    shape, shard = tuple(document["shape"]), tuple(document["chunk_grid"]["configuration"]["chunk_shape"])
    endians = {codec.get("configuration", {}).get("endian", "little") for key in ("codecs", "index_codecs") for codec in inner[key]}
    key = document["chunk_key_encoding"]
    plain = (endians, inner.get("index_location", "end"), key["name"], key.get("configuration", {}).get("separator", "/"))
    if plain != ({"little"}, "end", "default", "/") or tuple(inner["chunk_shape"]) != (1, *shape[1:]) or shard[1:] != shape[1:]:
        raise StoreError(f"{where}: the layout is not one tile per chunk, little-endian, with the index at the end")
    if prod(shape[1:]) < 1 or shard[0] < 1:
        raise StoreError(f"{where}: shape {shape} in shards of {shard} holds nothing")
    return ShardedArray(name, shape, dtype, shard[0], codec)
