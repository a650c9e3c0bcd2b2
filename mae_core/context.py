"""What is known of a sample besides its voxels: when, where and how fine; each may be missing, and each can be dropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from mae_core.masking import STREAM_DROP, Sample, counter_share
from mae_core.settings import Settings

Kind = Literal["day_of_year", "year", "place", "resolution"]


class ContextSettings(Settings):
    """What is told to the encoder."""

    kinds: tuple[Kind, ...] = Field((), description="Any of day_of_year, year, place and resolution; what a sample lacks adds nothing")
    drop_fraction: float = Field(0.1, ge=0, lt=1, description="Chance that a kind is withheld from a training sample")


@dataclass(frozen=True)
class Context:
    """Facts of a batch's samples; NaN where one is not known.

    Attributes:
        day_of_year: 1 to 366, in UTC.
        year: Such as 2021.
        latitude, longitude: Degrees.
        resolution: Distance between voxels along each axis, in metres or millimetres, as the embedding is told it.
        spacing: The same for positions in physical units, which need it always.
    """

    day_of_year: Float[Tensor, " batch"]
    year: Float[Tensor, " batch"]
    latitude: Float[Tensor, " batch"]
    longitude: Float[Tensor, " batch"]
    resolution: Float[Tensor, "batch axis"]
    spacing: Float[Tensor, "batch axis"]

    def to(self, device: torch.device) -> Context:
        """The same on a device."""
        return Context(*(getattr(self, name).to(device, non_blocking=True) for name in self.__dataclass_fields__))


def only_spacing(spacing: Float[Tensor, "batch axis"]) -> Context:
    """A context of which nothing but the distance between voxels is known."""
    unknown = torch.full_like(spacing[:, 0], torch.nan)
    return Context(unknown, unknown, unknown, unknown, spacing, spacing)


def days_and_years(times: Sequence[str]) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Day of the year and year of times in ISO 8601, UTC where they do not say; NaN for those that are empty.

    Raises:
        ValueError: A time is none.
    """
    pairs = torch.tensor([day_and_year(time) for time in times], dtype=torch.float32).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


@lru_cache(maxsize=1 << 16)
def day_and_year(time: str) -> tuple[float, float]:
    """Day of the year and year of one time."""
    if not time:
        return float("nan"), float("nan")
    try:
        moment = datetime.fromisoformat(time)
    except ValueError as error:
        raise ValueError(f"{time!r} is no time in ISO 8601, such as 2020-02-23T03:27:39Z") from error
    moment = moment.astimezone(UTC) if moment.tzinfo else moment
    return float(moment.timetuple().tm_yday), float(moment.year)


def metres_per_degree(latitude: NDArray[np.float64]) -> NDArray[np.float64]:
    """Metres on the ground of a degree of longitude and of one of latitude, `(…, 2)`, on the ellipsoid of WGS 84."""
    north = np.deg2rad(latitude)
    shape = 1 - 6.694379990141e-3 * np.sin(north) ** 2
    east = 6_378_137.0 / np.sqrt(shape) * np.cos(north)
    return np.deg2rad(np.stack([east, 6_378_137.0 * (1 - 6.694379990141e-3) / shape**1.5], axis=-1))


def dropped(context: Context, settings: ContextSettings, seed: int, sample: Sample) -> Context:
    """Each kind withheld from each sample with the chance that is set, by counter.

    What is withheld is as if it had never been known, bit for bit.
    """
    kinds = len(settings.kinds)
    if not kinds or settings.drop_fraction == 0:
        return context
    device = context.year.device
    drawn = counter_share(seed, STREAM_DROP, *sample.words(device), torch.arange(kinds, device=device))
    out = context
    for number, kind in enumerate(settings.kinds):
        gone = drawn[:, number] < settings.drop_fraction
        names = {"place": ("latitude", "longitude")}.get(kind, (kind,))
        for name in names:
            value = getattr(out, name)
            out = replace(out, **{name: torch.where(gone.reshape(-1, *(1,) * (value.ndim - 1)), torch.nan, value)})
    return out


class ContextEmbedding(nn.Module):
    """Sum over the kinds that are known of one linear map each, `(batch, width)`; zero where nothing is known."""

    def __init__(self, settings: ContextSettings, axes: int, width: int) -> None:
        super().__init__()
        self.settings = settings
        sizes = {"day_of_year": 2, "year": 1, "place": 3, "resolution": axes}
        self.maps = nn.ModuleDict({str(kind): nn.Linear(sizes[kind], width) for kind in settings.kinds})
        for name, weight in self.named_parameters():
            nn.init.zeros_(weight) if name.endswith("bias") else nn.init.normal_(weight, std=0.02)

    def forward(self, context: Context) -> Float[Tensor, "batch width"]:
        """The embedding of each sample's facts."""
        total: Tensor = context.year.new_zeros(())
        for kind, layer in self.maps.items():
            numbers = features(context, kind)
            known = numbers.isfinite().all(dim=1, keepdim=True)
            total = total + torch.where(known, layer(torch.where(known, numbers, 0.0)), 0.0)
        return total


def features(context: Context, kind: str) -> Float[Tensor, "batch feature"]:
    """Numbers of order one that tell a fact.

    The day on a circle of 365.25 days, decades from 2015, the place on a unit sphere, octaves of the resolution from 1.
    """
    match kind:
        case "day_of_year":
            angle = context.day_of_year * (2 * torch.pi / 365.25)
            return torch.stack([angle.sin(), angle.cos()], dim=1)
        case "year":
            return (context.year[:, None] - 2015) / 10
        case "place":
            north, east = context.latitude.deg2rad(), context.longitude.deg2rad()
            return torch.stack([north.cos() * east.cos(), north.cos() * east.sin(), north.sin()], dim=1)
        case _:
            return context.resolution.log2()
