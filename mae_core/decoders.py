"""Decoders: light transformers that fill in hidden tokens during pretraining and are dropped after it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from mae_core.attention import attend, attended, check_heads
from mae_core.masking import HidingPlan, num_predicted
from mae_core.positions import Places, PositionSettings
from mae_core.settings import Settings, default_kind
from mae_core.vit import Block, init_linears, mlp

DECODER_PRESETS: dict[str, tuple[int, int, int]] = {
    "nano": (64, 2, 2),
    "tiny": (128, 2, 4),
    "small": (256, 4, 4),
    "base": (512, 8, 16),
    "large": (512, 8, 16),
    "huge": (512, 8, 16),
}
"""Width, depth and heads of the decoder that goes with each encoder; base to huge as in the paper."""


class _DecoderShape(Settings):
    width: int | None = Field(None, ge=8, description="Token width of the decoder (default: by the encoder's preset)")
    depth: int | None = Field(None, ge=1, description="Blocks of the decoder (default: by the encoder's preset)")
    heads: int | None = Field(None, ge=1, description="Attention heads of the decoder (default: by the encoder's preset)")

    def shape(self, preset: str) -> tuple[int, int, int]:
        """Width, depth and heads beside an encoder."""
        usual = DECODER_PRESETS[preset]
        return self.width or usual[0], self.depth or usual[1], self.heads or usual[2]


class DecoderSettings(_DecoderShape):
    """The paper's: all tokens attend to all, a mask token stands in every hidden place (He et al. 2021)."""

    kind: Literal["self_attention"] = "self_attention"


class CrossDecoderSettings(_DecoderShape):
    """Hidden tokens attend to the encoded ones and not to each other, so that a part of them can be predicted (Fu et al. 2024)."""

    kind: Literal["cross_attention"] = "cross_attention"
    predicted_fraction: float = Field(1.0, gt=0, le=1, description="Share of the hidden tokens that a training step predicts")


DecoderChoice = Annotated[DecoderSettings | CrossDecoderSettings, Field(discriminator="kind"), default_kind("self_attention")]


@dataclass(frozen=True)
class DecoderFrame:
    """What a decoder must fit.

    Attributes:
        preset: Of the encoder; gives the decoder's usual shape.
        encoder_width: Token width of the encoder.
        mlp_ratio: Hidden width of the MLPs over the token width.
        positions: How tokens are told their place.
        num_groups: Channel groups.
        head: Channels and features per channel of a prediction.
        elements: Which of these are predicted, counted over channels, then features; the others come out zero. Empty: all.
    """

    preset: str
    encoder_width: int
    mlp_ratio: float
    positions: PositionSettings
    num_groups: int
    head: tuple[int, int]
    elements: tuple[int, ...] = ()


class Spread(nn.Module):
    """Brings what a head gives to `(batch, token, channel, feature)`, zero where nothing is predicted. Has no weights."""

    def __init__(self, shape: tuple[int, int], elements: Sequence[int]) -> None:
        super().__init__()
        self.shape = shape
        if elements:
            self.register_buffer("elements", torch.tensor(elements), persistent=False)
        self.is_whole = not elements

    def forward(self, predicted: Float[Tensor, "batch token element"]) -> Float[Tensor, "batch token channel feature"]:
        """The same numbers in their places."""
        if not self.is_whole:
            empty = predicted.new_zeros(*predicted.shape[:2], math.prod(self.shape))
            predicted = empty.index_copy(2, self.get_buffer("elements"), predicted)
        return predicted.reshape(*predicted.shape[:2], *self.shape)


class Decoder(nn.Module):
    """Self-attention over the encoded tokens and a mask token in every hidden place."""

    def __init__(self, settings: DecoderSettings, frame: DecoderFrame) -> None:
        super().__init__()
        width, depth, heads = settings.shape(frame.preset)
        self.shape = frame.head
        self.embed = nn.Linear(frame.encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(Block(width, heads, frame.mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, len(frame.elements) or math.prod(frame.head))
        nn.init.normal_(self.mask_token, std=0.02)
        init_linears(self)
        self.places = Places(frame.positions, frame.num_groups, width)
        self.spread = Spread(frame.head, frame.elements)

    def chosen(self, plan: HidingPlan) -> HidingPlan:
        """The plan as it is: every hidden token is predicted."""
        return plan

    def forward(
        self, features: Float[Tensor, "batch prefix_and_visible width"], plan: HidingPlan, grid: Sequence[int], size: Tensor | None = None
    ) -> Float[Tensor, "batch hidden channel feature"]:
        """Predictions for the hidden slots of the plan.

        Args:
            features: The encoder's, those without a place first.
            plan: What was shown and what is to be predicted.
            grid: Tokens per axis.
            size: Physical distance between tokens, for positions that need it.
        """
        num_visible = plan.visible.shape[1]
        num_prefix = features.shape[1] - num_visible
        features = self.embed(features)
        shown = features[:, num_prefix:] + self.places(plan.visible, grid, size)
        missing = self.mask_token.to(features.dtype) + self.places(plan.hidden, grid, size)
        tokens = torch.cat([features[:, :num_prefix], shown, missing], dim=1)
        used = None if plan.full else attended(torch.cat([plan.visible_used, plan.hidden_used], dim=1), num_prefix)
        for block in self.blocks:
            tokens = block(tokens, used)
        predicted: Tensor = self.spread(self.head(self.norm(tokens[:, num_prefix + num_visible :])))
        return predicted


class CrossBlock(nn.Module):
    """Pre-norm block in which tokens attend to others and pass through an MLP."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        check_heads(width, heads)
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = mlp(width, mlp_ratio)

    def forward(self, tokens: Tensor, seen: Tensor, used: Tensor | None) -> Tensor:
        """`tokens` after looking at `seen`, of which only those that are `used`."""
        key, value = self.key_value(seen).chunk(2, dim=2)
        tokens = tokens + self.out(attend(self.query(self.norm1(tokens)), key, value, self.heads, used))
        out: Tensor = tokens + self.mlp(self.norm2(tokens))
        return out


class CrossDecoder(nn.Module):
    """Cross-attention from hidden tokens to encoded ones; a hidden token's prediction does not depend on which others are predicted."""

    def __init__(self, settings: CrossDecoderSettings, frame: DecoderFrame) -> None:
        super().__init__()
        width, depth, heads = settings.shape(frame.preset)
        self.settings, self.shape = settings, frame.head
        self.embed = nn.Linear(frame.encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(CrossBlock(width, heads, frame.mlp_ratio) for _ in range(depth))
        self.seen_norm = nn.LayerNorm(width, eps=1e-6)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, len(frame.elements) or math.prod(frame.head))
        nn.init.normal_(self.mask_token, std=0.02)
        init_linears(self)
        self.places = Places(frame.positions, frame.num_groups, width)
        self.spread = Spread(frame.head, frame.elements)

    def chosen(self, plan: HidingPlan) -> HidingPlan:
        """The plan with the first hidden slots only, which hold a random share; in evaluation all of them."""
        if not self.training:
            return plan
        count = num_predicted(plan.hidden.shape[1], self.settings.predicted_fraction)
        return replace(plan, hidden=plan.hidden[:, :count], hidden_used=plan.hidden_used[:, :count])

    def forward(
        self, features: Float[Tensor, "batch prefix_and_visible width"], plan: HidingPlan, grid: Sequence[int], size: Tensor | None = None
    ) -> Float[Tensor, "batch hidden channel feature"]:
        """Predictions for the hidden slots of the plan; arguments as for `Decoder`."""
        num_prefix = features.shape[1] - plan.visible.shape[1]
        features = self.embed(features)
        shown = features[:, num_prefix:] + self.places(plan.visible, grid, size)
        seen = self.seen_norm(torch.cat([features[:, :num_prefix], shown], dim=1))
        used = None if plan.full else attended(plan.visible_used, num_prefix)
        tokens = self.mask_token + self.places(plan.hidden, grid, size)
        for block in self.blocks:
            tokens = block(tokens, seen, used)
        predicted: Tensor = self.spread(self.head(self.norm(tokens)))
        return predicted
