"""Class probabilities of a whole scene from overlapping crops, blended with Gaussian weights. Any number of axes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

Window = tuple[slice, ...]


def windows(space: Sequence[int], crop: Sequence[int], overlap: float) -> Iterator[Window]:
    """Windows of at most `crop` that cover `space`, evenly spread, neighbours sharing at least `overlap` of a crop."""
    axes = []
    for size, length in zip(space, crop, strict=True):
        if size <= length:
            axes.append([slice(0, size)])
            continue
        stride = max(1, math.floor(length * (1 - overlap) + 1e-9))
        count = -(-(size - length) // stride) + 1
        starts = [round(index * (size - length) / (count - 1)) for index in range(count)]
        axes.append([slice(start, start + length) for start in starts])
    yield from itertools.product(*axes)


def blend_weights(crop: Sequence[int]) -> Float[Tensor, "*space"]:
    """Gaussian about the crop's centre with a standard deviation of an eighth of its size, never below 0.1 %."""
    weights = torch.ones(())
    for size in crop:
        place = torch.arange(size) - (size - 1) / 2
        weights = weights[..., None] * torch.exp(-0.5 * (place / (size / 8)).square())
    return weights.clamp(min=1e-3)


def blended(
    space: Sequence[int], crop: Sequence[int], overlap: float, predict: Callable[[Window], Float[Tensor, "class *crop"]]
) -> Float[Tensor, "class *space"]:
    """Weighted mean of the predictions of all windows.

    Memory is one fp32 number per class and voxel of the scene, and one more.

    Args:
        space: Size of the scene.
        crop: Largest window.
        overlap: Least share of a crop that neighbours have in common.
        predict: Gives probabilities of a window; may return more than the window's size, the rest being padding.
    """
    total: Tensor | None = None
    share = torch.zeros(*space)
    weights = blend_weights(crop)
    for window in windows(space, crop, overlap):
        inside = tuple(slice(0, part.stop - part.start) for part in window)
        part = predict(window)[(slice(None), *inside)]
        if total is None:
            total = torch.zeros(len(part), *space)
        total[(slice(None), *window)] += part * weights[inside]
        share[window] += weights[inside]
    assert total is not None
    return total / share
