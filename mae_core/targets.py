"""What the decoder must predict. Targets and their statistics are computed in fp32 or better from unrounded data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from mae_core.nd import per_axis
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


class PcaTarget(Settings):
    """Coefficients of the patch, all channels jointly, on the first principal components of training patches.

    He et al. 2021, table 1e, row "PCA"; the default number of components is theirs. Only a patch of which every element
    counts has coefficients, so a sample that lacks a channel has none.
    """

    kind: Literal["pca"] = "pca"
    num_components: int = Field(96, ge=1, description="Principal components to predict, at most channels times voxels of a patch")
    whiten: bool = Field(False, description="Divide each coefficient by its standard deviation over the training patches")


class HogTarget(Settings):
    """Histograms of oriented gradients (Dalal and Triggs 2005) as a target (MaskFeat, Wei et al. 2022, section 3.2).

    `mae_core.hog.oriented_gradients` makes them. The defaults of `bins` and `cells` are MaskFeat's for 16 x 16 patches.
    """

    kind: Literal["hog"] = "hog"
    bins: int = Field(9, ge=3, le=64, description="Directions that gradients vote for, opposite ones being one; a line has only one")
    cells: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (2,), min_length=1, max_length=3, description="Histograms per patch along each axis; one number serves every axis"
    )
    eps: float = Field(1e-3, ge=0, description="Added in quadrature to the histogram's norm, in normalised units per voxel")
    min_gradient: float = Field(
        1e-3, ge=0, description="A channel of a patch whose mean gradient, in normalised units per voxel, is smaller is flat"
    )

    def num_directions(self, axes: int) -> int:
        """Directions of the histograms: `bins`, and one on a line, which has no other."""
        number: int = self.bins ** min(axes - 1, 1)
        return number


TargetSettings = Annotated[NormalisedPixelTarget | PixelTarget | PcaTarget | HogTarget, Field(discriminator="kind")]


@dataclass(frozen=True)
class Target:
    """Values to predict and which of them count.

    Attributes:
        values: `(batch, token, channel, feature)` in fp32; zero where nothing counts. Features are voxels, or for `hog` the
            numbers of its histograms; for `pca` they are the components, and the only channel is all channels together.
        counted: Elements that enter the loss.
        mean, std: To come back to input units: `values * std + mean`; they broadcast against `values`. For `pca` this gives
            coefficients, which `from_pca` makes pixels of; for `hog` nothing leads back, and they are 0 and 1.
        num_flat: Patches (or channels of patches) that were left out because they do not vary.
        num_partial: Patches that were left out because only some of their elements count, which `pca` cannot use.
    """

    values: Float[Tensor, "batch token channel feature"]
    counted: Bool[Tensor, "batch token channel feature"]
    mean: Tensor
    std: Tensor
    num_flat: Tensor
    num_partial: Tensor


@dataclass(frozen=True)
class PcaBasis:
    """Principal components of patches, in float64.

    Attributes:
        mean: Mean patch, channels before voxels.
        components: Orthonormal rows, the one of the largest variance first.
        scale: Standard deviation (ddof = 1) of each coefficient over the training patches, in normalised units.
    """

    mean: Float[Tensor, " element"]
    components: Float[Tensor, "component element"]
    scale: Float[Tensor, " component"]

    def to(self, device: torch.device | str) -> PcaBasis:
        """The same basis on another device; it has to be where the patches are."""
        return PcaBasis(self.mean.to(device), self.components.to(device), self.scale.to(device))


def target_shape(settings: TargetSettings, num_channels: int, patch: Sequence[int]) -> tuple[int, int]:
    """Size of the (channel, feature) axes of the target, which a prediction head must give for each token.

    Raises:
        ValueError: More components than elements of a patch, or cells that do not divide the patch.
    """
    voxels = math.prod(patch)
    match settings:
        case PcaTarget(num_components=number):
            if number > num_channels * voxels:
                raise ValueError(
                    f"target.num_components={number} is more than the {num_channels * voxels} elements of a patch "
                    f"({num_channels} channels, {voxels} voxels); use at most as many"
                )
            return 1, number
        case HogTarget():
            return num_channels, math.prod(cells_per_axis(settings, patch)) * settings.num_directions(len(patch))
        case _:
            return num_channels, voxels


def cells_per_axis(settings: HogTarget, patch: Sequence[int]) -> tuple[int, ...]:
    """Histograms along each axis of a patch.

    Raises:
        ValueError: The patch cannot be divided into them.
    """
    cells = per_axis(settings.cells, len(patch), "target.cells")
    if any(size % number for size, number in zip(patch, cells, strict=True)):
        raise ValueError(f"target.cells={list(cells)} do not divide patch {tuple(patch)} on every axis; change the cells or the patch")
    return cells


def make_target(
    patches: Float[Tensor, "batch token channel feature"],
    counted: Bool[Tensor, "batch token channel feature"],
    settings: TargetSettings,
    basis: PcaBasis | None = None,
) -> Target:
    """The target of some patches. Elements that are not counted touch neither mean, variance nor loss, NaN included.

    Args:
        patches: Pixels, one feature per voxel. For `hog` what `oriented_gradients` gave for these tokens, since gradients need
            the neighbours of a patch; it is only selected here.
        counted: Elements that count; for `hog` those of the histograms.
        settings: Which target.
        basis: For `pca` alone: what `fit_pca` gave, on the device of the patches.

    Raises:
        ValueError: The basis for `pca` is missing, or is not one of these patches and settings.
    """
    clean = torch.where(counted, patches.float(), 0.0)
    match settings:
        case PixelTarget():
            return _as_is(clean, counted, _none(clean))
        case NormalisedPixelTarget():
            return _normalised(clean, counted, settings)
        case PcaTarget():
            return _on_components(clean, counted, settings, basis)
        case HogTarget():
            flat = (counted.any(dim=3) & (clean == 0).all(dim=3))[..., None]
            return _as_is(clean, counted & ~flat, flat.sum())


def fit_pca(patches: Float[Tensor, "number channel voxel"], counted: Bool[Tensor, "number channel voxel"], num_components: int) -> PcaBasis:
    """The first principal components of those patches of which every element counts, computed in float64.

    The same patches give the same basis on every machine up to rounding, the sign included: the largest element of a
    component, the first of several as large, is positive.

    Raises:
        ValueError: Too few whole patches, too many components, or patches that vary in too few directions.
    """
    whole = patches.flatten(1)[counted.flatten(1).all(dim=1)].double()
    number, elements = whole.shape
    if num_components > elements:
        raise ValueError(f"num_components={num_components} is more than the {elements} elements of a patch; use at most as many")
    if number <= num_components:
        raise ValueError(
            f"{number} of {len(patches)} training patches are wholly counted and {num_components} components need at least "
            f"{num_components + 1}; give more patches or use fewer components"
        )
    mean = whole.mean(dim=0)
    centred = whole - mean
    variances, vectors = torch.linalg.eigh(centred.t() @ centred / (number - 1))
    rank = int((variances > variances[-1] * elements * torch.finfo(torch.float64).eps).sum())
    if rank < num_components:
        raise ValueError(
            f"the {number} training patches vary in {rank} directions only and num_components={num_components}; "
            "use fewer components or patches that differ more"
        )
    components = vectors.flip(1)[:, :num_components].t()
    sizes = components.abs()
    # Elements that are as large but for rounding count as as large, so that the sign does not hang on the machine.
    largest = (sizes >= sizes.amax(dim=1, keepdim=True) * (1 - 1e-6)).int().argmax(dim=1, keepdim=True)
    components = components * components.gather(1, largest).sign()
    return PcaBasis(mean, components.contiguous(), variances.flip(0)[:num_components].sqrt())


def from_pca(
    values: Float[Tensor, "batch token 1 component"], basis: PcaBasis, num_channels: int
) -> Float[Tensor, "batch token {num_channels} voxel"]:
    """Patches in fp32 with these coefficients; what lies outside the components is their mean.

    Args:
        values: Coefficients, not whitened: `target.values * target.std + target.mean`, or a prediction so scaled.
        basis: That of the target.
        num_channels: Channels of the patches that the basis was fitted to.
    """
    patches: Tensor = (values.double() @ basis.components + basis.mean).float().squeeze(2).unflatten(2, (num_channels, -1))
    return patches


def _none(like: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.int64, device=like.device)


def _as_is(clean: Tensor, counted: Tensor, num_flat: Tensor) -> Target:
    one = torch.ones_like(clean[:, :, :1, :1])
    return Target(clean, counted, torch.zeros_like(one), one, num_flat, _none(clean))


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
    return Target(torch.where(counted, centred / std, 0.0), counted, mean, std, flat.sum(), _none(clean))


def _on_components(clean: Tensor, counted: Tensor, settings: PcaTarget, basis: PcaBasis | None) -> Target:
    """In float64, which neither autocast nor TF32 rounds."""
    if basis is None:
        raise ValueError("target.kind=pca needs a basis and got none; fit one to training patches with fit_pca and hand it in as `basis`")
    wanted = (settings.num_components, clean.shape[2] * clean.shape[3])
    if basis.components.shape != wanted:
        raise ValueError(
            f"the PCA basis has (components, elements) {tuple(basis.components.shape)} and the settings with these patches want "
            f"{wanted}; fit it anew with fit_pca"
        )
    whole = counted.flatten(2).all(dim=2)
    coefficients = (clean.flatten(2).double() - basis.mean) @ basis.components.t()
    std = basis.scale if settings.whiten else torch.ones_like(basis.scale)
    kept = whole[..., None, None].expand(-1, -1, 1, settings.num_components)
    values = torch.where(kept, (coefficients / std)[:, :, None], 0.0).float()
    std = std.float().expand(1, 1, 1, -1)
    return Target(values, kept, torch.zeros_like(std), std, _none(clean), (counted.flatten(2).any(dim=2) & ~whole).sum())
