"""Patches of arrays with any number of spatial axes. No function here asks how many there are."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import functional as F

Marked = TypeVar("Marked", bound=Callable[..., Any])


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


def downsampling_factors(patch: Sequence[int]) -> list[tuple[int, ...]]:
    """Factors per stage and axis, finest stage first, whose product over the stages is the patch.

    `(8, 8)` gives three stages of two; `(4, 8, 8)` rests on its first axis in the last of three. Larger factors come first.
    """
    primes = [_primes(size) for size in patch]
    stages = max(1, *(len(part) for part in primes))
    padded = [part + [1] * (stages - len(part)) for part in primes]
    return [tuple(axis[stage] for axis in padded) for stage in range(stages)]


def _primes(number: int) -> list[int]:
    """Prime factors, largest first."""
    prime = next((divisor for divisor in range(2, math.isqrt(number) + 1) if number % divisor == 0), number)
    return [] if number == 1 else sorted([prime, *_primes(number // prime)], reverse=True)


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


def windows(array: Tensor, patch: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Patches `(batch, token, channel, voxel)` that overlap: one per stride, centred on it, zero (False) beyond the edge.

    With `stride` equal to `patch` this is `patchify`.

    Raises:
        ValueError: A patch is smaller than its stride or differs from it by an odd number of voxels.
    """
    if tuple(patch) == tuple(stride):
        return patchify(array, patch)
    reach = margins(patch, stride)
    token_grid(array.shape[2:], stride)
    axes = len(reach)
    out = F.pad(array, [side for margin in reversed(reach) for side in (margin, margin)])
    for axis, (size, step) in enumerate(zip(patch, stride, strict=True)):
        out = out.unfold(2 + axis, size, step)
    out = out.permute(0, *range(2, 2 + axes), 1, *range(2 + axes, 2 + 2 * axes))
    return out.reshape(len(array), -1, array.shape[1], math.prod(patch))


def blend(tokens: Tensor, used: Tensor, grid: Sequence[int], patch: Sequence[int], stride: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The array `(batch, channel, *space)` in which overlapping patches are averaged, and how many lie on each voxel.

    Args:
        tokens: `(batch, token, channel, voxel)`, as `windows` gives them.
        used: `(batch, token)`; others are left out. Voxels that no used patch reaches are zero.
        grid: Tokens per axis.
        patch: Voxels of a patch per axis.
        stride: Voxels between patches per axis.
    """
    space = [size * step for size, step in zip(grid, stride, strict=True)]
    reach = margins(patch, stride)
    wide = [size + 2 * margin for size, margin in zip(space, reach, strict=True)]
    numbers = torch.arange(math.prod(wide), device=tokens.device).reshape(1, 1, *wide)
    for axis, (size, step) in enumerate(zip(patch, stride, strict=True)):
        numbers = numbers.unfold(2 + axis, size, step)
    where = numbers.reshape(-1)
    kept = torch.where(used[:, :, None, None], tokens, 0)
    shape = (len(tokens), tokens.shape[2], math.prod(wide))
    total = kept.new_zeros(shape).index_add(2, where, kept.transpose(1, 2).flatten(2))
    every = used[:, None, :, None].expand(-1, -1, -1, tokens.shape[3]).flatten(2).to(total.dtype)
    number = total.new_zeros(shape[0], 1, shape[2]).index_add(2, where, every)
    inner = (slice(None), slice(None), *(slice(margin, margin + size) for margin, size in zip(reach, space, strict=True)))
    mean = (total / number.clamp(min=1)).reshape(*shape[:2], *wide)[inner]
    return mean, number.reshape(shape[0], 1, *wide)[inner]


def margins(patch: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    """Voxels that a patch reaches beyond its stride, on each side of each axis.

    Raises:
        ValueError: A patch is smaller than its stride or differs from it by an odd number of voxels.
    """
    wrong = len(patch) != len(stride) or any(size < step or (size - step) % 2 for size, step in zip(patch, stride, strict=False))
    if wrong:
        raise ValueError(
            f"patch {tuple(patch)} and stride {tuple(stride)} do not go together; "
            "a patch is as large as its stride, or larger by an even number on every axis"
        )
    return tuple((size - step) // 2 for size, step in zip(patch, stride, strict=True))


@dataclass(frozen=True)
class TokenLayout:
    """How an array becomes tokens and back: patches over the grid, once for each group of channels.

    A token is numbered `group · places + place`; it holds the voxels of one place in the channels of one group.

    Attributes:
        grid: Tokens per axis.
        patch: Voxels of a patch per axis.
        stride: Voxels between patches per axis.
        groups: Channel numbers of each group; one group of all channels is the plain case.
        num_channels: Channels of the array.
        footprints: Voxels along each of the last two axes that hold one and the same measurement, per channel; empty: 1 for all. Of
            such a block only the first voxel is in a token, and all of it has to count.
    """

    grid: tuple[int, ...]
    patch: tuple[int, ...]
    stride: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    num_channels: int
    footprints: tuple[int, ...] = ()

    @property
    def num_places(self) -> int:
        """Tokens of one group."""
        return math.prod(self.grid)

    @property
    def full_grid(self) -> tuple[int, ...]:
        """Groups, then tokens per axis; the product is the number of tokens."""
        return (len(self.groups), *self.grid)

    @property
    def overlaps(self) -> bool:
        """Whether patches share voxels."""
        return self.patch != self.stride

    @property
    def coarse(self) -> bool:
        """Whether any channel has fewer measurements than voxels."""
        return any(footprint > 1 for footprint in self.footprints)

    def split(self, array: Tensor) -> Tensor:
        """Patches of all places and channels, `(batch, place, channel, voxel)`."""
        return windows(array, self.patch, self.stride)

    def pick(self, patches: Tensor, ids: Int[Tensor, "batch count"]) -> Tensor:
        """Tokens `(batch, count, channel, voxel)` out of all patches; zero (False) in channels of other groups and inside blocks."""
        if len(self.groups) == 1 and not self.coarse:
            return take(patches, ids)
        return torch.where(self.own(ids), take(patches, ids % self.num_places), 0).to(patches.dtype)

    def own(self, ids: Int[Tensor, "batch count"]) -> Bool[Tensor, "batch count channel #voxel"]:
        """Which channels belong to the group of each token and, where there are blocks, which of their voxels begin one."""
        member = self.member(ids.device)[ids // self.num_places][..., None]
        return member & self.measurements(ids.device) if self.coarse else member

    def measurements(self, device: torch.device) -> Bool[Tensor, "channel voxel"]:
        """Which voxels of a patch stand for a measurement."""
        found: Tensor = starts_by_channel(self.patch, self.footprints, device)
        return found == torch.arange(math.prod(self.patch), device=device)

    def measured(
        self, voxels: Bool[Tensor, "batch *space"], present: Bool[Tensor, "batch channel"]
    ) -> Bool[Tensor, "batch channel *space"]:
        """The voxels that are True, in those channels that a sample has; in a coarse channel whole blocks of them only."""
        if not self.coarse:
            return per_channel(voxels, present)
        every = {footprint: whole_blocks(voxels, footprint) for footprint in set(self.footprints)}
        there = present.reshape(*present.shape, *(1,) * (voxels.ndim - 1))
        return torch.stack([every[footprint] for footprint in self.footprints], dim=1) & there

    def member(self, device: torch.device) -> Bool[Tensor, "group channel"]:
        """Which channels belong to each group."""
        member = torch.tensor([[channel in group for channel in range(self.num_channels)] for group in self.groups])
        return member.to(device, non_blocking=True)

    def any_present(self, present: Bool[Tensor, "batch channel"]) -> Bool[Tensor, "batch group"]:
        """Of which groups each sample has a channel."""
        return (present[:, None] & self.member(present.device)).any(dim=2)

    def seen(self, ids: Tensor, used: Tensor) -> Bool[Tensor, "batch channel *space"]:
        """Voxels that lie in one token at least of those that are used."""
        space = [size * step for size, step in zip(self.grid, self.stride, strict=True)]
        out = torch.zeros(len(ids), self.num_channels, *space, dtype=torch.bool, device=ids.device)
        for number, group in enumerate(self.groups):
            mine = used & (ids // self.num_places == number)
            there = torch.zeros(len(ids), self.num_places + 1, dtype=torch.bool, device=ids.device)
            there = there.scatter(1, torch.where(mine, ids % self.num_places, self.num_places), value=True)[:, :-1]
            tokens = there[:, :, None, None].float().expand(-1, -1, 1, math.prod(self.patch))
            out[:, list(group)] = blend(tokens, there, self.grid, self.patch, self.stride)[1] > 0
        return out

    def join(self, tokens: Tensor, ids: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
        """The array `(batch, channel, *space)` of some tokens, overlaps averaged, and where there is any (bool, same shape).

        A measurement is repeated over its block.
        """
        parts, reached = [], []
        owned = self.member(ids.device)[ids // self.num_places]
        if self.coarse:
            tokens = self._repeated(tokens)
        for channel in range(self.num_channels):
            mine = used & owned[:, :, channel]
            place = torch.where(mine, ids % self.num_places, self.num_places)
            index = place[:, :, None, None].expand(-1, -1, 1, tokens.shape[3])
            empty = tokens.new_zeros(len(ids), self.num_places + 1, 1, tokens.shape[3])
            spread = empty.scatter(1, index, tokens[:, :, channel : channel + 1])
            there = torch.zeros_like(spread[:, :, 0, 0], dtype=torch.bool).scatter(1, place, value=True)
            image, number = blend(spread[:, :-1], there[:, :-1], self.grid, self.patch, self.stride)
            parts.append(image)
            reached.append(number > 0)
        return torch.cat(parts, dim=1), torch.cat(reached, dim=1)

    def _repeated(self, tokens: Tensor) -> Tensor:
        """Tokens whose every voxel is the first of its block."""
        starts: Tensor = starts_by_channel(self.patch, self.footprints, tokens.device)
        return torch.gather(tokens, 3, starts.expand(*tokens.shape[:2], -1, -1))


def block_of(axes: int, footprint: int) -> tuple[int, ...]:
    """Voxels per axis of a measurement that has a footprint: it reaches over the last two axes."""
    return (1,) * (axes - 2) + (footprint,) * min(axes, 2)


def block_starts(patch: tuple[int, ...], footprint: int) -> tuple[int, ...]:
    """The number of the first voxel of its block, for every voxel of a patch; all in row-major order."""
    block = block_of(len(patch), footprint)
    token_grid(patch, block)
    steps = [math.prod(patch[axis + 1 :]) for axis in range(len(patch))]
    places = itertools.product(*(range(size) for size in patch))
    return tuple(sum((at - at % part) * step for at, part, step in zip(place, block, steps, strict=True)) for place in places)


def constant(function: Marked) -> Marked:
    """Marked for the compiler as what gives the same for the same arguments.

    That is all that `torch.compiler.assume_constant_result` does, and it imports the whole compiler: two seconds more at every start.
    """
    function.__dict__["_dynamo_marked_constant"] = True
    return function


@constant
def starts_by_channel(patch: tuple[int, ...], footprints: tuple[int, ...], device: torch.device) -> Int[Tensor, "channel voxel"]:
    """`block_starts` of every channel on a device, computed once per process; not to be changed in place."""
    return _cached_starts(patch, footprints, device)


@lru_cache(maxsize=64)
def _cached_starts(patch: tuple[int, ...], footprints: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(mode=False):
        return torch.tensor([block_starts(patch, footprint) for footprint in footprints]).to(device)


def whole_blocks(voxels: Bool[Tensor, "batch *space"], footprint: int) -> Bool[Tensor, "batch *space"]:
    """The voxels of those blocks in which every voxel is True."""
    if footprint == 1:
        return voxels
    block = block_of(voxels.ndim - 1, footprint)
    blocks = patchify(voxels[:, None], block)
    whole = blocks.all(dim=3, keepdim=True).expand_as(blocks)
    return unpatchify(whole, token_grid(voxels.shape[1:], block), block)[:, 0]


def take(tokens: Tensor, ids: Int[Tensor, "batch count"]) -> Tensor:
    """Tokens at `ids`: `(batch, count, ...)` out of `(batch, length, ...)`."""
    index = ids.reshape(*ids.shape, *(1,) * (tokens.ndim - 2)).expand(*ids.shape, *tokens.shape[2:])
    return torch.gather(tokens, 1, index)


def per_channel(voxels: Bool[Tensor, "batch *space"], present: Bool[Tensor, "batch channel"]) -> Bool[Tensor, "batch channel *space"]:
    """The voxels that are True, in those channels that a sample has."""
    return voxels[:, None] & present.reshape(*present.shape, *(1,) * (voxels.ndim - 1))


def token_valid(counted: Bool[Tensor, "batch *space"], patch: Sequence[int], min_fraction: float) -> Bool[Tensor, "batch length"]:
    """Which patches are tokens: at least `min_fraction` of their voxels count, and never none of them."""
    share = patchify(counted.unsqueeze(1).float(), patch).mean(dim=(2, 3))
    return (share >= min_fraction) & (share > 0)
