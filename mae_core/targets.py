"""What the decoder must predict. Targets and their statistics are computed in fp32 from unrounded data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from mae_core.settings import Settings


class PixelTarget(Settings):
    """The pixels themselves, in the normalised units that the model is fed."""

    kind: Literal["pixels"] = "pixels"


class NormalisedPixelTarget(Settings):
    """Pixels of each patch, less the patch's mean, over its standard deviation (He et al. 2021, section 3)."""

    kind: Literal["normalised_pixels"] = "normalised_pixels"
    over: Literal["patch", "channel"] = Field(
        "patch", description="Mean and variance over all channels of the patch (the paper's) or of each channel by itself"
    )
    eps: float = Field(1e-6, ge=0, description="Added to the variance, in squared units of the normalised input")
    min_variance: float = Field(1e-6, ge=0, description="A patch that varies less is flat: it is counted and left out of the loss")


TargetSettings = Annotated[NormalisedPixelTarget | PixelTarget, Field(discriminator="kind")]


@dataclass(frozen=True)
class Target:
    """Values to predict and which of them count.

    Attributes:
        values: `(batch, token, channel, voxel)` in fp32; zero where nothing counts.
        counted: Elements that enter the loss.
        mean, std: To come back to input units: `values * std + mean`; `(batch, token, 1 or channel, 1)`.
        num_flat: Patches (or channels of patches) that were left out because they do not vary.
    """

    values: Float[Tensor, "batch token channel voxel"]
    counted: Bool[Tensor, "batch token channel voxel"]
    mean: Tensor
    std: Tensor
    num_flat: Tensor


def make_target(
    patches: Float[Tensor, "batch token channel voxel"],
    counted: Bool[Tensor, "batch token channel voxel"],
    settings: PixelTarget | NormalisedPixelTarget,
) -> Target:
    """The target of some patches. Elements that are not counted touch neither mean, variance nor loss, NaN included."""
    clean = torch.where(counted, patches.float(), 0.0)
    match settings:
        case PixelTarget():
            one = torch.ones_like(clean[:, :, :1, :1])
            return Target(clean, counted, torch.zeros_like(one), one, torch.zeros((), dtype=torch.int64, device=clean.device))
        case NormalisedPixelTarget():
            return _normalised(clean, counted, settings)


def _normalised(clean: Tensor, counted: Tensor, settings: NormalisedPixelTarget) -> Target:
    """Sample variance (ddof = 1), as in every published implementation."""
    axes = (2, 3) if settings.over == "patch" else (3,)
    count = counted.sum(dim=axes, keepdim=True)
    mean = clean.sum(dim=axes, keepdim=True) / count.clamp(min=1)
    centred = torch.where(counted, clean - mean, 0.0)
    variance = centred.square().sum(dim=axes, keepdim=True) / (count - 1).clamp(min=1)
    flat = (variance < settings.min_variance) & (count > 0)
    std = (variance + settings.eps).sqrt()
    counted = counted & ~flat
    return Target(torch.where(counted, centred / std, 0.0), counted, mean, std, flat.sum())
