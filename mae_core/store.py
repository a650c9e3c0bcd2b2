"""The tile store, read side: a zarr v3 group whose every chunk is one tile and whose every promise is checked, or several as one.

`mae_core.store_writer` writes it and `mae_core.shards` knows the file of a shard. A store may be read from threads, forked and
spawned processes alike. Any zarr v3 reader gives the same arrays, but answers a missing chunk with zeros, which is refused here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float32, Int16, Int64, Shaped, UInt8
from numpy.typing import NDArray

from mae_core.shards import Packed, ShardedArray, StoreError
from mae_core.store_files import files_at
from mae_core.store_folder import Statistics, StoreFolder, TileIndex, Verify, open_folder
from mae_core.store_view import Combined, combine, view_members

__all__ = ["PackedTiles", "Split", "Statistics", "StoreError", "Tile", "TileIndex", "TileStore"]

Split = Literal["train", "val", "test"]
"""`test` are regions that were named to be held out whole; a store may have none."""
PackedTiles = dict[str, dict[int, Packed]]
"""Chunks as they lie in the files, by the name of their array and the row of their tile."""


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
class TileStore:
    """A finished store, opened for reading; holds no open file, so it can be pickled and shared by threads.

    Attributes:
        label: Where it lies, for messages.
        folders: The stores that it is made of; usually one.
        whole: Their digest, attributes, index, statistics and manifest as one.
    """

    label: str
    folders: tuple[StoreFolder, ...]
    whole: Combined

    @staticmethod
    def open(address: Path | str, verify: Verify = "checksums") -> TileStore:
        """The store in a folder, behind a URL, or the view of several that lies in a folder; checked.

        Args:
            address: Folder of a store or view, or URL of a store (`s3://…`; read over the network because it was asked for).
            verify: `"sizes"` checks that every file is there and has its size, and the checksums of index, statistics and
                metadata; `"checksums"` also reads every shard and compares its sha256.

        Raises:
            StoreError: The store is unfinished, unknown, altered or incomplete.
        """
        files = files_at(address)
        folders = tuple(open_folder(member, verify) for member in view_members(files) or [files])
        return TileStore(files.label, folders, combine(files, folders))

    @property
    def path(self) -> Path:
        """Folder of the store."""
        return Path(self.label)

    @property
    def digest(self) -> str:
        """Digest over the checksums of all files: two stores with the same digest are the same."""
        return self.whole.digest

    @property
    def attributes(self) -> dict[str, Any]:
        """Attributes of the group, as `zarr.json` has them."""
        return self.whole.attributes

    @property
    def index(self) -> TileIndex:
        """One row per tile."""
        return self.whole.index

    @property
    def statistics(self) -> Statistics:
        """Of the training tiles."""
        return self.whole.statistics

    @property
    def manifest(self) -> dict[str, Any]:
        """Counts of tiles by what became of them and, of a single store, its files with bytes and sha256."""
        return self.whole.manifest

    @property
    def arrays(self) -> dict[str, ShardedArray]:
        """Layout of `pixels`, `quality` and, where there are any, `labels`; of a view, of its first store."""
        return self.folders[0].arrays

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
    def has_labels(self) -> bool:
        """Whether tiles have class numbers."""
        return "labels" in self.arrays

    @property
    def kind(self) -> str:
        """Modality that the store was prepared from: `sentinel2`, `raster`, `mri`, …; empty if it was not said."""
        return str(self.attributes["kind"])

    @property
    def num_bytes(self) -> int:
        """Size of all files."""
        return sum(entry["bytes"] for folder in self.folders for entry in folder.manifest["files"].values())

    @cached_property
    def no_value(self) -> int:
        """The quality bits under which a pixel means nothing and is fed as zero."""
        return int(self.attributes["no_value"])

    @cached_property
    def shards(self) -> Int64[np.ndarray, " row"]:
        """Number of the shard that each row's tile lies in, rising, counted over all folders."""
        numbers = [
            (self.index.tile[rows] - tile) // folder.arrays["pixels"].tiles_per_shard
            for folder, tile, rows in zip(self.folders, self.whole.first_tile, self.whole.row_slices, strict=True)
        ]
        starts = np.cumsum([0, *(folder.arrays["pixels"].num_shards for folder in self.folders[:-1])])
        return np.concatenate([part + start for part, start in zip(numbers, starts, strict=True)]).astype(np.int64)

    def __len__(self) -> int:
        """Number of tiles."""
        return len(self.index.tile)

    def rows(self, split: Split) -> NDArray[np.int64]:
        """Row numbers of one side of the split, rising."""
        return np.flatnonzero(self.index.split == split).astype(np.int64)

    def fetch(self, rows: Iterable[int]) -> PackedTiles:
        """The packed tiles of some rows of the index; each shard is read front to back, in as few parts as gaps allow.

        What cannot be read is told by `unpack`, tile by tile.
        """
        chosen = np.unique(np.fromiter(rows, np.int64))
        if len(chosen) and not 0 <= chosen[0] <= chosen[-1] < len(self):
            raise IndexError(f"row {chosen[-1]} of a store of {len(self)} tiles")
        found: PackedTiles = {name: {} for name in self.arrays}
        for part in np.split(chosen, np.flatnonzero(np.diff(self.shards[chosen])) + 1):
            if len(part):
                place = self._place(int(part[0]))
                folder = self.folders[place]
                tiles = (self.index.tile[part] - self.whole.first_tile[place]).tolist()
                for name, array in folder.arrays.items():
                    found[name].update(zip(part.tolist(), array.fetch(folder.files, tiles), strict=True))
        return found

    def unpack(self, rows: Sequence[int], packed: PackedTiles, out: Mapping[str, NDArray[np.generic]]) -> dict[int, StoreError]:
        """Unpack the tiles of some rows into arrays `(tile, *shape)` by name, as `empty` gives them.

        Returns:
            What is missing or damaged, by position in `rows`; never answered with a fill value, the memory holds anything there.
        """
        failed: dict[int, StoreError] = {}
        tiles = self.index.tile[np.asarray(rows)].tolist()
        for name, target in out.items():
            chunks = packed[name]
            for number, row in enumerate(rows):
                place = self._place(row)
                folder, places = self.folders[place], self.whole.places[place] if name == "pixels" else None
                array = folder.arrays[name]
                own = target[number] if places is None else np.empty(array.shape[1:], array.stored_dtype)
                try:
                    array.unpack(folder.files, tiles[number] - self.whole.first_tile[place], chunks[row], own)
                except StoreError as error:
                    failed.setdefault(number, error)
                if places is not None:  # a view whose stores differ in their channels
                    target[number] = 0
                    target[number][places] = own
        return failed

    def read(self, row: int) -> Tile:
        """The tile of a row of the index.

        Raises:
            StoreError: A chunk is missing or damaged; never answered with a fill value.
        """
        out = self.empty(1)
        for error in self.unpack([row], self.fetch([row]), out).values():
            raise error
        return Tile(
            int(self.index.tile[row]),
            out["pixels"][0],
            out["quality"][0],
            out["labels"][0] if self.has_labels else None,
            self.index.present[row],
            self.index.scale[row].astype(np.float32),
            self.index.offset[row].astype(np.float32),
            tuple(int(size) for size in self.index.extent[row]),
        )

    def empty(self, num_tiles: int) -> dict[str, NDArray[Any]]:
        """Room for some tiles, `(tile, *shape)` by name of the array."""
        shapes = {name: array.shape[1:] for name, array in self.arrays.items()} | {"pixels": (len(self.channels), *self.space)}
        return {name: np.empty((num_tiles, *shape), self.arrays[name].stored_dtype) for name, shape in shapes.items()}

    def _place(self, row: int) -> int:
        """Which of the folders a row's tile lies in."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a store of {len(self)} tiles")
        return 0 if len(self.folders) == 1 else next(number for number, rows in enumerate(self.whole.row_slices) if row < rows.stop)
