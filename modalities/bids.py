"""What a BIDS tree says of a scan: patient, session, sequence, modality and acquisition, from names and sidecars; and what stands apart.

Conventions: BIDS 1.10 (file names, inheritance of sidecars, derivatives, .bidsignore). Of a sidecar only `NUMBERS` and `CHOICES` are ever
looked at, never free text; participants.tsv is never read. Names of plain folders are read as `modalities/nifti.py` says.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from modalities.licences import licence_of

DESCRIPTION = "dataset_description.json"
APART = {"derivatives": "derivative", "sourcedata": "source_data", "code": "not_data", "stimuli": "not_data"}
"""Folders of a dataset that hold no scans of its own, with the reason code of what lies in them."""

_AS_SUFFIX = (
    "T1w T2w FLAIR PD PDT2 T2star angio swi FLASH UNIT1 bold cbv dwi adc asl MP2RAGE MEGRE MESE VFA IRT1 MTR MTS MPM "
    "T1map T2map T2starmap PDmap"
)
SEQUENCES = {name: name for name in _AS_SUFFIX.split()} | {
    "PDw": "PD",
    "T2starw": "T2star",
    "inplaneT1": "T1w",
    "inplaneT2": "T2w",
    "ADC": "adc",
}
"""Suffixes of MRI and what we call the channel."""

OTHER_MODALITIES = {"ct": ("CT", "CT"), "CT": ("CT", "CT"), "pet": ("PT", "PET"), "PET": ("PT", "PET")}
"""Suffixes of what is no MRI: modality as DICOM says it, and channel."""

UNUSED = {
    **dict.fromkeys(("phase", "phase1", "phase2", "phasediff", "fieldmap", "epi"), "fieldmap"),
    **dict.fromkeys(("magnitude", "magnitude1", "magnitude2", "TB1TFL", "TB1RFM", "RB1COR", "TB1map", "RB1map"), "fieldmap"),
    **dict.fromkeys(("sbref", "m0scan"), "reference_scan"),
    **dict.fromkeys(("mask", "defacemask", "dseg", "probseg", "lesion", "roi", "label", "seg"), "labels"),
    **dict.fromkeys(("xfm", "warp"), "not_data"),
}
"""Suffixes of volumes that are no image to learn from, with their reason code."""

CODES = frozenset({*APART.values(), *UNUSED.values(), "bidsignore", "phase"})
"""Every reason code that a place or a name gives."""

NUMBERS = {
    "RepetitionTime": "repetition_time_s",
    "EchoTime": "echo_time_s",
    "InversionTime": "inversion_time_s",
    "FlipAngle": "flip_angle_deg",
    "MagneticFieldStrength": "field_strength_t",
}
"""Numeric fields of a sidecar that are looked at, and what we call them."""
CHOICES = {"Modality": frozenset({"MR", "CT", "PT", "CR", "DX", "MG", "US", "NM"})}
MAX_SIDECAR_BYTES = 1 << 24
ONLY_SESSION = "-"
"""Of a patient of BIDS without session labels: all of the patient's scans are one session."""

_ENTITY = re.compile(r"([A-Za-z]+)-([A-Za-z0-9+]+)")
_SUBJECT = re.compile(r"(?i)sub-[A-Za-z0-9+]+")
_SESSION = re.compile(r"(?i)(?:^|[/_])ses-([A-Za-z0-9+]+)")
_NO_AGENT = frozenset({"none", "no", "pre", "native"})


@dataclass(frozen=True)
class BidsName:
    """A file name of BIDS: `sub-01_ses-a_ce-gd_T1w.nii.gz`.

    Attributes:
        entities: Label by key, `sub` and the like.
        suffix: Behind the last underscore, without the extension.
    """

    entities: Mapping[str, str] = field(repr=False)
    suffix: str


@dataclass(frozen=True)
class Identity:
    """What path and sidecars say of a scan.

    Attributes:
        patient, session: As of `Found`; the session is empty where none is told.
        sequence: Channel name; empty where the name tells none.
        modality: As of `Found`.
        flags: `sidecar_broken`.
        acquisition: Numbers of the sidecars, by our names.
        unused: Reason code where it is no image to learn from; else empty.
    """

    patient: str = field(repr=False)
    session: str = field(repr=False)
    sequence: str
    modality: str
    flags: tuple[str, ...]
    acquisition: Mapping[str, float]
    unused: str = ""


def parse(name: str) -> BidsName | None:
    """Entities and suffix of a file name that begins with `sub-`; None for a name of another kind.

    Labels are letters and digits. The order of entities is not asked for: what BIDS fixes for writers is no reason to misread a file.
    """
    *pairs, suffix = name.split(".", 1)[0].split("_")
    found = [_ENTITY.fullmatch(pair) for pair in pairs]
    if not pairs or not suffix.isalnum() or not all(found):
        return None
    entities = {pair[1].lower(): pair[2] for pair in found if pair is not None}
    return BidsName(entities, suffix) if "sub" in entities and len(entities) == len(pairs) else None


class BidsTree:
    """The datasets in a scanned folder.

    A dataset is a folder with a dataset_description.json; a folder with `sub-…` folders of BIDS names and no description is one as far as
    `derivatives/` and the like stand apart in it.
    """

    def __init__(self, files: Iterable[Path], folder: Path, scope: Literal["dataset", "archive"] = "dataset") -> None:
        self._scope = scope
        self._folder = folder
        self._relative = {file: file.relative_to(folder).as_posix() for file in files}
        self._sidecars: dict[Path, tuple[dict[str, Any], bool]] = {}

    @cached_property
    def _described(self) -> dict[str, str]:
        """Digest of the description of each dataset, by its folder."""
        return {
            _parent(relative): hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()
            for file, relative in self._relative.items()
            if file.name == DESCRIPTION
        }

    @cached_property
    def _roots(self) -> frozenset[str]:
        """Folders of datasets, described or not."""
        roots = set(self._described)
        for file, relative in self._relative.items():
            if file.name.startswith("sub-") and parse(file.name):
                parts = relative.split("/")[:-1]
                first = next((place for place, part in enumerate(parts) if _SUBJECT.fullmatch(part)), None)
                if first is not None:
                    roots.add("/".join(parts[:first]))
        return frozenset(roots)

    @cached_property
    def _ignored(self) -> dict[str, list[tuple[bool, re.Pattern[str]]]]:
        """Patterns of each dataset's .bidsignore, in order, with whether they ignore or take back."""
        listed = {root: self._folder / root / ".bidsignore" for root in self._roots}
        return {root: _patterns(file.read_text(errors="replace")) for root, file in listed.items() if file.is_file()}

    @cached_property
    def _jsons(self) -> dict[str, list[tuple[BidsName, Path]]]:
        """Sidecars with BIDS names, or such names without a subject, by folder."""
        found: defaultdict[str, list[tuple[BidsName, Path]]] = defaultdict(list)
        for file, relative in self._relative.items():
            if file.suffix == ".json" and file.name != DESCRIPTION:
                name = parse(file.name) or parse(f"sub-0_{file.name}")
                if name is not None:
                    own = name.entities if file.name.startswith("sub-") else {key: v for key, v in name.entities.items() if key != "sub"}
                    found[_parent(relative)].append((BidsName(own, name.suffix), file))
        return found

    def notes(self) -> tuple[str, ...]:
        """What the user should know of the datasets."""
        if self._scope == "archive":
            return ()
        alike = len(self._described) - len(set(self._described.values()))
        told = f"{alike} BIDS datasets have the {DESCRIPTION} of another one; equal labels in them are taken for one patient"
        return (told,) if alike else ()

    def licences(self) -> tuple[str, ...]:
        """What the descriptions of the datasets, but of those that lie apart in others, state; each once, sorted."""
        roots = [root for root in self._described if not any(part in APART for part in root.split("/"))]
        return tuple(sorted({licence_of(self._folder / root / DESCRIPTION) for root in roots}))

    def apart(self, file: Path, *, derivatives: bool) -> str:
        """Reason code of a file that stands apart in its dataset; empty for one that does not."""
        relative = self._relative[file]
        for root in _ancestors(relative):
            if root not in self._roots:
                continue
            inside = relative[len(root) + 1 :] if root else relative
            code = APART.get(inside.split("/")[0], "") if "/" in inside else ""
            if code and not (derivatives and code == "derivative"):
                return code
            ignored = False
            for ignores, pattern in self._ignored.get(root, ()):
                if pattern.fullmatch(inside):
                    ignored = ignores
            if ignored:
                return "bidsignore"
        return ""

    def identity(self, file: Path) -> Identity | None:
        """What is known of a scan with a BIDS name; None for another name."""
        name = parse(file.name)
        if name is None:
            return None
        fields, broken = self._inherited(file, name)
        agent = name.entities.get("ce", "none").lower() not in _NO_AGENT
        modality, sequence = OTHER_MODALITIES.get(name.suffix, ("MR" if name.suffix in SEQUENCES else "", SEQUENCES.get(name.suffix, "")))
        unused = UNUSED.get(name.suffix, "") or ("phase" if name.entities.get("part", "mag").lower() != "mag" else "")
        if not unused and _parent(self._relative[file]).split("/")[-1] == "fmap":
            unused = "fieldmap"
        return Identity(
            patient=self.patient(file, f"sub-{name.entities['sub']}"),
            session=self.session(file) or ONLY_SESSION,
            sequence="T1ce" if agent and sequence == "T1w" else sequence,
            modality=modality or str(fields.get("Modality", "")),
            flags=("sidecar_broken",) if broken else (),
            acquisition={ours: fields[theirs] for theirs, ours in NUMBERS.items() if theirs in fields},
            unused=unused,
        )

    def patient(self, file: Path, label: str) -> str:
        """A patient's label, told apart by dataset: labels of BIDS mean nothing outside of their dataset.

        The dataset is known by the content of its description: its patients keep their pseudonyms when it is moved or scanned alone.
        Letters count without their case, as on file systems that know none: two patients taken for one cannot leak from training to test.
        """
        label = label.casefold()
        dataset = "" if self._scope == "archive" else self._dataset(self._relative[file])
        return f"{dataset}/{label}" if dataset else label

    def session(self, file: Path) -> str:
        """Label of the session in the path or file name; empty where there is none."""
        found = _SESSION.findall(self._relative[file])
        return found[-1].casefold() if found else ""

    def beside(self, file: Path) -> tuple[Mapping[str, Any], bool]:
        """Fields of the sidecar of the same name, and whether it is broken; of a file with a name of another kind."""
        sidecar = file.with_name(re.sub(r"(?i)\.nii(\.gz)?$", "", file.name) + ".json")
        return self._fields(sidecar) if sidecar in self._relative else ({}, False)

    def _dataset(self, relative: str) -> str:
        """Digest of the dataset that a file's patient belongs to: the innermost, but for one that lies apart in another."""
        described = [root for root in _ancestors(relative) if root in self._described]
        while len(described) > 1 and described[-1][len(described[-2]) :].strip("/").split("/")[0] in APART:
            described.pop()
        return self._described[described[-1]] if described else ""

    def _inherited(self, file: Path, name: BidsName) -> tuple[dict[str, Any], bool]:
        """Fields of all sidecars that speak of a file, the nearest first, and whether one of them is broken."""
        merged: dict[str, Any] = {}
        broken = False
        roots = [root for root in _ancestors(self._relative[file]) if root in self._roots]
        top = roots[-1] if roots else _parent(self._relative[file])
        for folder in _ancestors(self._relative[file]):
            if len(folder) < len(top):
                continue
            fit = [(len(own.entities), path) for own, path in self._jsons.get(folder, ()) if _speaks_of(own, name)]
            for _, path in sorted(fit):
                fields, damaged = self._fields(path)
                merged |= fields
                broken |= damaged
        return merged, broken

    def _fields(self, file: Path) -> tuple[dict[str, Any], bool]:
        if file not in self._sidecars:
            self._sidecars[file] = _read_fields(file)
        return self._sidecars[file]


def _speaks_of(sidecar: BidsName, scan: BidsName) -> bool:
    return sidecar.suffix == scan.suffix and all(scan.entities.get(key) == label for key, label in sidecar.entities.items())


def _read_fields(file: Path) -> tuple[dict[str, Any], bool]:
    """The fields of a sidecar that are looked at, where they are what they should be, and whether the file is broken."""
    try:
        if file.stat().st_size > MAX_SIDECAR_BYTES:
            return {}, True
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}, True
    if not isinstance(content, dict):
        return {}, True
    numbers = {key: float(content[key]) for key in NUMBERS if _is_number(content.get(key))}
    return numbers | {key: content[key] for key, allowed in CHOICES.items() if _is_one_of(content.get(key), allowed)}, False


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def _is_one_of(value: Any, allowed: frozenset[str]) -> bool:
    return isinstance(value, str) and value in allowed


def _parent(relative: str) -> str:
    return relative.rpartition("/")[0]


def _ancestors(relative: str) -> Sequence[str]:
    """Folders that hold a path, the outermost, which is empty, first."""
    return ["" if str(parent) == "." else str(parent) for parent in reversed(PurePosixPath(relative).parents)]


def _patterns(text: str) -> list[tuple[bool, re.Pattern[str]]]:
    """The lines of a .bidsignore, which are as git's: paths of files beneath the dataset that they fit, and whether they ignore them."""
    lines = [line.strip() for line in text.splitlines()]
    return [(not line.startswith("!"), _glob(line.lstrip("!"))) for line in lines if line.strip("!/") and not line.startswith("#")]


def _glob(pattern: str) -> re.Pattern[str]:
    anchored = "/" in pattern.rstrip("/")
    parts = [
        "(?:[^/]+/)*" if part == "**/" else ".*" if part == "**" else "[^/]*" if part == "*" else "[^/]" if part == "?" else re.escape(part)
        for part in re.split(r"(\*\*/|\*\*|\*|\?)", pattern.strip("/"))
    ]
    behind = "/.+" if pattern.endswith("/") else "(?:/.+)?"
    return re.compile(f"{'' if anchored else '(?:[^/]+/)*'}{''.join(parts)}{behind}")
