"""The table of injected faults: what is injected, what is expected, and which tests show it.

    python -m tests.faults.faults [--file TABLE.md] [--only NUMBER ...]

runs the tests of all faults, the long ones too, and prints the table with what happened. Exit code 1 if a test failed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Fault:
    """One row.

    Attributes:
        number: In the list that a release is judged by.
        injected: What is done to the system.
        expected: What it has to do then.
        tests: `file::function` that show it.
        exception: Why nothing does on this machine; empty where something does.
    """

    number: int
    injected: str
    expected: str
    tests: tuple[str, ...]
    exception: str = ""


def _tests(file: str, *functions: str) -> tuple[str, ...]:
    return tuple(f"tests/{file}.py::test_{name}" for name in functions)


FAULTS: tuple[Fault, ...] = ()


class Outcomes:
    """A plugin that counts how the tests of each function ended."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, int]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a test: failed wherever it failed, else passed or skipped."""
        if report.when == "call" or report.outcome != "passed":
            counts = self.found.setdefault(report.nodeid.partition("[")[0], {})
            counts[report.outcome] = counts.get(report.outcome, 0) + 1

    def of(self, fault: Fault) -> dict[str, int]:
        """How the tests of a fault ended, by outcome."""
        total: dict[str, int] = {}
        for name in fault.tests:
            for outcome, count in self.found.get(name, {"not run": 1}).items():
                total[outcome] = total.get(outcome, 0) + count
        return total


def happened(fault: Fault, counts: dict[str, int]) -> str:
    """What happened, in few words."""
    tests = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items(), key=lambda item: item[0] != "failed"))
    return "; ".join(part for part in (f"as expected ({tests})" if set(counts) == {"passed"} else tests, fault.exception) if part)


def table(faults: Sequence[Fault], outcomes: Outcomes) -> str:
    """The table in Markdown."""
    rows = [f"| {fault.number} | {fault.injected} | {fault.expected} | {happened(fault, outcomes.of(fault))} |" for fault in faults]
    return "\n".join(("| # | injected | expected | what happened |", "|---|---|---|---|", *rows))


def main(argv: Sequence[str] | None = None) -> int:
    """Run them; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, help="where the table goes too")
    parser.add_argument("--only", type=int, nargs="+", default=[], help="numbers of faults (default: all)")
    given = parser.parse_args(argv)
    chosen = [fault for fault in FAULTS if not given.only or fault.number in given.only]
    outcomes = Outcomes()
    names = sorted({name for fault in chosen for name in fault.tests})
    code = pytest.main(["-q", "-m", "", "--rootdir", str(ROOT), *(str(ROOT / name) for name in names)], plugins=[outcomes])
    text = table(chosen, outcomes)
    print(text)
    if given.file is not None:
        given.file.write_text(text + "\n")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
