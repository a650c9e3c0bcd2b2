"""What is not said while patients' files are read: messages that nobody here has written, since they could quote a name."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from modalities.patients import of_patients

SHOW = "TERRAVOX_SHOW_ERRORS"
"""Environment variable that shows everything, for a terminal that nobody else reads, if it is 1."""

SOURCES = ("data", "labels", "crosswalk")
"""Settings that are a place in the user's archive."""

HARMLESS = ("mlflow", "alembic", "sqlalchemy", "torch")
"""Libraries that never see a patient's file and whose log lines are left as they are."""

ADVICE = f"set {SHOW}=1 to see it, on a terminal that nobody else reads and that is not logged"


class WithheldError(RuntimeError):
    """An error that was not expected, told by types and places alone; it comes from another process."""


def kind_of(values: Mapping[str, Any]) -> str | None:
    """The kind of the files that a verb is to read, by its settings: empty where it reads none, None where nobody can tell yet."""
    section = values.get("reader")
    kind = values.get("modality") or (section.get("kind") if isinstance(section, Mapping) else None)
    if kind:
        return str(kind)
    for name, places in (("encoder", MODEL), ("model", MODEL), ("run", MODEL), ("store", STORE)):
        if isinstance(values.get(name), str):
            return _said(Path(values[name]), places)
    if isinstance(stores := values.get("stores"), list):
        kinds = {_said(Path(str(store)), STORE) for store in stores}
        return kinds.pop() if len(kinds) == 1 else None
    return ""


def is_private(kind: str | None) -> bool:
    """Whether files of a kind are to be treated as patients': those that are, and those of which it is not known."""
    return os.environ.get(SHOW) != "1" and (kind is None or of_patients(kind))


def missing_paths(kind: str | None, places: Mapping[str, Path]) -> list[str]:
    """A line for every setting that names a place that is not there; of patients without the place."""
    said = {name: name if kind is None or of_patients(kind) else f"{name} = {path}" for name, path in places.items()}
    return [f"{said[name]}: does not exist" for name, path in places.items() if not path.exists()]


def trace_of(error: BaseException) -> str:
    """An exception and what led to it in lines: types, and places in the code, without any message."""
    lines, seen = [], set[int]()
    now: BaseException | None = error
    while now is not None and id(now) not in seen:
        seen.add(id(now))
        told = f"\n{now}" if isinstance(now, WithheldError) else ", message withheld"
        lines.append(f"{'caused by ' if len(seen) > 1 else ''}{type(now).__name__}{told}")
        lines += [f"  {_short(frame.filename)}:{frame.lineno} in {frame.name}" for frame in traceback.extract_tb(now.__traceback__)]
        now = now.__cause__ or (None if now.__suppress_context__ else now.__context__)
    return "\n".join(lines)


@contextmanager
def discreet(*, private: bool) -> Iterator[None]:
    """Within it, warnings, log lines and lost exceptions of libraries tell where they come from, and withhold what they say."""
    if not private:
        yield
        return
    make_record, of_threads, of_garbage = logging.getLogRecordFactory(), threading.excepthook, sys.unraisablehook

    def record(name: str, level: int, *rest: Any, **more: Any) -> logging.LogRecord:
        made = make_record(name, level, *rest, **more)
        if name.partition(".")[0] not in HARMLESS:
            made.msg, made.args, made.exc_info, made.stack_info = f"{name}: a message is withheld; {ADVICE}", (), None, None
        return made

    with warnings.catch_warnings():
        warnings.showwarning = _warned
        logging.setLogRecordFactory(record)
        threading.excepthook = lambda lost: _lost(lost.exc_value, of_threads, lost)
        sys.unraisablehook = lambda lost: _lost(lost.exc_value, of_garbage, lost)
        try:
            yield
        finally:
            logging.setLogRecordFactory(make_record)
            threading.excepthook, sys.unraisablehook = of_threads, of_garbage


def _warned(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None, line: str | None = None
) -> None:
    del message, file, line
    print(f"{_short(filename)}:{lineno}: {category.__name__}, message withheld", file=sys.stderr)


def _lost(error: BaseException | None, usual: Callable[[Any], object], lost: Any) -> None:
    """Tells of an exception that nobody catches."""
    if error is None:
        usual(lost)
    else:
        print(trace_of(error), file=sys.stderr)


def _short(filename: str) -> str:
    """A file of code by the last parts of its path, which tell no more than the library."""
    return "/".join(Path(filename).parts[-2:])


MODEL = ("model/model.json", ("modality",))
STORE = ("manifest.json", ("plan", "attributes", "kind"))
"""Files of a folder that say what kind its data were, and where in them."""


def _said(folder: Path, place: tuple[str, tuple[str, ...]]) -> str | None:
    file, keys = place
    try:
        found: Any = json.loads((folder / file).read_bytes())
        for key in keys:
            found = found[key]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(found)
