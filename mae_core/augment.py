"""Raw tiles in the stored dtype become normalised crops on the device of the model.

Crop origins and flips are drawn by counter from (seed, epoch, tile, repeat), like the hidden sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, UInt8
from pydantic import Field
from torch import Tensor

from mae_core.masking import STREAM_CROP, STREAM_FLIP, counter_below, counter_bits
from mae_core.settings import Settings

_SAME_SIZE = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


class AugmentSettings(Settings):
    """Geometric augmentation; there is no colour jitter, which the paper finds to hurt."""

    flips: bool = Field(True, description="Mirror each spatial axis with probability one half")
    quarter_turns: bool = Field(False, description="Also turn the last two axes by a multiple of 90 degrees (square crops only)")


@dataclass(frozen=True)
class Sample:
    """The numbers that name a batch's samples, each `(batch,)` int64."""

    epoch: Int[Tensor, " batch"]
    tile: Int[Tensor, " batch"]
    repeat: Int[Tensor, " batch"]

    def shuffled(self, order: Tensor) -> Sample:
        """The same names in another order."""
        return Sample(self.epoch[order], self.tile[order], self.repeat[order])


@dataclass(frozen=True)
class RawBatch:
    """Whole tiles as they are stored.

    Attributes:
        pixels: `(batch, channel, *tile_space)` in the stored dtype.
        quality: Flags `(batch, *tile_space)`; zero is good.
        labels: Class numbers `(batch, *tile_space)`, -1 where there is none; None in a store without labels.
        present: Channels that each sample has.
        scale, offset: Physical value = stored · scale + offset, per sample and channel.
        extent: Size of the real data before padding, per sample and axis.
        sample: What names the samples.
    """

    pixels: Tensor
    quality: UInt8[Tensor, "batch *space"]
    labels: Tensor | None
    present: Bool[Tensor, "batch channel"]
    scale: Float[Tensor, "batch channel"]
    offset: Float[Tensor, "batch channel"]
    extent: Int[Tensor, "batch axis"]
    sample: Sample


@dataclass(frozen=True)
class Batch:
    """What a model is fed.

    Attributes:
        pixels: fp32, (physical − mean) / std per channel; zero where there is no value and in absent channels.
        quality: Flags of the crop; zero is good.
        labels: Class numbers of the crop or None.
        present: Channels that each sample has.
        sample: What names the samples.
    """

    pixels: Float[Tensor, "batch channel *space"]
    quality: UInt8[Tensor, "batch *space"]
    labels: Tensor | None
    present: Bool[Tensor, "batch channel"]
    sample: Sample

    @property
    def counted(self) -> Tensor:
        """Voxels without any flag, `(batch, *space)`."""
        return self.quality == 0


@dataclass(frozen=True)
class Normaliser:
    """Makes batches: crop, flip, scale, normalise, put zero where there is no value.

    Attributes:
        crop: Voxels per axis of what the model is fed; at most the tile's.
        mean, std: Statistics of physical values per channel.
        no_value: Quality bits under which a stored value means nothing.
        seed: Of crops and flips.
        augment: What is drawn; None gives the crop at the centre of the real data, unturned.
    """

    crop: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    no_value: int
    seed: int
    augment: AugmentSettings | None

    def __call__(self, raw: RawBatch, device: torch.device) -> Batch:
        """A batch on `device`; tiles travel there in their stored dtype."""
        origins = self.origins(raw).tolist()
        arrays = [raw.pixels.to(device, non_blocking=True), raw.quality.to(device, non_blocking=True)[:, None]]
        if raw.labels is not None:
            arrays.append(raw.labels.to(device, non_blocking=True)[:, None])
        cropped = [torch.stack([_cut(part[i], origins[i], self.crop) for i in range(len(part))]) for part in arrays]
        if self.augment is not None:
            cropped = self._turn(cropped, raw.sample, self.augment)
        pixels = normalise(cropped[0], raw.scale, raw.offset, self.mean, self.std)
        quality, present = cropped[1][:, 0], raw.present.to(device)
        keep = ((quality & self.no_value) == 0)[:, None] & present.reshape(*present.shape, *(1,) * len(self.crop))
        labels = cropped[2][:, 0].long() if raw.labels is not None else None
        return Batch(torch.where(keep, pixels, 0.0), quality, labels, present, raw.sample)

    def origins(self, raw: RawBatch) -> Tensor:
        """First voxel of each crop `(batch, axis)`: anywhere that keeps the crop on real data as far as it reaches."""
        room = (raw.extent - torch.tensor(self.crop)).clamp(min=0)
        if self.augment is None:
            return room // 2
        names = (part[:, None] for part in (raw.sample.epoch, raw.sample.tile, raw.sample.repeat))
        return counter_below(room + 1, self.seed, STREAM_CROP, *names, torch.arange(len(self.crop)))

    def _turn(self, arrays: list[Tensor], sample: Sample, augment: AugmentSettings) -> list[Tensor]:
        bits = counter_bits(self.seed, STREAM_FLIP, sample.epoch, sample.tile, sample.repeat).tolist()
        return [torch.stack([self._turned(item, number, augment) for item, number in zip(array, bits, strict=True)]) for array in arrays]

    def _turned(self, item: Tensor, bits: int, augment: AugmentSettings) -> Tensor:
        if item.dtype in _SAME_SIZE:  # torch turns no unsigned integers but uint8; moving needs their bits only
            return self._turned(item.view(_SAME_SIZE[item.dtype]), bits, augment).view(item.dtype)
        axes = [1 + axis for axis in range(len(self.crop)) if augment.flips and bits >> axis & 1]
        flipped = item.flip(axes) if axes else item
        square = len(self.crop) > 1 and self.crop[-1] == self.crop[-2]
        return torch.rot90(flipped, bits >> 8 & 3, (-2, -1)) if augment.quarter_turns and square else flipped


def normalise(pixels: Tensor, scale: Tensor, offset: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """fp32 `(stored · scale + offset − mean) / std` per sample and channel of `(batch, channel, *space)`."""
    shape = (*scale.shape, *(1,) * (pixels.ndim - 2))
    centre = torch.tensor(mean, dtype=torch.float64)
    width = torch.tensor(std, dtype=torch.float64)
    gain = (scale.double() / width).float().reshape(shape).to(pixels.device)
    shift = ((offset.double() - centre) / width).float().reshape(shape).to(pixels.device)
    return pixels.float() * gain + shift


def _cut(array: Tensor, origin: Sequence[int], size: Sequence[int]) -> Tensor:
    return array[(slice(None), *(slice(start, start + length) for start, length in zip(origin, size, strict=True)))]
