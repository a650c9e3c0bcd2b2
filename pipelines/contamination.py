"""What a model was trained on, kept beside its weights, and whether anything held out now was among it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, ValidationError

from mae_core.settings import Settings
from mae_core.store import TileStore
from modalities.licences import NOT_STATED
from modalities.patients import PSEUDONYM_KEY, of_patients
from pipelines.frozen_split import Group, all_names, joined_patients, split_digest
from pipelines.progress import console
from pipelines.run_folder import RunError
from pipelines.statements import Defaced, statements_of

TRAINING_DATA = "training_data.json"
"""Beside the weights of a model; sealed with them."""

BLOCK = " block "
"""Between a patient and a part of it, where patients are divided (`prepare.split.unit=block`)."""

SHOWN = 5


class Sides(Settings):
    """Names on both sides of a split; those of parts of a patient where patients are divided."""

    train: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()


class Source(Settings):
    """One store that a model was trained on.

    Attributes:
        role: What for.
        store, split: Digests of the store and of which patients are on which side.
        key: Fingerprint of the key of the pseudonyms; empty where patients have none, and are not told.
        blocks: How patients are divided in blocks; empty where they are whole.
        patients: Their pseudonyms; all of those who share a scan.
        scans: Voxel digests.
        licences, defaced: Of the data: see `Statements`.
    """

    role: Literal["pretraining", "fine-tuning"]
    store: str
    split: str
    key: str = ""
    blocks: str = ""
    patients: Sides = Sides()
    scans: Sides = Sides()
    licences: tuple[str, ...] = (NOT_STATED,)
    defaced: Defaced = "unknown"


class TrainingData(Settings):
    """All that a model was trained on, the encoder that it began with included.

    Attributes:
        format, format_version: Of the file.
        sources: The stores.
        unknown: What else it was trained on, of which nothing is known.
    """

    format: Literal["terravox-training-data"] = "terravox-training-data"
    format_version: Literal[1] = 1
    sources: tuple[Source, ...] = ()
    unknown: tuple[str, ...] = ()

    def files(self) -> dict[str, bytes]:
        """As a file beside a model."""
        return {TRAINING_DATA: (self.model_dump_json(indent=1) + "\n").encode()}


class SeenSettings(Settings):
    """What is done where held-out patients were among those that the encoder was trained on; part of a verb's settings."""

    split_like_pretraining: bool = Field(
        True,
        description="Scans only: patients that the encoder's pretraining held out are held out first, and those that it was trained on "
        "only where there are no others, so that none is judged on that it has seen; a frozen split (prepare.split.file) goes before",
    )
    allow_seen_patients: bool = Field(
        False,
        description="Go on although held-out patients were in the encoder's training data; recorded in result, tracker and model",
    )


@dataclass(frozen=True)
class Verdict:
    """Whether what is held out was trained on.

    Attributes:
        status: `none` was; `allowed`: some were, and the user went on; `unchecked`: nobody can tell.
        patients: Held-out ones that were trained on.
        num_scans: Scans of theirs that were, by their voxels.
        why: Why it cannot be told, or not wholly.
    """

    status: Literal["none", "allowed", "unchecked"]
    patients: tuple[str, ...] = ()
    num_scans: int = 0
    why: str = ""

    def record(self) -> dict[str, Any]:
        """For `result.json`."""
        return {"status": self.status, "patients": list(self.patients), "scans": self.num_scans, "why": self.why}

    @property
    def words(self) -> str:
        """For a tag."""
        found = f"{self.status}: {len(self.patients)} held-out patients were trained on" if self.patients else self.status
        return f"{found}; {self.why}" if self.why else found


def shows_patients(store: TileStore) -> bool:
    """Whether a store holds scans of patients; places on the ground are told apart by where they lie, not here."""
    return of_patients(store.kind) or any(store.index.voxel_digests.tolist())


def source_of(store: TileStore, role: Literal["pretraining", "fine-tuning"]) -> Source:
    """What a store of scans adds to what a model was trained on. Groups of a store without a key may be names, and are left out."""
    key = str(store.attributes.get(PSEUDONYM_KEY, ""))
    sides: dict[bool, tuple[set[str], set[str]]] = {True: (set(), set()), False: (set(), set())}
    index, joined = store.index, joined_patients(store)
    for group, digests, side in set(zip(index.group.tolist(), index.voxel_digests.tolist(), index.split.tolist(), strict=True)):
        patients, scans = sides[side == "train"]
        patients.update(names_of(group, joined))
        scans.update(scan + _part(group) for scan in digests)
    named, known = (Sides(train=tuple(sorted(sides[True][place])), held_out=tuple(sorted(sides[False][place]))) for place in (0, 1))
    said = statements_of(store)
    return Source(
        role=role,
        store=store.digest,
        split=split_digest(index),
        key=key,
        blocks=blocks_of(store),
        patients=named if key else Sides(),
        scans=known,
        licences=said.licences,
        defaced=said.defaced,
    )


def names_of(group: str, joined: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """A group, or a part of one, under all of its names."""
    patient = group.partition(BLOCK)[0]
    return tuple(name + _part(group) for name in all_names(patient, joined.get(patient, ())))


def blocks_of(store: TileStore) -> str:
    """How a store divides patients: equal for stores whose blocks are the same parts of them; empty where patients are whole."""
    if not any(BLOCK in group for group in set(store.index.group.tolist())):
        return ""
    split = store.folders[0].manifest.get("plan", {}).get("settings", {}).get("split", {})
    return block_words(split.get("block_tiles"), store.space)


def block_words(block_tiles: int | None, tile: Sequence[int]) -> str:
    """How patients are divided in blocks of tiles."""
    return f"{block_tiles} tiles of {'x'.join(map(str, tile))}"


def trained_on(
    before: TrainingData | None, store: TileStore, role: Literal["pretraining", "fine-tuning"], begun: str
) -> TrainingData | None:
    """What a model was trained on that began with another and went on with a store; None for what shows no patients.

    Args:
        before: What the other was trained on, if it is known.
        store: What it went on with.
        role: What for.
        begun: The encoder that it began with, in words; empty where it began with random weights.
    """
    if not shows_patients(store):
        return before
    earlier = before or TrainingData(unknown=(f"{begun} does not say what it was trained on",) if begun else ())
    return earlier.model_copy(update={"sources": (*earlier.sources, source_of(store, role))})


def load_training_data(folder: Path) -> TrainingData | None:
    """What the model in a folder was trained on; None where it does not say, as models of before and published ones.

    Raises:
        RunError: It is of a later version.
    """
    path = folder / TRAINING_DATA
    if not path.is_file():
        return None
    try:
        return TrainingData.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise RunError(f"{TRAINING_DATA} of the model is not of a form that this version reads ({error.error_count()} entries)") from None


def files_of(data: TrainingData | None) -> dict[str, bytes]:
    """The file beside a model, if there is anything to say."""
    return {} if data is None else data.files()


def verdict_facts(verdict: Verdict | None) -> dict[str, Any]:
    """What `result.json` says of a verdict, if there is one."""
    return {} if verdict is None else {"seen_patients": verdict.record()}


@dataclass(frozen=True)
class Exposure:
    """What a model has seen, in names that can be compared with those of a store.

    Attributes:
        data: What it was trained on.
        key: Fingerprint of the key of the pseudonyms now.
        blocks: How patients are divided now.
    """

    data: TrainingData
    key: str
    blocks: str

    def of(self, names: Sequence[str], scans: Iterable[str]) -> tuple[bool, frozenset[str], bool]:
        """Whether a group was trained on under any of its names, those of its scans that were, and whether it was known and held out."""
        by_name, seen, held = False, frozenset[str](), False
        for source in self.data.sources:
            whole = source.blocks != self.blocks

            def plain(names: Iterable[str], whole: bool = whole) -> frozenset[str]:
                return frozenset(name.partition(BLOCK)[0] if whole else name for name in names)

            patient, own = plain(names), plain(scan + _part(names[0]) for scan in scans)
            if self.key and source.key == self.key:
                by_name |= bool(patient & plain(source.patients.train))
                held |= bool(patient & plain(source.patients.held_out))
            seen |= own & plain(source.scans.train)
            held |= bool(own & plain(source.scans.held_out))
        return by_name, seen, held and not by_name and not seen

    @property
    def doubts(self) -> tuple[str, ...]:
        """Why not all of it can be told."""
        foreign = any(not self.key or source.key != self.key for source in self.data.sources)
        words = "patients bear pseudonyms of another key, or none, so only copies of the same scans were looked for"
        return (*self.data.unknown, *((words,) if foreign else ()))


def preferred(data: TrainingData | None, key: str, blocks: str, groups: Mapping[str, Group]) -> dict[str, tuple[str, ...]]:
    """Changes to the settings of a split, so that what an encoder held out is held out first and what it was trained on is not.

    Args:
        data: What the encoder was trained on; nothing is changed where it is not known.
        key, blocks: As of `Exposure`.
        groups: What is not divided, by name.
    """
    if data is None:
        return {}
    exposure = Exposure(data, key, blocks)
    found = {name: exposure.of(group.names, group.scans) for name, group in groups.items()}
    first = tuple(sorted(group for group, (_, _, held) in found.items() if held))
    never = tuple(sorted(group for group, (by_name, seen, _) in found.items() if by_name or seen))
    if never:
        console.print(
            f"{len(never)} of {len(groups)} patients were in the encoder's training data and are trained on again; held out are the "
            f"{len(first)} that its pretraining held out, and others that it does not know (split_like_pretraining)"
        )
    return {"hold_out_first": first, "never_hold_out": never} if first or never else {}


def verdict_on(data: TrainingData | None, store: TileStore, *, allow: bool) -> Verdict | None:
    """Whether anything that a store holds out was trained on; None for a store that shows no patients. Told where it is not simply no.

    Raises:
        RunError: Something was, and it is not allowed.
    """
    if not shows_patients(store):
        return None
    if data is None:
        return _told(Verdict("unchecked", why="the encoder does not say what it was trained on"))
    index, joined = store.index, joined_patients(store)
    scans: dict[str, set[str]] = {}
    for row in np.flatnonzero(index.split != "train").tolist():
        scans.setdefault(index.group[row], set()).update(index.voxel_digests[row])
    exposure = Exposure(data, str(store.attributes.get(PSEUDONYM_KEY, "")), blocks_of(store))
    found = {group: exposure.of(names_of(group, joined), digests) for group, digests in scans.items()}
    patients = tuple(sorted(group for group, (by_name, seen, _) in found.items() if by_name or seen))
    num_scans = len(set().union(*(seen for _, seen, _ in found.values())))
    why = "; ".join(exposure.doubts)
    if not patients:
        return _told(Verdict("unchecked" if why else "none", why=why))
    if not allow:
        more = f" and {len(patients) - SHOWN} more" if len(patients) > SHOWN else ""
        raise RunError(
            f"{len(patients)} of {len(found)} held-out patients were in the encoder's training data ({', '.join(patients[:SHOWN])}{more}; "
            f"{num_scans} of their scans are known by their voxels), so figures on them would tell what it remembers. Hold out others "
            "(split_like_pretraining=true, or a frozen split in prepare.split.file), pretrain without them, or set "
            "allow_seen_patients=true, which is recorded"
        )
    return _told(Verdict("allowed", patients, num_scans, why))


def _told(verdict: Verdict) -> Verdict:
    if verdict.status == "allowed":
        console.print(
            f"[yellow]{len(verdict.patients)} held-out patients were in the encoder's training data[/] and allow_seen_patients is set: "
            "the figures tell what it remembers, too"
        )
    elif verdict.status == "unchecked":
        console.print(f"[yellow]not checked[/] whether held-out patients were in the encoder's training data: {verdict.why}")
    return verdict


def _part(group: str) -> str:
    """What a name of a part of a patient ends in; empty for a whole one."""
    return "".join(group.partition(BLOCK)[1:])
