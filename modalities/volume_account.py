"""What a catalogue of scans holds, sequence by sequence, as a radiologist would ask for it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Rows = Sequence[Mapping[str, Any]]
SHOWN = 3
"""Most of a kind that are told one by one."""


@dataclass(frozen=True)
class SequenceAccount:
    """The accepted scans of one sequence.

    Attributes:
        modality: As DICOM says it; `unknown` where nobody said.
        sequence: Channel name.
        scans, patients, sessions: How many.
        spacing: Least and greatest in mm along the axes, the finest first, and of how many nobody knows it.
        shapes, orientations, dtypes: Each with the number of scans where there are several; ranges of many shapes.
    """

    modality: str
    sequence: str
    scans: int
    patients: int
    sessions: int
    spacing: str
    shapes: str
    orientations: str
    dtypes: str


@dataclass(frozen=True)
class OutcomeAccount:
    """The volumes, or the pictures, that are not used for one reason.

    Attributes:
        status: `rejected` or `ignored`.
        code: The reason in one word.
        kind: `volume` or `picture`.
        scans, files, patients: How many.
        first: Pseudonym of one of them, as a message calls it.
        reason: The reason of that one in words.
    """

    status: str
    code: str
    kind: str
    scans: int
    files: int
    patients: int
    first: str
    reason: str


def by_sequence(rows: Rows) -> tuple[SequenceAccount, ...]:
    """One entry per modality and sequence of the accepted scans, in alphabetical order."""
    groups: defaultdict[tuple[str, str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["status"] == "accepted":
            groups[row["modality"] or "unknown", row["sequence"], row["kind"]].append(row)
    return tuple(
        SequenceAccount(
            modality,
            sequence,
            len(group),
            num_distinct(group, "patient"),
            num_distinct(group, "session"),
            _spacing([sorted(row["spacing_mm"]) for row in group]),
            _shapes([row["shape"] for row in group]),
            _counted(row["orientation"] for row in group),
            _counted(row["dtype"] for row in group),
        )
        for (modality, sequence, _), group in sorted(groups.items())
    )


def by_reason(rows: Rows) -> tuple[OutcomeAccount, ...]:
    """One entry per reason code of the volumes that are not used: the rejected before the ignored, then the most frequent first."""
    groups: defaultdict[tuple[str, str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["status"] != "accepted":
            groups[row["status"], row["code"], row["kind"]].append(row)
    told = [
        OutcomeAccount(
            status,
            code,
            kind,
            len(group),
            sum(row["num_files"] for row in group),
            num_distinct(group, "patient"),
            group[0]["file"],
            group[0]["reason"],
        )
        for (status, code, kind), group in groups.items()
    ]
    return tuple(sorted(told, key=lambda entry: (entry.status != "rejected", -entry.scans, entry.code, entry.kind)))


def flags(rows: Rows) -> dict[str, int]:
    """Accepted scans by what is doubtful about them, the most frequent first."""
    return dict(Counter(flag for row in rows if row["status"] == "accepted" for flag in row["flags"]).most_common())


def num_distinct(rows: Rows, column: str) -> int:
    """How many different names a column holds."""
    return len({row[column] for row in rows if row[column]})


def num_status(rows: Rows, status: str) -> int:
    """How many scans have a status."""
    return sum(row["status"] == status for row in rows)


def counted(number: int, noun: str) -> str:
    """`1 scan`, `2 scans`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _spacing(spacings: Sequence[Sequence[float]]) -> str:
    """Ranges in mm of those that are known."""
    known = [spacing for spacing in spacings if spacing]
    unknown = f"unknown ({len(spacings) - len(known)})" if len(known) < len(spacings) else ""
    return ", ".join(text for text in (f"{_ranges(known)} mm" if known else "", unknown) if text)


def _shapes(shapes: Sequence[Sequence[int]]) -> str:
    """Each shape where they are few, else their ranges."""
    return _ranges(shapes) if len(set(shapes)) > SHOWN else _counted(" × ".join(map(str, shape)) for shape in shapes)


def _ranges(sizes: Sequence[Sequence[float]]) -> str:
    """`0.9 × 0.9 × 1–5`."""
    ends = [(f"{min(column):.4g}", f"{max(column):.4g}") for column in zip(*sizes, strict=True)]
    return " × ".join(low if low == high else f"{low}–{high}" for low, high in ends)


def _counted(texts: Iterable[str]) -> str:
    """Each text with its number where there are several, the most frequent first."""
    counts = Counter(texts).most_common()
    if len(counts) == 1:
        return counts[0][0]
    more = [f"and {len(counts) - SHOWN} more"] if len(counts) > SHOWN else []
    return ", ".join([*(f"{text} ({count})" for text, count in counts[:SHOWN]), *more])
