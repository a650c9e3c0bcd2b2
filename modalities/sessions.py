"""Volumes of one session become scenes: each by itself, or those that lie on one lattice together, with a channel each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import numpy as np

from modalities.grid import Grid
from modalities.medical import VolumeSettings
from modalities.nifti import without_sequence
from modalities.pseudonyms import Pseudonyms
from modalities.volume import Found, Refused, VolumeScene
from modalities.volume_checks import Volume

DATA_TYPES = ("anat", "func", "fmap", "perf", "dwi", "swi")
MOST_KINDS = 6


@dataclass(frozen=True)
class Together:
    """What became of usable volumes: every one is in a scene or refused.

    Attributes:
        scenes: In the order of the volumes.
        refused: Volumes that the settings leave out.
        notes: Lines to be told.
    """

    scenes: tuple[VolumeScene, ...]
    refused: tuple[Refused, ...] = field(default=(), repr=False)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class _Session:
    """The volumes of one session, divided.

    Attributes:
        joined: On one lattice, at most one of each sequence, sorted by it; the largest such set first.
        repeats: On the lattice of one of these, of a sequence that it has already.
    """

    joined: list[list[Volume]]
    repeats: list[Volume]


def put_together(volumes: Sequence[Volume], settings: VolumeSettings, names: Pseudonyms) -> Together:
    """Scenes of volumes, as `sequences`, `other_lattice` and `repeated` of the settings say.

    The order in which the files were found changes nothing but the order of the scenes.
    """
    if settings.sequences == "each":
        return Together(tuple(make_scene([volume], names) for volume in volumes))
    by_session: dict[tuple[str, str], list[Volume]] = {}
    for volume in volumes:
        by_session.setdefault(session_key(volume.found), []).append(volume)
    scenes: list[VolumeScene] = []
    refused: list[Refused] = []
    others = repeats = 0
    for members in by_session.values():
        session = _divided(members)
        others += sum(len(part) for part in session.joined[1:])
        repeats += len(session.repeats)
        refuse_others, refuse_repeats = settings.other_lattice == "refuse", settings.repeated == "refuse"
        kept = session.joined[:1] if refuse_others else session.joined
        kept = kept + ([] if refuse_repeats else [[volume] for volume in session.repeats])
        scenes += [make_scene(part, names) for part in kept]
        if refuse_others:
            refused += [_elsewhere(volume, session.joined[0][0]) for part in session.joined[1:] for volume in part]
        if refuse_repeats:
            refused += [_repeated(volume) for volume in session.repeats]
    return Together(tuple(scenes), tuple(refused), _notes(len(by_session), scenes, (others, repeats), settings))


def session_key(found: Found) -> tuple[str, str]:
    """What names the session that a volume is of: the patient, and the session or, where nothing names it, `session_folder`."""
    return found.patient, found.session or session_folder(found.place)


def session_folder(place: str) -> str:
    """The folder of a relative path, less its parts that name a sequence or a BIDS data type (`anat`)."""
    parts = without_sequence(PurePosixPath(place).parent.as_posix()).split("/")
    return "/".join(part for part in parts if part not in DATA_TYPES)


def make_scene(volumes: Sequence[Volume], names: Pseudonyms) -> VolumeScene:
    """The scene of volumes on one lattice, a channel each.

    Integers stay integers where all are; with a float among them it is float32, exact for whole numbers up to 2²⁴.
    """
    first = volumes[0]
    header, respacing = first.found.source.header, first.respacing
    return VolumeScene(
        name=names.of("scan", *(volume.found.place for volume in volumes)),
        group=names.of("subject", first.found.patient),
        sources=tuple(volume.found.source for volume in volumes),
        readings=tuple(volume.reading for volume in volumes),
        grid=Grid.from_matrix(respacing.target, header.canonical.matrix @ respacing.matrix, "RAS+", "mm"),
        channels=tuple(volume.channel for volume in volumes),
        voxel_digests=tuple(volume.voxel_digest for volume in volumes),
        dtype=_shared_dtype([volume.dtype for volume in volumes]),
        respacing=respacing,
        flags=tuple(dict.fromkeys(flag for volume in volumes for flag in volume.flags)),
        num_not_finite=sum(volume.num_not_finite for volume in volumes),
        foreground_fraction=first.foreground_fraction,
    )


def _divided(members: Sequence[Volume]) -> _Session:
    """The first of each sequence on each lattice together. Sorted by sequence and place, so by nothing that a file system decides."""
    joined: list[list[Volume]] = []
    repeats: list[Volume] = []
    for volume in sorted(members, key=lambda volume: (volume.found.sequence, volume.found.place)):
        header = volume.found.source.header
        home = next((part for part in joined if header.covers(part[0].found.source.header)), None)
        if home is None:
            joined.append([volume])
        elif any(other.found.sequence == volume.found.sequence for other in home):
            repeats.append(volume)
        else:
            home.append(volume)
    joined.sort(key=len, reverse=True)  # a stable sort: of equals, the first by name leads
    return _Session(joined, repeats)


def _shared_dtype(dtypes: Sequence[np.dtype[np.generic]]) -> np.dtype[np.generic]:
    shared = np.result_type(*dtypes)
    return np.dtype(np.float32) if shared.kind == "f" and shared.itemsize > 4 else shared


def _elsewhere(volume: Volume, first: Volume) -> Refused:
    reason = (
        f"lies on another lattice than {first.channel.name} of its session, which has shape {first.found.source.header.space}; register "
        "and resample it to that one, or set reader.other_lattice=separate"
    )
    return Refused(volume.found.source.files, volume.found.place, reason, "not_coregistered")


def _repeated(volume: Volume) -> Refused:
    reason = (
        f"another scan of {volume.channel.name} of its session lies on the same lattice and is used; name them apart "
        "(reader.sequence_names), leave one out with reader.exclude, or set reader.repeated=separate"
    )
    return Refused(volume.found.source.files, volume.found.place, reason, "repeated_sequence")


def _notes(num_sessions: int, scenes: Sequence[VolumeScene], left: tuple[int, int], settings: VolumeSettings) -> tuple[str, ...]:
    if not scenes:
        return ()
    kinds = Counter("+".join(channel.name for channel in scene.channels) for scene in scenes).most_common()
    shown = ", ".join(f"{kind} ({count})" for kind, count in kinds[:MOST_KINDS])
    more = f" and {len(kinds) - MOST_KINDS} more" if len(kinds) > MOST_KINDS else ""
    num_scans = sum(len(scene.channels) for scene in scenes)
    notes = [f"sequences: {num_scans} scans of {num_sessions} sessions in {len(scenes)} scenes: {shown}{more}"]
    ends = {"separate": "scenes of their own", "refuse": "refused"}
    if left[0]:
        notes.append(f"{left[0]} scans lie on another lattice than most of their session: {ends[settings.other_lattice]}")
    if left[1]:
        notes.append(f"{left[1]} scans repeat a sequence of their session on its lattice: {ends[settings.repeated]}")
    return tuple(notes)
