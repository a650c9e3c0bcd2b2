"""Masked autoencoder: hide most tokens, encode the rest, predict what was hidden (He et al. 2021, figure 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from mae_core.masking import HidingPlan
from mae_core.nd import patchify, take, token_grid
from mae_core.settings import Settings
from mae_core.targets import NormalisedPixelTarget, Target, TargetSettings, make_target
from mae_core.vit import Block, Encoder, EncoderSettings, init_linears, positions, prepend

DECODER_PRESETS: dict[str, tuple[int, int, int]] = {
    "nano": (64, 2, 2),
    "tiny": (128, 2, 4),
    "small": (256, 4, 4),
    "base": (512, 8, 16),
    "large": (512, 8, 16),
    "huge": (512, 8, 16),
}
"""Width, depth and heads of the decoder that goes with each encoder; base to huge as in the paper."""


class DecoderSettings(Settings):
    """Shape of the decoder; what is left out follows the encoder's preset."""

    kind: Literal["self_attention"] = "self_attention"
    width: int | None = Field(None, ge=8, description="Token width of the decoder (default: by the encoder's preset)")
    depth: int | None = Field(None, ge=1, description="Blocks of the decoder (default: by the encoder's preset)")
    heads: int | None = Field(None, ge=1, description="Attention heads of the decoder (default: by the encoder's preset)")


class ModelSettings(Settings):
    """A masked autoencoder."""

    encoder: EncoderSettings = EncoderSettings()
    decoder: DecoderSettings = DecoderSettings()
    target: TargetSettings = NormalisedPixelTarget()
    min_token_valid_fraction: Annotated[
        float, Field(ge=0, le=1, description="A patch with a smaller share of counted voxels is no token")
    ] = 0.5


@dataclass(frozen=True)
class MaeOutput:
    """Prediction, target and the error between them.

    Attributes:
        predicted: `(batch, hidden, channel, voxel)` in fp32, in the space of the target.
        target: What was to be predicted, with the elements that count.
        error_sum: Sum of squared errors over counted elements, `(batch, channel)`.
        count: Number of counted elements, `(batch, channel)`.
    """

    predicted: Float[Tensor, "batch hidden channel voxel"]
    target: Target
    error_sum: Float[Tensor, "batch channel"]
    count: Tensor


class Decoder(nn.Module):
    """Light transformer that sees the encoded tokens and a mask token in every hidden place."""

    def __init__(self, settings: ModelSettings, num_channels: int) -> None:
        super().__init__()
        encoder = settings.encoder
        width, depth, heads = DECODER_PRESETS[encoder.preset]
        chosen = settings.decoder
        width, depth, heads = chosen.width or width, chosen.depth or depth, chosen.heads or heads
        voxels = 1
        for size in encoder.patch:
            voxels *= size
        self.shape = (num_channels, voxels)
        self.embed = nn.Linear(encoder.width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(Block(width, heads, encoder.mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, num_channels * voxels)
        nn.init.normal_(self.mask_token, std=0.02)
        init_linears(self)

    def forward(self, features: Float[Tensor, "batch visible_and_class width"], plan: HidingPlan, grid: Sequence[int]) -> Tensor:
        """Predictions `(batch, hidden, channel, voxel)` for the hidden slots of the plan."""
        features = self.embed(features)
        codes = positions(grid, features).expand(len(features), -1, -1)
        shown = features[:, 1:] + take(codes, plan.visible)
        missing = self.mask_token.to(features.dtype) + take(codes, plan.hidden)
        tokens, used = torch.cat([shown, missing], dim=1), None
        if not plan.full:
            used = torch.cat([plan.visible_used, plan.hidden_used], dim=1)
        tokens, used = prepend(features[:, :1], tokens, used)
        for block in self.blocks:
            tokens = block(tokens, used)
        predicted: Tensor = self.head(self.norm(tokens[:, 1 + plan.visible.shape[1] :]))
        return predicted.reshape(*predicted.shape[:2], *self.shape)


class MaskedAutoencoder(nn.Module):
    """Encoder, decoder and the loss between prediction and target on the hidden tokens."""

    def __init__(self, settings: ModelSettings, channels: Sequence[str]) -> None:
        super().__init__()
        self.settings = settings
        self.encoder = Encoder(settings.encoder, channels)
        self.decoder = Decoder(settings, len(channels))

    def forward(
        self,
        pixels: Float[Tensor, "batch channel *space"],
        counted: Bool[Tensor, "batch *space"],
        present: Bool[Tensor, "batch channel"],
        plan: HidingPlan,
    ) -> MaeOutput:
        """Predict the hidden tokens of a batch.

        Args:
            pixels: Normalised units; zero where there is no value and in channels that a sample lacks.
            counted: Voxels that count in target and loss.
            present: Channels that each sample has; the others are in no sum, no target and no loss.
            plan: What is shown and what is hidden.
        """
        patch = self.settings.encoder.patch
        grid = token_grid(pixels.shape[2:], patch)
        patches = patchify(pixels, patch)
        features = self.encoder(take(patches, plan.visible), plan.visible, grid, None if plan.full else plan.visible_used)
        predicted = self.decoder(features, plan, grid).float()
        target = make_target(take(patches, plan.hidden), self._counted(counted, present, plan), self.settings.target)
        error = torch.where(target.counted, predicted - target.values, 0.0).square()
        return MaeOutput(predicted, target, error.sum(dim=(1, 3)), target.counted.sum(dim=(1, 3)))

    def _counted(self, counted: Tensor, present: Tensor, plan: HidingPlan) -> Tensor:
        voxels = take(patchify(counted[:, None], self.settings.encoder.patch), plan.hidden)
        return voxels & present[:, None, :, None] & plan.hidden_used[:, :, None, None]
