"""Histograms of oriented gradients for one to three axes (Dalal and Triggs 2005), the target of MaskFeat (Wei et al. 2022).

A gradient votes for directions in space, opposite ones being one. There is one definition for every number of axes: a
direction at an unsigned angle `a` from the gradient gets a weight of `1 - a / spacing`, at least 0, the weights are divided
by their sum, and the gradient's magnitude is shared out by them. `spacing` is the angle between neighbouring directions.
In a plane this is linear interpolation between the two nearest of `bins` directions over 180 degrees, in space it is the
same hat around each of `bins` directions, and a line has one direction, which gets all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mae_core.nd import patchify, token_grid
from mae_core.targets import HogTarget, cells_per_axis

_GOLDEN = (math.sqrt(5) - 1) / 2
_REPULSION_STEPS = 400


def oriented_gradients(
    pixels: Float[Tensor, "batch channel *space"],
    counted: Bool[Tensor, "batch channel *space"],
    patch: Sequence[int],
    settings: HogTarget,
) -> tuple[Float[Tensor, "batch token channel feature"], Bool[Tensor, "batch token channel feature"]]:
    """Histograms of every patch and channel in fp32, and which of them count.

    A feature is a direction of a cell, cells in row-major order and directions inside. A histogram is the mean vote of the
    voxels of its cell that have a gradient; a cell without any does not count. Those of a patch and channel are divided
    together by `sqrt(norm**2 + eps**2)`. A patch and channel whose mean gradient is below `min_gradient` is flat: it is zero,
    and counts here, so that `make_target` can leave it out and say so.

    Args:
        pixels: Normalised units, of whole crops: a gradient reaches over the borders of patches.
        counted: Where there is a value; what is elsewhere changes nothing, NaN included.
        patch: Voxels of a token per axis.
        settings: Numbers of directions and cells, and what is flat.

    Raises:
        ValueError: The patch does not divide the space or the cells the patch, or an axis has less than three voxels.
    """
    cells = cells_per_axis(settings, patch)
    gradient, known = central_differences(pixels, counted)
    units, spacing = directions(pixels.ndim - 2, settings.num_directions(pixels.ndim - 2))
    # Twice through the directions, so that no array is ever as large as all of them together.
    total = sum((_closeness(gradient, unit, spacing) for unit in units), torch.zeros(()))
    magnitude = torch.where(known, gradient.square().sum(dim=0).sqrt(), 0.0)
    number = _per_cell(known.float(), patch, cells)
    votes = [_per_cell(magnitude * _closeness(gradient, unit, spacing) / total, patch, cells) for unit in units]
    histogram = torch.stack(votes, dim=-1) / number.clamp(min=1)[..., None]
    mean = _per_cell(magnitude, patch, cells).sum(dim=-1) / number.sum(dim=-1).clamp(min=1)
    histogram = torch.where((mean < settings.min_gradient)[..., None, None], 0.0, histogram)
    norm = (histogram.square().sum(dim=(-2, -1), keepdim=True) + settings.eps**2).sqrt()
    values = histogram / norm.clamp(min=torch.finfo(torch.float32).tiny)
    return values.flatten(3), (number > 0)[..., None].expand_as(values).flatten(3)


def central_differences(
    pixels: Float[Tensor, "batch channel *space"], counted: Bool[Tensor, "batch channel *space"]
) -> tuple[Float[Tensor, "axis batch channel *space"], Bool[Tensor, "batch channel *space"]]:
    """Half the difference of the two neighbours along each axis, in pixel units per voxel, and where it is known.

    It is known where the voxel and both its neighbours along every axis count, so nowhere at the border; elsewhere it is 0.

    Raises:
        ValueError: An axis has less than three voxels, and so no voxel with two neighbours.
    """
    space = pixels.shape[2:]
    if min(space) < 3:
        raise ValueError(f"space {tuple(space)} has an axis with less than 3 voxels, where no gradient is known; use a larger crop")
    pixels, known = pixels.float(), counted
    parts = []
    for axis in range(2, pixels.ndim):
        parts.append((pixels.roll(-1, axis) - pixels.roll(1, axis)) / 2)
        known = known & counted.roll(-1, axis) & counted.roll(1, axis)
        place = torch.arange(pixels.shape[axis], device=pixels.device).reshape(-1, *[1] * (pixels.ndim - 1 - axis))
        known = known & (place > 0) & (place < pixels.shape[axis] - 1)
    return torch.where(known, torch.stack(parts), 0.0), known


@lru_cache
def directions(axes: int, number: int) -> tuple[tuple[tuple[float, ...], ...], float]:
    """Unit vectors over half a sphere, in array axes, and the angle in radians between neighbours, the largest of all.

    They start from a golden-angle lattice of equal areas and repel each other and their opposites until they lie nearly
    uniformly: in a plane at the multiples of 180 degrees / `number` from the first axis, where they start and are at rest;
    in space for instance along the edges of a cube (3) or the six axes of an icosahedron (6). A single one stands at a
    right angle to its nearest neighbour, since there is none.
    """
    units = _lattice(axes, number)
    for _ in range(_REPULSION_STEPS):
        gap = units[:, None] - torch.cat([units, -units])
        distance = gap.norm(dim=2, keepdim=True)
        distance[range(number), range(number)] = math.inf
        nearest = distance.min()
        push = (gap / distance * (nearest / distance) ** 4).sum(dim=1)
        push = push - (push * units).sum(dim=1, keepdim=True) * units
        units = torch.nn.functional.normalize(units + 0.1 * nearest * push, dim=1)
    cosines = (units @ units.t()).abs().fill_diagonal_(0)
    return tuple(tuple(unit) for unit in units.tolist()), float(cosines.amax(dim=1).clamp(max=1).acos().max())


def _lattice(axes: int, number: int) -> Float[Tensor, "number axes"]:
    """A point per share of half the circle and, with an axis more, per golden share of the height (Archimedes: equal areas)."""
    turn = torch.arange(number, dtype=torch.float64)
    heights = (torch.cos(math.pi * turn / number), 1 - 2 * ((turn + 0.5) * _GOLDEN % 1))
    units = torch.ones(number, 1, dtype=torch.float64)
    for height in heights[: axes - 1]:
        units = torch.cat([height[:, None], (1 - height**2).sqrt()[:, None] * units], dim=1)
    return units


def _closeness(gradient: Tensor, unit: Sequence[float], spacing: float) -> Tensor:
    """The hat around a direction; `atan2` keeps the small angles that `acos` loses in fp32."""
    along = sum((part * share for part, share in zip(gradient, unit, strict=True)), torch.zeros(()))
    across = sum(((part - along * share).square() for part, share in zip(gradient, unit, strict=True)), torch.zeros(()))
    return (1 - torch.atan2(across.sqrt(), along.abs()) / spacing).clamp(min=0)


def _per_cell(
    array: Float[Tensor, "batch channel *space"], patch: Sequence[int], cells: Sequence[int]
) -> Float[Tensor, "batch token channel cell"]:
    """Sums over the cells of every patch."""
    batch, channels = array.shape[:2]
    size = token_grid(patch, cells)
    patches = patchify(array, patch).reshape(-1, channels, *patch)
    sums: Tensor = patchify(patches, size).sum(dim=3).transpose(1, 2).unflatten(0, (batch, -1))
    return sums
