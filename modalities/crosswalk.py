"""The crosswalk: a table of what pseudonyms stand for, written only where the user asks for it, for her eyes alone."""

from __future__ import annotations

import csv
import io
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from modalities.scene import SceneError
from modalities.whole_file import OWN, written_whole

HEAD = ("pseudonym", "kind", "stands_for")


def write_crosswalk(path: Path, names: Mapping[str, str], away_from: Iterable[Path]) -> int:
    """Writes what each pseudonym stands for to a CSV file that its owner alone can read; the number of its rows.

    A crosswalk that is there already keeps its rows and takes in the new ones, so one file serves several archives.

    Args:
        path: Of the file. A link is never followed, and nothing but an earlier crosswalk is written over.
        names: What each pseudonym stands for.
        away_from: Folders that it may not lie in, because they are handed on: of runs, stores and MLflow.

    Raises:
        SceneError: It may not or cannot be written there; the message names no path.
    """
    place = refuse_place(path, away_from)
    try:
        rows = {**_before(place), **names}
        text = io.StringIO()
        table = csv.writer(text)
        table.writerow(HEAD)
        table.writerows((pseudonym, kind_of(pseudonym), rows[pseudonym]) for pseudonym in sorted(rows))
        with written_whole(place, OWN) as stream:
            stream.write(text.getvalue().encode("utf-8", "surrogateescape"))
    except OSError as error:
        raise SceneError(f"--crosswalk cannot be written: {error.strerror}; choose another place", "crosswalk") from None
    return len(rows)


def refuse_place(path: Path, away_from: Iterable[Path]) -> Path:
    """The place of a crosswalk with all folders on the way to it resolved.

    Raises:
        SceneError: It lies in one of some folders, is a link, or its folder is missing.
    """
    place = path.parent.resolve() / path.name
    if any(place.is_relative_to(folder.resolve()) for folder in away_from):
        raise SceneError(
            "--crosswalk lies in a folder of the run, of a store or of MLflow, which are handed on; choose another place", "crosswalk"
        )
    if place.is_symlink():
        raise SceneError("--crosswalk is a link, which is not followed; give the file itself", "crosswalk")
    if not place.parent.is_dir():
        raise SceneError("the folder of --crosswalk does not exist; make it, with rights for yourself alone", "crosswalk")
    return place


def kind_of(pseudonym: str) -> str:
    """What kind of thing a pseudonym stands for: `scan`, `subject`, `session`, `file`, `label`."""
    return pseudonym.rpartition("-")[0]


def stands_for(files: Sequence[Path], place: str = "") -> str:
    """What a crosswalk says of files: the path of one, or how many there are, where, and what tells them apart there."""
    if len(files) == 1:
        return str(files[0])
    folder = os.path.commonpath([file.parent for file in files]) if files else ""
    return f"{len(files)} files in {folder}: {place}"


def _before(place: Path) -> dict[str, str]:
    """The rows of an earlier crosswalk; none where there is no file."""
    try:
        handle = os.open(place, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return {}
    with os.fdopen(handle, "rb") as stream:
        rows = []
        if stat.S_ISREG(os.fstat(handle).st_mode):
            text = stream.read().decode("utf-8", "surrogateescape")
            rows = [tuple(row) for row in csv.reader(io.StringIO(text, newline=""))]
    if not rows or rows[0] != HEAD or any(len(row) != len(HEAD) for row in rows):
        raise SceneError("--crosswalk is a file that is there already and is no crosswalk; choose another name", "crosswalk")
    return {row[0]: row[2] for row in rows[1:]}
