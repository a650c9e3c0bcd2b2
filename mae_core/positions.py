"""Where a token is: codes that are added to tokens, for any number of axes, in tokens or in metres and millimetres."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mae_core.nd import constant, take
from mae_core.settings import Settings


class PositionSettings(Settings):
    """How a token is told its place."""

    kind: Literal["sincos", "learned"] = Field("sincos", description="Fixed sine-cosine codes, or a table of weights over `grid`")
    unit: Literal["token", "physical"] = Field(
        "token", description="physical: distances in the data's own unit, so that one encoder serves several resolutions"
    )
    reference: float = Field(1.0, gt=0, description="With unit=physical: metres or millimetres that count as one token")
    axis_order: Literal["array", "reversed"] = Field(
        "array", description="Which axis has the first share of the code; published 2-D weights have the last axis first"
    )
    grid: tuple[int, ...] = Field((), max_length=3, description="With kind=learned: tokens per axis of the table; interpolated to others")


def sincos_codes(
    coordinates: Float[Tensor, "... axes"], dim: int, order: Literal["array", "reversed"] = "array"
) -> Float[Tensor, "... dim"]:
    """Sine-cosine codes of places given in tokens, whole or not, in the dtype of `coordinates`.

    The width is shared equally among the axes, each getting sines then cosines of the wave lengths of Vaswani et al.
    (2017). What is left over when `dim` is not a multiple of twice the number of axes stays zero.

    Raises:
        ValueError: The width is too small.
    """
    axes = coordinates.shape[-1]
    pairs = dim // (2 * axes)
    if pairs == 0:
        raise ValueError(f"a width of {dim} is too small for positions on {axes} axes; use at least {2 * axes}")
    rates = 1.0 / 10000 ** (torch.arange(pairs, dtype=coordinates.dtype, device=coordinates.device) / pairs)
    places = coordinates.flip(-1) if order == "reversed" else coordinates
    angles = places[..., None] * rates
    codes = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)
    return F.pad(codes, (0, dim - codes.shape[-1]))


def sincos_positions(grid: Sequence[int], dim: int, order: Literal["array", "reversed"] = "array") -> Float[Tensor, "length dim"]:
    """Codes of a whole grid in row-major order, computed in float64, returned in fp32."""
    return sincos_codes(_places(grid).double(), dim, order).float()


@constant
def cached_positions(grid: tuple[int, ...], dim: int, order: Literal["array", "reversed"], device: torch.device) -> Tensor:
    """`sincos_positions` on a device, computed once per process; not to be changed in place."""
    return _cached(grid, dim, order, device)


@lru_cache(maxsize=64)
def _cached(grid: tuple[int, ...], dim: int, order: Literal["array", "reversed"], device: torch.device) -> Tensor:
    with torch.inference_mode(mode=False):
        return sincos_positions(grid, dim, order).to(device)


class Positions(nn.Module):
    """Codes for tokens at numbers `ids` of a grid, `(batch, count, width)` in fp32."""

    def __init__(self, settings: PositionSettings, width: int) -> None:
        super().__init__()
        if settings.kind == "learned" and not settings.grid:
            raise ValueError("positions.kind=learned needs positions.grid, the tokens per axis of its table")
        if settings.kind == "learned" and settings.unit == "physical":
            raise ValueError("positions.kind=learned has no physical unit; use positions.kind=sincos with unit=physical")
        self.settings, self.width = settings, width
        if settings.kind == "learned":
            self.table_token = nn.Parameter(torch.zeros(math.prod(settings.grid), width))
            nn.init.normal_(self.table_token, std=0.02)

    def forward(
        self, ids: Int[Tensor, "batch count"], grid: Sequence[int], token_size: Float[Tensor, "batch axis"] | None = None
    ) -> Float[Tensor, "batch count width"]:
        """Codes of some tokens.

        Args:
            ids: Their numbers, row-major.
            grid: Tokens per axis.
            token_size: Physical distance between tokens along each axis; needed with `unit=physical`.

        Raises:
            ValueError: The distance is needed and missing, or the table has another number of axes.
        """
        settings = self.settings
        if settings.unit == "physical":
            if token_size is None:
                raise ValueError("positions.unit=physical needs the distance between tokens of every sample; the data give none")
            places = _places(grid).to(ids.device, non_blocking=True)[ids] * (token_size[:, None] / settings.reference)
            return sincos_codes(places.float(), self.width, settings.axis_order)
        if settings.kind == "learned":
            codes = interpolated(self.table_token, settings.grid, grid)
        else:
            codes = cached_positions(tuple(grid), self.width, settings.axis_order, ids.device)
        return take(codes[None].expand(len(ids), -1, -1), ids)


class Places(nn.Module):
    """Codes of place and, where there are several, of channel group."""

    def __init__(self, settings: PositionSettings, num_groups: int, width: int) -> None:
        super().__init__()
        self.positions = Positions(settings, width)
        if num_groups > 1:
            self.group_token = nn.Parameter(torch.empty(num_groups, width))
            nn.init.normal_(self.group_token, std=0.02)
        self.num_groups = num_groups

    def forward(
        self, ids: Int[Tensor, "batch count"], grid: Sequence[int], token_size: Tensor | None = None
    ) -> Float[Tensor, "batch count width"]:
        """Codes of tokens numbered `group · places + place`; they stay fp32, and so does the residual stream, under autocast too."""
        if self.num_groups == 1:
            return self.positions(ids, grid, token_size)  # type: ignore[no-any-return]
        num_places = math.prod(grid)
        codes: Tensor = self.positions(ids % num_places, grid, token_size) + self.group_token[ids // num_places]
        return codes


def interpolated(table: Float[Tensor, "length width"], old: Sequence[int], new: Sequence[int]) -> Float[Tensor, "count width"]:
    """A table over one grid brought to another, linearly along each axis on the real grid; the outermost tokens keep their codes.

    Raises:
        ValueError: The numbers of axes differ.
    """
    if len(old) != len(new):
        raise ValueError(f"the table of positions has {len(old)} axes {tuple(old)} and the data have {len(new)}: {tuple(new)}")
    if tuple(old) == tuple(new):
        return table
    out = table.reshape(*old, -1)
    for axis, (before, after) in enumerate(zip(old, new, strict=True)):
        place = torch.linspace(0, before - 1, after, dtype=torch.float64, device=table.device)
        low = place.floor().long().clamp(max=max(before - 2, 0))
        share = (place - low).to(table.dtype).reshape(-1, *(1,) * (out.ndim - axis - 1))
        high = (low + 1).clamp(max=before - 1)
        out = out.index_select(axis, low) * (1 - share) + out.index_select(axis, high) * share
    return out.flatten(0, -2)


def _places(grid: Sequence[int]) -> Tensor:
    return torch.cartesian_prod(*(torch.arange(size) for size in grid)).reshape(-1, len(grid))
