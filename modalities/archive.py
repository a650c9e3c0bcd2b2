"""Images inside a zip: a path through it (`a.zip/b/c.jp2`) stands for a member, and nothing is unpacked to the disk."""

from __future__ import annotations

import re
import stat
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO

from modalities.scene import SceneError

MAX_MEMBERS = 20_000
MAX_EXPANSION = 200
MIN_BOMB_BYTES = 1 << 28
"""A member, or a whole zip, that says it unpacks to more than 256 MiB and more than 200 times its size is refused: the
images of a product are compressed already, and its texts pack twenty to one."""

UNFIT = re.compile(r'[\\:*?"<>|{}\x00-\x1f]')
"""Characters that no member of a product has; braces would end the name that GDAL is told."""


def split(path: Path) -> tuple[Path, str] | None:
    """The zip and the member that a path speaks of; None for a path of the file system."""
    if ".zip" not in str(path).lower():  # as nearly all, and this is asked of every file many times
        return None
    for parent in path.parents:
        if parent.suffix.lower() == ".zip" and parent.is_file():
            return parent, path.relative_to(parent).as_posix()
    return None


def on_disk(path: Path) -> Path:
    """The file that holds what the path speaks of: the zip, or the path itself."""
    inside = split(path)
    return inside[0] if inside else path


def members(archive: Path) -> list[Path]:
    """Paths through the zip to all of its files.

    Raises:
        SceneError: It is no zip, or not one to be read safely. The message does not name it.
    """
    return [archive / name for name in _listing(archive, *_stamp(archive))]


def size(path: Path) -> int:
    """Bytes of a file, or of a member when it is unpacked."""
    inside = split(path)
    return path.stat().st_size if inside is None else _sizes(*inside)[inside[1]]


@contextmanager
def stream(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, or of a member of a zip.

    Raises:
        OSError: There is no such file or member, or the zip is damaged.
    """
    inside = split(path)
    if inside is None:
        with path.open("rb") as opened:
            yield opened
        return
    _sizes(*inside)
    try:
        with zipfile.ZipFile(inside[0]) as opened_zip, opened_zip.open(inside[1]) as opened_member:
            yield opened_member
    except (zipfile.BadZipFile, EOFError) as error:
        raise OSError(f"the zip is damaged: {error}") from error


def gdal_name(path: Path) -> str:
    """What GDAL is to open: the path, or its own name for a member of a zip whose names were looked through.

    Raises:
        OSError: There is no such member, or the zip is not one to be read safely.
    """
    inside = split(path)
    if inside is None:
        return str(path.absolute())
    archive, member = inside
    _sizes(archive, member)
    outer = str(archive.absolute())
    if UNFIT.search(outer):
        raise OSError(f"the name of the zip has a character that GDAL cannot be told ({UNFIT.pattern}); rename it")
    return f"/vsizip/{{{outer}}}/{member}"


def _sizes(archive: Path, member: str) -> Mapping[str, int]:
    try:
        listing = _listing(archive, *_stamp(archive))
    except SceneError as error:
        raise OSError(str(error)) from error
    if member not in listing:
        raise OSError(f"{archive.name} has no member {member}")
    return listing


def _stamp(archive: Path) -> tuple[int, int]:
    state = archive.stat()
    return state.st_size, state.st_mtime_ns


@lru_cache(maxsize=256)
def _listing(archive: Path, num_bytes: int, _changed_ns: int) -> Mapping[str, int]:
    """Size of every file in the zip, by name."""
    try:
        with zipfile.ZipFile(archive) as opened:
            infos = [info for info in opened.infolist() if not info.is_dir()]
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise SceneError(f"it is no readable zip ({error}); fetch it again") from error
    if len(infos) > MAX_MEMBERS:
        raise SceneError(f"it has {len(infos)} members, more than {MAX_MEMBERS}; unpack what you need of it")
    sizes: dict[str, int] = {}
    for info in infos:
        reason = _unsafe(info)
        if reason or info.filename in sizes:
            raise SceneError(
                f"its member {info.filename[:80]!r} {reason or 'is there twice'}; a product has no such thing, nothing of it is read"
            )
        sizes[info.filename] = info.file_size
    if sum(sizes.values()) > max(MIN_BOMB_BYTES, MAX_EXPANSION * num_bytes):
        total = sum(sizes.values()) / 2**30
        raise SceneError(f"it says that it unpacks to {total:.1f} GiB, more than {MAX_EXPANSION} times its size; nothing of it is read")
    return sizes


def _unsafe(info: zipfile.ZipInfo) -> str:
    name = PurePosixPath(info.filename)
    if name.is_absolute() or ".." in name.parts or UNFIT.search(info.filename):
        return "leads out of it or has a name that no file should have"
    if stat.S_ISLNK(info.external_attr >> 16):
        return "is a link"
    if info.flag_bits & 1:
        return "is encrypted"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"is packed in a way (number {info.compress_type}) that is not read here"
    if info.file_size > max(MIN_BOMB_BYTES, MAX_EXPANSION * info.compress_size):
        return f"says that it unpacks to {info.file_size} bytes from {info.compress_size}"
    return ""
