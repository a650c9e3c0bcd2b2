"""Identifiers that are planted into an archive, and a search for them in every byte of what was written, whatever it is packed in."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import logging
import multiprocessing
import re
import sqlite3
import zipfile
import zlib
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import NoReturn
from urllib.parse import quote

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mae_core.store import TileStore
from modalities.grid import Window
from modalities.volume import VolumeScene

IDENTIFIERS = {
    "patient name": "Quixpatrick",
    "patient id": "PIDX7741902",
    "birth date": "19410717",
    "accession number": "ACCZ55310087",
    "study uid": "1.2.826.0.1.3680043.9.7133.55901",
    "series uid": "1.2.826.0.1.3680043.9.7133.77213",
    "institution": "Zollerhospital",
    "physician": "Drvonkessel",
    "study description": "queryglioblast",
    "comment": "calledhiswife",
    "folder": "wardseventeen",
    "file": "bedforty2",
    "label file": "drawnbyolga",
    "free text of a header": "scannedforjudy",
    "name of a database": "dbnapoleon",
    "extension": "extensionofluke",
    "sidecar": "operatormarlene",
    "archive": "archiveofstvitus",
}
"""What must be found nowhere, by what it is; each is written nowhere else."""


def fail_over(file: Path) -> NoReturn:
    """A bug, and a library, that talk of a file while it is read."""
    logging.getLogger("nibabel.global").error("%s is odd", file)
    cause = OSError(5, "Input/output error", str(file))
    raise RuntimeError(f"{file} of {IDENTIFIERS['patient name']}") from cause


class QuotingScene(VolumeScene):
    """A scene that can be read in the first process alone, where a part of a preparation is tried, and not in a worker's."""

    def read(self, window: Window) -> tuple[NDArray[np.generic], NDArray[np.uint8]]:
        if multiprocessing.parent_process() is None:
            return super().read(window)
        fail_over(self.files[0])


def spellings(text: str) -> Iterator[bytes]:
    """Every form in which a text could stand in a file: as it is, wide, quoted, in hexadecimal, in base64 at any offset."""
    for form in {text.lower(), text.casefold()}:
        yield form.encode()
        yield form.encode("utf-16-le")[:-1]  # the same bytes stand in the other byte order
        yield quote(form, safe="").lower().encode()
    for form in {text, text.lower()}:
        yield form.encode().hex().encode()
        for start in range(3):
            whole = base64.b64encode(bytes(start) + form.encode())
            yield whole[-(-start * 8 // 6) : -4].lower()


def digests(texts: Iterable[str]) -> frozenset[bytes]:
    """What digests of some texts without a key begin with, in hexadecimal."""
    forms = {form.encode() for text in texts for form in (text, text.lower())}
    usual = {hashlib.new(name, form).hexdigest()[:16].encode() for form in forms for name in ("md5", "sha1", "sha256", "sha512")}
    sizes = (8, 16, 20, 32, 64)
    return frozenset(usual | {hashlib.blake2b(form, digest_size=size).hexdigest()[:16].encode() for form in forms for size in sizes})


def texts_of(archive: Path) -> set[str]:
    """Whatever of an archive might be taken a digest of: paths, whole and from any folder on, names of files, and the parts of names."""
    texts: set[str] = set()
    for path in archive.rglob("*"):
        parts = path.parts
        texts |= {"/".join(parts[start:]) for start in range(1, len(parts))}
        texts |= {str(path), path.as_uri(), path.name, path.name.partition(".")[0], path.stem}
        texts |= {part for word in re.split(r"[_.]", path.name) for part in (word, word.partition("-")[2])}
    return {text for text in texts if len(text) > 6}


WANTED = {what: tuple(set(spellings(text))) for what, text in IDENTIFIERS.items()}
DIGESTS = {what: digests([text]) for what, text in IDENTIFIERS.items()}
_HEXADECIMAL = re.compile(rb"[0-9a-f]{16,}")


def named_in(data: bytes, more: Collection[bytes] = ()) -> set[str]:
    """Which identifiers stand in some bytes, in any of their forms; `more` are beginnings of digests that may not stand there either."""
    low = data.lower()
    hits = {what for what, forms in WANTED.items() if any(form in low for form in forms)}
    numbers = {run[start : start + 16] for run in set(_HEXADECIMAL.findall(low)) for start in range(len(run) - 15)}
    hits |= {what for what, wanted in DIGESTS.items() if not wanted.isdisjoint(numbers)}
    return hits | ({"a digest"} if not numbers.isdisjoint(more) else set())


def found_in(folders: Iterable[Path], more: Collection[bytes] = ()) -> dict[str, set[str]]:
    """Identifiers by file, in names and bytes of all files of some folders, unpacked as far as they can be; `more` as in `named_in`."""
    found: dict[str, set[str]] = {}
    for folder in folders:
        for path in [folder, *sorted(folder.rglob("*"))]:
            inside = path.relative_to(folder.parent).as_posix()
            hits = named_in(inside.encode(), more)
            if path.is_file() and not path.is_symlink():
                hits |= {hit for data in layers(path.read_bytes(), path) for hit in named_in(data, more)}
            if path.is_dir() and (path / "manifest.json").is_file() and (path / "zarr.json").is_file():
                hits |= {hit for data in tiles(path) for hit in named_in(data, more)}
            if hits:
                found[inside] = hits
    return found


def tiles(store: Path) -> Iterator[bytes]:
    """The unpacked arrays of a tile store."""
    opened = TileStore.open(store, verify="sizes")
    for row in range(len(opened)):
        tile = opened.read(row)
        yield np.ascontiguousarray(tile.pixels).tobytes()
        yield np.ascontiguousarray(tile.quality).tobytes()
        if tile.labels is not None:
            yield np.ascontiguousarray(tile.labels).tobytes()


def layers(data: bytes, path: Path) -> Iterator[bytes]:
    """Some bytes, and what is packed in them: gzip, zip, chunks of text of a PNG, columns of parquet, rows of SQLite."""
    yield data
    if data[:2] == b"\x1f\x8b":
        yield from layers(gzip.decompress(data), path)
    elif data[:4] == b"PK\x03\x04":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for name in archive.namelist():
                yield name.encode()
                yield from layers(archive.read(name), path)
    elif data[:8] == b"\x89PNG\r\n\x1a\n":
        yield from _png_texts(data)
    elif data[:4] == b"PAR1":
        table = pq.read_table(io.BytesIO(data))
        yield str([*table.column_names, table.schema.metadata]).encode()
        yield from (str(column.to_pylist()).encode() for column in table.columns)
    elif data[:15] == b"SQLite format 3":
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as base:
            for (name,) in base.execute("select name from sqlite_master where type = 'table'").fetchall():
                yield str(base.execute(f'select * from "{name}"').fetchall()).encode()
        base.close()


def _png_texts(data: bytes) -> Iterator[bytes]:
    place = 8
    while place + 8 <= len(data):
        size, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        chunk = data[place + 8 : place + 8 + size]
        if kind == b"zTXt":
            chunk = zlib.decompress(chunk.partition(b"\0")[2][1:])
        elif kind == b"iTXt" and chunk.partition(b"\0")[2][:1] == b"\1":
            chunk = zlib.decompress(chunk.partition(b"\0")[2][2:].split(b"\0", 2)[2])
        yield chunk
        place += 12 + size
