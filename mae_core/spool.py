"""What a run has to tell, in a file of its own: lines that are only ever added, and which of them may be told."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LINES, FOLDER = "spool.jsonl", "tracking"
Record = dict[str, Any]


@dataclass
class Entry:
    """A line of a spool.

    Attributes:
        record: What it says.
        end: Byte behind it.
        send: Whether it is to be told; None as long as that cannot be said.
    """

    record: Record
    end: int
    send: bool | None


class Gate:
    """Which lines of a spool may be told: a function of the lines alone, so that every reader comes to the same answer.

    A line that is gated waits until a later one says that a checkpoint of its step is on disk (`covered`), that the run has ended, or that
    a new attempt begins: that one goes on from a step, and lines of later steps are dropped, since they are told anew.
    """

    def __init__(self) -> None:
        self.waiting: deque[Entry] = deque()
        self._covered = -1

    def feed(self, record: Record, end: int) -> list[Entry]:
        """Take in the next line; all that is decided now, in the order of the lines."""
        kind = record["kind"]
        if kind == "covered":
            self._covered = max(self._covered, record["step"])
        elif kind == "attempt":
            self._covered = record["from_step"]
        for entry in self.waiting if kind in ("covered", "attempt", "end") else ():
            if entry.send is None:
                known = kind == "end" or entry.record["step"] <= self._covered
                if known or kind == "attempt":
                    entry.send = known
        gated = record.get("gated", False) and record["step"] > self._covered
        self.waiting.append(Entry(record, end, None if gated else kind != "covered"))
        decided = []
        while self.waiting and self.waiting[0].send is not None:
            decided.append(self.waiting.popleft())
        return decided


@dataclass
class Known:
    """What a spool says of its run so far.

    Attributes:
        key: Of the spool, its own for ever.
        name: Of the run.
        params: Its settings.
        attempts: Times that it was begun or gone on with.
        status: That it ended with last; empty while it lasts or after a kill.
        steps: Last step of every metric that is told or will be.
        values: Its value there.
        pictures: Keys and steps of pictures.
        models: Lines that register a model: name and digest of its weights to number of the line's end.
        time_ms: Of the last line.
    """

    key: str = ""
    name: str = ""
    params: dict[str, str] = field(default_factory=dict)
    attempts: int = 0
    status: str = ""
    steps: dict[str, int] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)
    pictures: set[tuple[str, int]] = field(default_factory=set)
    models: dict[tuple[str, str], int] = field(default_factory=dict)
    time_ms: int = 0

    def learn(self, entry: Entry) -> None:
        """Take in a line that is not dropped."""
        record = entry.record
        self.time_ms = max(self.time_ms, record["time_ms"])
        match record["kind"]:
            case "begin":
                self.key, self.name, self.params = record["key"], record["name"], record["params"]
            case "attempt":
                self.attempts, self.status = self.attempts + 1, ""
            case "metrics":
                for name, value in record["values"].items():
                    if record["step"] >= self.steps.get(name, -1):
                        self.steps[name], self.values[name] = record["step"], value
            case "image":
                self.pictures.add((record["key"], record["step"]))
            case "register":
                self.models[record["name"], record["digest"]] = entry.end
            case "end":
                self.status = record["status"]


class Spool:
    """The lines of one tracked run, in a folder `tracking/run-NNNN` of the folder of its run. Any thread may add to it.

    What is added survives a kill of the process at once, and a failure of the machine from the next checkpoint on.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / LINES
        self.base = folder.parent.parent
        """Paths of files in lines are relative to this folder."""
        self._lock = threading.Lock()
        self._time_ms = 0
        self._file = -1

    def open(self) -> Known:
        """Ready to be added to; what is known of the run, as if a new attempt that goes on from nothing dropped what it may.

        A line that was cut off by a kill goes.
        """
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        whole = self.size()
        if os.fstat(self._file).st_size > whole:
            os.ftruncate(self._file, whole)
        known = self.known()
        self._time_ms = known.time_ms
        return known

    def close(self) -> None:
        """Nothing is added any more."""
        with self._lock:
            if self._file >= 0:
                os.fsync(self._file)
                os.close(self._file)
            self._file = -1

    def append(self, kind: str, *, durable: bool = False, **content: Any) -> int:
        """Add a line; the number of bytes behind it. Its time is never before that of an earlier line, whatever the clock does.

        Raises:
            OSError: It cannot be written; nothing of it is left.
        """
        with self._lock:
            if self._file < 0:
                raise ValueError(f"{self.path} is closed")
            self._time_ms = max(self._time_ms, int(time.time() * 1000))
            line = (json.dumps({"kind": kind, "time_ms": self._time_ms, **content}, ensure_ascii=False) + "\n").encode()
            before = os.fstat(self._file).st_size
            try:
                written = os.write(self._file, line)
            except OSError:
                os.ftruncate(self._file, before)
                raise
            if written != len(line):
                os.ftruncate(self._file, before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if durable:
                os.fsync(self._file)
            return before + len(line)

    def read(self, start: int = 0) -> Iterator[tuple[Record, int]]:
        """Whole lines from a byte on, each with the byte behind it; what is added meanwhile is read too."""
        with self.path.open("rb") as stream:
            stream.seek(start)
            for line in stream:
                if not line.endswith(b"\n"):
                    return
                start += len(line)
                yield json.loads(line), start

    def known(self) -> Known:
        """What the lines say. Gated ones that wait count as dropped: only the attempt that wrote them could still tell them."""
        found, gate = Known(), Gate()
        for record, end in self.read():
            for entry in gate.feed(record, end):
                if entry.send:
                    found.learn(entry)
        for entry in gate.waiting:
            if entry.send:
                found.learn(entry)
            found.time_ms = max(found.time_ms, entry.record["time_ms"])
        return found

    def size(self) -> int:
        """Bytes of whole lines."""
        if not self.path.is_file():
            return 0
        with self.path.open("rb") as stream:
            end = stream.seek(0, os.SEEK_END)
            while end:
                start = max(0, end - 65536)
                stream.seek(start)
                cut = stream.read(end - start).rfind(b"\n")
                if cut >= 0:
                    return start + cut + 1
                end = start
        return 0


def new_spool(parent: Path) -> Spool:
    """An empty spool in the next free folder of a `tracking` folder."""
    parent.mkdir(parents=True, exist_ok=True)
    number = max((int(path.name.removeprefix("run-")) for path in parent.glob("run-*")), default=0)
    while True:
        number += 1
        folder = parent / f"run-{number:04d}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return Spool(folder)


def spools_in(parent: Path) -> list[Spool]:
    """Spools of a `tracking` folder that were begun, oldest first."""
    return [spool for path in sorted(parent.glob("run-*")) if (spool := Spool(path)).size()]


def new_key() -> str:
    """A name for a spool that no other has."""
    return uuid.uuid4().hex


def write_aside(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(json.dumps(content, indent=1) + "\n")
    aside.replace(path)


@dataclass
class Progress:
    """How far a spool is told, in a file beside its lines.

    Attributes:
        path: The file.
        offset: Byte up to which lines are told.
        uri: Of the store that the run was made in, without a password.
        run_id: Of MLflow; empty before the run is made there.
        experiment_id: Of MLflow.
        before: Last step of every metric that a run had which was begun without a spool.
        models: By number of the line's end: id, name and version of a model.
        refused: What the tracking store would not take.
    """

    path: Path
    offset: int = 0
    uri: str = ""
    run_id: str = ""
    experiment_id: str = ""
    before: dict[str, int] = field(default_factory=dict)
    models: dict[str, dict[str, str]] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)

    def save(self) -> None:
        """Write it whole or not at all."""
        write_aside(self.path, {name: value for name, value in vars(self).items() if name != "path"})


def progress_of(spool: Spool) -> Progress:
    """How far a spool is told; not at all where the file is missing or damaged, since telling twice does no harm."""
    path = spool.folder / "published.json"
    try:
        return Progress(path, **json.loads(path.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return Progress(path)
