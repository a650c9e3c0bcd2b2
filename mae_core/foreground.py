"""Voxels that crops are to hold: labelled ones of rare classes, which a crop that is placed anywhere seldom meets."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

from mae_core.masking import STREAM_FOREGROUND, Sample, counter_below, counter_bits, counter_share


@dataclass(frozen=True)
class Foreground:
    """Which crops are placed on a labelled voxel, and on one of which classes (Isensee et al. 2021, oversampling of foreground).

    Attributes:
        fraction: Share of the samples.
        classes: Numbers of the classes that are no background.
    """

    fraction: float
    classes: tuple[int, ...]

    def voxels(
        self,
        drawn: tuple[Sample, int],
        labels: Int[Tensor, "tile *space"],
        quality: UInt8[Tensor, "tile *space"],
        no_value: int,
        tile: Int[Tensor, " batch"] | None,
        reach: Int[Tensor, "batch axis"],
    ) -> tuple[Int[Tensor, "batch axis"], Bool[Tensor, " batch"]]:
        """A voxel for each sample, and which samples have one: those that are drawn and whose tile holds one of the classes.

        The classes that a tile holds are equally likely, then the voxels of the class. It depends on the sample's name and tile alone.

        Args:
            drawn: What names the samples, and the seed.
            labels: Class numbers, in main memory, where those of the drawn samples are looked at.
            quality: Flags.
            no_value: Flags under which a voxel counts nowhere.
            tile: Which of the tiles each sample is of; None: a tile each, in order.
            reach: Voxels per axis that crops of the sample can hold, from the tile's first on.
        """
        sample, seed = drawn
        names = sample.words(reach.device)
        voxel, found = torch.zeros_like(reach), torch.zeros(len(reach), dtype=torch.bool)
        picks = counter_bits(seed, STREAM_FOREGROUND, *names, torch.arange(1, 3)).tolist()
        for number in (counter_share(seed, STREAM_FOREGROUND, *names, 0)[:, 0] < self.fraction).nonzero()[:, 0].tolist():
            place = number if tile is None else int(tile[number])
            region = (place, *(slice(0, size) for size in reach[number].tolist()))
            here, counted = labels[region], (quality[region] & no_value) == 0
            every = [((here == value) & counted).flatten().nonzero()[:, 0] for value in self.classes]
            there = [places for places in every if len(places)]
            if there:
                which, where = picks[number]
                places = there[which % len(there)]
                voxel[number] = torch.stack(torch.unravel_index(places[where % len(places)], here.shape))
                found[number] = True
        return voxel, found


def origins_holding(
    voxel: Int[Tensor, "batch axis"],
    inside: Int[Tensor, "*batch axis"],
    room: Int[Tensor, "batch axis"],
    block: Int[Tensor, " axis"],
    drawn: tuple[Sample, int],
) -> Int[Tensor, "batch axis"]:
    """First voxels of crops that hold a voxel each, equally likely among the multiples of `block` up to `room` blocks.

    Args:
        voxel: What they are to hold, not farther than such crops reach.
        inside: Size of the crops.
        room: Blocks that a crop can begin after, at most.
        block: Voxels.
        drawn: What names the samples, and the seed.
    """
    sample, seed = drawn
    first = ((voxel - inside) // block + 1).clamp(min=0)
    last = torch.minimum(voxel // block, room)
    axes = torch.arange(3, 3 + voxel.shape[1])
    return (first + counter_below(last - first + 1, seed, STREAM_FOREGROUND, *sample.words(voxel.device), axes)) * block
