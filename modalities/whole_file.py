"""A file that is written whole or not at all: under another name beside its place, which it takes once it is on disk."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

USUAL = 0o666
OWN = 0o600


@contextmanager
def written_whole(path: Path, mode: int = USUAL) -> Iterator[BinaryIO]:
    """A stream into a new file that takes the place of `path` when all went well; else `path` is what it was, and nothing is left over.

    Args:
        path: Where the file goes. A link there is replaced, not followed.
        mode: Who may read it, from its first byte on, less what the user's umask takes away.
    """
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
