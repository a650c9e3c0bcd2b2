"""Patches of arrays with any number of spatial axes. No function here asks how many there are."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def token_grid(space: Sequence[int], patch: Sequence[int]) -> tuple[int, ...]:
    """Tokens per axis of a crop.

    Raises:
        ValueError: The number of axes differs, or a size is not a multiple of its patch size.
    """
    if len(space) != len(patch):
        raise ValueError(
            f"space {tuple(space)} has {len(space)} axes and patch {tuple(patch)} has {len(patch)}; give one patch size per axis"
        )
    if any(size % part for size, part in zip(space, patch, strict=True)):
        raise ValueError(f"space {tuple(space)} is not a multiple of patch {tuple(patch)} on every axis; change the crop or the patch")
    return tuple(size // part for size, part in zip(space, patch, strict=True))


def per_axis(sizes: Sequence[int], axes: int, key: str) -> tuple[int, ...]:
    """One size per axis; a single one serves every axis.

    Raises:
        ValueError: There are several, but not one per axis; the message names the setting `key`.
    """
    if len(sizes) not in (1, axes):
        raise ValueError(f"{key}={list(sizes)} gives {len(sizes)} sizes and the data have {axes} axes; give one size or {axes}")
    return tuple(sizes) * axes if len(sizes) == 1 else tuple(sizes)


def patchify(array: Tensor, patch: Sequence[int]) -> Tensor:
    """Tokens `(batch, token, channel, voxel)` of `(batch, channel, *space)`.

    Tokens are in row-major order of the token grid, voxels in row-major order of the patch, for every number of axes.
    """
    batch, channels, *space = array.shape
    grid = token_grid(space, patch)
    axes = len(grid)
    split = array.reshape(batch, channels, *(size for pair in zip(grid, patch, strict=True) for size in pair))
    order = [0, *(2 + 2 * axis for axis in range(axes)), 1, *(3 + 2 * axis for axis in range(axes))]
    return split.permute(order).reshape(batch, math.prod(grid), channels, math.prod(patch))


def unpatchify(tokens: Tensor, grid: Sequence[int], patch: Sequence[int]) -> Tensor:
    """The array `(batch, channel, *space)` whose `patchify` gives `tokens`."""
    batch, _, channels, _ = tokens.shape
    axes = len(grid)
    split = tokens.reshape(batch, *grid, channels, *patch)
    order = [0, 1 + axes, *(index for axis in range(axes) for index in (1 + axis, 2 + axes + axis))]
    return split.permute(order).reshape(batch, channels, *(size * part for size, part in zip(grid, patch, strict=True)))


def take(tokens: Tensor, ids: Int[Tensor, "batch count"]) -> Tensor:
    """Tokens at `ids`: `(batch, count, ...)` out of `(batch, length, ...)`."""
    index = ids.reshape(*ids.shape, *(1,) * (tokens.ndim - 2)).expand(*ids.shape, *tokens.shape[2:])
    return torch.gather(tokens, 1, index)


def token_valid(counted: Bool[Tensor, "batch *space"], patch: Sequence[int], min_fraction: float) -> Bool[Tensor, "batch length"]:
    """Which patches are tokens: at least `min_fraction` of their voxels count, and never none of them."""
    share = patchify(counted.unsqueeze(1).float(), patch).mean(dim=(2, 3))
    return (share >= min_fraction) & (share > 0)


def sincos_positions(grid: Sequence[int], dim: int) -> Float[Tensor, "length dim"]:
    """Fixed sine-cosine position codes, in token units, for a grid of any number of axes.

    The width is shared equally among the axes in array order (row before column), each axis getting sines then
    cosines of the wave lengths of Vaswani et al. (2017). What is left over when `dim` is not a multiple of twice the
    number of axes stays zero.
    """
    pairs = dim // (2 * len(grid))
    if pairs == 0:
        raise ValueError(f"a width of {dim} is too small for positions on {len(grid)} axes; use at least {2 * len(grid)}")
    rates = 1.0 / 10000 ** (torch.arange(pairs, dtype=torch.float64) / pairs)
    places = torch.cartesian_prod(*(torch.arange(size, dtype=torch.float64) for size in grid)).reshape(-1, len(grid))
    codes = torch.zeros(len(places), dim, dtype=torch.float64)
    for axis in range(len(grid)):
        angles = places[:, axis, None] * rates
        codes[:, 2 * axis * pairs : 2 * (axis + 1) * pairs] = torch.cat([angles.sin(), angles.cos()], dim=1)
    return codes.float()
