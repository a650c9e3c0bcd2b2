"""Folders whose every byte is vouched for: a manifest with bytes and SHA-256 of each file, all flushed to disk."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"

Entry = dict[str, Any]
"""Of a file in a manifest: `bytes` and `sha256`."""


def seal(folder: Path) -> None:
    """Write the manifest of a folder (name, bytes, SHA-256 of each file) and flush everything to disk."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != MANIFEST)
    write_manifest(folder, {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files})
    for path in files:
        shutil.copymode(folder / MANIFEST, path)
        with path.open("rb") as stream:
            os.fsync(stream.fileno())


def write_manifest(folder: Path, entries: Mapping[str, Entry]) -> None:
    """Write the manifest of files that are on disk already, and flush it and the folder."""
    write_flushed(folder / MANIFEST, [json.dumps(dict(entries), indent=1, sort_keys=True).encode()])
    sync_folder(folder)


def write_flushed(path: Path, pieces: Iterable[bytes | memoryview]) -> Entry:
    """Write a file and flush it to disk; its entry in a manifest, made of what was meant and not of what a disk gives back."""
    size, digest = 0, hashlib.sha256()
    with path.open("wb") as stream:
        for piece in pieces:
            digest.update(piece)
            stream.write(piece)
            size += len(piece)
        stream.flush()
        os.fsync(stream.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def verify(folder: Path) -> str | None:
    """What is wrong with a sealed folder, or None."""
    try:
        entries = json.loads((folder / MANIFEST).read_text())
        if not entries:
            return f"{MANIFEST} lists nothing"
        for name, entry in entries.items():
            path = folder / name
            if name != path.name:
                return f"{MANIFEST} names {name!r}, which is no file of this folder"
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, {entry['bytes']} were written"
            if sha256(path) != entry["sha256"]:
                return f"{name} fails its SHA-256"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    return None


def advice(error: Exception) -> str:
    """What to do about an error of writing. Safetensors tells the number of a system error in words only."""
    full = (errno.ENOSPC, errno.EDQUOT)
    is_full = getattr(error, "errno", None) in full or any(f"os error {code})" in str(error) for code in full)
    return "free some space" if is_full else "check the folder"


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename survives a power cut.

    Some network file systems flush entries by themselves and answer that a folder is no valid argument; nothing is left to do there.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(handle)
