"""The end of a preparation: the split, the statistics and the manifest, and the account of what became of every tile."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mae_core.store_writer import finish, merge_moments
from modalities.quality import NO_VALUE, Quality
from pipelines.preparation_plan import PreparationPlan
from pipelines.shard_task import Record
from pipelines.tiling_plan import PreparationError, held_out_groups, overlapping, split_group

OVERLAPS = "overlaps a held-out tile"
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
    notes: tuple[str, ...] = field(default=())

    def summary(self) -> str:
        """The report in lines for a person."""
        done = "already prepared" if self.already_done else f"prepared in {self.seconds:.1f} s"
        lines = [f"{self.path}: {done}, {self.num_bytes / 2**20:.1f} MiB, digest {self.digest[:12]}"]
        lines.append(f"  {self.found} tiles found, {self.accepted} accepted")
        lines += [f"  {count} thrown away: {reason}" for reason, count in sorted(self.discarded.items())]
        lines += [f"  scene {scene} quarantined: {reason}" for scene, reason in sorted(self.quarantined.items())]
        lines += [f"  {side}: {self.tiles[side]} tiles of {self.groups[side]} groups" for side in ("train", "val")]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def finish_store(
    out: Path, plan: PreparationPlan, records: Sequence[Record], max_rejected_fraction: float, started: float
) -> PreparationReport:
    """Divides the tiles, measures the training side and writes everything but the shards; the manifest comes last.

    Raises:
        PreparationError: Too many scenes failed, no tile is left, or the tiles cannot be divided. The finished shards are kept.
    """
    failed = [failure for record in records for failure in record["failed"]]
    quarantined = {failure["scene"]: failure["reason"] for failure in reversed(failed)}
    if len(quarantined) > max_rejected_fraction * len(plan.scenes):
        lines = "".join(f"\n  {scene}: {reason}" for scene, reason in sorted(quarantined.items())[:10])
        raise PreparationError(
            f"{len(quarantined)} of {len(plan.scenes)} scenes cannot be read, more than prepare.max_rejected_fraction "
            f"{max_rejected_fraction} allows; the store is not finished. Mend or leave out these and run again:{lines}"
        )
    rows = [row for record in records for row in record["rows"]]
    discarded = Counter({UNREADABLE: len(failed)} if failed else {})
    for record in records:
        discarded.update(record["discarded"])
    rows, leaks = _divide(plan, rows, discarded)
    discarded.update({OVERLAPS: leaks} if leaks else {})
    statistics = merge_moments([row["moments"] for row in rows if row["split"] == "train"], len(plan.channels))
    groups = {side: len({row["group"] for row in rows if row["split"] == side}) for side in ("train", "val")}
    sides = {side: sum(row["split"] == side for row in rows) for side in ("train", "val")}
    if len(rows) + sum(discarded.values()) != len(plan.tiles):
        raise AssertionError(f"tiles were lost: {len(rows)} accepted and {dict(discarded)} thrown away of {len(plan.tiles)}")
    names = [channel.name for channel, count in zip(plan.channels, statistics["count"], strict=True) if not count]
    manifest = finish(
        out,
        plan.layout,
        attributes=_attributes(plan, rows),
        rows=rows,
        statistics=statistics,
        shards={name: entry for record in records for name, entry in record["files"].items()},
        manifest={
            "plan": plan.document,
            "plan_digest": plan.digest,
            "tiles": {"found": len(plan.tiles), "accepted": len(rows), "discarded": dict(discarded), **sides},
            "groups": groups,
            "quarantined": dict(Counter(failure["scene"] for failure in failed)),
            "notes": [f"channel {name} has no counted voxel in any training tile; its mean is 0 and its std 1" for name in names],
        },
    )
    report = report_of(out, manifest, already_done=False, seconds=time.monotonic() - started)
    return PreparationReport(**{**vars(report), "quarantined": quarantined})


def report_of(out: Path, manifest: Mapping[str, Any], *, already_done: bool, seconds: float) -> PreparationReport:
    """The report that a finished store's manifest gives; of a quarantined scene it knows the number of tiles only."""
    tiles = manifest["tiles"]
    return PreparationReport(
        path=out,
        digest=manifest["store_digest"],
        already_done=already_done,
        found=tiles["found"],
        accepted=tiles["accepted"],
        discarded=tiles["discarded"],
        quarantined={scene: f"{count} tiles could not be read" for scene, count in manifest["quarantined"].items()},
        tiles={side: tiles[side] for side in ("train", "val")},
        groups=manifest["groups"],
        num_bytes=sum(entry["bytes"] for entry in manifest["files"].values()),
        seconds=seconds,
        notes=tuple(manifest["notes"]),
    )


def _divide(plan: PreparationPlan, rows: list[dict[str, Any]], discarded: Mapping[str, int]) -> tuple[list[dict[str, Any]], int]:
    """The rows that stay, each with `group` and `split`, and the number that a held-out tile pushes out.

    Counted over the tiles that were accepted, so that a corner without data is not all there is to validate on.
    """
    if not rows:
        reasons = "; ".join(f"{count}: {reason}" for reason, count in sorted(discarded.items()))
        raise PreparationError(
            f"none of {len(plan.tiles)} tiles is left ({reasons}); lower prepare.min_valid_fraction or look at the scenes"
        )
    tiles = {tile.tile: tile for tile in plan.tiles}
    groups = [split_group(plan.scenes[tiles[row["tile"]].scene], tiles[row["tile"]], plan.split) for row in rows]
    held = held_out_groups(Counter(groups), plan.split)
    rows = [{**row, "group": group, "split": "val" if group in held else "train"} for row, group in zip(rows, groups, strict=True)]
    leaks: set[int] = set()
    if plan.split.unit == "block":
        sides = {side: [tiles[row["tile"]] for row in rows if row["split"] == side] for side in ("train", "val")}
        leaks = overlapping(plan.scenes, sides["train"], sides["val"])
    kept = [row for row in rows if row["tile"] not in leaks]
    train = {row["group"] for row in kept if row["split"] == "train"}
    both = train & {row["group"] for row in kept if row["split"] == "val"}
    if both:
        raise AssertionError(f"groups on both sides of the split: {sorted(both)[:3]}")
    if not train:
        raise PreparationError(
            "every training tile overlaps a held-out one: make prepare.split.block_tiles larger or prepare.tile smaller, "
            "or set val_fraction=0"
        )
    return kept, len(leaks)


def _attributes(plan: PreparationPlan, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    channels = [{key: value for key, value in asdict(channel).items() if key not in {"scale", "offset"}} for channel in plan.channels]
    return {
        "kind": "",
        **plan.attributes,
        "channels": channels,
        "quality_bits": {flag.name.lower(): int(flag) for flag in Quality if flag.name},
        "no_value": NO_VALUE,
        "classes": sorted({value for row in rows for value in row["classes"]}),
    }
