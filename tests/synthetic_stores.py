"""Small stores whose every pixel tells store, tile and channel."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mae_core.store import TileStore
from mae_core.store_writer import ShardWriter, StoreLayout, finish, merge_moments

SPACE = (5, 6)


def pixels_of(name: str, tile: int, channels: tuple[str, ...]) -> np.ndarray:
    """Values that tell store, tile and channel."""
    base = 1000 * (ord(name[0]) - ord("a")) + 10 * tile
    return np.stack([np.full(SPACE, base + "ABC".index(channel), np.int16) for channel in channels])


def small_store(
    folder: Path,
    name: str,
    channels: tuple[str, ...] = ("A", "B"),
    groups: Mapping[str, str] | None = None,
    east: float = 0,
    frame: str = "EPSG:32632",
    **layout: Any,
) -> TileStore:
    """A store of seven tiles, three a shard, of which tile 2 is left empty; two scenes, each a group, the second held out."""
    given = {"num_tiles": 7, "tile": SPACE, "axes": ("y", "x"), "dtype": "int16", "tiles_per_shard": 3, "has_labels": False} | layout
    plan = StoreLayout(channels=channels, **given)
    tiles = [tile for tile in range(7) if tile != 2]
    shards: dict[str, Any] = {}
    for shard in range(plan.num_shards):
        with ShardWriter(folder, plan, shard) as writer:
            for tile in (tile for tile in tiles if tile // 3 == shard):
                values = pixels_of(name, tile, channels).astype(plan.dtype)
                writer.add(tile, values, np.full(SPACE, tile, np.uint8), np.zeros(SPACE, np.int16) if plan.has_labels else None)
        shards |= writer.files
    sides = dict(groups or {f"{name} 0": "train", f"{name} 1": "val"})
    rows = []
    for tile in tiles:
        group = list(sides)[tile // 4]
        rows.append(
            {
                "tile": tile,
                "scene": f"scene {name} {tile // 4}",
                "group": group,
                "split": sides[group],
                "origin": [0, tile],
                "extent": list(SPACE),
                "owned": list(SPACE),
                "affine": [1.0, 0, 0, 0, 1, east + 10 * tile, 0, 0, 1],
                "frame": frame,
                "unit": "m",
                "valid_fraction": 1.0,
                "present": [True] * len(channels),
                "scale": [0.5] * len(channels),
                "offset": [1.0] * len(channels),
            }
        )
    width = len(channels)
    values = np.array([pixels_of(name, tile, channels)[:, 0, 0] for tile in (0, 1, 3)], np.float64)
    moments: dict[str, Any] = {"count": [3] * width, "mean": values.mean(0).tolist(), "m2": (values.var(0) * 3).tolist()}
    moments |= {"min": values.min(0).tolist(), "max": values.max(0).tolist()}
    finish(
        folder,
        plan,
        attributes={
            "kind": "raster",
            "channels": [{"name": channel} for channel in channels],
            "no_value": 127,
            "classes": [0, ord(name[0])],
        },
        rows=rows,
        statistics=merge_moments([moments], width),
        shards=shards,
        manifest={"tiles": {"accepted": 6, "found": 7, "train": 3, "val": 3, "discarded": {"too little": 1}}, "notes": [f"note of {name}"]},
    )
    return TileStore.open(folder)
