"""What a preparation will do, fixed before it starts and told apart by a digest: scenes, channels, tiles, shards and settings."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from mae_core.chunks import Compression
from mae_core.shards import DTYPES
from mae_core.store_writer import StoreLayout, encode_json
from modalities.grid import Grid
from modalities.ground import centres
from modalities.patients import PSEUDONYM_KEY, of_patients
from modalities.scene import Channel, LabelMap, Scene, SceneError, fingerprint
from pipelines.channel_conflicts import refuse_mixed
from pipelines.frozen_split import FrozenSplit, Group, read_split, sides_of
from pipelines.ground_split import block_names
from pipelines.preparation_extension import LISTED, Earlier, Growth, growth
from pipelines.shard_task import Keep, ShardTask, Stamps, shard_tasks, stamps_of
from pipelines.statements import STATEMENTS, StatementSettings
from pipelines.tiling_plan import (
    PlannedTile,
    PreparationError,
    SplitSettings,
    held_out_groups,
    plan_tiles,
    scene_regions,
    split_group,
)

T = TypeVar("T")

READ_VOXELS = 1 << 25
"""Label maps up to this size are read at once for their digest."""


class TilingSettings(Protocol):
    """The settings that decide what is in a store, as against how fast it is written."""

    @property
    def tiles_per_shard(self) -> int:
        """Tiles in one file."""
        ...

    @property
    def compression(self) -> Compression:
        """How chunks are packed."""
        ...

    @property
    def min_valid_fraction(self) -> float:
        """Share of counted voxels below which a tile is thrown away."""
        ...

    @property
    def max_cloud_fraction(self) -> float:
        """Share of voxels under clouds above which a tile is thrown away."""
        ...

    @property
    def mix_levels(self) -> bool:
        """Whether a channel may come in several processing levels."""
        ...

    @property
    def split(self) -> SplitSettings:
        """How tiles are held out."""
        ...

    @property
    def states(self) -> StatementSettings:
        """What the user says of the data."""
        ...


@dataclass(frozen=True)
class PreparationPlan:
    """All that decides the bytes of a store.

    Attributes:
        scenes: Those that are to be written, by name; not those that an earlier store has already.
        groups: What the group of each scene is called in the store.
        channels: Union over the scenes, in the order of the channel axis.
        labels: Label maps by position of their scene.
        stamps: What the files of each scene were like before anything was read.
        tiles: Candidates, by rising id.
        layout: Of the arrays.
        split: How tiles are held out.
        sides: Of each group, by a frozen split; empty where there is none.
        attributes: Of the store's group, given by the caller.
        earlier, grown: The finished store that the scenes are added to, and what is new about them; None for a new store.
        document: What the plan says in a few words, compared to tell one plan from another and kept in the manifest.
        digest: Of the document.
    """

    scenes: tuple[Scene, ...]
    groups: tuple[str, ...]
    channels: tuple[Channel, ...]
    labels: Mapping[int, LabelMap]
    stamps: tuple[Stamps, ...]
    tiles: list[PlannedTile]
    layout: StoreLayout
    split: SplitSettings
    sides: Mapping[str, str]
    attributes: Mapping[str, Any]
    earlier: Earlier | None
    grown: Growth | None
    document: dict[str, Any]
    digest: str

    @property
    def bytes_per_voxel(self) -> int:
        """Bytes that a voxel takes in all arrays, uncompressed."""
        return sum(prod(array.shape[1:]) * np.dtype(array.dtype).itemsize for array in self.layout.arrays.values()) // prod(
            self.layout.tile
        )

    def tasks(self, store: Path, keep: Keep) -> Iterator[ShardTask]:
        """Tasks that own whole shards; together they own each once."""
        template = ShardTask(store, self.layout, self.digest, (), {}, {}, dict(enumerate(self.stamps)), keep)
        return shard_tasks(template, self.tiles, self.scenes, self.labels)


def make_plan(
    scenes: Sequence[Scene],
    tile: tuple[int, ...],
    settings: TilingSettings,
    labels: Mapping[str, LabelMap],
    attributes: Mapping[str, Any],
    earlier: Earlier | None = None,
) -> PreparationPlan:
    """The plan for scenes: of a new store, or of what an earlier store lacks.

    Raises:
        PreparationError: The scenes do not go together or not with the earlier store, a file is gone, or they cannot be split.
    """
    scenes = tuple(sorted(scenes, key=lambda scene: scene.name))
    named = _named(scenes, labels)
    _refuse_unwritable(attributes)
    frozen = None if settings.split.file is None else read_split(settings.split.file)
    document: dict[str, Any] = {
        "settings": {
            "tile": list(tile),
            "tiles_per_shard": settings.tiles_per_shard,
            "compression": settings.compression,
            "min_valid_fraction": settings.min_valid_fraction,
            **_where_set(settings),
            "split": settings.split.document() | ({"frozen": frozen.digest} if frozen else {}),
        },
        "channels": [asdict(channel) for channel in _channels(scenes, earlier, settings.mix_levels, str(attributes.get("kind", "")))],
        "dtype": _dtype(scenes),
        "labelled": bool(labels),
        "attributes": {key: value for key, value in attributes.items() if key != STATEMENTS},
    }
    stamps = {scene.name: _of_files(stamps_of, scene) for scene in scenes}
    entries = {scene.name: _entry(scene, named.get(scene.name), tile) for scene in scenes}
    grown = None
    if earlier is not None:
        document = _as_before(earlier, scenes, document)
        grown = growth(earlier, scenes, entries)
        scenes = tuple(scene for scene in scenes if scene.name in grown.new)
    groups = tuple(scene.group if grown is None else grown.groups[scene.name] for scene in scenes)
    first = 0 if earlier is None else earlier.free_tile
    tiles = plan_tiles(scenes, tile, settings.split, settings.tiles_per_shard, first, labelled=bool(labels))
    sides = {} if frozen is None else _frozen_sides(frozen, scenes, groups, settings.split, attributes, is_new=earlier is None)
    if earlier is None and frozen is None:
        held_out_groups(Counter(_planned_groups(scenes, groups, tiles, settings.split)), settings.split)
    of_scene = {number: list(places) for number, places in groupby(tiles, key=lambda place: place.scene)}
    document["scenes"] = [] if earlier is None else list(earlier.document["scenes"])
    for number, scene in enumerate(scenes):
        places = of_scene[number]
        cut = scene_regions(scene, tile, settings.split, labelled=bool(labels))[1].edges
        ids = {"group": groups[number], "regions": _digest(cut), "first_tile": places[0].tile, "num_tiles": len(places)}
        some = {key: list(values) for key, values in (("times", scene.times), ("patients", scene.patients)) if values}
        document["scenes"].append({**entries[scene.name], **ids, **some})
    frame = scenes[0].grid.frame if scenes else ""
    axes = attributes.get("axes") or (("x", "y", "z") if frame == "RAS+" else ("z", "y", "x")[-len(tile) :])
    layout = StoreLayout(
        num_tiles=tiles[-1].tile + 1 if tiles else first,
        channels=tuple(channel["name"] for channel in document["channels"]),
        tile=tile,
        axes=tuple(axes)[: len(tile)],
        dtype=document["dtype"],
        tiles_per_shard=settings.tiles_per_shard,
        has_labels=bool(labels),
        compression=settings.compression,
    )
    return PreparationPlan(
        scenes,
        groups,
        tuple(Channel(**channel) for channel in document["channels"]),
        {number: named[scene.name] for number, scene in enumerate(scenes) if scene.name in named},
        tuple(stamps[scene.name] for scene in scenes),
        tiles,
        layout,
        settings.split,
        sides,
        attributes,
        earlier,
        grown,
        document,
        hashlib.sha256(encode_json(document)).hexdigest(),
    )


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between the documents of two plans, in words."""
    lines = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += differences(old, new, f"{prefix}{key}.")
        elif key == "scenes" and isinstance(old, Sequence) and isinstance(new, Sequence):
            lines += _scene_differences({entry["name"]: entry for entry in old}, {entry["name"]: entry for entry in new})
        elif old != new:
            values = f": {old} there, {new} now"
            lines.append(f"{prefix}{key}{values if len(values) < 120 else ''}")
    return lines


def refuse_other(out: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Stops where what lies in a folder was planned differently.

    Raises:
        PreparationError: The documents differ.
    """
    lines = "".join(f"\n  {line}" for line in differences(found, json.loads(encode_json(wanted))))
    if lines:
        raise PreparationError(f"{out} was prepared by another plan; choose another --out or delete the folder. What differs:{lines}")


def _scene_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    lines = [f"scene {name}: there, not now" for name in sorted(before.keys() - now.keys())]
    lines += [f"scene {name}: now, not there" for name in sorted(now.keys() - before.keys())]
    for name in sorted(before.keys() & now.keys()):
        keys = [key for key in now[name] if before[name].get(key) != now[name][key]]
        lines += [f"scene {name}: {', '.join(keys)}"] if keys else []
    return lines if len(lines) <= LISTED else [*lines[:LISTED], f"… and {len(lines) - LISTED} more scenes"]


def _where_set(settings: TilingSettings) -> dict[str, Any]:
    """Settings that came later, and are told only where they are set: without them, stores of before are still of the same plan."""
    clouds = {"max_cloud_fraction": settings.max_cloud_fraction} if settings.max_cloud_fraction < 1 else {}
    return clouds | ({"states": settings.states.model_dump(mode="json")} if settings.states != StatementSettings() else {})


def _as_before(earlier: Earlier, scenes: Sequence[Scene], document: Mapping[str, Any]) -> dict[str, Any]:
    """The document with the earlier store's channels and element type, which must do for the new scenes.

    Raises:
        PreparationError: They do not, or the settings are others.
    """
    there = {key: value for key, value in earlier.document.items() if key != "scenes"}
    held = np.result_type(np.dtype(there["dtype"]), np.dtype(document["dtype"])) == np.dtype(there["dtype"])
    names = [channel["name"] for channel in there["channels"]]
    lacking = sorted({channel.name for scene in scenes for channel in scene.channels} - set(names))
    now = {**document, "dtype": there["dtype"] if held else document["dtype"], "channels": there["channels"]}
    if lacking:
        now["channels"] = document["channels"]
    refuse_other(earlier.store.path, there, now)
    return now


def _entry(scene: Scene, labels: LabelMap | None, tile: tuple[int, ...]) -> dict[str, Any]:
    """What may not change about a scene."""
    return {
        "name": scene.name,
        "files": _of_files(_fingerprint, scene),
        "grid": _digest(_grid(scene.grid)),
        "channels": _digest([_described(channel) for channel in scene.channels]),
        "labels": None if labels is None else _label_digest(scene, labels, tile),
    }


def _planned_groups(scenes: Sequence[Scene], groups: Sequence[str], tiles: Sequence[PlannedTile], split: SplitSettings) -> list[str]:
    """What is not divided, of each tile."""
    if split.unit != "ground":
        return [split_group(groups[tile.scene], tile, split) for tile in tiles]
    matrices = np.stack([scenes[tile.scene].grid.matrix for tile in tiles])
    matrices[:, :-1, -1] += np.einsum("tij,tj->ti", matrices[:, :-1, :-1], np.array([tile.origin for tile in tiles], float))
    places = centres([scenes[tile.scene].grid.frame for tile in tiles], matrices, [tile.extent for tile in tiles])
    blocks = block_names(*places, split.block_km)
    return [block or groups[tile.scene] for tile, block in zip(tiles, blocks, strict=True)]


def _refuse_unwritable(attributes: Mapping[str, Any]) -> None:
    try:
        encode_json(attributes)
    except (TypeError, ValueError) as error:
        raise PreparationError(f"the attributes {dict(attributes)} cannot be written as JSON: {error}") from error


def _frozen_sides(
    frozen: FrozenSplit,
    scenes: Sequence[Scene],
    groups: Sequence[str],
    split: SplitSettings,
    attributes: Mapping[str, Any],
    *,
    is_new: bool,
) -> Mapping[str, str]:
    """The side of every group, as a frozen split has it under any of its names or scans.

    Raises:
        PreparationError: It does not fit them, or leaves a new store nothing to train on.
    """
    names: dict[str, list[str]] = {}
    scans: dict[str, set[str]] = {}
    for scene, group in zip(scenes, groups, strict=True):
        names.setdefault(group, []).extend((scene.group, *scene.patients))
        scans.setdefault(group, set()).update(scene.voxel_digests)
    found = {group: Group(tuple(names[group]), frozenset(scans[group])) for group in names}
    sides = sides_of(frozen, found, split.unknown, str(attributes.get(PSEUDONYM_KEY, "")))
    if is_new and sides and "train" not in sides.values():
        raise PreparationError(
            f"prepare.split.file holds out all {len(sides)} groups of these data ({', '.join(sorted(set(sides.values())))}), and a store "
            "needs tiles to train on; give the whole data that were frozen, or another split"
        )
    return sides


def _described(channel: Channel) -> dict[str, Any]:
    """A channel's facts; those that came later are left out where they say nothing, so that stores from before them can still grow."""
    later = {"unit": "", "level": "", "footprint": 1}
    return {key: value for key, value in asdict(channel).items() if key not in later or value != later[key]}


def _refuse_times(scenes: Sequence[Scene]) -> None:
    """Stops where a scene's times are none, or not one per index."""
    for scene in scenes:
        dates = scene.grid.space[0]
        if len(scene.times) not in (0, 1, dates):
            raise PreparationError(
                f"scene {scene.name} has {len(scene.times)} times for {dates} places on its first axis; give one per date, or none"
            )
        try:
            [datetime.fromisoformat(time) for time in scene.times]
        except ValueError as error:
            raise PreparationError(f"scene {scene.name}: {error}; a time is in ISO 8601, such as 2020-02-23T03:27:39Z") from error


def _named(scenes: Sequence[Scene], labels: Mapping[str, LabelMap]) -> Mapping[str, LabelMap]:
    """Label maps by name of their scene, after a look at the names and times."""
    if not scenes:
        raise PreparationError("there is no scene to prepare")
    repeated = [name for name, count in Counter(scene.name for scene in scenes).items() if count > 1]
    if repeated:
        raise PreparationError(f"two scenes are called {repeated[0]}; every scene needs a name of its own")
    strangers = sorted(labels.keys() - {scene.name for scene in scenes})
    if strangers:
        raise PreparationError(f"there are labels for {strangers[0]}, which is no scene that is prepared")
    _refuse_times(scenes)
    return labels


def _channels(scenes: Sequence[Scene], earlier: Earlier | None, allow_levels: bool, kind: str) -> tuple[Channel, ...]:
    """The first scene's channels in its order, then what others add in theirs; one name means one thing in all of them.

    Those of patients by name: which of their scenes is the first depends on the key of the pseudonyms.
    """
    refuse_mixed(scenes, allow_levels=allow_levels, before=() if earlier is None else earlier.store.attributes["channels"])
    channels: dict[str, Channel] = {}
    for scene in scenes:
        names = [channel.name for channel in scene.channels]
        if not names or len(set(names)) < len(names):
            raise PreparationError(f"scene {scene.name} has channels {names}; it needs at least one, and each name once")
        for channel in scene.channels:
            channels.setdefault(channel.name, channel)
    return tuple(sorted(channels.values(), key=lambda channel: channel.name)) if of_patients(kind) else tuple(channels.values())


def _dtype(scenes: Sequence[Scene]) -> str:
    """The smallest element type that holds all scenes; what would need float64 becomes float32."""
    for scene in scenes:
        if scene.dtype.kind not in "biuf":
            raise PreparationError(f"scene {scene.name} holds {scene.dtype}; a tile store holds whole or real numbers: {', '.join(DTYPES)}")
    name = np.result_type(*(scene.dtype for scene in scenes)).name
    return {"bool": "uint8", "float64": "float32", "longdouble": "float32", "float128": "float32"}.get(name, name)


def _grid(grid: Grid) -> list[Any]:
    return [list(grid.space), [list(row) for row in grid.affine], grid.frame, grid.unit]


def _digest(document: Any) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True, allow_nan=False).encode()).hexdigest()[:32]


def _fingerprint(scene: Scene) -> str:
    return fingerprint(scene.files)


def _of_files(look: Callable[[Scene], T], scene: Scene) -> T:
    """What `look` gives; a file that cannot be looked at is said with its scene."""
    try:
        return look(scene)
    except OSError as error:
        said = error.strerror or type(error).__name__  # all of it names the file, and a scan's may name a person
        raise PreparationError(f"scene {scene.name}: a file cannot be read any more: {said}") from None


def _label_digest(scene: Scene, labels: LabelMap, tile: tuple[int, ...]) -> str:
    """Digest of all class numbers, since a label map does not say which files it reads."""
    digest = hashlib.sha256()
    whole = prod(scene.grid.space) <= READ_VOXELS
    windows = [scene.grid.full] if whole else [place.window for place in plan_tiles([scene], tile, SplitSettings())]
    try:
        for window in windows:
            digest.update(np.ascontiguousarray(labels.read(window), dtype="<i8").tobytes())
    except SceneError as error:
        raise PreparationError(str(error)) from error
    return digest.hexdigest()
