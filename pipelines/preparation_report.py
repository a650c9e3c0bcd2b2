"""The end of a preparation: the split, the statistics and the manifest, and the account of what became of every tile."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mae_core.store_writer import finish, merge_moments
from modalities.ground import centres
from modalities.quality import NO_VALUE, Quality
from pipelines.preparation_extension import OVERLAPS, Growth, divide_new, listed
from pipelines.preparation_plan import PreparationPlan
from pipelines.shard_task import Record
from pipelines.tiling_plan import Ground, PreparationError, held_out_groups, overlapping, split_group

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
        tiles, groups: Tiles and groups on each side of the split, `train` and `val`.
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
        lines += [f"  {side}: {self.tiles[side]} tiles of {self.groups[side]} groups" for side in ("train", "val")]
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


def failures(records: Iterable[Record]) -> dict[str, str]:
    """The first reason of each scene that could not be read."""
    failed = [failure for record in records for failure in record["failed"]]
    return {failure["scene"]: failure["reason"] for failure in reversed(failed)}


def finish_store(out: Path, plan: PreparationPlan, records: Sequence[Record], started: float) -> PreparationReport:
    """Divides the tiles, measures the training side and writes everything but the shards; the manifest comes last.

    Raises:
        PreparationError: No tile is left, or the tiles cannot be divided. The finished shards are kept.
    """
    failed = Counter(failure["scene"] for record in records for failure in record["failed"])
    rows = [row for record in records for row in record["rows"]]
    discarded = Counter({UNREADABLE: failed.total()} if failed else {})
    for record in records:
        discarded.update(record["discarded"])
    rows = with_place(_with_groups(plan, rows))
    if plan.earlier is None or plan.grown is None:
        rows, dropped = _divide(plan, rows, discarded)
    else:
        rows, dropped = divide_new(plan.earlier, plan.grown, rows, plan.split)
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
    groups = {side: len({row["group"] for row in rows if row["split"] == side}) for side in ("train", "val")}
    sides = {side: sum(row["split"] == side for row in rows) for side in ("train", "val")}
    names = [channel.name for channel, count in zip(plan.channels, statistics["count"], strict=True) if not count]
    manifest = finish(
        out,
        plan.layout,
        attributes=_attributes(plan, classes),
        rows=rows,
        statistics=statistics,
        shards=shards,
        manifest={
            "plan": plan.document,
            "plan_digest": plan.digest,
            "tiles": {"found": found, "accepted": len(rows), "discarded": dict(discarded), **sides},
            "groups": groups,
            "quarantined": {**failed_before, **failed},
            "notes": [f"channel {name} has no counted voxel in any training tile; its mean is 0 and its std 1" for name in names],
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
        tiles={side: tiles[side] for side in ("train", "val")},
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
    """The rows with `group`."""
    tiles = {tile.tile: tile for tile in plan.tiles}
    planned = [tiles[row["tile"]] for row in rows]
    return [{**row, "group": split_group(plan.groups[tile.scene], tile, plan.split)} for row, tile in zip(rows, planned, strict=True)]


def _divide(
    plan: PreparationPlan, rows: Sequence[Mapping[str, Any]], discarded: Mapping[str, int]
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The rows that stay, each with `split`, and the number that a held-out tile pushes out by reason.

    Counted over the tiles that were accepted, so that a corner without data is not all there is to validate on.
    """
    if not rows:
        reasons = "; ".join(f"{count}: {reason}" for reason, count in sorted(discarded.items()))
        raise PreparationError(
            f"none of {len(plan.tiles)} tiles is left ({reasons}); lower prepare.min_valid_fraction or look at the scenes"
        )
    held = held_out_groups(Counter(row["group"] for row in rows), plan.split)
    divided = [{**row, "split": "val" if row["group"] in held else "train"} for row in rows]
    leaks: set[int] = set()
    if plan.split.unit == "block":
        place = {scene.name: group for scene, group in zip(plan.scenes, plan.groups, strict=True)}
        train, val = ([row for row in divided if row["split"] == side] for side in ("train", "val"))
        grounds = [Ground.of_rows(part, [place[row["scene"]] for row in part]) for part in (train, val)]
        leaks = {row["tile"] for row, hit in zip(train, overlapping(*grounds), strict=True) if hit}
    kept = [row for row in divided if row["tile"] not in leaks]
    if not any(row["split"] == "train" for row in kept):
        raise PreparationError(
            "every training tile overlaps a held-out one: make prepare.split.block_tiles larger or prepare.tile smaller, "
            "or set val_fraction=0"
        )
    return kept, {OVERLAPS: len(leaks)} if leaks else {}


def _attributes(plan: PreparationPlan, classes: Collection[int]) -> dict[str, Any]:
    channels = [{key: value for key, value in asdict(channel).items() if key not in {"scale", "offset"}} for channel in plan.channels]
    return {
        "kind": "",
        **plan.attributes,
        "channels": channels,
        "quality_bits": {flag.name.lower(): int(flag) for flag in Quality if flag.name},
        "no_value": NO_VALUE,
        "classes": sorted(classes),
    }
