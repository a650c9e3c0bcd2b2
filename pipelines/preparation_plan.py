"""What a preparation will do, fixed before it starts and told apart by a digest: scenes, channels, tiles, shards and settings."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from mae_core.shards import DTYPES
from mae_core.store_writer import StoreLayout, encode_json
from modalities.grid import Grid
from modalities.scene import Channel, LabelMap, Scene, SceneError, fingerprint
from pipelines.shard_task import ShardTask, Stamps, shard_tasks, stamps_of
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
    def min_valid_fraction(self) -> float:
        """Share of counted voxels below which a tile is thrown away."""
        ...

    @property
    def split(self) -> SplitSettings:
        """How tiles are held out."""
        ...


@dataclass(frozen=True)
class PreparationPlan:
    """All that decides the bytes of a store.

    Attributes:
        scenes: By name.
        channels: Union over the scenes, in the order of the channel axis.
        labels: Label maps by position of their scene.
        stamps: What the files of each scene were like before anything was read.
        tiles: Candidates, by rising id.
        layout: Of the arrays.
        split: How tiles are held out.
        attributes: Of the store's group, given by the caller.
        document: What the plan says in a few words, compared to tell one plan from another and kept in the manifest.
        digest: Of the document.
    """

    scenes: tuple[Scene, ...]
    channels: tuple[Channel, ...]
    labels: Mapping[int, LabelMap]
    stamps: tuple[Stamps, ...]
    tiles: list[PlannedTile]
    layout: StoreLayout
    split: SplitSettings
    attributes: Mapping[str, Any]
    document: dict[str, Any]
    digest: str

    @property
    def bytes_per_voxel(self) -> int:
        """Bytes that a voxel takes in all arrays, uncompressed."""
        return sum(prod(array.shape[1:]) * np.dtype(array.dtype).itemsize for array in self.layout.arrays.values()) // prod(
            self.layout.tile
        )

    def tasks(self, store: Path, min_valid_fraction: float) -> Iterator[ShardTask]:
        """Tasks that own whole shards; together they own each once."""
        template = ShardTask(store, self.layout, self.digest, (), {}, {}, dict(enumerate(self.stamps)), min_valid_fraction)
        return shard_tasks(template, self.tiles, self.scenes, self.labels)


def make_plan(
    scenes: Sequence[Scene],
    tile: tuple[int, ...],
    settings: TilingSettings,
    labels: Mapping[str, LabelMap],
    attributes: Mapping[str, Any],
) -> PreparationPlan:
    """The plan for scenes.

    Raises:
        PreparationError: The scenes do not go together, a file is gone, or they cannot be split.
    """
    scenes = tuple(sorted(scenes, key=lambda scene: scene.name))
    numbers = _numbers(scenes, labels)
    channels = _channels(scenes)
    stamps = tuple(_of_files(stamps_of, scene) for scene in scenes)
    tiles = plan_tiles(scenes, tile, settings.split, settings.tiles_per_shard, labelled=bool(labels))
    held_out_groups(Counter(split_group(scenes[place.scene], place, settings.split) for place in tiles), settings.split)
    axes = attributes.get("axes") or (("x", "y", "z") if scenes[0].grid.frame == "RAS+" else ("z", "y", "x")[-len(tile) :])
    layout = StoreLayout(
        num_tiles=tiles[-1].tile + 1,
        channels=tuple(channel.name for channel in channels),
        tile=tile,
        axes=tuple(axes)[: len(tile)],
        dtype=_dtype(scenes),
        tiles_per_shard=settings.tiles_per_shard,
        has_labels=bool(labels),
    )
    document = {
        "settings": {
            "tile": list(tile),
            "tiles_per_shard": settings.tiles_per_shard,
            "min_valid_fraction": settings.min_valid_fraction,
            "split": settings.split.model_dump(),
        },
        "num_scenes": len(scenes),
        "names and groups": _digest([[scene.name, scene.group] for scene in scenes]),
        "grids": _digest([_grid(scene.grid) for scene in scenes]),
        "regions": _digest([scene_regions(scene, tile, settings.split, labelled=bool(labels))[1].edges for scene in scenes]),
        "channels": [asdict(channel) for channel in channels],
        "scale and offset": _digest([[asdict(channel) for channel in scene.channels] for scene in scenes]),
        "dtype": layout.dtype,
        "files": _digest([_of_files(_fingerprint, scene) for scene in scenes]),
        "labels": _digest([[scenes[n].name, _label_digest(scenes[n], numbers[n], tile)] for n in sorted(numbers)]) if labels else None,
        "attributes": dict(attributes),
    }
    try:
        digest = hashlib.sha256(encode_json(document)).hexdigest()
    except (TypeError, ValueError) as error:
        raise PreparationError(f"the attributes {dict(attributes)} cannot be written as JSON: {error}") from error
    return PreparationPlan(scenes, channels, numbers, stamps, tiles, layout, settings.split, attributes, document, digest)


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between the documents of two plans, in words."""
    lines = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            values = f": {old} there, {new} now"
            lines.append(f"{prefix}{key}{values if len(values) < 120 else ''}")
    return lines


def _numbers(scenes: Sequence[Scene], labels: Mapping[str, LabelMap]) -> dict[int, LabelMap]:
    """Label maps by the position of their scene."""
    if not scenes:
        raise PreparationError("there is no scene to prepare")
    repeated = [name for name, count in Counter(scene.name for scene in scenes).items() if count > 1]
    if repeated:
        raise PreparationError(f"two scenes are called {repeated[0]}; every scene needs a name of its own")
    strangers = sorted(labels.keys() - {scene.name for scene in scenes})
    if strangers:
        raise PreparationError(f"there are labels for {strangers[0]}, which is no scene that is prepared")
    return {number: labels[scene.name] for number, scene in enumerate(scenes) if scene.name in labels}


def _channels(scenes: Sequence[Scene]) -> tuple[Channel, ...]:
    """The first scene's channels in its order, then what others add in theirs."""
    channels: dict[str, Channel] = {}
    for scene in scenes:
        names = [channel.name for channel in scene.channels]
        if not names or len(set(names)) < len(names):
            raise PreparationError(f"scene {scene.name} has channels {names}; it needs at least one, and each name once")
        for channel in scene.channels:
            channels.setdefault(channel.name, channel)
    return tuple(channels.values())


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
    return hashlib.sha256(encode_json({"": document})).hexdigest()


def _fingerprint(scene: Scene) -> str:
    return fingerprint(scene.files)


def _of_files(look: Callable[[Scene], T], scene: Scene) -> T:
    """What `look` gives; a file that cannot be looked at is said with its scene."""
    try:
        return look(scene)
    except OSError as error:
        raise PreparationError(f"scene {scene.name}: a file cannot be read any more: {error}") from error


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
