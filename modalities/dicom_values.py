"""Single values out of a DICOM data set: numbers, texts and lists as plain types, with a reason where a tag holds something else."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from typing import Any

from pydicom.errors import BytesLengthException, InvalidDicomError

from modalities.scene import SceneError

MISREAD = (
    *(ValueError, TypeError, LookupError, AttributeError, NotImplementedError, OverflowError, EOFError, AssertionError, RecursionError),
    *(struct.error, zlib.error, BytesLengthException, InvalidDicomError),
)
"""What a parser raises over bytes that are no DICOM; the messages quote them, so none is passed on."""


def value_of(dataset: Any, tag: str | int) -> Any:
    """The value of a tag; None where it is absent, empty or cannot be understood."""
    try:
        value = dataset.get(tag)
        return getattr(value, "value", value) if isinstance(tag, int) else value
    except MISREAD:
        return None


def text_of(dataset: Any, tag: str | int) -> str:
    """A text without the blanks around it; several are joined by a backslash, as they are stored."""
    value = value_of(dataset, tag)
    if value is None or isinstance(value, bytes):
        return ""
    return "\\".join(str(part) for part in several(value)).strip(" \0")


def texts_of(dataset: Any, tag: str) -> tuple[str, ...]:
    """The texts of a tag in capital letters, without the blanks around them."""
    return tuple(part.strip().upper() for part in text_of(dataset, tag).split("\\")) if text_of(dataset, tag) else ()


def number_of(dataset: Any, tag: str | int, otherwise: float = 0.0) -> float:
    """The first finite number of a tag that nothing hangs on, else `otherwise`."""
    value = value_of(dataset, tag)
    if isinstance(value, bytes):
        value = _unpacked(value)
    try:
        number = float(several(value)[0])
    except (ValueError, TypeError, IndexError):
        return otherwise
    return number if math.isfinite(number) else otherwise


def numbers_of(dataset: Any, keyword: str, count: int) -> tuple[float, ...] | None:
    """`count` finite numbers of a tag that geometry or values hang on; None where it is absent or empty.

    Raises:
        SceneError: It holds something else. The message does not say what.
    """
    try:
        value = dataset.get(keyword)
        if value is None or value == "" or several(value) == ():
            return None
        numbers = tuple(float(part) for part in several(value))
    except MISREAD:
        numbers = ()
    if len(numbers) != count or not all(math.isfinite(number) for number in numbers):
        raise SceneError(f"{keyword} does not hold {count} numbers; export it again", "damaged_header")
    return numbers


def whole_of(dataset: Any, keyword: str, otherwise: int = 0) -> int:
    """A whole number that the layout of pixels hangs on; see `numbers_of`."""
    numbers = numbers_of(dataset, keyword, 1)
    return otherwise if numbers is None else int(numbers[0])


def first_item(dataset: Any, keyword: str) -> Any:
    """The first item of a sequence; None where there is none."""
    items = value_of(dataset, keyword)
    return items[0] if items is not None and not isinstance(items, str | bytes) and len(items) else None


def several(value: Any) -> tuple[Any, ...]:
    """A value as a tuple, whether it is one or many."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else (value,)


def _unpacked(data: bytes) -> Any:
    """A number of a private tag whose type was lost on the way."""
    if len(data) in (4, 8):
        number = struct.unpack("<f" if len(data) == 4 else "<d", data)[0]
        if math.isfinite(number) and (number == 0 or 1e-3 < abs(number) < 1e6):
            return number
    return data.split(b"\\")[0].decode("ascii", "replace").strip(" \0")
