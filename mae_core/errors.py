"""How far a prediction is from its target, element by element, and how much each channel weighs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from mae_core.settings import Settings


class ErrorSettings(Settings):
    """The error between prediction and target; He et al. 2021 use the square (`l2`), SimMIM (Xie et al. 2022) `l1`."""

    kind: Literal["l2", "l1", "smooth_l1"] = Field("l2", description="Square, absolute value, or a square that goes on straight")
    beta: float = Field(1.0, gt=0, description="Difference from which smooth_l1 goes on straight, in units of the target; others ignore it")
    channel_weights: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default_factory=dict, description="Weight of a channel's error by the channel's name; a channel that is not named weighs 1"
    )


def elementwise_error(
    predicted: Float[Tensor, "*shape"], values: Float[Tensor, "*shape"], counted: Bool[Tensor, "*shape"], settings: ErrorSettings
) -> Float[Tensor, "*shape"]:
    """Error of every element in fp32; exactly 0 and without gradient where it does not count, NaN included.

    Channels are not weighted here. With the difference `d`, `l2` is `d**2`, `l1` is `|d|`, and `smooth_l1` is
    `d**2 / (2 * beta)` up to `beta` and `|d| - beta / 2` from there on (Girshick 2015, section 2.3, with beta 1).
    """
    difference = torch.where(counted, predicted.float() - values.float(), 0.0)
    match settings.kind:
        case "l2":
            return difference.square()
        case "l1":
            return difference.abs()
        case "smooth_l1":
            return F.smooth_l1_loss(difference, torch.zeros_like(difference), reduction="none", beta=settings.beta)


def channel_weights(settings: ErrorSettings, channels: Sequence[str]) -> Float[Tensor, " channel"]:
    """Weight of each channel in fp32, in the order of `channels`.

    Weighted with it, the sum of the errors and the count of the elements alike, a loss stays a mean.

    Raises:
        ValueError: A weight is given to a name that is not among `channels`, or all weights are zero.
    """
    unknown = [name for name in settings.channel_weights if name not in channels]
    if unknown:
        raise ValueError(f"channel_weights name {unknown}, which are not channels of these data; the channels are {list(channels)}")
    weights = [settings.channel_weights.get(name, 1.0) for name in channels]
    if not any(weights):
        raise ValueError(f"channel_weights are 0 for every channel of {list(channels)}; let at least one weigh more than 0")
    return torch.tensor(weights, dtype=torch.float32)
