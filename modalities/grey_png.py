"""Grey pictures as PNG of 8 or 16 bits, in and out. The library sees their bytes and never their names."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.enums import ColorInterp
from rasterio.io import MemoryFile

from modalities.raster_file import BROKEN, quiet
from modalities.scene import SceneError
from modalities.whole_file import written_whole

SIGNATURE = b"\x89PNG\r\n\x1a\n"
ALONE = {"GDAL_PAM_ENABLED": "NO"}


def png_space(path: Path) -> tuple[int, int]:
    """Rows and columns that a PNG states.

    Raises:
        SceneError: It is none.
    """
    with path.open("rb") as stream:
        head = stream.read(24)
    if head[:8] != SIGNATURE or head[12:16] != b"IHDR" or len(head) < 24:
        raise SceneError("not PNG, or its beginning is damaged; copy it again", "damaged_picture")
    columns, rows = struct.unpack(">II", head[16:24])
    return int(rows), int(columns)


def read_png(path: Path, *, palette: bool = False) -> NDArray[Any]:
    """The grey values `(row, column)` of a PNG, uint8 or uint16; one with three equal colours is grey, too.

    Args:
        path: The file.
        palette: Whether numbers that stand for colours are welcome, as they are in a map of classes.

    Raises:
        SceneError: It is damaged or coloured; without its name.
    """
    png_space(path)
    try:
        with rasterio.Env(**ALONE), quiet(), MemoryFile(path.read_bytes()) as memory, memory.open(driver="PNG") as source:
            values, kinds = source.read(), source.colorinterp
    except BROKEN:
        raise SceneError("the PNG is damaged; copy it again", "damaged_picture") from None
    planes = [plane for plane, kind in zip(values, kinds, strict=True) if kind != ColorInterp.alpha]
    if ColorInterp.palette in kinds and not palette:
        raise SceneError("its values are entries of a colour table, not measurements; convert it to grey", "colour")
    if any(not np.array_equal(plane, planes[0]) for plane in planes[1:]):
        raise SceneError("a colour picture, while grey values are wanted", "colour")
    return np.asarray(planes[0])


def write_png(path: Path, values: NDArray[np.uint8]) -> None:
    """Writes `(row, column)` as a grey PNG, whole or not at all."""
    rows, columns = values.shape
    with rasterio.Env(**ALONE), quiet(), MemoryFile() as memory:
        with memory.open(driver="PNG", height=rows, width=columns, count=1, dtype="uint8") as target:
            target.write(values, 1)
        data = bytes(memory.getbuffer())
    with written_whole(path) as stream:
        stream.write(data)
