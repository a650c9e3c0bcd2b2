"""What a check found: fine, worth knowing, or something that will fail; and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of a check.

    Attributes:
        subject: What was looked at.
        level: `problem`: a run would fail or be spoiled.
        found: What is there.
        advice: What to do; empty where all is well.
    """

    subject: str
    level: Level
    found: str
    advice: str = ""

    @property
    def sentence(self) -> str:
        """The finding in one line."""
        return f"{self.subject}: {self.found}" + (f"; {self.advice}" if self.advice else "")


def fine(subject: str, found: str) -> Finding:
    """All is well."""
    return Finding(subject, "ok", found)


def warning(subject: str, found: str, advice: str) -> Finding:
    """It works, and not as one may think."""
    return Finding(subject, "warning", found, advice)


def problem(subject: str, found: str, advice: str) -> Finding:
    """It would fail."""
    return Finding(subject, "problem", found, advice)


def sentences(findings: Iterable[Finding], level: Level) -> list[str]:
    """The findings of a level, a line each."""
    return [finding.sentence for finding in findings if finding.level == level]


def size(count: float) -> str:
    """Bytes in the unit that fits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
