"""Raw tiles in the stored dtype become normalised crops on the device of the model.

Everything that is random is drawn by counter from (seed, epoch, tile, repeat), like the hidden sets.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, UInt8
from pydantic import Field, model_validator
from torch import Tensor

from mae_core.artefacts import ArtefactSettings, degraded
from mae_core.context import Context
from mae_core.foreground import Foreground, origins_holding
from mae_core.masking import (
    STREAM_CHANNEL,
    STREAM_CROP,
    STREAM_FLIP,
    STREAM_INTENSITY,
    STREAM_SCALE,
    Sample,
    counter_below,
    counter_bits,
    counter_share,
)
from mae_core.nd import block_of, per_channel
from mae_core.settings import Settings, to_plain

_SAME_SIZE = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


class AugmentSettings(Settings):
    """Augmentation; there is no colour jitter, which the paper finds to hurt."""

    flips: bool = Field(True, description="Mirror each spatial axis with probability one half")
    quarter_turns: bool = Field(False, description="Also turn the last two axes by a multiple of 90 degrees (square crops only)")
    resized_crop: tuple[float, float] | None = Field(
        None, description="Enlarge a window of this share of the crop's area or volume, such as [0.2, 1.0]; changes the resolution"
    )
    intensity: float = Field(0.0, ge=0, lt=1, description="Most that a channel is scaled and shifted by, in its standard deviations")
    channel_drop_fraction: float = Field(0.0, ge=0, lt=1, description="Chance that a sample lacks a channel; one always stays")
    artefacts: ArtefactSettings = ArtefactSettings()

    @model_validator(mode="after")
    def _in_order(self) -> AugmentSettings:
        if self.resized_crop is not None and not 0 < self.resized_crop[0] <= self.resized_crop[1] <= 1:
            raise ValueError(f"augment.resized_crop={list(self.resized_crop)} must be two rising shares in (0, 1]")
        return self


class LabelledAugmentSettings(AugmentSettings):
    """Augmentation of tiles with labels."""

    foreground_fraction: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of crops placed on a labelled voxel that is no background (class 0, or the lowest), where the tile has one",
    )


@dataclass(frozen=True)
class RawBatch:
    """Whole tiles as they are stored.

    Attributes:
        pixels: `(tile, channel, *tile_space)` in the stored dtype.
        quality: Flags `(tile, *tile_space)`; zero is good.
        labels: Class numbers `(tile, *tile_space)`, -1 where there is none; None in a store without labels.
        present: Channels that each sample has.
        scale, offset: Physical value = stored · scale + offset, per sample and channel.
        extent: Size of the real data before padding, per sample and axis.
        sample: What names the samples.
        context: What else is known of them.
        complete: No tile has a flag, padding or an absent channel.
        place: Which of the tiles each sample is of, where several crops are drawn from one; None: a tile each, in order.
    """

    pixels: Tensor
    quality: UInt8[Tensor, "tile *space"]
    labels: Tensor | None
    present: Bool[Tensor, "batch channel"]
    scale: Float[Tensor, "batch channel"]
    offset: Float[Tensor, "batch channel"]
    extent: Int[Tensor, "batch axis"]
    sample: Sample
    context: Context | None = None
    complete: bool = False
    place: Int[Tensor, " batch"] | None = None


@dataclass(frozen=True)
class Batch:
    """What a model is fed.

    Attributes:
        pixels: fp32, (physical − mean) / std per channel; zero where there is no value and in absent channels.
        quality: Flags of the crop; zero is good.
        labels: Class numbers of the crop or None.
        present: Channels that each sample has.
        sample: What names the samples.
        context: What else is known of them, after the crop has been resized.
        complete: Everything counts; known without looking.
    """

    pixels: Float[Tensor, "batch channel *space"]
    quality: UInt8[Tensor, "batch *space"]
    labels: Tensor | None
    present: Bool[Tensor, "batch channel"]
    sample: Sample
    context: Context | None = None
    complete: bool = False

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
        footprint: Voxels of the last two axes that crops begin at a multiple of, so that no measurement of a coarse channel is cut.
        one_way: Number of leading axes that are never mirrored: time has a direction.
        foreground: Crops that are placed on a labelled voxel; None: all are placed anywhere.

    Raises:
        ValueError: Crops would cut measurements, or windows are to be resized where a measurement fills several voxels.
    """

    crop: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    no_value: int
    seed: int
    augment: AugmentSettings | None
    footprint: int = 1
    one_way: int = 0
    foreground: Foreground | None = None

    def __post_init__(self) -> None:
        if any(size % part for size, part in zip(self.crop, self.block, strict=True)):
            raise ValueError(
                f"crop {self.crop} cuts measurements of {self.footprint} voxels; on the last two axes give a multiple of {self.footprint}"
            )
        if self.footprint > 1 and self.augment is not None and self.augment.resized_crop is not None:
            raise ValueError(
                "augment.resized_crop would mix neighbouring measurements of channels that are kept at their native resolution; leave it "
                "out, or prepare all channels at one resolution"
            )

    @property
    def block(self) -> tuple[int, ...]:
        """Voxels per axis that crops begin at a multiple of."""
        return block_of(len(self.crop), self.footprint)

    @property
    def plain(self) -> Normaliser:
        """The same with nothing drawn, as evaluation needs it."""
        return replace(self, augment=None)

    def facts(self) -> dict[str, Any]:
        """What makes an equal one, as JSON's types; `from_facts` reads it."""
        plain = {name: getattr(self, name) for name in ("crop", "mean", "std", "no_value", "seed", "footprint", "one_way")}
        foreground = None if self.foreground is None else asdict(self.foreground)
        return {**plain, "augment": None if self.augment is None else to_plain(self.augment), "foreground": foreground}

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> Normaliser:
        """The normaliser that `facts` tells of."""
        own, placed = dict(facts), facts["foreground"]
        own |= {name: tuple(own[name]) for name in ("crop", "mean", "std")}
        augment = None if own["augment"] is None else LabelledAugmentSettings.model_validate(own["augment"])
        foreground = None if placed is None else Foreground(placed["fraction"], tuple(placed["classes"]))
        return cls(**{**own, "augment": augment, "foreground": foreground})

    def __call__(self, raw: RawBatch, device: torch.device) -> Batch:
        """A batch on `device`; tiles travel there in their stored dtype."""
        zoom = self.zoom(raw)
        index = self.index(raw, zoom)
        near = [(part if zoom is None else part.round().long()).to(device, non_blocking=True) for part in index]
        present = self.present(raw).to(device, non_blocking=True)
        stored = raw.pixels.to(device, non_blocking=True)
        flags = raw.quality.to(device, non_blocking=True)[:, None]
        tile = None if raw.place is None else raw.place.to(device, non_blocking=True)
        quality = pick_voxels(flags, near, tile)[:, 0]
        keep = per_channel((quality & self.no_value) == 0, present)
        if zoom is None:
            pixels = normalise(pick_voxels(stored, near, tile), raw.scale, raw.offset, self.mean, self.std)
        else:
            stored, flags = _tile_each(stored, tile), _tile_each(flags, tile)
            whole = normalise(stored, raw.scale, raw.offset, self.mean, self.std)
            pixels = interpolate(whole, (flags & self.no_value) == 0, [part.to(device, non_blocking=True) for part in index])
        if self.augment is not None and self.augment.intensity:
            pixels = self._changed(pixels, raw.sample, self.augment.intensity)
        if self.augment is not None and not self.augment.artefacts.is_off:
            none = self.no_signal(raw).to(device, non_blocking=True)
            pixels = degraded(pixels, none, quality == 0, keep, (raw.sample, self.seed), self.augment.artefacts)
        labels = None if raw.labels is None else pick_voxels(raw.labels.to(device, non_blocking=True)[:, None], near, tile)[:, 0].long()
        context = None if raw.context is None else _zoomed(raw.context, zoom).to(device)
        complete = raw.complete and (self.augment is None or not self.augment.channel_drop_fraction)
        return Batch(torch.where(keep, pixels, 0.0), quality, labels, present, raw.sample, context, complete)

    def origins(self, raw: RawBatch, zoom: Tensor | None = None) -> Tensor:
        """First voxel of each crop `(batch, axis)`: anywhere that keeps it on real data as far as it reaches, and measurements whole.

        A share of them is placed anywhere about a labelled voxel, if that is wanted.

        Raises:
            ValueError: That is wanted and there are no labels.
        """
        size = torch.tensor(self.crop)
        window = size if zoom is None else (size * zoom[:, None]).ceil().long()
        block = torch.tensor(self.block)
        room = (raw.extent - window).clamp(min=0) // block
        if self.augment is None:
            return room // 2 * block
        origins = counter_below(room + 1, self.seed, STREAM_CROP, *raw.sample.words(room.device), torch.arange(len(self.crop))) * block
        if self.foreground is None:
            return origins
        if raw.labels is None:
            raise ValueError("crops are to be placed on labels and the tiles have none; leave out augment.foreground_fraction")
        # A window that is resized shows every voxel that lies in it whole; of a last one that it cuts, the nearest may be another.
        inside = size if zoom is None else (size * zoom[:, None]).floor().long().clamp(min=1)
        drawn = raw.sample, self.seed
        voxel, found = self.foreground.voxels(drawn, raw.labels, raw.quality, self.no_value, raw.place, room * block + inside)
        return torch.where(found[:, None], origins_holding(voxel, inside, room, block, drawn), origins)

    def zoom(self, raw: RawBatch) -> Float[Tensor, " batch"] | None:
        """Side of each sample's window over that of the crop, or None where windows are not resized."""
        if self.augment is None or self.augment.resized_crop is None:
            return None
        low, high = self.augment.resized_crop
        drawn = counter_share(self.seed, STREAM_SCALE, *raw.sample.words(raw.extent.device))[:, 0]
        share: Tensor = (low + (high - low) * drawn) ** (1 / len(self.crop))
        return share

    def index(self, raw: RawBatch, zoom: Tensor | None) -> list[Tensor]:
        """Where each voxel of the crop comes from: one tensor per axis that broadcasts to `(batch, *crop)`, in voxels or parts of them."""
        origins, axes = self.origins(raw, zoom), len(self.crop)
        augment = self.augment or AugmentSettings(flips=False)
        bits = counter_bits(self.seed, STREAM_FLIP, *raw.sample.words(origins.device))[:, 0]
        lines = []
        for axis, size in enumerate(self.crop):
            steps = torch.arange(size).expand(len(origins), -1)
            if zoom is not None:
                steps = (steps + 0.5) * zoom[:, None] - 0.5
            if augment.flips and axis >= self.one_way:
                steps = torch.where((bits >> axis & 1).bool()[:, None], steps.flip(1), steps)
            lines.append((origins[:, axis, None] + steps).clamp(min=0))
        placed = [line.reshape(len(line), *(-1 if other == axis else 1 for other in range(axes))) for axis, line in enumerate(lines)]
        if augment.quarter_turns and axes > 1 and self.crop[-1] == self.crop[-2]:
            turns = (bits >> 8 & 3).reshape(-1, *(1,) * axes)
            row = torch.where(turns >= 2, placed[-2].flip(-2), placed[-2])
            column = torch.where((turns == 1) | (turns == 2), placed[-1].flip(-1), placed[-1])
            odd = (turns & 1).bool()
            placed[-2] = torch.where(odd, row.transpose(-1, -2), row)
            placed[-1] = torch.where(odd, column.transpose(-1, -2), column)
        return placed

    def present(self, raw: RawBatch) -> Bool[Tensor, "batch channel"]:
        """Channels that each sample has, less those that are dropped."""
        if self.augment is None or not self.augment.channel_drop_fraction:
            return raw.present
        drawn = counter_share(
            self.seed, STREAM_CHANNEL, *raw.sample.words(raw.present.device), torch.arange(raw.present.shape[1])
        ).masked_fill(~raw.present, -1.0)
        last = drawn == drawn.amax(dim=1, keepdim=True)
        return raw.present & ((drawn >= self.augment.channel_drop_fraction) | last)

    def no_signal(self, raw: RawBatch) -> Float[Tensor, "batch channel"]:
        """What a stored zero is, in normalised units."""
        return (raw.offset - torch.tensor(self.mean, dtype=raw.offset.dtype)) / torch.tensor(self.std, dtype=raw.offset.dtype)

    def _changed(self, pixels: Tensor, sample: Sample, most: float) -> Tensor:
        """Each channel of each sample scaled by `1 ± most` and shifted by `± most`."""
        channels = torch.arange(2 * pixels.shape[1])
        drawn = (2 * counter_share(self.seed, STREAM_INTENSITY, *sample.words(channels.device), channels) - 1) * most
        gain, shift = drawn.float().to(pixels.device, non_blocking=True).reshape(len(pixels), 2, -1, *(1,) * (pixels.ndim - 2)).unbind(1)
        return pixels * (1 + gain) + shift


def pick_voxels(array: Tensor, index: Sequence[Tensor], tile: Int[Tensor, " batch"] | None = None) -> Tensor:
    """Voxels `(batch, channel, *crop)` of `(tile, channel, *space)` at whole places, as `Normaliser.index` gives them.

    Sample `n` is of tile `tile[n]`, or of tile `n` without `tile`.
    """
    if array.dtype in _SAME_SIZE:  # torch picks no unsigned integers but uint8; moving needs their bits only
        return pick_voxels(array.view(_SAME_SIZE[array.dtype]), index, tile).view(array.dtype)
    ones = (1,) * len(index)
    sample = (torch.arange(len(array), device=array.device) if tile is None else tile).reshape(-1, 1, *ones)
    channel = torch.arange(array.shape[1], device=array.device).reshape(1, -1, *ones)
    return array[(sample, channel, *(part[:, None] for part in index))]


def _tile_each(array: Tensor, tile: Int[Tensor, " batch"] | None) -> Tensor:
    """The tile of every sample, those that several samples share repeated."""
    if tile is None or array.dtype not in _SAME_SIZE:
        return array if tile is None else array[tile]
    return array.view(_SAME_SIZE[array.dtype])[tile].view(array.dtype)


def interpolate(
    array: Float[Tensor, "batch channel *space"], ok: Bool[Tensor, "batch 1 *space"], index: Sequence[Tensor]
) -> Float[Tensor, "batch channel *crop"]:
    """Linear interpolation along every axis at places in parts of a voxel, among the voxels that are ok; zero where none is."""
    corners = []
    for part, size in zip(index, array.shape[2:], strict=True):
        low = part.floor().long().clamp(0, size - 1)
        share = (part - low).clamp(0, 1).float()
        corners.append(((low, 1 - share), ((low + 1).clamp(max=size - 1), share)))
    total, weight = torch.zeros((), device=array.device), torch.zeros((), device=array.device)
    for chosen in itertools.product(*corners):
        places = [place for place, _ in chosen]
        share = torch.ones((), device=array.device)
        for _, part in chosen:
            share = share * part
        here = pick_voxels(ok, places)
        share = torch.where(here, share[:, None], 0.0)
        total = total + torch.where(here, pick_voxels(array, places), 0.0) * share
        weight = weight + share
    return total / weight.clamp(min=1e-6)


def normalise(pixels: Tensor, scale: Tensor, offset: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """fp32 `(stored · scale + offset − mean) / std` per sample and channel of `(batch, channel, *space)`."""
    shape = (*scale.shape, *(1,) * (pixels.ndim - 2))
    centre = torch.tensor(mean, dtype=torch.float64)
    width = torch.tensor(std, dtype=torch.float64)
    gain = (scale.double() / width).float().reshape(shape).to(pixels.device, non_blocking=True)
    shift = ((offset.double() - centre) / width).float().reshape(shape).to(pixels.device, non_blocking=True)
    return pixels.float() * gain + shift


def _zoomed(context: Context, zoom: Tensor | None) -> Context:
    """What is known after enlarging: voxels lie closer."""
    if zoom is None:
        return context
    return replace(context, resolution=context.resolution * zoom[:, None].float(), spacing=context.spacing * zoom[:, None].float())
