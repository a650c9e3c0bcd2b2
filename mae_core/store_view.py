"""Several stores as one, without copying: what they must have in common, and their index and statistics joined.

A view is a folder with one file, `view.json`, that names its stores by path and digest. Stores are never changed by it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mae_core.histogram import Histogram
from mae_core.shards import StoreError
from mae_core.store_files import LocalFiles, StoreFiles
from mae_core.store_folder import Statistics, StoreFolder, TileIndex, read_histogram, statistics_of
from mae_core.store_writer import encode_json, merge_moments, write_file

VIEW = "view.json"
VIEW_FORMAT, VIEW_VERSION = "terravox-view", 1


@dataclass(frozen=True, eq=False)
class Combined:
    """What one or several stores say as one.

    Attributes:
        digest, attributes, index, statistics, manifest: As of a single store; tile numbers of later stores are counted on.
        first_tile: Per store, the number that its tile 0 has here.
        row_slices: Per store, its rows.
        places: Per store, where its channels stand among all; None where they are all, in the same order.
    """

    digest: str
    attributes: dict[str, Any]
    index: TileIndex
    statistics: Statistics
    manifest: dict[str, Any]
    first_tile: tuple[int, ...]
    row_slices: tuple[slice, ...]
    places: tuple[NDArray[np.int64] | None, ...]


def write_view(out: Path, stores: Sequence[Path]) -> None:
    """Write the view of some stores into a new or empty folder; the stores are named relative to it, so that all can be moved together.

    Raises:
        StoreError: The folder is taken, or a store is named twice.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StoreError(f"{out} is taken; a view wants a new or empty folder")
    resolved = [store.resolve() for store in stores]
    twice = [str(store) for store, count in Counter(resolved).items() if count > 1]
    if twice:
        raise StoreError(f"{', '.join(twice)} is named more than once; name each store once")
    members = []
    for store in resolved:
        manifest = json.loads((store / "manifest.json").read_bytes())
        members.append({"path": os.path.relpath(store, out.resolve()), "digest": manifest["store_digest"]})
    out.mkdir(parents=True, exist_ok=True)
    write_file(out / VIEW, encode_json({"format": VIEW_FORMAT, "format_version": VIEW_VERSION, "stores": members}))


def view_members(files: StoreFiles) -> list[StoreFiles]:
    """Where the stores of a view lie; empty if the place holds no view.

    Raises:
        StoreError: The view is damaged, or a store has changed since the view was made.
    """
    if not isinstance(files, LocalFiles) or files.size(VIEW) is None:
        return []
    try:
        document = json.loads(files.read(VIEW))
        found = (document["format"], document["format_version"])
        members = [(str(entry["path"]), str(entry["digest"])) for entry in document["stores"]]
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{files.label}/{VIEW} is damaged ({error!r}); merge the stores again") from error
    if found != (VIEW_FORMAT, VIEW_VERSION) or not members:
        raise StoreError(f"{files.label}/{VIEW} is of format {found}, with {len(members)} stores; merge the stores again")
    places: list[StoreFiles] = []
    for path, digest in members:
        member = LocalFiles((files.folder / path).resolve())
        try:
            now = json.loads(member.read("manifest.json"))["store_digest"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{files.label}: its store {path} cannot be read ({error}); put it back or merge again") from error
        if now != digest:
            raise StoreError(f"{files.label}: its store {path} has changed since they were merged (digest {now[:12]}); merge again")
        places.append(member)
    return places


def combine(files: StoreFiles, folders: Sequence[StoreFolder]) -> Combined:
    """What stores say as one.

    Raises:
        StoreError: They do not go together; the message names what differs, or the scene or group that is in two of them.
    """
    first = folders[0]
    if len(folders) == 1:
        rows = (slice(0, len(first.index.tile)),)
        return Combined(first.digest, first.attributes, first.index, first.statistics, first.manifest, (0,), rows, (None,))
    _check_alike(files, folders)
    _check_apart(files, folders)
    channels = _channels(files, folders)
    names = [channel["name"] for channel in channels]
    places = [np.array([names.index(name) for name in folder.channels]) for folder in folders]
    starts = np.cumsum([0, *(folder.arrays["pixels"].shape[0] for folder in folders)])
    edges = np.cumsum([0, *(len(folder.index.tile) for folder in folders)])
    counts = [folder.manifest["tiles"] for folder in folders]
    discarded = sum((Counter(count.get("discarded", {})) for count in counts), Counter())
    keys = ("found", "accepted", "train", "val", *(("test",) if any("test" in count for count in counts) else ()))
    tiles = {key: sum(int(count.get(key, 0)) for count in counts) for key in keys}
    classes = sorted({value for folder in folders for value in folder.attributes.get("classes", [])})
    return Combined(
        digest=hashlib.sha256("".join(folder.digest for folder in folders).encode()).hexdigest(),
        attributes={**first.attributes, "channels": channels, "classes": classes},
        index=_joined(folders, starts, places, len(names)),
        statistics=_statistics(folders, places, len(names)),
        manifest={
            "tiles": {**tiles, "discarded": dict(discarded)},
            "quarantined": {scene: count for folder in folders for scene, count in folder.manifest.get("quarantined", {}).items()},
            "notes": [note for folder in folders for note in folder.manifest.get("notes", [])],
            "stores": [{"digest": folder.digest, "tiles": len(folder.index.tile)} for folder in folders],
        },
        first_tile=tuple(int(start) for start in starts[:-1]),
        row_slices=tuple(slice(int(low), int(high)) for low, high in pairwise(edges)),
        places=tuple(None if place.tolist() == list(range(len(names))) else place for place in places),
    )


def _check_alike(files: StoreFiles, folders: Sequence[StoreFolder]) -> None:
    """All stores have what cannot be brought together by reading alone."""

    def facts(folder: StoreFolder) -> dict[str, Any]:
        return {
            "size of a tile": folder.arrays["quality"].shape[1:],
            "element type": folder.arrays["pixels"].dtype,
            "labels": "labels" in folder.arrays,
            "modality": folder.attributes["kind"],
            "key of the pseudonyms": folder.attributes.get("pseudonym_key"),
            "names of the axes": folder.attributes.get("axes"),
            "quality bits": (folder.attributes.get("quality_bits"), folder.attributes["no_value"]),
        }

    wanted = facts(folders[0])
    for folder in folders[1:]:
        for name, value in facts(folder).items():
            if value != wanted[name]:
                raise StoreError(
                    f"{files.label}: {folder.files.label} cannot be joined to {folders[0].files.label}: "
                    f"{name} {value} is not {wanted[name]}; prepare them alike"
                )


def _check_apart(files: StoreFiles, folders: Sequence[StoreFolder]) -> None:
    """No scene is in two stores, and no group or scan, under whatever name, is trained on in one and held out in another."""
    _check_scans(files, folders)
    seen: dict[str, StoreFolder] = {}
    side: dict[str, str] = {}
    for folder in folders:
        scenes = set(folder.index.scene.tolist())
        again = sorted(scenes & seen.keys())
        if again:
            other = seen[again[0]].files.label
            raise StoreError(f"{files.label}: scene {again[0]} is in {other} and in {folder.files.label} ({len(again)} such scenes)")
        seen |= dict.fromkeys(scenes, folder)
        for group, split in set(zip(folder.index.group.tolist(), folder.index.split.tolist(), strict=True)):
            if side.setdefault(group, split) != split:
                raise StoreError(
                    f"{files.label}: group {group} is trained on in one store and held out in another; "
                    "prepare them as one, or with one split"
                )


def _check_scans(files: StoreFiles, folders: Sequence[StoreFolder]) -> None:
    """No scan, known by its voxels, is trained on in one store and held out in another."""
    scans = []
    for folder in folders:
        pairs = set(zip(folder.index.voxel_digests.tolist(), (folder.index.split == "train").tolist(), strict=True))
        scans.append({side: {scan for digests, trained in pairs if trained is side for scan in digests} for side in (True, False)})
    for one, other in permutations(range(len(folders)), 2):
        leaks = scans[one][True] & scans[other][False]
        if leaks:
            raise StoreError(
                f"{files.label}: {len(leaks)} scans are trained on in {folders[one].files.label} and held out in "
                f"{folders[other].files.label}, by their voxels; prepare them as one, or with one split (prepare.split.file)"
            )


def _channels(files: StoreFiles, folders: Sequence[StoreFolder]) -> list[dict[str, Any]]:
    """The first store's channels in its order, then what others add in theirs."""
    channels: dict[str, dict[str, Any]] = {}
    for folder in folders:
        for channel in folder.attributes["channels"]:
            known = channels.setdefault(channel["name"], channel)
            if known != channel:
                raise StoreError(f"{files.label}: channel {channel['name']} is {known} in one store and {channel} in another")
    return list(channels.values())


def _joined(folders: Sequence[StoreFolder], starts: NDArray[np.int64], places: Sequence[NDArray[np.int64]], width: int) -> TileIndex:
    """All rows, with tile numbers counted on and channels in their places."""
    parts: list[TileIndex] = []
    for folder, start, place in zip(folders, starts[:-1], places, strict=True):
        rows = len(folder.index.tile)
        spread = {"present": np.zeros((rows, width), bool), "scale": np.ones((rows, width)), "offset": np.zeros((rows, width))}
        for name, values in spread.items():
            values[:, place] = getattr(folder.index, name)
        parts.append(replace(folder.index, tile=folder.index.tile + start, **spread))
    return TileIndex(**{each.name: np.concatenate([getattr(part, each.name) for part in parts]) for each in fields(TileIndex)})


def _statistics(folders: Sequence[StoreFolder], places: Sequence[NDArray[np.int64]], width: int) -> Statistics:
    """Moments of all training tiles."""
    parts = []
    for folder, place in zip(folders, places, strict=True):
        own = folder.statistics
        columns = {"count": own.count, "mean": own.mean, "m2": own.std**2 * own.count, "min": own.minimum, "max": own.maximum}
        part: dict[str, list[float | None]] = {}
        for name, values in columns.items():
            spread = np.zeros(width)
            spread[place] = values
            part[name] = [float(value) for value in spread]
        for name in ("min", "max"):
            part[name] = [value if count else None for value, count in zip(part[name], part["count"], strict=True)]
        parts.append(part)
    counted = [read_histogram(folder) for folder in folders]
    moved = [part.moved(np.asarray(place)) for part, place in zip(counted, places, strict=True) if part is not None]
    joined = statistics_of(merge_moments(parts, width))
    return replace(joined, percentiles=Histogram.merged(moved).percentiles(width)) if len(moved) == len(folders) else joined
