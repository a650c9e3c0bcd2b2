"""What a tile store holds, as plain numbers and in words; read from its metadata alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from math import prod
from typing import Any

import numpy as np

from mae_core.chunks import ChunkCodec
from mae_core.histogram import PERCENTS
from mae_core.store import Split, TileStore
from mae_core.store_folder import FORMAT, FORMAT_VERSION
from pipelines.progress import console, table

SHOWN_PERCENTS = (2, 50, 98)
"""Percentiles that are told; the others are in `statistics.json`."""

SIDES: tuple[Split, ...] = ("train", "val", "test")


def facts(store: TileStore) -> dict[str, Any]:
    """What a store holds, in JSON's types. A number that is not known, such as the mean of a channel without a voxel, is None."""
    index, manifest = store.index, store.manifest
    voxels = index.extent.prod(axis=1)
    uncompressed = len(store) * prod(store.space) * (len(store.channels) * store.dtype.itemsize + 1 + 2 * store.has_labels)
    sides = {side: rows for side in SIDES if len(rows := store.rows(side)) or side != "test"}
    return {
        "format": f"{FORMAT} {FORMAT_VERSION}",
        "digest": store.digest,
        "modality": store.kind,
        "stores": len(store.folders),
        "tiles": {"all": len(store), **{side: len(rows) for side, rows in sides.items()}},
        "groups": {side: len(np.unique(index.group[rows])) for side, rows in sides.items()},
        "scenes": {"all": len(np.unique(index.scene)), **{side: len(np.unique(index.scene[rows])) for side, rows in sides.items()}},
        "space": list(store.space),
        "axes": list(store.attributes.get("axes", [])),
        "dtype": store.dtype.name,
        "codecs": {name: codec_words(array.codec) for name, array in store.arrays.items()},
        "labels": store.attributes.get("classes", []) if store.has_labels else None,
        "bytes": {"on_disk": store.num_bytes, "uncompressed": uncompressed, "packed_times": uncompressed / store.num_bytes},
        "channels": _channels(store),
        "spacing": _spacing(store),
        "valid_fraction": {
            "mean": float((index.valid_fraction * voxels).sum() / voxels.sum()),
            "least": float(index.valid_fraction.min()),
        },
        "frames": dict(Counter(str(frame) for frame in index.frame).most_common()),
        "discarded": dict(manifest["tiles"].get("discarded", {})),
        "quarantined": dict(manifest.get("quarantined", {})),
        "notes": list(manifest.get("notes", [])),
    }


def codec_words(codec: ChunkCodec) -> str:
    """A codec in words, such as `blosc (lz4, level 5, bitshuffle)`."""
    words = {name: value for name, value in asdict(codec).items() if name != "name"}
    inside = "" if codec.name == codec.compressor else f"{words['compressor']}, "
    return f"{codec.name} ({inside}level {words['level']}" + ("" if codec.shuffle == "noshuffle" else f", {codec.shuffle}") + ")"


def tell(found: Mapping[str, Any]) -> None:
    """Print what `facts` gives."""
    tiles, groups, scenes, size = found["tiles"], found["groups"], found["scenes"], found["bytes"]
    head = f"{found['modality'] or 'unknown modality'}, {found['format']}, digest {found['digest']}"
    lines = [head + (f", a view of {found['stores']} stores" if found["stores"] > 1 else "")]
    lines.append(
        f"tiles: {tiles['all']} of {'×'.join(map(str, found['space']))} ({', '.join(found['axes'])}), {found['dtype']}; "
        + "; ".join(f"{side} {tiles[side]} of {groups[side]} groups and {scenes[side]} scenes" for side in SIDES if side in groups)
    )
    lines.append(
        f"size: {size['on_disk'] / 1e6:.1f} MB on disk, {size['uncompressed'] / 1e6:.1f} MB unpacked, {size['packed_times']:.2f} times; "
        + ", ".join(f"{name} by {codec}" for name, codec in found["codecs"].items())
    )
    valid = found["valid_fraction"]
    lines.append(f"counted: {valid['mean']:.1%} of all voxels, {valid['least']:.1%} in the poorest tile")
    for unit, (low, high) in found["spacing"].items():
        lines.append(f"spacing: {low:g} to {high:g} {unit}" if low != high else f"spacing: {low:g} {unit}")
    frames = [f"{_frame(frame)}: {count}" for frame, count in found["frames"].items()]
    lines.append("tiles by frame: " + ", ".join(frames[:8]) + (f" and {len(frames) - 8} more" if len(frames) > 8 else ""))
    if found["labels"] is not None:
        lines.append(f"labels: classes {', '.join(map(str, found['labels']))}")
    discarded = [f"{count} {why}" for why, count in found["discarded"].items()]
    lines.append("discarded tiles: " + (", ".join(discarded) or "none"))
    lines += [f"quarantined: scene {scene}, {count} tiles could not be read" for scene, count in found["quarantined"].items()]
    lines += [f"note: {note}" for note in found["notes"]]
    for line in lines:
        console.print(line, markup=False)
    head_row = ("channel", "nm", "m", "tiles", "mean", "std", "min", "max")
    table("channels, physical values of the training side", head_row, [_row(channel) for channel in found["channels"]])


def value_columns(store: TileStore) -> dict[str, list[str]]:
    """What values the training side holds, by name of a column: channel, unit, mean, deviation and percentiles; empty where not known."""
    shown = ("mean", "std", *map(str, SHOWN_PERCENTS))
    units = [str(channel.get("unit", "")) for channel in store.attributes["channels"]]
    columns: dict[str, list[str]] = {
        name: [] for name in ("channel", "unit", "mean", "std", *(f"{percent} %" for percent in SHOWN_PERCENTS))
    }
    for channel, unit in zip(_channels(store), units, strict=True):
        values = channel | channel["percentiles"]
        numbers = ["" if values[name] is None else f"{values[name]:.4g}" for name in shown]
        for column, text in zip(columns.values(), (channel["name"], unit or "not said", *numbers), strict=True):
            column.append(text)
    return columns


def tell_values(store: TileStore) -> None:
    """Print what values the training side holds, so that wrong units are seen at once."""
    columns = value_columns(store)
    table("values of the training side", tuple(columns), list(zip(*columns.values(), strict=True)))


def _row(channel: Mapping[str, Any]) -> list[str]:
    def number(name: str) -> str:
        return "" if channel[name] is None else f"{channel[name]:.4g}"

    of_values = map(number, ("mean", "std", "min", "max"))
    return [channel["name"], number("wavelength_nm"), number("resolution_m"), str(channel["tiles"]), *of_values]


def _frame(frame: str) -> str:
    """A frame in a few words: its code, or the name that stands in a WKT."""
    return (frame.split('"')[1] if frame.count('"') > 1 else frame) or "no frame"


def _channels(store: TileStore) -> list[dict[str, Any]]:
    statistics, columns = store.statistics, []
    for place, channel in enumerate(store.attributes["channels"]):
        count = int(statistics.count[place])
        values = {"mean": statistics.mean, "std": statistics.std, "min": statistics.minimum, "max": statistics.maximum}
        columns.append(
            {
                "name": channel["name"],
                "wavelength_nm": channel.get("wavelength_nm"),
                "resolution_m": channel.get("resolution_m"),
                "tiles": int(store.index.present[:, place].sum()),
                "count": count,
                **{name: float(column[place]) if count else None for name, column in values.items()},
                "percentiles": {
                    str(percent): None if np.isnan(value) else float(value)
                    for percent, value in zip(PERCENTS, statistics.percentiles[place], strict=True)
                },
            }
        )
    return columns


def _spacing(store: TileStore) -> dict[str, list[float]]:
    """Least and largest distance between voxels of any axis, by unit."""
    size = len(store.space) + 1
    matrices = store.index.affine.reshape(-1, size, size)[:, :-1, :-1]
    distances = np.linalg.norm(matrices, axis=1).round(9)
    units = {str(unit): distances[store.index.unit == unit] for unit in np.unique(store.index.unit)}
    return {unit: [float(found.min()), float(found.max())] for unit, found in units.items()}
