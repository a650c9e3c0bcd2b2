"""Channels at their native resolution on a finer grid: one measurement per block of voxels, of which one voxel is looked at.

A 20 m band on a 10 m grid repeats each measurement over 2 x 2 voxels. What embeds and predicts such a channel has one weight per
measurement, so nothing that was repeated is learnt or judged twice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from mae_core.nd import TokenLayout, block_of, block_starts, margins, token_valid, whole_blocks


def channel_footprints(
    footprints: Mapping[str, int], channels: Sequence[str], patch: Sequence[int], stride: Sequence[int]
) -> tuple[int, ...]:
    """The footprint of each channel, 1 where none is given.

    Raises:
        ValueError: A name is that of no channel, or the patches do not consist of whole blocks.
    """
    unknown = [name for name in footprints if name not in channels]
    if unknown:
        raise ValueError(f"model.encoder.footprints name {unknown}, which are not channels of the data: {list(channels)}")
    found = tuple(footprints.get(name, 1) for name in channels)
    common = math.lcm(*found) if found else 1
    block = block_of(len(patch), common)
    rooms = {"patch": patch, "stride": stride, "reach of a patch beyond its stride": margins(patch, stride)}
    for name, sizes in rooms.items():
        if any(size % part for size, part in zip(sizes, block, strict=True)):
            raise ValueError(
                f"{name} {tuple(sizes)} does not hold whole measurements of {dict(footprints)} voxels; on the last two axes give a "
                f"multiple of {common}, such as model.encoder.patch={[part * max(1, round(8 / part)) for part in block]}"
            )
    return found


def common_footprint(footprints: Sequence[int]) -> int:
    """The least number of voxels that holds whole measurements of every channel."""
    return math.lcm(*footprints)


def measured_elements(patch: Sequence[int], footprints: Sequence[int]) -> tuple[int, ...]:
    """Which elements of a token, counted over channels, then voxels, stand for a measurement; rising."""
    voxels = math.prod(patch)
    own = {footprint: sorted(set(block_starts(tuple(patch), footprint))) for footprint in set(footprints)}
    return tuple(number * voxels + voxel for number, footprint in enumerate(footprints) for voxel in own[footprint])


def group_tokens_valid(
    layout: TokenLayout, counted: Bool[Tensor, "batch *space"], min_fraction: float
) -> Bool[Tensor, "batch group place"]:
    """Which tokens hold enough measurements that count, for each channel group."""
    sizes = [layout.footprints[group[0]] if layout.coarse else 1 for group in layout.groups]
    every = {size: token_valid(whole_blocks(counted, size), layout.stride, min_fraction) for size in sorted(set(sizes))}
    return torch.stack([every[size] for size in sizes], dim=1)


class MeasurementEmbedding(nn.Module):
    """`ChannelEmbedding` for channels of several footprints: the first voxel of each block is embedded, the others are not looked at.

    `weights` holds one tensor `(channel, measurement, width)` per footprint, `f1`, `f2`, …, with the channels in their order.
    """

    def __init__(self, channels: Sequence[str], patch: Sequence[int], footprints: Sequence[int], width: int) -> None:
        super().__init__()
        self.channels, self.footprints, self.patch = tuple(channels), tuple(footprints), tuple(patch)
        self.weights = nn.ParameterDict()
        for size in sorted(set(self.footprints)):
            measurements = math.prod(patch) // math.prod(block_of(len(patch), size))
            weight = torch.empty(self.footprints.count(size), measurements, width)
            nn.init.xavier_uniform_(weight.view(-1, width))
            self.weights[f"f{size}"] = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("elements", torch.tensor(self._elements(self.channels)), persistent=False)

    def members(self, footprint: int) -> tuple[str, ...]:
        """Channels of a footprint, as they stand in `weights`."""
        return tuple(name for name, own in zip(self.channels, self.footprints, strict=True) if own == footprint)

    def forward(self, patches: Float[Tensor, "batch token channel voxel"], channels: Sequence[str] | None = None) -> Tensor:
        """Embedded tokens `(batch, token, width)`; `channels` names the patches' channel axis (default: all of ours).

        Raises:
            ValueError: A channel is not known to this embedding.
        """
        if channels is None or tuple(channels) == self.channels:
            elements, weights = self.get_buffer("elements"), [weight.flatten(0, 1) for weight in self.weights.values()]
        else:
            unknown = [name for name in channels if name not in self.channels]
            if unknown:
                raise ValueError(f"channels {unknown} are not known to this encoder; it knows {list(self.channels)}")
            elements = torch.tensor(self._elements(channels), device=patches.device)
            weights = [self.kernel(name) for size in sorted(set(self.footprints)) for name in channels if name in self.members(size)]
        return F.linear(patches.flatten(2).index_select(2, elements), torch.cat(weights).t(), self.bias)

    def kernel(self, channel: str) -> Float[Tensor, "measurement width"]:
        """Weights of one channel."""
        size = self.footprints[self.channels.index(channel)]
        weight: Tensor = self.weights[f"f{size}"]
        return weight[self.members(size).index(channel)]

    def _elements(self, channels: Sequence[str]) -> list[int]:
        """Elements of a token with these channels, in the order of the weights: by footprint, then channel."""
        voxels = math.prod(self.patch)
        found = []
        for size in sorted(set(self.footprints)):
            own = sorted(set(block_starts(self.patch, size)))
            members = set(self.members(size))
            found += [number * voxels + voxel for number, name in enumerate(channels) if name in members for voxel in own]
        return found
