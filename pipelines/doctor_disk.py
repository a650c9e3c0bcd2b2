"""Whether what a run writes has a place: folder, names, room, kind of file system; and whether the store that it reads is whole."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import time

from mae_core.file_systems import is_network, kind_of
from pipelines.findings import Finding, fine, problem, size, warning

LONGEST_INSIDE = "checkpoints/step-00000000.tmp/optimiser.safetensors"
LEAST_FREE, LEAST_FILES, TRIED_BYTES = 2**30, 10_000, 2**20
FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Trial:
    """What came of writing a file for a moment.

    Attributes:
        error: Why it could not be written; None if it could.
        skew_s: By how much this machine's clock was ahead of the time that the file system gave it.
        locks: Whether it can be locked.
    """

    error: OSError | None = None
    skew_s: float | None = None
    locks: bool = True


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    place = path.absolute()
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    return place


def folder_findings(name: str, path: Path, need_bytes: int = 0, trial: Trial | None = None) -> list[Finding]:
    """Whether a folder can be made or written to; nothing is written here.

    Args:
        name: Of the setting.
        path: Need not exist.
        need_bytes: That will be written.
        trial: What came of a trial, if there was one.
    """
    place = existing(path)
    if found := name_findings(name, path, place):
        return found
    if not place.is_dir():
        return [problem(name, f"{place} is no folder", "choose another place")]
    return [*_writable(name, path, place, trial), *_room(name, place, need_bytes), *_kind(name, place, trial), *_modes(name, path)]


def name_findings(name: str, path: Path, place: Path) -> list[Finding]:
    """Names that a file system would refuse."""
    most = _most(place, "PC_NAME_MAX", 255)
    long = [part for part in path.parts if len(os.fsencode(part)) > most]
    found = [
        problem(
            name, f"a name of {len(os.fsencode(part))} bytes, {part[:20]}…", f"at most {most} bytes are possible; letters can be several"
        )
        for part in long
    ]
    whole, most = len(os.fsencode(path.absolute() / LONGEST_INSIDE)), _most(place, "PC_PATH_MAX", 4096)
    if whole > most and not long:
        found.append(problem(name, f"paths of {whole} bytes", f"at most {most} are possible: choose a shorter one"))
    return found


def try_writing(path: Path) -> Trial:
    """Write, lock and remove a file of a mebibyte in the nearest folder that is there: quotas and squashed users show only so."""
    try:
        with tempfile.NamedTemporaryFile(dir=existing(path), prefix=".terravox-doctor-") as file:
            file.write(os.urandom(TRIED_BYTES))
            file.flush()
            os.fsync(file.fileno())
            skew = time() - os.fstat(file.fileno()).st_mtime
            try:
                fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return Trial(skew_s=skew, locks=False)
            return Trial(skew_s=skew)
    except OSError as error:
        return Trial(error)


def store_finding(store: str) -> Finding:
    """Whether a tile store can be read and is whole, by the sizes of its files."""
    from mae_core.store import StoreError, TileStore

    try:
        opened = TileStore.open(store, "sizes")
    except (StoreError, OSError) as error:
        return problem("store", str(error), "prepare it again, or copy it again from where it is whole")
    return fine("store", f"{len(opened)} tiles, {len(opened.channels)} channels, all files there and of their sizes")


def _writable(name: str, path: Path, place: Path, trial: Trial | None) -> list[Finding]:
    if os.statvfs(place).f_flag & os.ST_RDONLY:
        return [problem(name, f"{place} lies on a file system that is read-only", "choose another place, or mount it for writing")]
    if not os.access(place, os.W_OK | os.X_OK):
        advice = "choose another place, or have it given to you (root, too, may not write where a server squashes it)"
        return [problem(name, f"{place} may not be written to", advice)]
    if trial is not None and trial.error is not None:
        reason = f"{trial.error.strerror or trial.error}"
        return [
            problem(
                name, f"{place}: {reason}", "free some space, or choose another place" if trial.error.errno in FULL else "choose another"
            )
        ]
    return [fine(name, f"{path} can be written to" if path.exists() else f"{path} can be made in {place}")]


def _room(name: str, place: Path, need_bytes: int) -> list[Finding]:
    room, counts = shutil.disk_usage(place), os.statvfs(place)
    if not room.total:  # such as /proc, where nobody may write anyway
        return []
    told = f"{size(room.free)} free" + (f", {size(need_bytes)} needed" if need_bytes else "")
    advice = "free some, choose another place, or keep fewer checkpoints (train.keep_checkpoints)"
    found = fine(f"{name}: room", told)
    if need_bytes > room.free:
        found = problem(f"{name}: room", told, advice)
    elif room.free < LEAST_FREE:
        found = warning(f"{name}: room", told, advice)
    if counts.f_files and counts.f_favail < LEAST_FILES:
        return [
            found,
            warning(f"{name}: files", f"{counts.f_favail} more files are possible", "remove small files, or choose another place"),
        ]
    return [found]


def _kind(name: str, place: Path, trial: Trial | None) -> list[Finding]:
    kind = kind_of(place)
    subject, told = f"{name}: file system", kind or "unknown"
    if kind in ("tmpfs", "ramfs"):
        return [warning(subject, told, "it is memory: gone at the next boot, and counted as used memory")]
    if trial is not None and trial.error is None and not trial.locks:
        return [
            warning(subject, f"{told}, without locks", "two jobs on one run are told apart by signs of life alone, after up to a minute")
        ]
    return [fine(subject, f"{told}, shared over a network: good for checkpoints, not for a database" if is_network(kind) else told)]


def _modes(name: str, path: Path) -> list[Finding]:
    """Whether others may change what is loaded from here later."""
    try:
        found = path.stat()
    except OSError:
        return []
    if found.st_mode & 0o022:
        who = "everybody" if found.st_mode & 0o002 else "its group"
        return [warning(f"{name}: rights", f"{path} may be changed by {who}", f"checkpoints are loaded from there: chmod go-w '{path}'")]
    if hasattr(os, "geteuid") and found.st_uid not in (os.geteuid(), 0):
        return [warning(f"{name}: rights", f"{path} belongs to another user", "go on with it only if you trust them")]
    return []


def _most(place: Path, what: str, usual: int) -> int:
    try:
        return os.pathconf(place, what)
    except (OSError, ValueError):
        return usual
