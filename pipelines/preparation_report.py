"""The end of a preparation: the split, the statistics and the manifest, and the account of what became of every tile."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mae_core.histogram import Histogram
from mae_core.store_folder import read_histogram
from mae_core.store_writer import finish, merge_moments, wait_with
from modalities.ground import centres, footprints
from modalities.quality import NO_VALUE, Quality
from modalities.reasons import REASONS
from modalities.scene import Rejected
from pipelines.channel_conflicts import levels_of
from pipelines.frozen_split import digest_of_sides
from pipelines.ground_check import refuse_shared_ground
from pipelines.ground_split import Sided, block_names, leaks, region_names
from pipelines.preparation_extension import OVERLAPS_EARLIER, Growth, earlier_tiles, listed, sides_of_new, too_near_words
from pipelines.preparation_plan import PreparationPlan
from pipelines.preparation_workers import WorkerSettings
from pipelines.shard_task import Record
from pipelines.statements import grown
from pipelines.tiling_plan import Ground, PreparationError, held_out_groups, split_group
from pipelines.value_counts import count_values

UNREADABLE = "scene could not be read"


@dataclass(frozen=True)
class PreparationReport:
    """What became of the scenes and tiles.

    Attributes:
        path: Folder of the store.
        digest: The store's digest: the same for the same content.
        already_done: True if the store was there and nothing was written.
        found: Candidate tiles; equal to accepted + the sum of discarded.
        accepted: Tiles in the store.
        discarded: Tiles thrown away, by reason.
        quarantined: Scenes of which a tile could not be read, with the reason.
        tiles, groups: Tiles and groups on each side of the split: `train`, `val` and, where regions are held out whole, `test`.
        num_bytes: Size of the store on disk.
        seconds: Time that this call took.
        done: Candidate tiles that this call was about; 0 if there was nothing to do.
        added: Scenes that were added to an earlier store.
        gone: Scenes of an earlier store that the data do not have any more; their tiles stay.
        notes: What else to know, such as a channel without any counted training voxel.
    """

    path: Path
    digest: str
    already_done: bool
    found: int
    accepted: int
    discarded: Mapping[str, int]
    quarantined: Mapping[str, str]
    tiles: Mapping[str, int]
    groups: Mapping[str, int]
    num_bytes: int
    seconds: float
    done: int = 0
    added: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def summary(self) -> str:
        """The report in lines for a person."""
        done = "already prepared" if self.already_done else f"prepared in {self.seconds:.1f} s"
        lines = [f"{self.path}: {done}, {self.num_bytes / 2**20:.1f} MiB, digest {self.digest[:12]}"]
        if self.added:
            lines.append(f"  {len(self.added)} scenes added to the earlier store: {listed(self.added)}")
        if self.gone:
            lines.append(f"  {len(self.gone)} scenes of the store are no longer in the data, their tiles stay: {listed(self.gone)}")
        lines.append(f"  {self.found} tiles found, {self.accepted} accepted")
        lines += [f"  {count} thrown away: {reason}" for reason, count in sorted(self.discarded.items())]
        lines += [f"  scene {scene} quarantined: {reason}" for scene, reason in sorted(self.quarantined.items())]
        lines += [f"  {side}: {self.tiles[side]} tiles of {self.groups[side]} groups" for side in self.tiles]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def refuse_failed(plan: PreparationPlan, failed: Mapping[str, str], max_rejected_fraction: float) -> None:
    """Stops when too many scenes have failed.

    Args:
        plan: What is done.
        failed: A reason for each scene that could not be read.
        max_rejected_fraction: Share of the plan's scenes that may.

    Raises:
        PreparationError: There are more. The finished shards are kept.
    """
    if len(failed) > max_rejected_fraction * len(plan.scenes):
        lines = "".join(f"\n  {scene}: {reason}" for scene, reason in sorted(failed.items())[:10])
        raise PreparationError(
            f"{len(failed)} of {len(plan.scenes)} scenes cannot be read, more than prepare.max_rejected_fraction "
            f"{max_rejected_fraction} allows; the store is not finished. Mend or leave out these and run again:{lines}"
        )


def refuse_damaged(rejected: Sequence[Rejected], num_used: int, max_rejected_fraction: float) -> None:
    """Stops when too many files of an archive of scans are damaged, before anything is written.

    What a scan may be without being broken is not counted: a label map, a localiser, a repeat, another modality.

    Args:
        rejected: Files that cannot be used.
        num_used: Files that are used.
        max_rejected_fraction: Share of both that may be damaged.

    Raises:
        PreparationError: There are more.
    """
    damaged = [item for item in rejected if item.code in REASONS and REASONS[item.code].is_damage]
    counts = Counter[str]()
    for item in damaged:
        counts[item.code] += item.num_files
    if counts.total() > max_rejected_fraction * (counts.total() + num_used):
        first = {item.code: item.file for item in reversed(damaged)}
        lines = "".join(
            f"\n  {count} {code} (the first is {first[code]}): {REASONS[code].meaning}; {REASONS[code].remedy}"
            for code, count in counts.most_common(10)
        )
        raise PreparationError(
            f"{counts.total()} of {counts.total() + num_used} files are damaged, more than prepare.max_rejected_fraction "
            f"{max_rejected_fraction} allows; nothing was written. Mend or exclude them, or raise it:{lines}"
        )


def failures(records: Iterable[Record]) -> dict[str, str]:
    """The first reason of each scene that could not be read."""
    failed = [failure for record in records for failure in record["failed"]]
    return {failure["scene"]: failure["reason"] for failure in reversed(failed)}


def finish_store(
    out: Path, plan: PreparationPlan, records: Sequence[Record], started: float, settings: WorkerSettings
) -> PreparationReport:
    """Divides the tiles, measures the training side and writes everything but the shards; the manifest comes last.

    Raises:
        PreparationError: No tile is left, or the tiles cannot be divided. The finished shards are kept.
    """
    failed = Counter(failure["scene"] for record in records for failure in record["failed"])
    rows = [row for record in records for row in record["rows"]]
    discarded = Counter({UNREADABLE: failed.total()} if failed else {})
    for record in records:
        discarded.update(record["discarded"])
    rows, dropped, told = _divide(plan, _with_groups(plan, with_place(rows)), discarded)
    discarded.update(dropped)
    if len(rows) + discarded.total() != len(plan.tiles):
        raise AssertionError(f"tiles were lost: {len(rows)} accepted and {dict(discarded)} thrown away of {len(plan.tiles)}")
    done = len(plan.tiles)
    parts = [row["moments"] for row in rows if row["split"] == "train"]
    shards = {name: entry for record in records for name, entry in record["files"].items()}
    classes = {value for row in rows for value in row["classes"]}
    found = len(plan.tiles)
    if plan.earlier is not None:
        before = plan.earlier.store.manifest
        parts = [plan.earlier.moments(), *parts]
        rows = [*plan.earlier.rows(), *rows]
        shards |= {name: entry for name, entry in before["files"].items() if "/c/" in name}
        classes |= set(plan.earlier.store.attributes["classes"])
        found += before["tiles"]["found"]
        discarded.update(before["tiles"]["discarded"])
        failed_before = before["quarantined"]
    else:
        failed_before = {}
    statistics = merge_moments(parts, len(plan.channels))
    before_counted = None if plan.earlier is None else read_histogram(plan.earlier.store.folders[0])
    uncounted = [row for row in rows if row["split"] == "train" and (before_counted is None or int(row["tile"]) >= plan.tiles[0].tile)]
    histogram = count_values(out, plan.layout.arrays, uncounted, settings)
    if before_counted is not None:
        histogram = Histogram.merged([before_counted, histogram])
    percentiles, waiting = wait_with(out, histogram, len(plan.channels))
    sides = {side: sum(row["split"] == side for row in rows) for side in ("train", "val", "test")}
    sides = {side: count for side, count in sides.items() if count or side != "test"}
    groups = {side: len({row["group"] for row in rows if row["split"] == side}) for side in sides}
    names = [channel.name for channel, count in zip(plan.channels, statistics["count"], strict=True) if not count]
    manifest = finish(
        out,
        plan.layout,
        attributes=_attributes(plan, classes),
        rows=rows,
        statistics=statistics | percentiles,
        shards=shards | waiting,
        manifest={
            "plan": plan.document,
            "plan_digest": plan.digest,
            "tiles": {"found": found, "accepted": len(rows), "discarded": dict(discarded), **sides},
            "groups": groups,
            "split_digest": digest_of_sides((row["group"], row["split"]) for row in rows),
            "quarantined": {**failed_before, **failed},
            "notes": [*told, *(f"channel {name} has no counted voxel in any training tile; its mean is 0 and its std 1" for name in names)],
        },
    )
    report = report_of(out, manifest, seconds=time.monotonic() - started, grown=plan.grown, done=done)
    return replace(report, quarantined={**report.quarantined, **failures(records)})


def report_of(out: Path, manifest: Mapping[str, Any], *, seconds: float, grown: Growth | None = None, done: int = 0) -> PreparationReport:
    """The report that a finished store's manifest gives; of a quarantined scene it knows the number of tiles only."""
    tiles = manifest["tiles"]
    return PreparationReport(
        path=out,
        digest=manifest["store_digest"],
        already_done=not done,
        found=tiles["found"],
        accepted=tiles["accepted"],
        discarded=tiles["discarded"],
        quarantined={scene: f"{count} tiles could not be read" for scene, count in manifest["quarantined"].items()},
        tiles={side: tiles[side] for side in ("train", "val", "test") if side in tiles},
        groups=manifest["groups"],
        num_bytes=sum(entry["bytes"] for entry in manifest["files"].values()),
        seconds=seconds,
        done=done,
        added=() if grown is None else tuple(sorted(grown.new)),
        gone=() if grown is None else grown.gone,
        notes=tuple(manifest["notes"]),
    )


def with_place(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows with `latitude` and `longitude`."""
    places = centres([row["frame"] for row in rows], [row["affine"] for row in rows], [row["extent"] for row in rows])
    return [
        {**row, "latitude": float(latitude), "longitude": float(longitude)} for row, latitude, longitude in zip(rows, *places, strict=True)
    ]


def _with_groups(plan: PreparationPlan, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows with `group`: what is not divided."""
    tiles = {tile.tile: tile for tile in plan.tiles}
    planned = [tiles[row["tile"]] for row in rows]
    groups = [split_group(plan.groups[tile.scene], tile, plan.split) for tile in planned]
    if plan.split.unit == "ground":
        latitude, longitude = (np.array([row[name] for row in rows], np.float64) for name in ("latitude", "longitude"))
        groups = [block or group for block, group in zip(block_names(latitude, longitude, plan.split.block_km), groups, strict=True)]
    return [{**row, "group": group} for row, group in zip(rows, groups, strict=True)]


def _divide(
    plan: PreparationPlan, rows: Sequence[dict[str, Any]], discarded: Mapping[str, int]
) -> tuple[list[dict[str, Any]], Counter[str], list[str]]:
    """The rows that stay, each with `split`, the number of the others by reason, and what is to be told of the division.

    Counted over the tiles that were accepted, so that a corner without data is not all there is to validate on.

    Raises:
        PreparationError: No tile is left, none to train on, a named region holds none, or training tiles come too near to others.
    """
    if not rows and plan.earlier is None:
        reasons = "; ".join(f"{count}: {reason}" for reason, count in sorted(discarded.items()))
        raise PreparationError(
            f"none of {len(plan.tiles)} tiles is left ({reasons}); lower prepare.min_valid_fraction or look at the scenes"
        )
    names = {scene.name: group for scene, group in zip(plan.scenes, plan.groups, strict=True)}
    ground = Ground.of_rows(rows, [names[row["scene"]] for row in rows])
    prints = footprints(ground.frames, ground.affines, ground.extents)
    regions = region_names([row["scene"] for row in rows], prints, plan.split.regions)
    rows = [{**row, "group": f"region {region}"} if region else row for row, region in zip(rows, regions, strict=True)]
    dropped: Counter[str] = Counter()
    if plan.earlier is None or plan.grown is None:
        earlier = None
        if absent := sorted(plan.split.regions.keys() - set(regions)):
            raise PreparationError(
                f"prepare.split.regions.{absent[0]} holds no tile; it is {list(plan.split.regions[absent[0]])}: "
                "[west, south, east, north] in degrees, or globs of scenes' names"
            )
        sizes = Counter(row["group"] for row, region in zip(rows, regions, strict=True) if not region)
        held = plan.sides or dict.fromkeys(held_out_groups(sizes, plan.split), "val")
        sides = ["test" if region else held.get(row["group"], "train") for row, region in zip(rows, regions, strict=True)]
    else:
        earlier = earlier_tiles(plan.earlier, plan.grown)
        rows, sides, dropped = sides_of_new(plan.earlier, plan.grown, rows, plan.split, plan.sides)
        ground = Ground.of_rows(rows, [names[row["scene"]] for row in rows])
        prints = footprints(ground.frames, ground.affines, ground.extents)
    new = Sided(ground, prints, np.array(sides, dtype=object))
    near_held, near_earlier = leaks(new, earlier, plan.split)
    kept = ~near_held & ~near_earlier
    if earlier is None and not (kept & (new.sides == "train")).any():
        raise PreparationError(
            "every training tile overlaps a held-out one, or is nearer to it than prepare.split.buffer_m: make prepare.split.block_tiles "
            "or block_km larger or prepare.tile or the buffer smaller, or set val_fraction=0"
        )
    notes = refuse_shared_ground(new.rows(kept), earlier, plan.split)
    unplaced = {row["scene"] for row, there in zip(rows, prints.placed, strict=True) if not there}
    if plan.split.unit == "ground" and unplaced:
        notes.append(f"{len(unplaced)} scenes lie nowhere on the globe and are held out or trained on whole: {listed(sorted(unplaced))}")
    dropped.update({too_near_words(plan.split): int(near_held.sum()), OVERLAPS_EARLIER: int(near_earlier.sum())})
    return [{**row, "split": side} for row, side, stays in zip(rows, sides, kept, strict=True) if stays], +dropped, notes


def _attributes(plan: PreparationPlan, classes: Collection[int]) -> dict[str, Any]:
    there: Mapping[str, Any] = {} if plan.earlier is None else plan.earlier.store.attributes
    before = there.get("channels", ())
    channels = [
        {**{key: value for key, value in asdict(channel).items() if key not in {"scale", "offset"}}, "levels": levels}
        for channel in plan.channels
        for levels in [levels_of(channel.name, plan.scenes, before)]
    ]
    return {
        "kind": "",
        **plan.attributes,
        **(grown(there, plan.attributes) if there else {}),
        "channels": channels,
        "quality_bits": {flag.name.lower(): int(flag) for flag in Quality if flag.name},
        "no_value": NO_VALUE,
        "classes": sorted(classes),
    }
