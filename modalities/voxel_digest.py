"""What tells the voxels of a scan from those of every other one, whatever its copy is called, stored as, or turned to.

The digest is of the order of the values and not of the values themselves, so that another slope, unit or voxel type changes nothing;
and of the array turned to a side that its own content decides, so that nothing that a header says of directions does. It is not keyed:
sites can find each other's scans by it, and who has the very scan can tell whether it is among those of a model.
"""

from __future__ import annotations

import hashlib
from itertools import permutations, product

import numpy as np
from numpy.typing import NDArray

MOST_LEVELS = 1 << 16
"""Scans with more different values than a 16-bit file can hold are told apart by the values as float32 instead of by their order."""

NO_NUMBER = np.uint32(0xFFFFFFFF)


def voxel_digest(stored: NDArray[np.generic], finite: NDArray[np.bool_], slope: float, intercept: float) -> str:
    """Digest of a volume: the same for a copy of it in another order of axes, mirrored, of another voxel type, slope or intercept.

    Where there are more than `MOST_LEVELS` different values, another slope or intercept gives another digest.

    Args:
        stored: Values as stored, any number of axes.
        finite: Where there is a number; what is elsewhere, NaN of any payload or an infinity, is one and the same.
        slope, intercept: Physical value = stored · slope + intercept.
    """
    codes = _codes(stored, finite, slope, intercept)
    return min(_digest(turned) for turned in _sides(codes))


def _codes(stored: NDArray[np.generic], finite: NDArray[np.bool_], slope: float, intercept: float) -> NDArray[np.uint32]:
    """A whole number for each voxel: the rank of its value among all values, or the bits of the value."""
    narrow = stored.dtype.kind in "biu" and stored.dtype.itemsize <= 2
    values = stored if narrow else stored.astype(np.float32)
    levels = np.unique(values[finite])
    if narrow:
        steps = np.zeros(MOST_LEVELS, np.uint32)
        steps[levels.astype(np.int64) & (MOST_LEVELS - 1)] = np.arange(len(levels), dtype=np.uint32)
        codes = np.stack([steps[plane.astype(np.int64) & (MOST_LEVELS - 1)] for plane in values])
    elif len(levels) <= MOST_LEVELS:
        codes = np.stack([np.searchsorted(levels, plane).astype(np.uint32) for plane in values])
    else:
        codes = np.stack([_physical(plane, slope, intercept).view(np.uint32) for plane in stored])
    if slope < 0 and len(levels) <= MOST_LEVELS:
        codes = np.uint32(len(levels) - 1) - codes
    codes[~finite] = NO_NUMBER
    found: NDArray[np.uint32] = codes
    return found


def _physical(plane: NDArray[np.generic], slope: float, intercept: float) -> NDArray[np.float32]:
    """Values as float32 in memory order, with one zero for both."""
    physical: NDArray[np.float32] = (plane.astype(np.float64) * slope + intercept).astype(np.float32) + np.float32(0)
    return np.ascontiguousarray(physical)


def _sides(codes: NDArray[np.uint32]) -> list[NDArray[np.uint32]]:
    """The array with its axes in the order and direction that its sums over planes decide; several where they leave a choice."""
    choices: list[list[tuple[tuple[int, ...], int, int]]] = []
    for axis in range(codes.ndim):
        others = tuple(other for other in range(codes.ndim) if other != axis)
        sums = tuple(codes.sum(axis=others, dtype=np.uint64).tolist())
        back = sums[::-1]
        ways = [1, -1] if sums == back else [1 if sums < back else -1]
        choices.append([(min(sums, back), axis, step) for step in ways])
    found = []
    for chosen in product(*choices):
        for order in permutations(chosen):
            keys = [(len(sums), sums) for sums, _, _ in order]
            if keys == sorted(keys):
                steps = tuple(slice(None, None, step) for _, _, step in sorted(order, key=lambda part: part[1]))
                found.append(codes[steps].transpose([axis for _, axis, _ in order]))
    return found


def _digest(codes: NDArray[np.uint32]) -> str:
    digest = hashlib.blake2b(str(codes.shape).encode(), digest_size=16)
    for plane in codes:
        digest.update(np.ascontiguousarray(plane, "<u4").tobytes())
    return digest.hexdigest()
