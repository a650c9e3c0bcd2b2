"""Codecs on a store's own tiles: how tight and how fast each packs and unpacks them, on one core."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from mae_core.chunks import BLOSC_LEVEL, ChunkCodec, Compression, default_codec
from mae_core.settings import Settings, to_plain
from mae_core.shards import StoreError
from mae_core.store import TileStore
from pipelines.benchmark_machine import description
from pipelines.benchmark_report import busy_note
from pipelines.command_line import run
from pipelines.progress import console, table
from pipelines.run_folder import RunError, write_json

DESCRIPTION = "codec: times packed and rates of packing and unpacking of the tiles of a store, by codec, on one core"
COMPRESSIONS: tuple[Compression, ...] = ("fast", "small")
CODECS: Mapping[str, ChunkCodec] = {
    "zstd 1": ChunkCodec("zstd", "zstd", 1),
    "zstd 3": ChunkCodec("zstd", "zstd", 3),
    "Blosc lz4, shuffled bytes": ChunkCodec("blosc", "lz4", BLOSC_LEVEL, "shuffle"),
    "Blosc lz4, shuffled bits": ChunkCodec("blosc", "lz4", BLOSC_LEVEL, "bitshuffle"),
    "Blosc zstd 1, shuffled bits": ChunkCodec("blosc", "zstd", 1, "bitshuffle"),
    "Blosc zstd 3, shuffled bits": ChunkCodec("blosc", "zstd", 3, "bitshuffle"),
    "Blosc zstd 3, shuffled bytes": ChunkCodec("blosc", "zstd", 3, "shuffle"),
}


class CodecSettings(Settings):
    """Settings of `benchmark codec`."""

    store: Path = Field(description="Folder of a tile store")
    out: Path | None = Field(None, description="JSON file to write the figures to")
    num_tiles: int = Field(64, ge=1, description="Tiles that are packed and unpacked, spread over the store")
    rounds: int = Field(5, ge=1, description="Turns; in each, every codec packs and unpacks all tiles once")


def measure(tiles: Sequence[NDArray[np.generic]], rounds: int) -> dict[str, dict[str, float]]:
    """Times packed, and bytes a second packed and unpacked, by codec."""
    size = sum(tile.nbytes for tile in tiles)
    spent: dict[str, dict[str, list[float]]] = {name: {"pack": [], "unpack": []} for name in CODECS}
    found: dict[str, dict[str, float]] = {name: {} for name in CODECS}
    out = np.empty_like(tiles[0])
    for _ in range(rounds):
        for name, codec in CODECS.items():
            began = perf_counter()
            packed = [codec.encode(tile) for tile in tiles]
            middle = perf_counter()
            for chunk in packed:
                codec.decode(memoryview(chunk), out)
            spent[name]["pack"].append(middle - began)
            spent[name]["unpack"].append(perf_counter() - middle)
            found[name]["times_packed"] = size / sum(map(len, packed))
            if not np.array_equal(out, tiles[-1]):
                raise RunError(f"{name} does not give back what it packed")
    for name, times in spent.items():
        found[name] |= {f"{what}_bytes_per_second": size / median(each) for what, each in times.items()}
    return found


def work(settings: CodecSettings) -> int:
    """Do it."""
    machine = description(torch.device("cpu"))
    store = TileStore.open(settings.store, "sizes")
    rows = np.unique(np.linspace(0, len(store) - 1, settings.num_tiles).round().astype(int))
    tiles = [store.read(int(row)).pixels for row in rows]
    found: dict[str, Any] = {
        "verb": "benchmark",
        "subject": "codec",
        "machine": machine,
        "tiles": {"number": len(tiles), "shape": list(tiles[0].shape), "dtype": str(tiles[0].dtype), "store": store.digest},
        "default": {name: vars(default_codec(store.arrays["pixels"].dtype, name)) for name in COMPRESSIONS},
        "codecs": measure(tiles, settings.rounds),
        "config": to_plain(settings),
    }
    rows_told = [
        (
            name,
            f"{each['times_packed']:.2f}",
            f"{each['pack_bytes_per_second'] / 1e6:.0f}",
            f"{each['unpack_bytes_per_second'] / 1e6:.0f}",
        )
        for name, each in found["codecs"].items()
    ]
    shape = "×".join(map(str, tiles[0].shape))
    table(f"codecs: {len(tiles)} tiles of {shape} {tiles[0].dtype}", ("codec", "times packed", "packing MB/s", "unpacking MB/s"), rows_told)
    if note := busy_note(machine):
        console.print(note)
    if settings.out is not None:
        write_json(settings.out, found)
        console.print(f"written to {settings.out}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subject; its exit code."""
    return run("benchmark", CodecSettings, work, description=DESCRIPTION, expected=(RunError, StoreError), argv=argv)
