"""Grey PNG pictures made for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio.io import MemoryFile

from modalities.raster_file import quiet


def save_png(path: Path, values: NDArray[Any]) -> Path:
    """Writes `(row, column)` or `(band, row, column)` of 8 or 16 bits."""
    bands = values if values.ndim == 3 else values[None]
    path.parent.mkdir(parents=True, exist_ok=True)
    with quiet(), MemoryFile() as memory:
        with memory.open(driver="PNG", height=bands.shape[1], width=bands.shape[2], count=len(bands), dtype=bands.dtype.name) as target:
            target.write(bands)
        path.write_bytes(bytes(memory.getbuffer()))
    return path


def shades(space: tuple[int, int] = (24, 20), seed: int = 0, dtype: str = "uint16") -> NDArray[Any]:
    """Grey values of which each tells its place, with some noise."""
    rows, columns = np.indices(space)
    return (1000 + 60 * rows + 7 * columns + np.random.default_rng(seed).integers(0, 40, space)).astype(dtype)
