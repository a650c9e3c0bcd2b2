"""A perceptual term: how far a frozen encoder's features of the reconstruction are from those of the true crop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from mae_core.nd import patchify, token_grid


@runtime_checkable
class LayeredEncoder(Protocol):
    """What is asked of the frozen encoder, which is an `nn.Module` besides; `mae_core.vit.Encoder` is one.

    `num_prefix`, the number of tokens before those of the patches, is read too if there is one; without it is 1.
    """

    @property
    def settings(self) -> Any:
        """Anything with `patch`, the voxels of a token per axis."""

    def layers(
        self, patches: Tensor, ids: Tensor, grid: Sequence[int], used: Tensor | None = None, channels: Sequence[str] | None = None
    ) -> list[Tensor]:
        """Outputs `(batch, prefix_and_token, width)` of its blocks, of which the last is used."""


class PerceptualTerm(nn.Module):
    """Distance of a reconstruction from the truth in the features of a frozen encoder (after Johnson et al. 2016, section 3.2).

    It keeps a frozen copy of the encoder in evaluation mode: the original goes on training, and the copy is no submodule, so
    that it stands in no `state_dict`, no list of parameters and no sharding of the model that holds this term. It follows `to`
    like the rest.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        # In a tuple, where torch does not look for submodules.
        self._frozen = (copy.deepcopy(encoder).eval().requires_grad_(requires_grad=False),)

    @property
    def encoder(self) -> LayeredEncoder:
        """The frozen copy."""
        return cast("LayeredEncoder", self._frozen[0])

    def forward(
        self,
        pixels: Float[Tensor, "batch channel *space"],
        predicted_pixels: Float[Tensor, "batch channel *space"],
        hidden_voxels: Bool[Tensor, "batch *space"],
        used: Bool[Tensor, "batch token"] | None = None,
        channels: Sequence[str] | None = None,
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
        """Sum over tokens of the error between the features, and the number of tokens, per sample in fp32.

        A token's error is the mean square of the difference of its features, each brought to mean 0 and variance 1 over the
        width by a layer norm without weights: 0 for equal features, about 2 for unrelated ones, at most 4. All tokens of the
        crop count; a sample without any hidden voxel counts nothing.

        Args:
            pixels: The true crop in normalised units, zero where there is no value.
            predicted_pixels: The reconstruction in the same units, zero in channels that a sample lacks; only its hidden voxels
                are looked at.
            hidden_voxels: True where the prediction replaces the truth: voxels of hidden tokens that have a value.
            used: False for tokens without any value: nothing attends to them and they do not count.
            channels: Names of the channel axis, if not all in the encoder's own order.
        """
        shown = hidden_voxels[:, None]
        with torch.no_grad():
            wanted = self._features(pixels, used, channels)
        found = self._features(torch.where(shown, predicted_pixels.float(), pixels.float()), used, channels)
        counted = hidden_voxels.flatten(1).any(dim=1, keepdim=True).expand(wanted.shape[:2])
        if used is not None:
            counted = counted & used
        error = torch.where(counted[..., None], found - wanted, 0.0).square().mean(dim=2)
        return error.sum(dim=1), counted.sum(dim=1).float()

    def _features(self, pixels: Tensor, used: Tensor | None, channels: Sequence[str] | None) -> Float[Tensor, "batch token width"]:
        patch = self.encoder.settings.patch
        grid = token_grid(pixels.shape[2:], patch)
        patches = patchify(pixels, patch)
        ids = torch.arange(patches.shape[1], device=pixels.device).expand(len(pixels), -1)
        last = self.encoder.layers(patches, ids, grid, used, channels)[-1][:, getattr(self.encoder, "num_prefix", 1) :]
        return F.layer_norm(last.float(), last.shape[-1:], eps=1e-6)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PerceptualTerm:
        """Torch's hook behind `to`, `cuda` and the like: what is no submodule has to be taken along by hand."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for module in self._frozen:
            module._apply(fn, recurse)  # noqa: SLF001
        return self
