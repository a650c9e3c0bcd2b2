"""Which tokens are hidden: a pure function of (seed, epoch, tile, repeat), never of worker, rank or batch order.

Random numbers come from a counter: a 64-bit hash of the numbers that name the sample (finaliser of SplitMix64, Steele
et al. 2014). The same integers give the same bits on every device, so nothing has to be stored to resume.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Int
from pydantic import Field
from torch import Tensor

from mae_core.settings import Settings, default_kind

STREAM_ORDER, STREAM_CROP, STREAM_FLIP, STREAM_HIDE, STREAM_UNIT = range(1, 6)
STREAM_DROP, STREAM_SCALE, STREAM_INTENSITY, STREAM_CHANNEL, STREAM_STEP, STREAM_WINDOW, STREAM_ARTEFACT = range(6, 13)
STREAM_FOREGROUND = 13
"""First counter of each use, so that no two uses share their numbers."""

_GOLDEN = -7046029254386353131
_MULTIPLY = (-4658895280553007687, -7723592293110705685)
_LAST = torch.iinfo(torch.int64).max
_ASPECTS = (64, 214)
"""Least and one more than the most that a block is stretched by along an axis, in 64ths: aspects up to 0.3, as BEiT's."""


class _Hiding(Settings):
    """How much is hidden."""

    mask_ratio: float = Field(0.75, gt=0, lt=1, description="Share of the valid tokens that the encoder does not see")
    final_mask_ratio: float | None = Field(None, gt=0, lt=1, description="Share at the end of the run, reached in equal stages")
    num_stages: int = Field(4, ge=2, description="Stages from the first share to the last; each has its own shapes")


class RandomHiding(_Hiding):
    """Hides a random set of tokens, all sets equally likely (He et al. 2021, section 3; the paper's best)."""

    kind: Literal["random"] = "random"


class BlockHiding(_Hiding):
    """Hides what is nearest to a few random places, in boxes of random aspect (He et al. 2021, figure 6, after BEiT)."""

    kind: Literal["block"] = "block"
    num_blocks: int = Field(1, ge=1, le=16, description="Boxes per sample; where they meet they are one")


class GridHiding(_Hiding):
    """Shows a regular lattice, shifted at random, and hides the rest (He et al. 2021, figure 6)."""

    kind: Literal["grid"] = "grid"
    period: int = Field(2, ge=2, le=8, description="Tokens between lattice places along every axis")


class TubeHiding(_Hiding):
    """Hides the same places all along an axis (Tong et al. 2022), or in all channel groups."""

    kind: Literal["tube"] = "tube"
    axis: Annotated[int, Field(ge=0, le=2)] | Literal["channels"] = Field(0, description="Spatial axis, or channels: in all groups alike")


class SliceHiding(_Hiding):
    """Hides whole slices of an axis, such as time steps, or whole channel groups."""

    kind: Literal["slice"] = "slice"
    axis: Annotated[int, Field(ge=0, le=2)] | Literal["channels"] = Field(0, description="Spatial axis, or channels: whole groups")


AnyHiding = RandomHiding | BlockHiding | GridHiding | TubeHiding | SliceHiding
HidingSettings = Annotated[AnyHiding, Field(discriminator="kind"), default_kind("random")]


@dataclass(frozen=True)
class Sample:
    """The numbers that name a batch's samples, each `(batch,)` int64."""

    epoch: Int[Tensor, " batch"]
    tile: Int[Tensor, " batch"]
    repeat: Int[Tensor, " batch"]

    def shuffled(self, order: Tensor) -> Sample:
        """The same names in another order."""
        return Sample(self.epoch[order], self.tile[order], self.repeat[order])

    def words(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """The numbers as columns `(batch, 1)`, to be hashed with others."""
        columns = (part.to(device, non_blocking=True)[:, None] for part in (self.epoch, self.tile, self.repeat))
        return next(columns), next(columns), next(columns)


@dataclass(frozen=True)
class HidingPlan:
    """Which tokens are shown and which are hidden, in shapes that do not depend on the data.

    A sample with fewer valid tokens than the rest uses fewer of its slots; a slot that is not used holds some token
    number and is to be ignored.

    Attributes:
        visible: Token numbers that the encoder sees, `(batch, num_visible_slots)`.
        visible_used: Which of these slots are real.
        hidden: Token numbers to be predicted, `(batch, num_hidden_slots)`.
        hidden_used: Which of these slots are real.
        full: Every slot of every sample is used, so that attention needs no exclusion.
    """

    visible: Int[Tensor, "batch visible"]
    visible_used: Bool[Tensor, "batch visible"]
    hidden: Int[Tensor, "batch hidden"]
    hidden_used: Bool[Tensor, "batch hidden"]
    full: bool


def counter_bits(seed: int, *words: Tensor | int) -> Tensor:
    """63 random bits (int64, not negative) for each combination of the broadcast `words`."""
    state = torch.as_tensor(seed, dtype=torch.int64)
    for word in words:
        state = _finalise(state * _GOLDEN + word + 1)  # the first state is a lone number, which any device takes without a copy
    return state & 0x7FFFFFFFFFFFFFFF


def counter_below(limit: Tensor, seed: int, *words: Tensor | int) -> Tensor:
    """Random whole numbers from 0 to `limit - 1` (int64; the bias of the remainder is below 2⁻⁴⁰ for our limits)."""
    return counter_bits(seed, *words) % limit


def counter_share(seed: int, *words: Tensor | int) -> Tensor:
    """Random numbers in [0, 1) in float64."""
    return (counter_bits(seed, *words) >> 10).double() * 2.0**-53


def num_kept(num_tokens: int, mask_ratio: float) -> int:
    """Tokens that stay visible: `num_tokens * (1 - mask_ratio)` rounded half up, at least 1, leaving at least 1 hidden."""
    kept = math.floor(num_tokens * (1 - mask_ratio) + 0.5 + 1e-9)
    return max(min(kept, num_tokens - 1), min(1, num_tokens))


def num_predicted(num_hidden: int, fraction: float) -> int:
    """Hidden tokens that are predicted: `num_hidden * fraction` rounded half up, at least 1 where there is any."""
    return max(math.floor(num_hidden * fraction + 0.5 + 1e-9), min(1, num_hidden))


def at_progress(settings: AnyHiding, progress: float) -> AnyHiding:
    """The settings that hold after a share of the run, in [0, 1): the mask ratio of the stage that has been reached."""
    if settings.final_mask_ratio is None:
        return settings
    stage = min(int(progress * settings.num_stages), settings.num_stages - 1) / (settings.num_stages - 1)
    ratio = settings.mask_ratio + stage * (settings.final_mask_ratio - settings.mask_ratio)
    return settings.model_copy(update={"mask_ratio": ratio})


def hide(
    valid: Bool[Tensor, "batch length"],
    grid: Sequence[int],
    settings: AnyHiding,
    seed: int,
    sample: Sample,
    full: bool | None = None,
) -> HidingPlan:
    """A plan for each sample of a batch.

    Whatever the kind, exactly `num_kept` of a sample's valid tokens are shown; where that cuts a tube, a slice, a box
    or a lattice, the tokens of the cut one are drawn at random.

    Args:
        valid: Which tokens there are.
        grid: Channel groups (1 where there are none), then tokens per axis; their product is the length.
        settings: Kind and ratio.
        seed: Of the run.
        sample: What names the samples.
        full: Whether every token of every sample is valid, where the caller knows it; None looks, which waits for the device.
    """
    length = valid.shape[1]
    if math.prod(grid) != length:
        raise ValueError(f"grid {tuple(grid)} holds {math.prod(grid)} tokens and valid has {length}")
    names = sample.words(valid.device)
    drawn = counter_bits(seed, STREAM_HIDE, *names, torch.arange(length, device=valid.device))
    order = torch.argsort(torch.where(valid, drawn, _LAST), dim=1, stable=True)
    units = hiding_order(settings, grid, seed, names)
    if units is not None:
        ranks = torch.gather(torch.where(valid, units, _LAST), 1, order)
        order = torch.gather(order, 1, torch.argsort(ranks, dim=1, stable=True))
    num_valid = valid.sum(dim=1)
    shown, kept = _kept(num_valid, settings.mask_ratio), num_kept(length, settings.mask_ratio)
    plan = _slots(order, shown, num_valid - shown, kept, length - kept, full)
    return plan if units is None else replace(plan, hidden=_shuffled(plan, drawn))


def check_hiding(settings: AnyHiding, grid: Sequence[int]) -> None:
    """Refuse a way of hiding that a grid (channel groups, then tokens per axis) has no axis for.

    Raises:
        ValueError: The message says which axes there are.
    """
    if isinstance(settings, TubeHiding | SliceHiding):
        _axis(settings.axis, grid)


def hiding_order(settings: AnyHiding, grid: Sequence[int], seed: int, names: Sequence[Tensor]) -> Int[Tensor, "batch length"] | None:
    """A rank for every token; those of lowest rank are shown first. None where all are alike.

    Raises:
        ValueError: The axis is not there.
    """
    device = names[0].device
    places = torch.cartesian_prod(*(torch.arange(size, device=device) for size in (*grid, 1)))[:, :-1]
    match settings:
        case RandomHiding():
            return None
        case TubeHiding() | SliceHiding():
            axis = _axis(settings.axis, grid)
            others = [index for index in range(len(grid)) if (index != axis) == isinstance(settings, TubeHiding)]
            unit = torch.zeros_like(places[:, 0])
            for index in others:
                unit = unit * grid[index] + places[:, index]
            return counter_bits(seed, STREAM_UNIT, *names, unit)
        case BlockHiding():
            sizes = torch.tensor(grid[1:]).to(device, non_blocking=True)
            draws = torch.arange(settings.num_blocks * len(sizes), device=device).reshape(settings.num_blocks, len(sizes))
            centre = counter_below(sizes, seed, STREAM_UNIT, *(name[..., None] for name in names), draws)
            low, high = (torch.tensor(bound).to(device, non_blocking=True) for bound in _ASPECTS)
            stretch = low + counter_below(high - low, seed, STREAM_UNIT, *(name[..., None] for name in names), draws + draws.numel())
            away = (places[None, None, :, 1:] - centre[:, :, None]).abs() * stretch[:, :, None]
            near: Tensor = -away.amax(dim=3).amin(dim=1)
            return near
        case GridHiding():
            draws = torch.arange(len(grid) - 1, device=device)
            shift = counter_below(torch.tensor(settings.period), seed, STREAM_UNIT, *names, draws)
            offset = (places[None, :, 1:] - shift[:, None]) % settings.period
            rank = torch.zeros_like(offset[..., 0])
            for index in range(len(grid) - 1):
                rank = rank * settings.period + offset[..., index]
            order: Tensor = rank + offset.sum(dim=2) % 2 * settings.period ** (len(grid) - 1)
            return order


def plan_from_hidden(hidden: Bool[Tensor, "batch length"], valid: Bool[Tensor, "batch length"] | None = None) -> HidingPlan:
    """The plan of a hidden set that is handed in (True: hidden), with as many slots as the sample that needs most."""
    valid = torch.ones_like(hidden) if valid is None else valid
    shown = (~hidden & valid).sum(dim=1)
    missing = (hidden & valid).sum(dim=1)
    order = torch.argsort((hidden.long() + 2 * (~valid).long()), dim=1, stable=True)
    return _slots(order, shown, missing, int(shown.max()), int(missing.max()))


def _axis(axis: int | str, grid: Sequence[int]) -> int:
    if axis == "channels":
        if grid[0] == 1:
            raise ValueError("hiding.axis=channels needs more than one channel group; set model.encoder.groups")
        return 0
    if int(axis) + 1 >= len(grid):
        raise ValueError(f"hiding.axis={axis} and the data have {len(grid) - 1} axes; give 0 to {len(grid) - 2}, or channels")
    return int(axis) + 1


def _kept(num_valid: Tensor, mask_ratio: float) -> Tensor:
    """`num_kept` of each sample, on the device."""
    kept = (num_valid.double() * (1 - mask_ratio) + (0.5 + 1e-9)).floor().long()
    return torch.maximum(torch.minimum(kept, num_valid - 1), num_valid.clamp(max=1))


def _shuffled(plan: HidingPlan, drawn: Tensor) -> Tensor:
    """Hidden tokens in random order, so that the first few are as good as any; unused slots stay last."""
    keys = torch.where(plan.hidden_used, torch.gather(drawn, 1, plan.hidden), _LAST)
    return torch.gather(plan.hidden, 1, torch.argsort(keys, dim=1, stable=True))


def _slots(order: Tensor, shown: Tensor, missing: Tensor, num_visible: int, num_hidden: int, full: bool | None = None) -> HidingPlan:
    length = order.shape[1]
    slot = torch.arange(length, device=order.device)
    behind = (shown[:, None] + slot[None, :num_hidden]).clamp(max=length - 1)
    visible_used = slot[None, :num_visible] < shown[:, None]
    hidden_used = slot[None, :num_hidden] < missing[:, None]
    return HidingPlan(
        visible=order[:, :num_visible],
        visible_used=visible_used,
        hidden=torch.gather(order, 1, behind),
        hidden_used=hidden_used,
        full=bool(visible_used.all()) and bool(hidden_used.all()) if full is None else full,
    )


def _finalise(state: Tensor) -> Tensor:
    state = (state ^ _shift(state, 30)) * _MULTIPLY[0]
    state = (state ^ _shift(state, 27)) * _MULTIPLY[1]
    return state ^ _shift(state, 31)


def _shift(state: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; torch shifts int64 arithmetically."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)
