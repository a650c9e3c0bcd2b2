"""The files of a store, wherever they lie: in a folder, or behind the URL of an object store (through fsspec).

Nothing is opened before it is read and nothing stays open, so that what is here can be pickled and shared by threads and processes.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from mae_core.memory import recycled

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
BLOCK_BYTES = 8 << 20
"""Bytes read at once for a digest."""


@dataclass(frozen=True)
class LocalFiles:
    """Files of a folder."""

    folder: Path

    @property
    def label(self) -> str:
        """What an error calls the place."""
        return str(self.folder)

    def size(self, name: str) -> int | None:
        """Bytes of a file; None if there is no such file."""
        try:
            found = os.stat(f"{self.folder}/{name}")  # noqa: PTH116 - a store has thousands of files, and a Path costs more than the call
        except FileNotFoundError:
            return None
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """Bytes of a file from `start` (from its end if negative), at most `length` of them; all that follow if None.

        The position is given with each read, so that threads do not meet.

        Raises:
            OSError: The file is missing or cannot be read.
        """
        return bytes(self.view(name, start, length))

    def view(self, name: str, start: int = 0, length: int | None = None) -> memoryview:
        """The same bytes in memory that is used again when nobody looks at them any more."""
        handle = os.open(f"{self._real}/{name}", os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        try:
            size = os.fstat(handle).st_size
            start = max(0, size + start) if start < 0 else min(start, size)
            room = recycled(min(size - start, size if length is None else length)).data
            done = 0
            while done < len(room) and (more := os.preadv(handle, [room[done:]], start + done)):
                done += more  # one call gives 2 GiB at most
            return room[:done]
        finally:
            os.close(handle)

    def holds(self, name: str) -> bool:
        """Whether a name, from a manifest that may be forged, stays inside the folder; a link that leads out does not."""
        return os.path.realpath(f"{self.folder}/{name}").startswith(f"{self._real}{os.sep}") and not os.path.isabs(name)  # noqa: PTH117

    @cached_property
    def _real(self) -> str:
        return os.path.realpath(self.folder)


@dataclass(frozen=True)
class RemoteFiles:
    """Files below the URL of an object store.

    Attributes:
        url: With its scheme, such as `s3://bucket/store`; the scheme's library (s3fs, gcsfs, adlfs, …) must be installed. Endpoint and
            credentials come from the library's own configuration (for S3: `AWS_ENDPOINT_URL`, `AWS_PROFILE`, …), never from here.
    """

    url: str

    @property
    def label(self) -> str:
        """The URL, without anything that may be a secret."""
        return re.sub(r"//[^/@]*@", "//", self.url.split("?")[0])

    def size(self, name: str) -> int | None:
        """Bytes of a file; None if there is no such file."""
        system, root = self._place()
        with self._told(name):
            try:
                return int(system.size(f"{root}/{name}"))
            except FileNotFoundError:
                return None

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """As of a folder; a part of a file is asked for as a range of bytes."""
        system, root = self._place()
        end = None if length is None or start < 0 else start + length
        with self._told(name):
            data: bytes = system.cat_file(f"{root}/{name}", start=start or None, end=end)
        return data if length is None else data[:length]

    def view(self, name: str, start: int = 0, length: int | None = None) -> memoryview:
        """As of a folder."""
        return memoryview(self.read(name, start, length))

    def holds(self, name: str) -> bool:
        """Whether a name, from a manifest that may be forged, stays below the URL."""
        return not name.startswith("/") and ".." not in name.split("/") and "\\" not in name and not URL.match(name)

    @contextmanager
    def _told(self, name: str) -> Iterator[None]:
        """Whatever the scheme's library raises (no credentials, no network, a range behind the end) says of what and is an OSError."""
        try:
            yield
        except Exception as error:
            raise OSError(f"{self.label}/{name}: {error or type(error).__name__}") from error

    def _place(self) -> tuple[Any, str]:
        return _opened(self.url, os.getpid())


StoreFiles = LocalFiles | RemoteFiles
"""Where the files of a store are read from."""


@lru_cache(maxsize=16)
def _opened(url: str, process: int) -> tuple[Any, str]:
    """File system and path of a URL; once per process, since connections do not survive a fork."""
    from fsspec.core import url_to_fs

    del process
    try:
        system, root = url_to_fs(url)
    except ImportError as error:
        raise OSError(f"{url.split('://', maxsplit=1)[0]}:// needs a library that is not installed: {error}") from error
    except ValueError as error:
        raise OSError(f"{url}: {error}") from error
    return system, root.rstrip("/")


def files_at(address: Path | str) -> StoreFiles:
    """Files of a folder, or behind a URL if that is what the address is."""
    return RemoteFiles(address.rstrip("/")) if isinstance(address, str) and URL.match(address) else LocalFiles(Path(address))


def digest_of(files: StoreFiles, name: str) -> str:
    """Hex sha256 of a file, read block by block.

    Raises:
        OSError: It cannot be read.
    """
    digest = hashlib.sha256()
    for start in range(0, files.size(name) or 0, BLOCK_BYTES):
        digest.update(files.read(name, start, BLOCK_BYTES))
    return digest.hexdigest()
