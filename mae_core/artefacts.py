"""Crops as a worse scanner would have given them: bias field, contrast, noise, ghosts, stripes and thick slices; any number of axes.

What is drawn depends on the sample alone. Effects that are of intensities work above the value of no signal (a stored zero), so that air
stays air. Voxels that do not count (air, padding, what holds no value) and absent channels are not touched.

The input of a pretraining and its target are degraded alike: what is predicted is what would be seen, not a clean scan that nobody has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from mae_core.masking import STREAM_ARTEFACT, Sample, counter_share
from mae_core.nd import per_channel
from mae_core.settings import Settings

MOST_DRAWN = 64
"""Numbers that may be drawn for an effect and a sample, beside those of voxels."""
BIAS_TERMS = 2
"""Highest power of a coordinate in the logarithm of a bias field."""
CENTRE_FRACTION = 0.05
"""Share of the lines in k-space around its middle that ghosts leave as they are; without it brightness itself would change."""


class ArtefactSettings(Settings):
    """How often each effect is seen, per sample, and how strong it is at most. For scans of one to three axes; off by default."""

    bias_field: float = Field(0.0, ge=0, le=1, description="Chance of a smooth change of brightness over the crop, as of a coil")
    bias_strength: float = Field(0.3, gt=0, le=1, description="Most that its logarithm differs from 0")
    gamma: float = Field(0.0, ge=0, le=1, description="Chance of another contrast: a power of the share of the brightest voxel")
    gamma_range: tuple[float, float] = Field((0.7, 1.5), description="That the power lies in")
    noise: float = Field(0.0, ge=0, le=1, description="Chance of Rician noise, which is what the magnitude of a noisy signal has")
    noise_strength: float = Field(0.2, gt=0, le=2, description="Most of its deviation, in standard deviations of the channel")
    ghosting: float = Field(0.0, ge=0, le=1, description="Chance of ghosts along an axis, as of breathing or a pulse")
    ghosting_strength: float = Field(0.5, gt=0, le=1, description="Most that every n-th line of k-space is weakened by")
    spike: float = Field(0.0, ge=0, le=1, description="Chance of stripes through the crop, as of a spike in k-space")
    spike_strength: float = Field(0.3, gt=0, le=2, description="Most of their height, in standard deviations of the channel")
    low_resolution: float = Field(0.0, ge=0, le=1, description="Chance of thick slices: blocks of voxels along one axis, and back")
    low_resolution_factor: float = Field(4.0, gt=1, le=16, description="Most that a slice is thicker by")

    @property
    def is_off(self) -> bool:
        """Whether no effect is ever seen."""
        return not any(getattr(self, name) for name in EFFECTS)


@dataclass(frozen=True)
class Crops:
    """What effects see, for those samples of a batch that have one.

    Attributes:
        signal: Normalised values above that of no signal; zero where there is no value.
        valid: Where there is a value.
        drawn: Random numbers in [0, 1) `(batch, number)` of each sample.
        voxels: Draws two such numbers for each channel and voxel, `(2, batch, channel, *space)`.
    """

    signal: Float[Tensor, "batch channel *space"]
    valid: Bool[Tensor, "batch channel *space"]
    drawn: Float[Tensor, "batch number"]
    voxels: Callable[[], Tensor]

    def each(self, number: int) -> Tensor:
        """One of the numbers drawn, to be broadcast with `signal`."""
        return self.drawn[:, number].reshape(-1, *(1,) * (self.signal.ndim - 1))


def degraded(
    pixels: Float[Tensor, "batch channel *space"],
    none: Float[Tensor, "batch channel"],
    counted: Bool[Tensor, "batch *space"],
    valid: Bool[Tensor, "batch channel *space"],
    words: tuple[Sample, int],
    settings: ArtefactSettings,
) -> Float[Tensor, "batch channel *space"]:
    """Crops after the effects that each sample is given.

    Args:
        pixels: Normalised units.
        none: Value of no signal per sample and channel, in the same units.
        counted: Voxels that may change.
        valid: Voxels that hold a value, in channels that are there.
        words: The samples' names and the seed.
        settings: How often and how strong.
    """
    sample, seed = words
    base = none.reshape(*none.shape, *(1,) * (pixels.ndim - 2))
    signal = torch.where(valid, pixels - base, 0.0)
    for number, (name, effect) in enumerate(EFFECTS.items()):
        share = getattr(settings, name)
        if not share:
            continue
        drawn = _drawn(sample, seed, number, torch.arange(MOST_DRAWN))
        chosen = drawn[:, 0] < share
        if not bool(chosen.any()):
            continue
        rows = chosen.nonzero()[:, 0]
        there = rows.to(pixels.device)
        own = Sample(sample.epoch[rows], sample.tile[rows], sample.repeat[rows])
        numbers = drawn[rows, 1:].float().to(pixels.device)
        crops = Crops(signal[there], valid[there], numbers, _voxels(own, seed, number, signal[there]))
        signal = signal.index_copy(0, there, torch.where(valid[there], effect(crops, settings), 0.0))
    touched = per_channel(counted, torch.ones_like(none, dtype=torch.bool)) & valid
    return torch.where(touched, signal + base, pixels)


def _drawn(sample: Sample, seed: int, effect: int, numbers: Tensor) -> Tensor:
    return counter_share(seed, STREAM_ARTEFACT, *sample.words(numbers.device), effect, numbers)


def _voxels(sample: Sample, seed: int, effect: int, like: Tensor) -> Callable[[], Tensor]:
    def draw() -> Tensor:
        count = 2 * math.prod(like.shape[1:])
        numbers = torch.arange(MOST_DRAWN, MOST_DRAWN + count, device=like.device)
        return _drawn(sample, seed, effect, numbers).float().reshape(len(like), 2, *like.shape[1:]).transpose(0, 1)

    return draw


def _bias_field(crops: Crops, settings: ArtefactSettings) -> Tensor:
    """Brightness times the exponential of a polynomial whose largest value in the crop is the one drawn."""
    space = crops.signal.shape[2:]
    field = torch.zeros(len(crops.signal), 1, *space, device=crops.signal.device)
    for number, powers in enumerate(_powers(len(space))):
        term = torch.ones(space, device=crops.signal.device)
        for axis, power in enumerate(powers):
            line = torch.linspace(-1, 1, space[axis], device=crops.signal.device) if space[axis] > 1 else torch.zeros(1, device=term.device)
            term = term * (line**power).reshape(*(-1 if own == axis else 1 for own in range(len(space))))
        field = field + (2 * crops.each(number + 1) - 1) * term
    peak = field.abs().flatten(1).amax(dim=1).clamp(min=1e-6).reshape(-1, *(1,) * (field.ndim - 1))
    return crops.signal * torch.exp(settings.bias_strength * crops.each(0) * field / peak)


def _powers(axes: int) -> Iterator[tuple[int, ...]]:
    """Powers of each coordinate in the terms of a polynomial of degree `BIAS_TERMS`, without the constant."""
    every = torch.cartesian_prod(*(torch.arange(BIAS_TERMS + 1),) * axes).reshape(-1, axes).tolist()
    return (tuple(powers) for powers in every if 0 < sum(powers) <= BIAS_TERMS)


def _gamma(crops: Crops, settings: ArtefactSettings) -> Tensor:
    """The brightest voxel of each channel stays, the others move between it and no signal."""
    low, high = settings.gamma_range
    power = torch.exp(math.log(low) + (math.log(high) - math.log(low)) * crops.each(0))
    size = crops.signal.abs()
    most = size.flatten(2).amax(dim=2).clamp(min=1e-6).reshape(*size.shape[:2], *(1,) * (size.ndim - 2))
    return crops.signal.sign() * most * (size / most) ** power


def _noise(crops: Crops, settings: ArtefactSettings) -> Tensor:
    """Magnitude of the signal with normal noise in its real and its imaginary part (Box and Muller's transform).

    Values below no signal, which interpolation leaves behind, have no magnitude and take the real part alone.
    """
    one, two = crops.voxels()
    radius = torch.sqrt(-2 * torch.log1p(-one)) * settings.noise_strength * crops.each(0)
    real, imaginary = crops.signal + radius * torch.cos(2 * math.pi * two), radius * torch.sin(2 * math.pi * two)
    return torch.where(crops.signal < 0, real, torch.sqrt(real**2 + imaginary**2))


def _ghosting(crops: Crops, settings: ArtefactSettings) -> Tensor:
    """Every n-th line of k-space along an axis weakened, but for those around its middle: n copies, shifted along the axis."""
    result = crops.signal
    for axis, own in _along(crops):
        size = crops.signal.shape[axis]
        line = torch.fft.fftfreq(size, device=crops.signal.device) * size
        every = (2 + torch.floor(crops.each(1) * 3)).flatten()[:, None]
        hit = (line % every == 1) & (line.abs() > CENTRE_FRACTION * size)
        weight = 1 - hit * settings.ghosting_strength * crops.each(2).flatten()[:, None]
        shape = (len(weight), *(size if other == axis else 1 for other in range(1, crops.signal.ndim)))
        ghosts = torch.fft.ifft(torch.fft.fft(crops.signal, dim=axis) * weight.reshape(shape), dim=axis).real
        result = torch.where(own, ghosts, result)
    return result


def _spike(crops: Crops, settings: ArtefactSettings) -> Tensor:
    """A wave through the whole crop, of two to eight periods along the axes."""
    phase = 2 * math.pi * crops.each(1)
    for axis in range(2, crops.signal.ndim):
        size = crops.signal.shape[axis]
        place = torch.arange(size, device=crops.signal.device) / size
        shape = tuple(size if other == axis else 1 for other in range(crops.signal.ndim))
        phase = phase + 2 * math.pi * torch.floor(2 + 7 * crops.each(axis)) * place.reshape(shape)
    return crops.signal + settings.spike_strength * crops.each(0) * torch.cos(phase)


def _low_resolution(crops: Crops, settings: ArtefactSettings) -> Tensor:
    """Means of blocks along one axis, and straight lines between their middles; voxels without a value have no weight."""
    result, weight = crops.signal, crops.valid.to(crops.signal.dtype)
    for axis, own in _along(crops):
        matrix = _thick(crops.signal.shape[axis], 1 + (settings.low_resolution_factor - 1) * crops.each(1).flatten())
        known = _times(matrix, weight, axis)
        result = torch.where(own & (known > 0.25), _times(matrix, crops.signal * weight, axis) / known.clamp(min=0.25), result)
    return result


def _thick(size: int, factor: Float[Tensor, " batch"]) -> Float[Tensor, "batch size size"]:
    """Matrices that take the means of `factor` voxels and lay straight lines between them."""
    place = torch.arange(size, device=factor.device, dtype=torch.float32)
    count = (size / factor).ceil().clamp(min=1)
    step = size / count
    block = torch.floor((place + 0.5) / step[:, None]).clamp(max=size - 1).long()
    down = torch.zeros(len(factor), size, size, device=factor.device)
    down.scatter_(1, block[:, None, :], 1.0)
    down = down / down.sum(dim=2, keepdim=True).clamp(min=1)
    at = ((place + 0.5) / step[:, None] - 0.5).clamp(min=0)
    at = torch.minimum(at, count[:, None] - 1)
    low = at.floor().long()
    high = torch.minimum(low + 1, (count[:, None] - 1).long())
    up = torch.zeros(len(factor), size, size, device=factor.device)
    up.scatter_add_(2, low[:, :, None], (1 - (at - low))[:, :, None])
    up.scatter_add_(2, high[:, :, None], (at - low)[:, :, None])
    return up @ down


def _times(matrix: Tensor, array: Tensor, axis: int) -> Tensor:
    """Each sample's matrix applied along an axis."""
    moved = array.movedim(axis, -1)
    flat = moved.flatten(1, -2) @ matrix.transpose(1, 2)
    return flat.reshape(moved.shape).movedim(-1, axis)


def _along(crops: Crops) -> Iterator[tuple[int, Tensor]]:
    """Each axis of space that some sample has drawn, and which samples did."""
    axes = crops.signal.ndim - 2
    drawn = torch.floor(crops.each(0) * axes)
    for axis in range(axes):
        own = drawn == axis
        if bool(own.any()):
            yield axis + 2, own


EFFECTS: dict[str, Callable[[Crops, ArtefactSettings], Tensor]] = {
    "low_resolution": _low_resolution,
    "bias_field": _bias_field,
    "gamma": _gamma,
    "ghosting": _ghosting,
    "spike": _spike,
    "noise": _noise,
}
"""By the setting that holds the chance of each, in the order in which they are done: noise comes last, as in a scanner."""
