"""Which kind of file system a path lies on, and whether it is shared over a network."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import psutil

MOUNTS = Path("/proc/self/mountinfo")
NETWORK: tuple[str, ...] = (
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "smbfs",
    "lustre",
    "gpfs",
    "mmfs",
    "beegfs",
    "fhgfs",
    "ceph",
    "glusterfs",
    "afs",
    "panfs",
)
NETWORK += ("pvfs2", "orangefs", "wekafs", "gfs2", "ocfs2", "quobyte")
"""Kinds that several machines can mount at once, by the names that Linux gives them."""
LOCAL_FUSE = ("fuse.lxcfs", "fuse.fuse-overlayfs", "fuse.ext2")


def kind_of(path: Path) -> str:
    """Kind of the file system that a path lies on or, where there is nothing yet, would lie on; empty where it cannot be told.

    Such as `ext4`, `tmpfs`, `nfs4`, `lustre`, `fuse.sshfs`.
    """
    place = path.resolve()
    while not place.exists():
        place = place.parent
    mounts = mount_points(MOUNTS.read_text().splitlines()) if MOUNTS.is_file() else _partitions()
    best, kind = -1, ""
    for mount, name in mounts:
        if len(mount.parts) >= best and place.is_relative_to(mount):  # a later mount hides an earlier one of the same place
            best, kind = len(mount.parts), name
    return kind


def is_network(kind: str) -> bool:
    """Whether a file system of this kind is shared over a network, where locks of SQLite cannot be trusted."""
    name = kind.lower()
    return name in NETWORK or (name.startswith("fuse.") and name not in LOCAL_FUSE)


def mount_points(lines: Iterable[str]) -> list[tuple[Path, str]]:
    """Where what kind is mounted, in the order of mounting, from the lines of a `mountinfo` of Linux (see proc(5))."""
    found = []
    for line in lines:
        before, _, after = line.partition(" - ")
        place = before.split()[4]
        for code, letter in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
            place = place.replace(code, letter)
        found.append((Path(place), after.split()[0]))
    return found


def _partitions() -> list[tuple[Path, str]]:
    return [(Path(part.mountpoint), part.fstype) for part in psutil.disk_partitions(all=True)]
