"""Class numbers from a MATLAB file, which has no place: they lie on an image of the very same size."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.io import loadmat, whosmat
from scipy.io.matlab import MatReadError

from modalities.grid import Grid, Window
from modalities.label_raster import check_window
from modalities.scene import SceneError

NUMBERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "single", "double", "logical")
BROKEN = (MatReadError, NotImplementedError, ValueError, TypeError, KeyError, IndexError, EOFError, OSError, zlib.error)
"""What scipy raises for a file that is gone, damaged, of another kind, or of MATLAB 7.3, which is HDF5."""


@dataclass(frozen=True)
class MatrixLabels:
    """Class numbers of one variable of a MATLAB file, whose rows and columns are the scene's."""

    path: Path
    variable: str
    stamp: tuple[int, int]
    grid: Grid

    def read(self, window: Window) -> NDArray[np.int64]:
        """Class numbers; -1 for negative numbers and what is not a number."""
        check_window(window, self.grid, str(self.path))
        return _matrix(self)[window].copy()


def open_matrix_labels(path: Path, grid: Grid, name: str, variable: str = "") -> tuple[MatrixLabels, str]:
    """The one matrix of an image's size in a MATLAB file, and what is to be told of it.

    Only names and sizes are read before a matrix is known to have the image's size.

    Raises:
        SceneError: It cannot be read, or holds no such matrix, or several.
    """
    try:
        listed = whosmat(str(path), appendmat=False)
        stamp = (path.stat().st_size, path.stat().st_mtime_ns)
    except BROKEN as error:
        raise SceneError(_unreadable(path, error)) from error
    fitting = [name for name, space, kind in listed if tuple(space) == grid.space and kind in NUMBERS and variable in ("", name)]
    if len(fitting) != 1:
        there = ", ".join(f"{own} {kind} {'×'.join(map(str, space))}" for own, space, kind in listed) or "nothing"
        what = "say which by label_options.layer" if fitting else "a matrix without a place must have the image's very size"
        wanted = "×".join(map(str, grid.space))
        raise SceneError(f"{path} holds {there}; for {name} one matrix of {wanted} numbers is wanted: {what}")
    labels = MatrixLabels(path, fitting[0], stamp, grid)
    _matrix(labels)
    return labels, f"variable {fitting[0]} has no place of its own and was laid onto the image, which has the same size"


@lru_cache(maxsize=2)
def _matrix(labels: MatrixLabels) -> NDArray[np.int64]:
    try:
        if (labels.path.stat().st_size, labels.path.stat().st_mtime_ns) != labels.stamp:
            raise SceneError(f"{labels.path} has changed since it was looked at; start again")
        found: Any = loadmat(str(labels.path), appendmat=False, variable_names=[labels.variable])[labels.variable]
    except BROKEN as error:
        if isinstance(error, SceneError):
            raise
        raise SceneError(_unreadable(labels.path, error)) from error
    values = np.asarray(found)
    if values.dtype.kind not in "iufb" or values.shape != labels.grid.space:
        raise SceneError(f"{labels.path}: {labels.variable} holds {values.dtype} of {values.shape}; labels are whole numbers")
    usable = np.where(np.isnan(values), -1, values) if values.dtype.kind == "f" else values.astype(np.int64)
    broken = usable[usable != np.rint(usable)]
    if broken.size:
        raise SceneError(f"{labels.path} holds numbers that are not whole, such as {broken[0]}; labels are class numbers")
    return np.asarray(np.maximum(usable, -1), dtype=np.int64)


def _unreadable(path: Path, error: Exception) -> str:
    hint = "; save it again with -v7" if isinstance(error, NotImplementedError) else ""
    return f"the labels {path} cannot be read as a MATLAB file: {' '.join(str(error).split())[:200]}{hint}"
