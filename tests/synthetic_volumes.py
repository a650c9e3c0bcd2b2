"""NIfTI files made for tests, byte for byte under the test's control."""

from __future__ import annotations

import gzip
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from modalities.medical import MriSettings
from modalities.scene import Rejected
from modalities.volume import VolumeScene
from modalities.volume_scan import scan_volumes

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
"""Where real files lie on machines that have them, beside the repository."""

OBLIQUE = np.array([[0.96, -0.28, 0.0, -11.0], [0.2688, 0.9216, -0.28, 7.0], [0.0784, 0.2688, 0.96, 30.0], [0.0, 0.0, 0.0, 1.0]])
"""A rotation about two axes by 16.26 degrees each, and a shift."""

needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data")

SPACE = (9, 7, 8)

NATIVE = MriSettings(spacing_mm=None, duplicates="keep")
"""Files of tests are often copies of one another."""


def save_volume(path: Path, values: NDArray[Any], affine: NDArray[Any] | None = None, version: int = 1, **fields: Any) -> Path:
    """Writes `values` as stored, with sform and qform of `affine`; `fields` then replace header fields, whatever they are."""
    header = nib.Nifti1Header() if version == 1 else nib.Nifti2Header()
    matrix = np.eye(4) if affine is None else affine
    header.set_data_dtype(values.dtype)
    header.set_data_shape(values.shape)
    header.set_sform(matrix, code=1)
    header.set_qform(matrix, code=1)
    header["vox_offset"] = header.single_vox_offset
    header["xyzt_units"] = 2
    header["scl_slope"], header["scl_inter"] = np.nan, np.nan
    for key, value in fields.items():
        header[key] = value
    block = header.binaryblock + bytes(4) + values.tobytes("F")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(block, compresslevel=1, mtime=0) if path.name.endswith(".gz") else block)
    return path


def texture(space: tuple[int, ...], seed: int = 0) -> NDArray[np.float32]:
    """Positive noise without air: every voxel differs from its neighbours, so that a wrong order of axes shows."""
    return np.random.default_rng(seed).uniform(50, 100, space).astype(np.float32)


def head(size: int = 24, seed: int = 0) -> NDArray[np.float32]:
    """A bright ball in faint noise, with a dark hole in its middle."""
    rng = np.random.default_rng(seed)
    radius = np.sqrt(sum((axis - (size - 1) / 2) ** 2 for axis in np.indices((size,) * 3)))
    values = np.where(radius < size * 0.4, rng.normal(100, 10, radius.shape), rng.uniform(0, 3, radius.shape))
    return np.where(radius < size * 0.1, 1.0, values).astype(np.float32)


def split_scan(files: Sequence[Path], folder: Path, settings: MriSettings = NATIVE) -> tuple[list[VolumeScene], list[Rejected]]:
    """Scenes and what was rejected, of a scan."""
    found = scan_volumes(files, folder, settings)
    return list(found.scenes), list(found.rejected)


def scan_one(path: Path, settings: MriSettings = NATIVE) -> VolumeScene:
    """The scene of a file that has to be usable."""
    scenes, rejected = split_scan([path], path.parent, settings)
    assert not rejected, rejected
    return scenes[0]


def reason(path: Path, settings: MriSettings = NATIVE) -> str:
    """Why a file that must not be usable is rejected."""
    scenes, rejected = split_scan([path], path.parent, settings)
    assert not scenes
    assert rejected[0].file.startswith("file-"), "a pseudonym"
    assert path.name not in rejected[0].reason
    return rejected[0].reason


def orientations() -> list[NDArray[np.float64]]:
    """The 48 tables that turn RAS+ axes to another order and sign."""
    signs = list(itertools.product((1, -1), repeat=3))
    return [np.array(list(zip(order, sign, strict=True)), float) for order in itertools.permutations(range(3)) for sign in signs]


def turned(values: NDArray[Any], affine: NDArray[Any], turn: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The same volume stored in another order of axes."""
    moved = nib.orientations.apply_orientation(values, turn)
    return np.ascontiguousarray(moved), affine @ nib.orientations.inv_ornt_aff(turn, values.shape)


def world(space: tuple[int, ...], affine: NDArray[Any]) -> NDArray[np.float64]:
    """World coordinates `(3, *space)` of every voxel."""
    return np.einsum("ij,j...->i...", affine[:3, :3], np.indices(space)) + affine[:3, 3].reshape(3, 1, 1, 1)


def dice(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    """Overlap of two sets of voxels."""
    return float(2 * (one & other).sum() / (one.sum() + other.sum()))


def broken(path: Path, change: Callable[[bytes], bytes]) -> Path:
    """The same file with its bytes changed."""
    path.write_bytes(change(path.read_bytes()))
    return path
