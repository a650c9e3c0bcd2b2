"""Grey values that stored ones stand for, and those that they are shown as: lookup tables and windows of DICOM.

Source: PS3.3, C.11.1 (Modality LUT) and C.11.2 (VOI LUT).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modalities.dicom_values import MISREAD, first_item, number_of, several, text_of, value_of

FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")


@dataclass(frozen=True)
class Lut:
    """A lookup table; what lies before its first input has the value of the first entry, what lies behind its last that of the last.

    Attributes:
        first: Input of the first entry.
        entries: Each as 16 bits, little-endian; empty where the table in the file is damaged.
    """

    first: int
    entries: bytes = field(repr=False)

    def of(self, values: NDArray[Any]) -> NDArray[np.uint16]:
        """The entry of each value; of a value between two inputs, that of the lower one."""
        table = np.frombuffer(self.entries, "<u2")
        index = np.clip(np.floor(values.astype(np.float64)) - self.first, 0, len(table) - 1).astype(np.intp)
        return np.asarray(table[index], np.uint16)


@dataclass(frozen=True)
class Window:
    """How grey values are stretched over what a screen can show.

    Attributes:
        center, width: In the values that stored ones stand for.
        function: One of `FUNCTIONS`; empty where the file names another.
    """

    center: float
    width: float
    function: str = "LINEAR"

    @property
    def is_sound(self) -> bool:
        """Whether it is a window that the standard knows."""
        return self.function in FUNCTIONS and (self.width >= 1 if self.function == "LINEAR" else self.width > 0)

    @property
    def ends(self) -> tuple[float, float]:
        """Values that are shown black and white, with a line between; of a sigmoid, which reaches neither, none."""
        if self.function == "SIGMOID":
            return -np.inf, np.inf
        if self.function == "LINEAR_EXACT":
            return self.center - self.width / 2, self.center + self.width / 2
        return self.center - 0.5 - (self.width - 1) / 2, self.center - 0.5 + (self.width - 1) / 2

    def of(self, values: NDArray[Any]) -> NDArray[np.float32]:
        """Of a sigmoid, the share of the way from black to white."""
        with np.errstate(over="ignore"):
            return np.asarray(1 / (1 + np.exp(-4 * (values.astype(np.float64) - self.center) / self.width)), np.float32)


def lut_of(dataset: Any, keyword: str) -> Lut | None:
    """The first table of a sequence (`ModalityLUTSequence`, `VOILUTSequence`); None where there is none."""
    item = first_item(dataset, keyword)
    if item is None:
        return None
    try:
        count, first, bits = (int(part) for part in several(item.get("LUTDescriptor")))
        data = value_of(item, "LUTData")
        entries = _entries(data, count or 1 << 16, bits, bool(dataset.original_encoding[1]))
    except MISREAD:
        return Lut(0, b"")
    return Lut(first, entries)


def window_of(dataset: Any) -> Window | None:
    """The first window of a file; None where there is none."""
    center, width = number_of(dataset, "WindowCenter"), number_of(dataset, "WindowWidth")
    if value_of(dataset, "WindowCenter") is None or width <= 0:
        return None
    function = text_of(dataset, "VOILUTFunction").upper() or "LINEAR"
    return Window(center, width, function if function in FUNCTIONS else "")


def _entries(data: Any, count: int, bits: int, is_little: bool) -> bytes:
    """The entries of a table as 16 bits each; empty where they are not as many as the file says, or do not fit into its bits."""
    if isinstance(data, bytes):
        is_narrow = bits <= 8 and len(data) in (count, count + 1)
        found = np.frombuffer(data, "u1" if is_narrow else "<u2" if is_little else ">u2")[:count]
    else:
        found = np.array(several(data), np.int64)
    if len(found) != count or not 8 <= bits <= 16 or found.min() < 0 or found.max() >= 1 << bits:
        return b""
    return found.astype("<u2").tobytes()
