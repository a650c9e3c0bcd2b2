"""Scans that are there more than once, and patients who are one because their scans are: found by voxel digest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from modalities.medical import Duplicates
from modalities.pseudonyms import Pseudonyms
from modalities.volume import Refused, VolumeScene
from modalities.volume_account import counted
from modalities.volume_checks import Volume
from modalities.xray import XrayScene

Scan = TypeVar("Scan", VolumeScene, XrayScene)


@dataclass(frozen=True)
class Unique:
    """The volumes of an archive after its copies were found.

    Attributes:
        volumes: Those that are used.
        refused: Copies that are not, each with the pseudonym of what is kept instead.
        groups: What a patient is called who shares a scan with others, by the patient's own pseudonym; no other patient is in it.
        notes: Lines to be told.
    """

    volumes: tuple[Volume, ...]
    refused: tuple[Refused, ...]
    groups: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def find_duplicates(volumes: Sequence[Volume], policy: Duplicates, names: Pseudonyms) -> Unique:
    """Which volumes are copies of others, and which patients share one.

    Of copies, that with the fewest doubts about its geometry is kept, and of those the first by place. Patients who share a scan are
    one for every split; they are called by the first of their pseudonyms.
    """
    copies: defaultdict[str, list[Volume]] = defaultdict(list)
    for volume in sorted(volumes, key=lambda volume: (len(volume.flags), volume.found.place)):
        copies[volume.voxel_digest].append(volume)
    several = [found for found in copies.values() if len(found) > 1]
    if not several:
        return Unique(tuple(volumes), ())
    groups = joined([[names.of("subject", volume.found.patient) for volume in found] for found in several])
    refused = [
        Refused(copy.found.source.files, copy.found.place, f"the same voxels as {_scan(first, names)}, which is kept", "duplicate")
        for first, *others in several
        for copy in others
        if policy == "refuse"
    ]
    dropped = {id(copy) for _, *others in several for copy in others if policy == "refuse"}
    kept = tuple(volume for volume in volumes if id(volume) not in dropped)
    return Unique(kept, tuple(refused), groups, _notes(several, groups, policy))


def find_duplicate_pictures(scenes: Sequence[XrayScene], policy: Duplicates) -> tuple[list[XrayScene], dict[str, str], tuple[str, ...]]:
    """Pictures that are used, with patients who share one as one; why others are not, by name; and lines to be told.

    Of copies, one whose pixels have a known size is kept, and of those the first by name.
    """
    copies: defaultdict[str, list[XrayScene]] = defaultdict(list)
    for scene in sorted(scenes, key=lambda scene: (scene.grid.unit != "mm", scene.name)):
        copies[scene.voxel_digests[0]].append(scene)
    several = [found for found in copies.values() if len(found) > 1]
    groups = joined([[scene.group for scene in found] for found in several])
    refused = {copy.name: f"the same pixels as {first.name}, which is kept" for first, *others in several for copy in others}
    refused = refused if policy == "refuse" else {}
    kept = in_groups([scene for scene in scenes if scene.name not in refused], groups)
    return kept, refused, _notes(several, groups, policy) if several else ()


def joined(links: Sequence[Sequence[str]]) -> dict[str, str]:
    """The first name of everything that names are linked with, directly or through others; names that are alone are left out."""
    leader: dict[str, str] = {}

    def first(name: str) -> str:
        while leader.setdefault(name, name) != name:
            leader[name] = leader[leader[name]]
            name = leader[name]
        return name

    for one, *others in links:
        for other in others:
            low, high = sorted((first(one), first(other)))
            leader[high] = low
    members: defaultdict[str, list[str]] = defaultdict(list)
    for name in leader:
        members[first(name)].append(name)
    return {name: group for group, found in members.items() if len(found) > 1 for name in found}


def in_groups(scenes: Sequence[Scan], groups: Mapping[str, str]) -> list[Scan]:
    """The scenes with the patients who are one under one name, and all of their pseudonyms."""
    members = _members(groups)
    return [
        replace(scene, group=group, patients=members.get(group, ())) for scene in scenes for group in [groups.get(scene.group, scene.group)]
    ]


def _members(groups: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """The patients who are called by each name."""
    return {group: tuple(sorted(name for name, leader in groups.items() if leader == group)) for group in sorted(set(groups.values()))}


def _scan(volume: Volume, names: Pseudonyms) -> str:
    return names.of("scan", volume.found.place)


def _notes(several: Sequence[Sequence[object]], groups: Mapping[str, str], policy: Duplicates) -> tuple[str, ...]:
    num_copies = sum(len(found) - 1 for found in several)
    what = {"refuse": "left out (reader.duplicates=refuse)", "keep": "used as well (reader.duplicates=keep)"}[policy]
    copies, are, names = ("1 copy", "is", "another name") if num_copies == 1 else (f"{num_copies} copies", "are", "other names")
    notes = [f"{copies} of {counted(len(several), 'scan')} {are} there under {names} and {are} {what}"]
    for group, members in _members(groups).items():
        notes.append(f"{len(members)} patients share a scan and stay on one side of every split as {group}: {', '.join(members)}")
    return tuple(notes)
