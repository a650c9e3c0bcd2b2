"""Whether Python and the libraries are what Terravox is made for: within their ranges, and whether as tested."""

from __future__ import annotations

import platform
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from pipelines.findings import Finding, fine, problem

ROOT = Path(__file__).resolve().parents[1]
TRAPS = {
    "mlflow": ("3.18.0", "it pins parts that are not served everywhere and may be half installed"),
}
"""Versions that are known to break, with how."""


def python_finding(wanted: str, found: str) -> Finding:
    """Whether this Python is one that Terravox runs on."""
    if Version(found) in SpecifierSet(wanted):
        return fine("Python", f"{found} (wanted: {wanted})")
    return problem("Python", f"{found} (wanted: {wanted})", "make an environment with a Python within the range")


def library_findings(wanted: Iterable[str], tested: Mapping[str, str], installed: Callable[[str], str | None]) -> list[Finding]:
    """A line for every library that is missing, out of its range or known to break, and one for the others.

    Args:
        wanted: Requirements, such as `numpy>=1.26`.
        tested: Version that was tested, by name.
        installed: Version of a library; None where it is not there.
    """
    found, wrong, others = 0, [], []
    for text in wanted:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name, range_ = requirement.name, str(requirement.specifier)
        there, known = installed(name), tested.get(_plain(name), "")
        repair = f"pip install '{name}{'==' + known if known else range_}'"
        if there is None:
            wrong.append(problem(name, f"not installed (wanted: {range_})", repair))
        elif there == TRAPS.get(_plain(name), ("", ""))[0]:
            wrong.append(problem(name, f"{there}: {TRAPS[_plain(name)][1]}", repair))
        elif not requirement.specifier.contains(there, prereleases=True):
            wrong.append(problem(name, f"{there} (wanted: {range_})", repair))
        else:
            found += 1
            others += [f"{name} {there} (tested: {known})"] if known and _release(there) != _release(known) else []
    told = f"; not the tested versions: {', '.join(others)}" if others else ", all as tested" if tested else ""
    return [*wrong, fine("libraries", f"{found} within their ranges{told}")]


def software_findings() -> list[Finding]:
    """Of this process."""
    file = ROOT / "constraints.txt"
    tested = pinned(file.read_text().splitlines()) if file.is_file() else {}
    wanted_python, wanted = requirements()
    return [python_finding(wanted_python, platform.python_version()), *library_findings(wanted, tested, installed_version)]


def requirements() -> tuple[str, list[str]]:
    """Range of Python and requirements, as they are installed or, in a checkout that is not, as `pyproject.toml` has them."""
    file = ROOT / "pyproject.toml"
    if file.is_file():
        project = tomllib.loads(file.read_text())["project"]
        return str(project["requires-python"]), list(project["dependencies"])
    return str(metadata("terravox")["Requires-Python"]), [text for text in requires("terravox") or [] if "extra ==" not in text]


def pinned(lines: Iterable[str]) -> dict[str, str]:
    """Version by name, from the lines of a file of constraints."""
    found = (re.match(r"([\w.-]+)==([^\s#;]+)", line) for line in lines)
    return {_plain(match[1]): match[2] for match in found if match}


def installed_version(name: str) -> str | None:
    """Version of a distribution; None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _release(text: str) -> tuple[int, ...]:
    """A version without what a build appends to it, such as `+cu130`."""
    return Version(text).release
