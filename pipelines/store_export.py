"""Tiles of a store as files that other programs read, each at its place in the world."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mae_core.store import TileStore
from modalities.grid import Grid
from modalities.scene import Channel
from modalities.tile_file import RASTER, VOLUME, TileImage, suffix_of, write_tile
from pipelines.run_folder import RunError


def export_tiles(address: Path | str, tiles: Sequence[int], out: Path) -> Iterator[str]:
    """Writes tiles and gives a line on each.

    Raises:
        StoreError: The store cannot be read.
        RunError: It has no such tile, or `out` does not fit.
        SceneError: A file is there already, or cannot be written.
    """
    store = TileStore.open(address, verify="sizes")
    for row, path in planned(store, tiles, out):
        image = tile_image(store, row)
        files = write_tile(path, image)
        place = "" if image.grid.frame else "; its store knows no CRS for it, so neither does the file"
        left_out = int((~store.index.present[row]).sum())
        absent = f"; without {left_out} channels that its scene does not have" if left_out else ""
        yield f"tile {store.index.tile[row]} of {store.index.scene[row]}: {', '.join(str(file) for file in files)}{place}{absent}"


def planned(store: TileStore, tiles: Sequence[int], out: Path) -> list[tuple[int, Path]]:
    """Row and file of each tile that is to be written; nothing is written yet.

    Raises:
        RunError: The store has no such tile, or `out` is no place for it.
        SceneError: There is no file format for a tile.
    """
    known = store.index.tile
    unknown = sorted(set(tiles) - set(known.tolist()))
    if unknown:
        raise RunError(
            f"{store.label} has no tile {', '.join(map(str, unknown[:5]))}; it has {len(known)} tiles, "
            f"numbered {known[0]} to {known[-1]} with gaps"
        )
    is_file = out.name.endswith((RASTER, VOLUME))
    if is_file and len(set(tiles)) > 1:
        raise RunError(f"--out {out} is one file and {len(set(tiles))} tiles are to be written; give a folder")
    if out.resolve().is_relative_to(store.path.resolve()):
        raise RunError(f"--out {out} lies in the store, which holds nothing but itself; choose another place")
    rows = [int(row) for row in np.searchsorted(known, sorted(set(tiles)))]
    return [(row, out if is_file else out / f"tile-{known[row]:06d}{suffix_of(grid_of(store, row))}") for row in rows]


def grid_of(store: TileStore, row: int) -> Grid:
    """Where a tile lies, without its padding."""
    index, size = store.index, len(store.space) + 1
    extent = tuple(int(voxels) for voxels in index.extent[row])
    return Grid.from_matrix(extent, index.affine[row].reshape(size, size), str(index.frame[row]), str(index.unit[row]))


def tile_image(store: TileStore, row: int) -> TileImage:
    """A tile without its padding and without the channels that its scene does not have."""
    tile, grid = store.read(row), grid_of(store, row)
    inside = tuple(slice(0, size) for size in grid.space)
    there = np.flatnonzero(tile.present)
    channels = tuple(
        Channel(
            described["name"],
            described.get("wavelength_nm"),
            described.get("resolution_m"),
            float(store.index.scale[row][place]),
            float(store.index.offset[row][place]),
        )
        for place, described in enumerate(store.attributes["channels"])
        if tile.present[place]
    )
    return TileImage(
        pixels=tile.pixels[there][(slice(None), *inside)],
        quality=tile.quality[inside],
        labels=None if tile.labels is None else tile.labels[inside],
        channels=channels,
        grid=grid,
        no_value=store.no_value,
        tags={"terravox_store": store.digest, "terravox_tile": str(tile.tile), "terravox_scene": str(store.index.scene[row])},
    )
