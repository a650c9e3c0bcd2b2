"""Which patients, or places, are on which side, fixed in a file: drawn once, sealed, and the same for every store prepared with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from mae_core.settings import Settings
from mae_core.store import TileIndex, TileStore
from modalities.patients import PSEUDONYM_KEY
from pipelines.preparation_extension import listed
from pipelines.tiling_plan import PreparationError, group_order

Side = Literal["train", "val", "test"]
SIDES: tuple[Side, ...] = ("train", "val", "test")
SETTING = "prepare.split.file"
MAKERS = "`store split` or `catalogue --split`"


class DrawSettings(Settings):
    """How groups are divided."""

    val_fraction: float = Field(0.1, ge=0, lt=1, description="Share that is held out to watch training and to choose by, at least")
    test_fraction: float = Field(0.0, ge=0, lt=1, description="Share that is held out for the last figures, at least; drawn first")
    seed: int = Field(0, description="Draws which groups are held out")

    @model_validator(mode="after")
    def _leave_some(self) -> Self:
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError("val_fraction and test_fraction leave nothing to train on; their sum must lie below 1")
        return self


class Member(Settings):
    """A group of a frozen split, under one of its names: its side, and the digests of the scans that it is known by under any name."""

    side: Side
    scans: tuple[str, ...] = ()


class FrozenSplit(Settings):
    """A split that does not change.

    Attributes:
        format, format_version: Of the file.
        key: Fingerprint of the key that patients' pseudonyms were made with; empty where groups are no patients.
        groups: Side and scans of every group, by name; one that is known by several is there under each, with its scans under the first.
    """

    format: Literal["terravox-split"] = "terravox-split"
    format_version: Literal[1] = 1
    key: str = ""
    groups: dict[str, Member] = Field(min_length=1)

    @property
    def digest(self) -> str:
        """SHA-256 of all that it says."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()

    def document(self) -> dict[str, Any]:
        """What its file holds."""
        return {**self.model_dump(mode="json"), "sha256": self.digest}

    def counts(self) -> dict[str, int]:
        """Names on each side."""
        return {side: sum(member.side == side for member in self.groups.values()) for side in SIDES}

    @property
    def words(self) -> str:
        """For people."""
        sides = ", ".join(f"{count} {side}" for side, count in self.counts().items())
        return f"{len(self.groups)} groups ({sides}), digest {self.digest[:12]}"


@dataclass(frozen=True)
class Group:
    """What is not divided.

    Attributes:
        names: By which it may be known.
        scans: Digests of its scans.
        size: How much of it there is, in tiles or scans.
    """

    names: tuple[str, ...]
    scans: frozenset[str] = frozenset()
    size: int = 1


def freeze(groups: Iterable[Group], settings: DrawSettings, key: str = "") -> FrozenSplit:
    """The split of groups, each on one side, drawn by a hash of seed and name: a group's place in the order does not depend on others.

    Raises:
        PreparationError: There are too few groups for the sides that are asked for.
    """
    found = {group.names[0]: group for group in groups}
    order = group_order(found, settings.seed)
    wanted = 1 + (settings.val_fraction > 0) + (settings.test_fraction > 0)
    if len(order) < wanted:
        raise PreparationError(
            f"{len(order)} groups cannot be on {wanted} sides; give more patients, or set val_fraction or test_fraction to 0"
        )
    total = sum(group.size for group in found.values())
    sides: dict[str, Side] = {}
    for side, fraction in (("test", settings.test_fraction), ("val", settings.val_fraction)):
        wanted -= fraction > 0
        free = [name for name in order if name not in sides]
        before = accumulate((found[name].size for name in free), initial=0)
        held = [name for name, size in zip(free, before, strict=False) if size < fraction * total]
        sides |= dict.fromkeys(held[: len(free) - wanted], side)  # type: ignore[arg-type]
    return _frozen(found.values(), {name: sides.get(name, "train") for name in found}, key)


def _frozen(groups: Iterable[Group], sides: Mapping[str, Side], key: str) -> FrozenSplit:
    """The split of groups whose sides are known by their first names."""
    members: dict[str, Member] = {}
    for group in groups:
        first, *others = group.names
        members |= {name: Member(side=sides[first]) for name in others}
        members[first] = Member(side=sides[first], scans=tuple(sorted(group.scans)))
    return FrozenSplit(key=key, groups=dict(sorted(members.items())))


def frozen_from(store: TileStore, settings: DrawSettings | None) -> FrozenSplit:
    """The split of a store's groups: as they are divided in it, or drawn anew."""
    index = store.index
    scans: dict[str, set[str]] = {}
    sizes: dict[str, int] = {}
    for group, digests in zip(index.group.tolist(), index.voxel_digests.tolist(), strict=True):
        scans.setdefault(group, set()).update(digests)
        sizes[group] = sizes.get(group, 0) + 1
    key = str(store.attributes.get(PSEUDONYM_KEY, ""))
    joined = joined_patients(store)
    groups = [Group(all_names(group, joined.get(group, ())), frozenset(scans[group]), sizes[group]) for group in scans]
    if settings is not None:
        return freeze(groups, settings, key)
    return _frozen(groups, dict(zip(index.group.tolist(), index.split.tolist(), strict=True)), key)


def all_names(group: str, patients: Iterable[str]) -> tuple[str, ...]:
    """A group's name and then those of its patients, each once."""
    return (group, *sorted({*patients} - {group}))


def joined_patients(store: TileStore) -> dict[str, tuple[str, ...]]:
    """The pseudonyms of the patients of every group of a store that is several, because they share a scan.

    Of a store that grew, those that were known when scans of them came in: who brought nothing but a copy later is known by its voxels.
    """
    found: dict[str, set[str]] = {}
    for folder in store.folders:
        for entry in folder.manifest.get("plan", {}).get("scenes", ()):
            found.setdefault(entry["group"], set()).update(entry.get("patients", ()))
    return {group: tuple(sorted(names)) for group, names in found.items() if names}


def refuse_place(path: Path) -> None:
    """Stops where a split cannot be written.

    Raises:
        PreparationError: The name does not end in .json, or the file is there: a frozen split is not overwritten.
    """
    if path.suffix != ".json":
        raise PreparationError("the file of a split must end in .json")
    if path.exists():
        raise PreparationError("there is a file in the place of the split already, and a frozen split is not overwritten; choose another")


def write_split(path: Path, split: FrozenSplit) -> None:
    """Write a split's file, whole or not at all; raises as `refuse_place` does."""
    refuse_place(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(json.dumps(split.document(), indent=1, sort_keys=True) + "\n")
    aside.replace(path)


def read_split(path: Path) -> FrozenSplit:
    """The split in a file.

    Raises:
        PreparationError: It cannot be read, is of another format, or was altered since it was written.
    """
    try:
        content = json.loads(path.read_bytes())
        seal = content.pop("sha256")
        split = FrozenSplit.model_validate(content)
    except OSError as error:
        raise PreparationError(f"{SETTING} cannot be read: {error.strerror}; give a file of {MAKERS}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{error.error_count()} entries do not fit" if isinstance(error, ValidationError) else type(error).__name__
        raise PreparationError(f"{SETTING} is no frozen split of this version ({what}); make one with {MAKERS}") from None
    if seal != split.digest:
        raise PreparationError(f"{SETTING} was altered: its content does not give its sha256; restore it, or freeze anew")
    return split


def sides_of(split: FrozenSplit, groups: Mapping[str, Group], unknown: Literal["refuse", "train"], key: str = "") -> dict[str, Side]:
    """The side of every group, by its name or by its scans.

    Raises:
        PreparationError: The split was made under another key, does not know groups and `unknown` says to refuse them, or has what is
            one group on several sides.
    """
    if split.key != key:
        raise PreparationError(
            f"{SETTING} was frozen under the pseudonyms of {split.key or 'no key'} and these are of {key or 'no key'}; "
            "set TERRAVOX_KEY_FILE to the key that it was made with, or freeze anew"
        )
    scans = {scan: member.side for member in split.groups.values() for scan in member.scans}
    found: dict[str, set[Side]] = {}
    for name, group in groups.items():
        found[name] = {split.groups[known].side for known in (name, *group.names) if known in split.groups}
        found[name] |= {scans[scan] for scan in group.scans if scan in scans}
    torn = sorted(name for name, sides in found.items() if len(sides) > 1)
    if torn:
        raise PreparationError(
            f"{SETTING} has {len(torn)} groups on several sides, because they share a scan with others ({listed(torn)}); freeze anew"
        )
    strange = sorted(name for name, sides in found.items() if not sides)
    if strange and unknown == "refuse":
        raise PreparationError(
            f"{SETTING} does not know {len(strange)} of {len(groups)} groups ({listed(strange)}); freeze anew with them, "
            "or set prepare.split.unknown=train to train on them"
        )
    return {name: next(iter(sides), "train") for name, sides in found.items()}


def split_digest(index: TileIndex) -> str:
    """SHA-256 of which groups of a store are on which side."""
    pairs = sorted(set(zip(index.group.tolist(), index.split.tolist(), strict=True)))
    return digest_of_sides(pairs)


def digest_of_sides(pairs: Iterable[tuple[str, str]]) -> str:
    """SHA-256 of pairs of group and side."""
    return hashlib.sha256(json.dumps(sorted(set(pairs))).encode()).hexdigest()
