"""The sheet of a tile store: one page on what was prepared, to look at before anything is trained on it.

Tiles of both sides of the split, what their values are, how much of them counts, where they lie and what was thrown away.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, prod
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter
from numpy.typing import NDArray

from mae_core.figures import plane, render, shown_channels
from mae_core.store import Split, Tile, TileStore
from mae_core.tracking import Tracker

SIDES: tuple[Split, ...] = ("train", "val", "test")
COLOURS = {"train": "#1f5fa8", "val": "#d2691e", "test": "#7a3f98"}
NOTHING = (0.93, 0.55, 0.68)
"""Colour of voxels without a value, so that a hole is not taken for a dark place."""

SHOWN_TILES = 8
"""Pictures per side."""
MAX_READ_TILES, MAX_READ_BYTES, MIN_READ_TILES = 48, 128 << 20, 4
"""Tiles per side that histograms are made of: so many, fewer where these are more than so many bytes, but at least so few."""
VOXELS_PER_TILE = 20_000
MANY_TILES = 30
"""Above this, numbers of tiles are told on a logarithmic axis, so that few bad tiles among many good ones are seen."""
MAX_CHANNELS, MAX_FRAMES, MAX_SCENES = 16, 4, 14
"""Panels of each kind; what is beyond is counted."""


@dataclass(frozen=True)
class Sampled:
    """What was read of one side of the split.

    Attributes:
        rows: Rows of the index, in the order in which they were drawn.
        values: Per channel, physical values of counted voxels.
        shown: Row and tile of the first ones.
    """

    rows: tuple[int, ...]
    values: tuple[NDArray[np.float64], ...]
    shown: tuple[tuple[int, Tile], ...]


def store_sheet(store: TileStore, seed: int = 0) -> NDArray[np.uint8]:
    """The sheet as a picture `(height, width, 3)`, the same for the same store and seed; see `sheet_figure`."""
    return render(sheet_figure(store, seed))


def sheet_figure(store: TileStore, seed: int = 0) -> Figure:
    """The sheet as a figure.

    Args:
        store: An opened store of any number of axes and channels. A bounded number of its tiles is read.
        seed: Draws the tiles that are shown and measured, and the voxels of large ones.
    """
    sampled = {side: _sample(store, store.rows(side), seed) for side in _sides(store)}
    panels = min(len(store.channels), MAX_CHANNELS)
    heights = [0.4 + 2.1 * sum(bool(sampled[side].shown) for side in _sides(store)), 0.35 + 1.55 * ceil(panels / min(panels, 5)), 3.5]
    figure = Figure(figsize=(13, sum(heights) + 0.7), dpi=100, layout="constrained")
    figure.suptitle(_title(store), fontsize=11)
    top, middle, bottom = figure.subfigures(3, 1, squeeze=False, height_ratios=heights)[:, 0]
    _pictures(top, store, sampled)
    _histograms(middle, store, sampled, seed)
    left, right = bottom.subfigures(1, 2, squeeze=False, width_ratios=[1, 1.9])[0]
    _valid_shares(left, store)
    if _is_mapped(store):
        _maps(right, store)
    else:
        _scenes(right, store)
    return figure


def sheet_to(tracker: Tracker, store: TileStore, seed: int = 0) -> None:
    """Logs the sheet of a store as the run's picture `store/sheet`; draws nothing where pictures may not leave the archive."""
    if tracker.images:
        tracker.image("store/sheet", store_sheet(store, seed), 0)


def _title(store: TileStore) -> str:
    found, size = store.manifest["tiles"], "×".join(map(str, store.space))
    dropped = {str(why): int(count) for why, count in found.get("discarded", {}).items()}
    what = f"{_many(len(store), 'tile')} of {size}, {_many(len(store.channels), 'channel')} of {store.dtype}"
    lines = [f"{store.kind or 'store'}: {what}, digest {store.digest[:12]}"]
    thrown = ", ".join(f"{count} {why}" for why, count in sorted(dropped.items())) or "none"
    unread = len(store.manifest.get("quarantined", {}))
    lines.append(f"discarded tiles: {thrown}; scenes that could not be read: {unread}")
    return "\n".join(fill(line, 150) for line in lines)


def _sample(store: TileStore, rows: NDArray[np.int64], seed: int) -> Sampled:
    """Tiles drawn from some rows, each read once and let go unless it is shown."""
    rng = np.random.default_rng(seed)
    bytes_per_tile = prod(store.space) * (len(store.channels) * store.dtype.itemsize + 1)
    number = int(np.clip(MAX_READ_BYTES // bytes_per_tile, MIN_READ_TILES, MAX_READ_TILES))
    drawn = tuple(int(row) for row in rng.permutation(rows)[:number])
    values: list[list[NDArray[np.float64]]] = [[] for _ in store.channels]
    shown: list[tuple[int, Tile]] = []
    for row in drawn:
        tile = store.read(row)
        if len(shown) < SHOWN_TILES:
            shown.append((row, tile))
        inside = tuple(slice(0, size) for size in tile.extent)
        counted = np.flatnonzero(tile.quality[inside] == 0)
        if len(counted) > VOXELS_PER_TILE:
            counted = np.sort(rng.choice(counted, VOXELS_PER_TILE, replace=False))
        for place in np.flatnonzero(tile.present):
            plane = tile.pixels[place][inside].ravel()[counted].astype(np.float64)
            values[place].append(plane * tile.scale[place] + tile.offset[place])
    return Sampled(drawn, tuple(np.concatenate(parts) if parts else np.empty(0) for parts in values), tuple(shown))


def _sides(store: TileStore) -> list[Split]:
    """The sides of the split; `test` where regions are held out whole."""
    return [side for side in SIDES if side != "test" or len(store.rows(side))]


def _pictures(figure: SubFigure, store: TileStore, sampled: Mapping[Split, Sampled]) -> None:
    """A row per side; every picture is stretched between the 1st and 99th percentile of its counted values, which are told."""
    sides = [side for side in _sides(store) if sampled[side].shown]
    none = "".join(f"; no {side} tiles" for side in _sides(store) if side not in sides)
    which = "date" if _is_series(store) else "plane across the last axis"
    plane = f"; of each the {which} that holds most of them" if len(store.space) == 3 else ""
    figure.suptitle(f"tiles, each stretched to the 1st–99th percentile of its counted values{plane}; pink: no value{none}", fontsize=9)
    for places, side in zip(figure.subplots(len(sides), SHOWN_TILES, squeeze=False), sides, strict=True):
        shown = sampled[side].shown
        for number, place in enumerate(places):
            place.set_xticks([])
            place.set_yticks([])
            for edge in place.spines.values():
                edge.set(color=COLOURS[side], linewidth=1.6, visible=number < len(shown))
            if number < len(shown):
                row, tile = shown[number]
                picture, low, high, names = _picture(store, tile)
                place.imshow(picture, interpolation="nearest", aspect="auto" if len(store.space) == 1 else "equal")
                place.set_title(f"{side} {tile.tile}: {_short(str(store.index.scene[row]), 15)}", fontsize=6.5, color=COLOURS[side])
                place.set_xlabel(f"{names}\n{_number(low)} … {_number(high)}", fontsize=6.5)


def _picture(store: TileStore, tile: Tile) -> tuple[NDArray[np.float64], float, float, str]:
    """`(row, column, 3)` of a tile without its padding, the physical values that are black and white in it, and its channels."""
    chosen = shown_channels(store.channels, tile.present.tolist())
    names = [store.channels[place] for place in chosen]
    axes = tuple(store.attributes.get("axes", ()))
    inside = tuple(slice(0, size) for size in tile.extent)
    if _is_series(store):
        inside = (_fullest_plane(np.moveaxis(tile.quality[inside], 0, -1)), *inside[1:])
    elif len(tile.extent) == 3:
        inside = (*inside[:2], _fullest_plane(tile.quality[inside]))
    by_channel = (-1, *(1 for _ in tile.extent))
    values = tile.pixels[chosen][(slice(None), *inside)] * tile.scale[chosen].reshape(by_channel) + tile.offset[chosen].reshape(by_channel)
    image = plane(values.astype(np.float32), axes).astype(np.float64)
    quality = plane(tile.quality[inside].astype(np.float32)[None], axes)[..., 0].astype(np.uint8)
    nothing, seen = (quality & store.no_value) != 0, image[quality == 0]
    low, high = (float(end) for end in np.percentile(seen, [1, 99])) if len(seen) else (0.0, 1.0)
    grey = np.clip((image - low) / max(high - low, 1e-12), 0, 1)
    picture = np.broadcast_to(grey, (*grey.shape[:2], 3)).copy()
    picture[nothing] = NOTHING
    return picture, low, high, "/".join(names)


def _is_series(store: TileStore) -> bool:
    return len(store.space) == 3 and tuple(store.attributes.get("axes", ()))[:1] == ("time",)


def _fullest_plane(quality: NDArray[np.uint8]) -> slice:
    """The place on the last axis where most voxels count, near the middle where several are alike: a corner of a head holds mostly air."""
    counted = (quality == 0).sum(axis=(0, 1))
    from_middle = np.abs(np.arange(len(counted)) - len(counted) // 2)
    best = int(np.lexsort((from_middle, -counted))[0])
    return slice(best, best + 1)


def _histograms(figure: SubFigure, store: TileStore, sampled: Mapping[Split, Sampled], seed: int) -> None:
    """A panel per channel: share of counted voxels by physical value, with mean ± std of the whole training side."""
    used = ", ".join(f"{len(sampled[side].rows)} of {len(store.rows(side))} {side} tiles" for side in _sides(store))
    voxels = max((sum(len(sampled[side].values[place]) for side in _sides(store)) for place in range(len(store.channels))), default=0)
    more = len(store.channels) - MAX_CHANNELS
    figure.suptitle(
        f"physical values (stored · scale + offset) of counted voxels of {used}, drawn with seed {seed}: at most {voxels:,} a channel; "
        "grey: mean ± std of all training tiles" + (f"; {more} more channels are not shown" if more > 0 else ""),
        fontsize=9,
    )
    panels = min(len(store.channels), MAX_CHANNELS)
    columns = min(panels, 5)
    places = figure.subplots(ceil(panels / columns), columns, squeeze=False).ravel()
    for place in places[panels:]:
        place.set_axis_off()
    for number, place in enumerate(places[:panels]):
        place.set_title(_channel_name(store.attributes["channels"][number]), fontsize=8, pad=2)
        place.tick_params(labelsize=6.5, length=2)
        place.set_yticks([])
        both = np.concatenate([sampled[side].values[number] for side in _sides(store)])
        if not len(both):
            place.text(0.5, 0.5, "no counted voxel\nin these tiles", ha="center", va="center", fontsize=8, transform=place.transAxes)
            place.set_xticks([])
            continue
        edges = _edges(both)
        for side in _sides(store):
            values = np.clip(sampled[side].values[number], edges[0], edges[-1])
            if len(values):
                shares = np.histogram(values, edges)[0] / len(values)
                place.stairs(shares, edges, color=COLOURS[side], fill=side == "train", alpha=0.55 if side == "train" else 1.0, label=side)
        if store.statistics.count[number]:
            mean, std = store.statistics.mean[number], store.statistics.std[number]
            place.axvspan(mean - std, mean + std, color="0.5", alpha=0.15, linewidth=0)
            place.axvline(mean, color="0.3", linewidth=0.8)
        place.set_xlim(edges[0], edges[-1])
        if number == 0:
            place.legend(fontsize=6.5, frameon=False)


def _edges(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Edges of bins from the 0.1st to the 99.9th percentile; whole numbers of few steps get a bin each."""
    low, high = np.percentile(values, [0.1, 99.9])
    if high <= low:
        low, high = low - 0.5, high + 0.5
    return np.linspace(low, high, min(60, max(8, len(np.unique(values)))) + 1)


def _valid_shares(figure: SubFigure, store: TileStore) -> None:
    """How much of the tiles counts, both sides in one panel."""
    place = figure.subplots()
    shares = [store.index.valid_fraction[store.rows(side)] for side in _sides(store)]
    edges = np.linspace(0, 1, 21)
    place.hist(shares, bins=list(edges), color=[COLOURS[side] for side in _sides(store)], label=_sides(store))
    place.set_xlim(0, 1)
    if max(np.histogram(part, edges)[0].max() for part in shares) > MANY_TILES:
        place.set_yscale("log")
        place.set_ylim(bottom=0.5)
        place.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        place.yaxis.set_minor_formatter("")
    else:
        place.yaxis.set_major_locator(MaxNLocator(integer=True))
    place.set_xlabel("share of voxels that count", fontsize=8)
    place.set_ylabel("tiles", fontsize=8)
    place.tick_params(labelsize=7)
    groups = {side: len(np.unique(store.index.group[store.rows(side)])) for side in _sides(store)}
    sides = ", ".join(f"{side} {_many(len(store.rows(side)), 'tile')} of {_many(groups[side], 'group')}" for side in _sides(store))
    place.set_title(
        f"{sides}\ncounted: {store.index.valid_fraction.mean():.1%} in the mean, least {store.index.valid_fraction.min():.1%}", fontsize=9
    )
    place.legend(fontsize=7, frameon=False, loc="upper left")


def _is_mapped(store: TileStore) -> bool:
    """Whether there is a map to draw: images with a frame. Volumes lie each in a space of its own."""
    return len(store.space) == 2 and bool(set(np.unique(store.index.frame)) - {"", "RAS+"})


def _maps(figure: SubFigure, store: TileStore) -> None:
    """Where tiles lie, a panel per frame of world coordinates."""
    index = store.index
    counts = Counter(str(frame) for frame in index.frame)
    unplaced = counts.pop("", 0)
    largest = [frame for frame, _ in counts.most_common(MAX_FRAMES)]
    more = len(counts) - len(largest)
    beyond = sum(counts.values()) - sum(counts[frame] for frame in largest)
    rest = [f"{_many(more, 'more frame')} with {_many(beyond, 'tile')}"] * (more > 0)
    rest += [f"{_many(unplaced, 'tile')} without a place"] * (unplaced > 0)
    figure.suptitle("tile outlines in world coordinates" + (f"; not shown: {', '.join(rest)}" if rest else ""), fontsize=9)
    columns = min(2, len(largest)) if len(largest) != 3 else 3
    places = figure.subplots(ceil(len(largest) / columns), columns, squeeze=False).ravel()
    for frame, place in zip(largest, places, strict=False):
        for side in _sides(store):
            rows = np.flatnonzero((index.frame == frame) & (index.split == side))
            if len(rows):
                corners = tile_outlines(index.affine[rows], index.extent[rows])
                centres = corners.mean(axis=1)
                place.fill(*(corners[..., axis].T for axis in (0, 1)), color=COLOURS[side], alpha=0.35, linewidth=0.5)
                place.plot(*centres.T, "." if side == "train" else "x", color=COLOURS[side], markersize=4, label=side)
        unit = str(index.unit[np.flatnonzero(index.frame == frame)[0]])
        place.set_title(
            f"{frame_name(frame)}: {_many(counts[frame], 'tile')} of {_many(_num_scenes(store, frame), 'scene')} ({unit})", fontsize=8
        )
        place.set_aspect("equal", adjustable="datalim")
        place.tick_params(labelsize=6)
        place.ticklabel_format(useOffset=False, style="plain")
        place.locator_params(nbins=4)
        place.legend(fontsize=6.5, frameon=False)


def tile_outlines(affine: NDArray[np.float64], extent: NDArray[np.int64]) -> NDArray[np.float64]:
    """World coordinates `(tile, 4, 2)` of the corners of images, from matrices of pixel centres as the index holds them."""
    corners = np.array([[0, 0], [0, 1], [1, 1], [1, 0]])[None] * extent[:, None] - 0.5
    matrices = affine.reshape(-1, 3, 3)
    outlines: NDArray[np.float64] = np.einsum("tij,tcj->tci", matrices[:, :2, :2], corners) + matrices[:, None, :2, 2]
    return outlines


def frame_name(frame: str) -> str:
    """A frame in a few words: an authority's code, or the name that stands in a WKT."""
    return _short(frame.split('"')[1] if frame.count('"') > 1 else frame, 32)


def _num_scenes(store: TileStore, frame: str) -> int:
    return len(np.unique(store.index.scene[store.index.frame == frame]))


def _scenes(figure: SubFigure, store: TileStore) -> None:
    """Tiles by scene, the largest first; names as the store has them, which are pseudonyms where names are not to be told."""
    counts = {side: Counter(str(scene) for scene in store.index.scene[store.rows(side)]) for side in _sides(store)}
    total = sum(counts.values(), Counter())
    largest = sorted(total, key=lambda scene: (-total[scene], scene))[:MAX_SCENES]
    rest = [total[scene] for scene in total if scene not in largest]
    span = dict.fromkeys((min(rest), max(rest))) if rest else ()
    more = f"; not shown: {len(rest)} more with {' to '.join(map(str, span))} tiles each" if rest else ""
    place = figure.subplots()
    place.set_title(f"tiles by scene, {_many(len(total), 'scene')}{more}", fontsize=9)
    begin = np.zeros(len(largest))
    for side in _sides(store):
        width = np.array([counts[side][scene] for scene in largest], dtype=float)
        place.barh(range(len(largest)), width, left=begin, color=COLOURS[side], label=side)
        begin += width
    place.set_yticks(range(len(largest)), [_short(scene, 34) for scene in largest], fontsize=6.5)
    place.tick_params(axis="x", labelsize=7)
    place.set_ylim(max(len(largest), 8) - 0.4, -0.6)
    place.set_xlim(0, 1.15 * begin.max())
    place.xaxis.set_major_locator(MaxNLocator(integer=True))
    place.set_xlabel("tiles", fontsize=8)
    place.legend(fontsize=7, frameon=False, loc="center right")


def _channel_name(channel: Mapping[str, Any]) -> str:
    wavelength = channel.get("wavelength_nm")
    return f"{channel['name']} ({wavelength:g} nm)" if wavelength is not None else str(channel["name"])


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _many(number: int, what: str) -> str:
    return f"{number:,} {what}" + "s" * (number != 1)


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length // 3]}…{text[len(text) - length + length // 3 + 1 :]}"
