"""What a chunk is packed with: Blosc or zstd, then a crc32c, as zarr v3 writes the same chain.

Measured on one core (AMD EPYC, two shared) with real tiles, `python pipelines/benchmark.py codec store=STORE`: times packed / MB/s
packing / MB/s unpacking, of ten Sentinel-2 bands, an MR template, and MR crops: mostly whole numbers in float32, padding around them.

| codec | Sentinel-2, 128², uint16 | MR, 64³, uint8 | MR, 64³, float32 |
|---|---|---|---|
| zstd 1 | 1.40 / 322 / 608 | 3.33 / 353 / 939 | 9.6 / 743 / 2526 |
| zstd 3 | 1.46 / 102 / 621 | 3.48 / 163 / 782 | 11.5 / 513 / 2464 |
| Blosc lz4, shuffled bytes | 1.51 / 907 / 2371 | 1.93 / 966 / 2838 | 4.8 / 1991 / 5085 |
| Blosc lz4, shuffled bits | 1.61 / 1089 / 2004 | 1.78 / 572 / 869 | 3.4 / 907 / 2176 |
| Blosc zstd 3, shuffled bits | 1.76 / 187 / 569 | 2.28 / 88 / 397 | 5.2 / 202 / 1103 |
| Blosc zstd 3, shuffled bytes | 1.79 / 110 / 737 | 2.57 / 80 / 576 | 6.3 / 247 / 1797 |

A store is written once and read some hundred times, and a GPU eats gigabytes a second; so what unpacks fastest is the default:
lz4 on shuffled bits for integers of two bytes (it also packs tighter than plain zstd), on shuffled bytes for all else.
`small` is for slow disks and networks: up to half the bytes, unpacked at a third to a half of the rate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Compression = Literal["fast", "small"]
"""`fast`: what unpacks fastest; `small`: what packs tightest at a bearable rate."""

BLOSC_LEVEL, ZSTD_LEVEL = 5, 3
CHECKSUM_BYTES = 4
SMALL_BYTES = 512
"""Chunks up to this size, packed, are looked up among those that were unpacked before."""


@dataclass(frozen=True)
class ChunkCodec:
    """How a chunk is packed; only these can be read, whatever a store's metadata say.

    Attributes:
        name: Codec of zarr v3.
        compressor: Inside Blosc: `lz4` or `zstd`; `zstd` for the plain codec.
        level: Effort of packing.
        shuffle: Order in which Blosc sees bytes or bits; `noshuffle` for the plain codec.
    """

    name: Literal["blosc", "zstd"]
    compressor: Literal["lz4", "zstd"]
    level: int
    shuffle: Literal["noshuffle", "shuffle", "bitshuffle"] = "noshuffle"

    def encode(self, values: NDArray[np.generic]) -> bytes:
        """The chunk of an array, which must be contiguous and little-endian: the packed bytes and their checksum."""
        frame = bytes(self._library.encode(values))
        return frame + crc32c(frame).to_bytes(CHECKSUM_BYTES, "little")

    def decode(self, chunk: memoryview, out: NDArray[np.generic]) -> None:
        """Unpack a chunk into `out`, which is contiguous.

        Raises:
            ValueError: The chunk is damaged, or holds another number of bytes than `out`; `out` may be spoilt then.
        """
        if len(chunk) <= SMALL_BYTES:
            out.reshape(-1).view(np.uint8)[:] = _small(self, bytes(chunk), out.nbytes)
        else:
            self._decode(chunk, out)

    def _decode(self, chunk: memoryview, out: NDArray[np.generic]) -> None:
        frame = chunk[:-CHECKSUM_BYTES]
        if len(chunk) < CHECKSUM_BYTES or crc32c(frame) != int.from_bytes(chunk[-CHECKSUM_BYTES:], "little"):
            raise ValueError("fails its crc32c; restore the shard or prepare again")
        holds = _blosc_size(frame) if self.name == "blosc" else _zstd_size(frame)
        if holds != out.nbytes:
            raise ValueError(f"holds {holds} bytes, wanted {out.nbytes}")
        try:
            self._unpack(frame, out)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"cannot be unpacked: {error}") from error

    @cached_property
    def _unpack(self) -> Callable[[memoryview, NDArray[np.generic]], Any]:
        """Straight to the library for Blosc: the codec object looks at both arrays for longer than a small chunk takes."""
        from numcodecs import blosc  # type: ignore[import-untyped]

        decompress: Callable[[memoryview, NDArray[np.generic]], Any] = blosc.decompress
        return decompress if self.name == "blosc" and self._library else self._library.decode

    @cached_property
    def _library(self) -> Any:
        from numcodecs import Blosc, Zstd, blosc

        if self.name == "zstd":
            return Zstd(level=self.level)
        blosc.use_threads = False  # our threads unpack a tile each; Blosc's own would fight them, and hang after a fork
        shuffle = {"noshuffle": Blosc.NOSHUFFLE, "shuffle": Blosc.SHUFFLE, "bitshuffle": Blosc.BITSHUFFLE}[self.shuffle]
        return Blosc(cname=self.compressor, clevel=self.level, shuffle=shuffle)


@lru_cache(maxsize=64)
def _small(codec: ChunkCodec, chunk: bytes, size: int) -> NDArray[np.uint8]:
    """What a small chunk holds: flags that are the same all over a tile are the same few bytes in most tiles, and are unpacked once."""
    out = np.empty(size, np.uint8)
    codec._decode(memoryview(chunk), out)  # noqa: SLF001 - a part of it
    return out


def default_codec(dtype: str, compression: Compression = "fast") -> ChunkCodec:
    """What an array of an element type is packed with."""
    words = np.dtype(dtype).kind in "iu" and np.dtype(dtype).itemsize == 2
    if compression == "small":
        return ChunkCodec("blosc", "zstd", ZSTD_LEVEL, "bitshuffle") if words else ChunkCodec("zstd", "zstd", ZSTD_LEVEL)
    return ChunkCodec("blosc", "lz4", BLOSC_LEVEL, "bitshuffle" if words else "shuffle")


def codec_of(documents: list[dict[str, Any]]) -> ChunkCodec:
    """The codec that the metadata of an array name.

    Raises:
        ValueError: The chain is not one that is read here.
    """
    names = [document.get("name") for document in documents]
    if len(names) == 3 and names[0] == "bytes" and names[2] == "crc32c":
        settings = documents[1].get("configuration", {})
        if names[1] == "zstd" and not settings.get("checksum", False):
            return ChunkCodec("zstd", "zstd", int(settings.get("level", 0)))
        compressor, shuffle = settings.get("cname"), settings.get("shuffle")
        if names[1] == "blosc" and compressor in ("lz4", "zstd") and shuffle in ("noshuffle", "shuffle", "bitshuffle"):
            return ChunkCodec("blosc", compressor, int(settings.get("clevel", BLOSC_LEVEL)), shuffle)
    raise ValueError(f"codecs {names} are not allowed; allowed: bytes, then zstd or blosc (lz4, zstd), then crc32c")


def crc32c(data: bytes | memoryview) -> int:
    """The Castagnoli checksum that zarr's `crc32c` codec appends."""
    from numcodecs.checksum32 import CRC32C  # type: ignore[import-untyped]

    return int(CRC32C.checksum(np.frombuffer(data, np.uint8)))


def _blosc_size(frame: memoryview) -> int:
    """Bytes that a Blosc frame says it holds (its header: 4 bytes of flags, then size, block size, packed size); -1 if it is none."""
    if len(frame) < 16 or int.from_bytes(frame[12:16], "little") != len(frame):
        return -1
    return int.from_bytes(frame[4:8], "little")


def _zstd_size(frame: memoryview) -> int:
    """Bytes that a zstd frame says it holds (RFC 8878, section 3.1.1.1); -1 if it does not say."""
    if len(frame) < 10 or bytes(frame[:4]) != b"\x28\xb5\x2f\xfd":
        return -1
    flags = frame[4]
    single = flags >> 5 & 1
    width = (1 if single else 0, 2, 4, 8)[flags >> 6]
    start = 5 + (0 if single else 1) + (0, 1, 2, 4)[flags & 3]
    if width == 0:
        return -1
    return int.from_bytes(frame[start : start + width], "little") + (256 if width == 2 else 0)
