"""What is packed is unpacked the same, zarr-python reads and writes the same chunks, and nothing else is ever unpacked."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from mae_core.chunks import ChunkCodec, Compression, codec_of, crc32c, default_codec
from mae_core.shards import DTYPES

CODECS = [default_codec(dtype, compression) for dtype in ("uint8", "uint16", "float32") for compression in ("fast", "small")]


@given(st.sampled_from(CODECS), st.sampled_from(DTYPES), st.integers(1, 400), st.integers(0, 2**32 - 1), st.booleans())
def test_unpacking_undoes_packing(codec: ChunkCodec, dtype: str, size: int, seed: int, smooth: bool) -> None:
    values = np.random.default_rng(seed).integers(0, 100, size)
    values = np.sort(values).astype(dtype) if smooth else values.astype(dtype)
    out = np.full(size, 7, dtype)
    codec.decode(memoryview(codec.encode(values)), out)
    np.testing.assert_array_equal(out, values)


def test_the_same_array_gives_the_same_chunk() -> None:
    values = np.random.default_rng(0).integers(0, 4000, (10, 128, 128)).astype(np.uint16)
    for codec in CODECS:
        assert len({codec.encode(values) for _ in range(4)}) == 1


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_whatever_is_changed_or_cut_is_refused(codec: ChunkCodec) -> None:
    values = np.arange(500, dtype=np.uint16)
    chunk = codec.encode(values)
    out = np.empty_like(values)
    for place in (0, 4, 9, len(chunk) // 2, len(chunk) - 1):
        with pytest.raises(ValueError, match="fails its crc32c"):
            codec.decode(memoryview(chunk[:place] + bytes([chunk[place] ^ 1]) + chunk[place + 1 :]), out)
    for size in (0, 3, 4, 20, len(chunk) - 1):
        with pytest.raises(ValueError, match=r"fails its crc32c|holds -1 bytes, wanted 1000"):
            codec.decode(memoryview(chunk[:size]), out)


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_a_chunk_signed_anew_by_a_forger_is_still_refused(codec: ChunkCodec) -> None:
    """The checksum can be made to fit; then what the chunk says of its size decides, before anything is unpacked."""
    out = np.empty(500, np.uint16)

    def signed(frame: bytes) -> memoryview:
        return memoryview(frame + crc32c(frame).to_bytes(4, "little"))

    for wrong in (codec.encode(np.zeros(10**6, np.uint8))[:-4], codec.encode(np.zeros(3, np.uint8))[:-4], b"", b"x" * 40):
        with pytest.raises(ValueError, match=r"holds -?\d+ bytes, wanted 1000"):
            codec.decode(signed(wrong), out)
    frame = codec.encode(np.random.default_rng(1).integers(0, 9000, 500).astype(np.uint16))[:-4]
    spoilt = frame[: len(frame) // 2] + b"\xff" * (len(frame) - len(frame) // 2)
    try:
        codec.decode(signed(spoilt), out)
    except ValueError as error:
        assert "cannot be unpacked" in str(error)  # noqa: PT017 - a spoilt lz4 stream may also unpack to other numbers


@pytest.mark.parametrize("compression", ["fast", "small"])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "float32"])
def test_zarr_reads_and_writes_the_same_chunks(dtype: str, compression: Compression) -> None:
    codec = default_codec(dtype, compression)
    values = np.random.default_rng(2).integers(0, 200, (3, 40)).astype(dtype)
    inner: Any = ZstdCodec(level=codec.level)
    if codec.name == "blosc":
        size = values.dtype.itemsize
        inner = BloscCodec(cname=codec.compressor, clevel=codec.level, shuffle=codec.shuffle, typesize=size, blocksize=0)
    memory = zarr.storage.MemoryStore()
    array = zarr.create_array(store=memory, shape=(3, 40), chunks=(3, 40), dtype=dtype, compressors=[inner, Crc32cCodec()])
    array[:] = values
    named = list(array.metadata.to_dict()["codecs"])  # type: ignore[union-attr]
    assert codec_of(named) == codec  # type: ignore[arg-type]
    chunk = memory._store_dict["c/0/0"].to_bytes()
    out = np.empty_like(values)
    codec.decode(memoryview(chunk), out)
    np.testing.assert_array_equal(out, values)
    memory._store_dict["c/0/0"] = type(memory._store_dict["c/0/0"]).from_bytes(codec.encode(values[::-1].copy()))
    np.testing.assert_array_equal(array[:], values[::-1])


@pytest.mark.parametrize(
    "documents",
    [
        [],
        [{"name": "bytes"}, {"name": "pickle"}, {"name": "crc32c"}],
        [{"name": "bytes"}, {"name": "zstd"}],
        [{"name": "bytes"}, {"name": "gzip"}, {"name": "crc32c"}],
        [{"name": "bytes"}, {"name": "blosc", "configuration": {"cname": "zlib", "shuffle": "shuffle"}}, {"name": "crc32c"}],
        [{"name": "bytes"}, {"name": "blosc", "configuration": {"cname": "lz4", "shuffle": "other"}}, {"name": "crc32c"}],
        [{"name": "transpose"}, {"name": "zstd"}, {"name": "crc32c"}],
    ],
)
def test_other_chains_are_not_allowed(documents: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match=r"are not allowed; allowed: bytes, then zstd or blosc \(lz4, zstd\), then crc32c"):
        codec_of(documents)
