"""A finished store that takes in new scenes: what is new, gone or changed, on which side new tiles fall, what they add to the numbers.

Nothing that is in the store moves: ids, shards, groups and sides stay, and a model that was judged on its held-out tiles may go on
being judged on them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

from mae_core.store import TileIndex, TileStore
from modalities.scene import Scene
from pipelines.ground_split import Sided
from pipelines.tiling_plan import Ground, PreparationError, SplitSettings, drawing_order

TIES = "its scene ties held-out and training places together"
OVERLAPS = "overlaps a held-out tile"
OVERLAPS_EARLIER = "would be held out, but overlaps an earlier training tile"
FIXED = ("files", "grid", "channels", "labels")
"""What may not change about a scene that is in a store."""

LISTED = 10
"""Scenes that a message names."""


@dataclass(frozen=True)
class Earlier:
    """A finished store to which scenes may be added."""

    store: TileStore

    @property
    def document(self) -> Mapping[str, Any]:
        """Of the plan that it was prepared by."""
        document: Mapping[str, Any] = self.store.manifest["plan"]
        return document

    @cached_property
    def scenes(self) -> dict[str, Mapping[str, Any]]:
        """What the plan says about each scene, by name."""
        return {entry["name"]: entry for entry in self.document["scenes"]}

    @cached_property
    def sides(self) -> dict[str, str]:
        """Side of the split of every group that has a tile."""
        return dict(zip(self.store.index.group.tolist(), self.store.index.split.tolist(), strict=True))

    @property
    def scans(self) -> tuple[list[str], list[tuple[str, ...]]]:
        """The scene of each tile, and the digests of its scans."""
        return self.store.index.scene.tolist(), self.store.index.voxel_digests.tolist()

    @property
    def free_tile(self) -> int:
        """The first id of a shard that does not exist yet."""
        pixels = self.store.arrays["pixels"]
        return pixels.num_shards * pixels.tiles_per_shard

    def rows(self) -> list[dict[str, Any]]:
        """The index, row by row."""
        columns = {field.name: getattr(self.store.index, field.name).tolist() for field in fields(TileIndex)}
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def moments(self) -> dict[str, list[float | None]]:
        """The statistics as `merge_moments` takes them."""
        found = self.store.statistics
        ends = {
            name: [float(value) if count else None for value, count in zip(values, found.count, strict=True)]
            for name, values in (("min", found.minimum), ("max", found.maximum))
        }
        squares = found.std**2 * found.count
        return {"count": found.count.tolist(), "mean": found.mean.tolist(), "m2": squares.tolist(), **ends}


@dataclass(frozen=True)
class Growth:
    """What a catalogue has beyond a finished store.

    Attributes:
        new: Names of the scenes that are not in the store.
        gone: Names of scenes of the store that the catalogue does not have any more.
        groups: What the group of each new scene is called in the store.
        joined: Groups of the store that the new scenes of a group belong to, by the name of the group; most often itself or none.
    """

    new: frozenset[str]
    gone: tuple[str, ...]
    groups: Mapping[str, str]
    joined: Mapping[str, frozenset[str]]


def growth(earlier: Earlier, scenes: Sequence[Scene], entries: Mapping[str, Mapping[str, Any]]) -> Growth:
    """What is new and what is gone.

    A group is called after the scenes in it, so a new scene may give an old place another name, or join two: groups are
    recognised by the old scenes that are in them, and by scans that are there under another name.

    Args:
        earlier: The store.
        scenes: The catalogue's.
        entries: What a plan says about each, by name.

    Raises:
        PreparationError: A scene of the store has changed.
    """
    known = earlier.scenes
    changed = {name: [key for key in FIXED if entries[name][key] != known[name][key]] for name in entries if name in known}
    lines = [f"\n  {name}: its {', '.join(keys)}" for name, keys in sorted(changed.items()) if keys]
    if lines:
        more = f"\n  … and {len(lines) - LISTED} more" if len(lines) > LISTED else ""
        raise PreparationError(
            f"{len(lines)} scenes that are in {earlier.store.path} have changed since, and tiles that are there are not written anew. "
            "Put the files back, give the changed ones another name so that they count as new scenes, or choose another --out and "
            f"prepare everything:{''.join(lines[:LISTED])}{more}"
        )
    places = {name: entry["group"] for entry in known.values() for name in entry.get("patients", ())}
    places |= {entry["group"]: entry["group"] for entry in known.values()}
    olds: defaultdict[str, set[str]] = defaultdict(set)
    scans = {scan: known[name]["group"] for name, digests in zip(*earlier.scans, strict=True) for scan in digests}
    for scene in scenes:
        olds[scene.group] |= (
            {known[scene.name]["group"]}
            if scene.name in known
            else {places[name] for name in (scene.group, *scene.patients) if name in places}
        )
        olds[scene.group] |= {scans[scan] for scan in scene.voxel_digests if scan in scans}
    new = [scene for scene in scenes if scene.name not in known]
    groups = {scene.name: min(olds[scene.group], default=scene.group) for scene in new}
    joined: defaultdict[str, set[str]] = defaultdict(set)
    for scene in new:
        joined[groups[scene.name]] |= olds[scene.group]
    return Growth(
        frozenset(groups),
        tuple(sorted(known.keys() - entries.keys())),
        groups,
        {group: frozenset(found) for group, found in joined.items()},
    )


def sides_of_new(
    earlier: Earlier, grown: Growth, rows: Sequence[dict[str, Any]], split: SplitSettings, fixed: Mapping[str, str]
) -> tuple[list[dict[str, Any]], list[str], Counter[str]]:
    """New rows that may stay, the side of each, and the number of the others by reason; the old ones keep their sides.

    Tiles of a group that the store has go where it is. A group that it does not have is held out while too little is, in the order
    in which groups are drawn. What ties groups of both sides together is thrown away.

    Args:
        earlier: The store.
        grown: What is new.
        rows: Accepted tiles of new scenes, with `group`.
        split: As the store was divided.
        fixed: Side of each new group by a frozen split; empty where there is none.
    """
    dropped: Counter[str] = Counter()
    sides = {**fixed, **earlier.sides, **{f"region {name}": "test" for name in split.regions}}
    rows = list(rows)
    if split.unit != "block":
        for group, olds in grown.joined.items():
            found = {sides[old] for old in olds if old in sides} - {"test"}
            if len(found) == 1:
                sides[group] = found.pop()
            elif found:
                dropped[TIES] += sum(row["group"] == group for row in rows)
                rows = [row for row in rows if row["group"] != group]
    sizes = Counter(row["group"] for row in rows if sides.get(row["group"]) != "test")
    old = Counter(earlier.store.index.split.tolist())
    held = old["val"] + sum(size for group, size in sizes.items() if sides.get(group) == "val")
    left = [group for group in sizes if group not in sides]
    if set(left) <= set(split.never_hold_out):
        sides |= dict.fromkeys(left, "train")
        left = []
    for group in drawing_order(left, split):
        sides[group] = "val" if held < split.val_fraction * (old["train"] + old["val"] + sizes.total()) else "train"
        held += sizes[group] if sides[group] == "val" else 0
    return rows, [sides.get(row["group"], "train") for row in rows], dropped


def too_near_words(split: SplitSettings) -> str:
    """Why a tile is left out that comes too near to a held-out one."""
    return f"nearer than {split.buffer_m:g} m to a held-out tile" if split.buffer_m else OVERLAPS


def listed(names: Sequence[str]) -> str:
    """The first names and the number of the others."""
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")


def earlier_tiles(earlier: Earlier, grown: Growth) -> Sided:
    """Where the store's tiles lie; old groups that new scenes join together are one place."""
    names = {old: group for group, olds in grown.joined.items() for old in olds}
    index = earlier.store.index
    groups = [earlier.scenes[name]["group"] for name in index.scene.tolist()]
    places = np.array([names.get(group, group) for group in groups], dtype=np.str_)
    return Sided.of(Ground(places, index.frame, index.affine, index.extent), index.split.tolist())
