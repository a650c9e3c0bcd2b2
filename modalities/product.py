"""What metadata, or a name alone, say about a Sentinel-2 image."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Literal

from modalities.scene import utc

Level = Literal["L1C", "L2A"]

_LEVEL = re.compile(r"(?<![A-Za-z0-9])(?:S2|MSI|S2MSI)?_?(L1C|L2A)(?![A-Za-z0-9])", re.IGNORECASE)
_BASELINE = re.compile(r"_N(\d{2})(\d{2})_")
_TIMES = (
    (re.compile(r"(?<!\d)(20\d{6}T\d{6})(?!\d)"), "%Y%m%dT%H%M%S"),
    (re.compile(r"(?<!\d)(20\d\d-\d\d-\d\d)(?!\d)"), "%Y-%m-%d"),
    (re.compile(r"(?<!\d)(20\d{6})(?![\dT])"), "%Y%m%d"),
)


@dataclass(frozen=True)
class Statement:
    """What is said about one image; empty where nothing is.

    Attributes:
        source: Where it is said, for messages.
        level: `L1C` or `L2A`.
        time: ISO 8601 in UTC; midnight where only the day is known.
        baseline: Processing baseline (`04.00`).
        tile, orbit: MGRS tile and relative orbit.
        scaling: Scale and offset by band: reflectance = stored number · scale + offset. Never derived from a date or a baseline.
        nodata, saturated: Stored numbers that are no measurement.
        documents: Files that it was read from.
    """

    source: str = ""
    level: str = ""
    time: str = ""
    baseline: str = ""
    tile: str = ""
    orbit: int | None = None
    scaling: Mapping[str, tuple[float, float]] = field(default_factory=lambda: MappingProxyType({}))
    nodata: float = 0.0
    saturated: float = 65535.0
    documents: tuple[Path, ...] = ()


def from_names(relative: str) -> Statement:
    """What the name of a file and of the folders that it lies in say; the innermost that says something counts."""
    level = time = baseline = ""
    for part in reversed(PurePosixPath(relative).parts):
        found = _LEVEL.search(part) or re.search(r"_MSI(L1C|L2A)_", part)
        level = level or (found[1].upper() if found else "")
        time = time or _time_in(part)
        numbered = _BASELINE.search(part)
        baseline = baseline or (f"{numbered[1]}.{numbered[2]}" if numbered else "")
    return Statement("its name", level, time, baseline)


def _time_in(part: str) -> str:
    for pattern, form in _TIMES:
        for text in pattern.findall(part):
            try:
                return utc(datetime.strptime(text, form))  # noqa: DTZ007
            except ValueError:
                continue
    return ""
