"""A plain Vision Transformer over a set of tokens, for any number of spatial axes and any set of named channels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mae_core.attention import AttentionShape, attend, attended, check_heads
from mae_core.context import Context, ContextEmbedding, ContextSettings
from mae_core.native import MeasurementEmbedding, channel_footprints, group_tokens_valid
from mae_core.nd import TokenLayout, token_grid
from mae_core.positions import Places, PositionSettings
from mae_core.settings import Settings

PRESETS: dict[str, tuple[int, int, int]] = {
    "nano": (128, 4, 4),
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
"""Width, depth and heads. Base, large and huge are the paper's (He et al. 2021), tiny and small DeiT's, nano ours."""


class EncoderSettings(Settings):
    """Shape of the encoder."""

    kind: Literal["vit"] = "vit"
    preset: Literal["nano", "tiny", "small", "base", "large", "huge"] = Field(
        "tiny", description="Width, depth and heads of the encoder; base, large and huge as in the paper"
    )
    patch: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (8,), min_length=1, max_length=3, description="Voxels of a token per axis; one number serves every axis"
    )
    stride: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (), max_length=3, description="Voxels between tokens per axis; smaller than the patch: patches overlap (default: the patch)"
    )
    mlp_ratio: float = Field(4.0, gt=0, description="Hidden width of the MLP over the token width")
    class_token: bool = Field(True, description="One token more that gathers the whole sample, as in the paper")
    num_registers: int = Field(0, ge=0, description="Further tokens without a place (Darcet et al. 2024)")
    drop_path: float = Field(0.0, ge=0, lt=1, description="Chance that the last block is passed by in training; less in earlier ones")
    groups: tuple[tuple[str, ...], ...] | Literal["each"] = Field(
        (), description="Channels that share tokens, such as [[B02,B03,B04],[B8A]]; each: one group a channel (default: one group of all)"
    )
    footprints: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict,
        description="Voxels along each of the last two axes that hold one measurement, by channel; pretrain takes them from the store",
    )
    positions: PositionSettings = PositionSettings()
    context: ContextSettings = ContextSettings()
    recompute: bool = Field(False, description="Compute blocks again in the backward pass instead of keeping what is inside them")

    @property
    def step(self) -> tuple[int, ...]:
        """Voxels between tokens per axis."""
        return self.stride or self.patch

    @property
    def width(self) -> int:
        """Token width."""
        return PRESETS[self.preset][0]

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return PRESETS[self.preset][1]

    @property
    def heads(self) -> int:
        """Attention heads."""
        return PRESETS[self.preset][2]


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        check_heads(width, heads)
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, tokens: Float[Tensor, "batch length width"], used: Bool[Tensor, "batch length"] | None) -> Tensor:
        """Tokens after attention; tokens that are not `used` are seen by no other."""
        query, key, value = self.qkv(tokens).chunk(3, dim=2)
        out: Tensor = self.out(attend(query, key, value, self.heads, used))
        return out


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, drop_path: float = 0.0) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = mlp(width, mlp_ratio)

    def forward(self, tokens: Tensor, used: Tensor | None) -> Tensor:
        """Tokens of the same shape."""
        tokens = tokens + self._kept(self.attention(self.norm1(tokens), used))
        out: Tensor = tokens + self._kept(self.mlp(self.norm2(tokens)))
        return out

    def _kept(self, change: Tensor) -> Tensor:
        """Stochastic depth per sample (Huang et al. 2016), from torch's own random state, which checkpoints hold."""
        if not self.training or self.drop_path == 0:
            return change
        stays = torch.rand(len(change), 1, 1, device=change.device) >= self.drop_path
        return torch.where(stays, change / (1 - self.drop_path), 0.0)


class ChannelEmbedding(nn.Module):
    """Sum over channels of one linear map each, so that any subset of named channels in any order can be fed.

    A missing channel is not in the sum. `weight` is `(channel, voxel, width)`; weights move between models by name.
    """

    def __init__(self, channels: Sequence[str], voxels: int, width: int) -> None:
        super().__init__()
        self.channels = tuple(channels)
        self.weight = nn.Parameter(torch.empty(len(self.channels), voxels, width))
        self.bias = nn.Parameter(torch.zeros(width))
        nn.init.xavier_uniform_(self.weight.view(-1, width))

    def forward(self, patches: Float[Tensor, "batch token channel voxel"], channels: Sequence[str] | None = None) -> Tensor:
        """Embedded tokens `(batch, token, width)`; `channels` names the patches' channel axis (default: all of ours).

        Raises:
            ValueError: A channel is not known to this embedding.
        """
        weight = self.weight if channels is None or tuple(channels) == self.channels else self.weight[self._rows(channels)]
        return F.linear(patches.flatten(2), weight.flatten(0, 1).t(), self.bias)

    def _rows(self, channels: Sequence[str]) -> list[int]:
        unknown = [name for name in channels if name not in self.channels]
        if unknown:
            raise ValueError(f"channels {unknown} are not known to this encoder; it knows {list(self.channels)}")
        return [self.channels.index(name) for name in channels]


class Encoder(nn.Module):
    """ViT encoder over the tokens that it is shown, behind a class token and registers."""

    def __init__(self, settings: EncoderSettings, channels: Sequence[str]) -> None:
        super().__init__()
        self.settings = settings
        width, depth = settings.width, settings.depth
        self.footprints = channel_footprints(settings.footprints, channels, settings.patch, settings.step)
        self.groups = channel_groups(settings.groups, channels, self.footprints)
        coarse = any(footprint > 1 for footprint in self.footprints)
        self.embed = (
            MeasurementEmbedding(channels, settings.patch, self.footprints, width)
            if coarse
            else ChannelEmbedding(channels, math.prod(settings.patch), width)
        )
        if settings.class_token:
            self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        rates = [settings.drop_path * number / max(1, depth - 1) for number in range(depth)]
        self.blocks = nn.ModuleList(Block(width, settings.heads, settings.mlp_ratio, rate) for rate in rates)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        if settings.class_token:
            nn.init.normal_(self.class_token, std=0.02)
        init_linears(self.blocks)
        if settings.num_registers:
            self.register_token = nn.Parameter(torch.empty(1, settings.num_registers, width))
            nn.init.normal_(self.register_token, std=0.02)
        self.places = Places(settings.positions, len(self.groups), width)
        self.context = ContextEmbedding(settings.context, len(settings.patch), width) if settings.context.kinds else None

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the channels that can be fed."""
        return self.embed.channels

    @property
    def num_prefix(self) -> int:
        """Features before those of the first shown token: class token and registers."""
        return int(self.settings.class_token) + self.settings.num_registers

    def layout(self, space: Sequence[int]) -> TokenLayout:
        """How a crop of all channels becomes tokens."""
        settings = self.settings
        grid = token_grid(space, settings.step)
        return TokenLayout(grid, settings.patch, settings.step, self.groups, len(self.channels), self.footprints)

    def attention_shape(self, num_tokens: int) -> AttentionShape:
        """What every block does with so many tokens."""
        heads, seen = self.settings.heads, num_tokens + self.num_prefix
        return AttentionShape("encoder", heads, self.settings.width // heads, seen, seen)

    def forward(
        self,
        patches: Float[Tensor, "batch token channel voxel"],
        ids: Int[Tensor, "batch token"],
        grid: Sequence[int],
        used: Bool[Tensor, "batch token"] | None = None,
        channels: Sequence[str] | None = None,
        context: Context | None = None,
    ) -> Float[Tensor, "batch prefix_and_token width"]:
        """Features of the shown tokens behind `num_prefix` others (class token first, then registers).

        Args:
            patches: Pixels of the shown tokens, in normalised units, zero where there is no value and in channels of other groups.
            ids: Their numbers, `group · places + place`, which give the positions.
            grid: Tokens per axis.
            used: False for slots that hold no token; nothing attends to them.
            channels: Names of the channel axis, if not all in the encoder's own order.
            context: What else is known of the samples.
        """
        return self.norm(self.layers(patches, ids, grid, used, channels, context)[-1])  # type: ignore[no-any-return]

    def layers(
        self,
        patches: Tensor,
        ids: Tensor,
        grid: Sequence[int],
        used: Tensor | None = None,
        channels: Sequence[str] | None = None,
        context: Context | None = None,
    ) -> list[Tensor]:
        """Output of every block, before the last norm; arguments as for `forward`."""
        tokens = self.embed(patches, channels)
        tokens = tokens + self.places(ids, grid, token_size(context, self.settings.step))
        if self.context is not None and context is not None:
            tokens = tokens + self.context(context)[:, None]
        if self.settings.num_registers:
            tokens = prepend(self.register_token, tokens)
        if self.settings.class_token:
            tokens = prepend(self.class_token, tokens)
        seen = None if used is None else attended(used, self.num_prefix)
        outputs = []
        for block in self.blocks:
            if self.settings.recompute and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, seen, use_reentrant=False)
            else:
                tokens = block(tokens, seen)
            outputs.append(tokens)
        return outputs


@dataclass(frozen=True)
class AllTokens:
    """Every token of a batch, as an encoder is fed.

    Attributes:
        patches: `(batch, token, channel, voxel)`.
        ids: Token numbers `(batch, token)`.
        used: False for tokens without any value; None where every token has one.
        layout: How the crop became tokens.
        there: Channel groups of which a sample has any channel; None where every sample has one of each group.
    """

    patches: Float[Tensor, "batch token channel voxel"]
    ids: Int[Tensor, "batch token"]
    used: Bool[Tensor, "batch token"] | None
    layout: TokenLayout
    there: Bool[Tensor, "batch group"] | None = None

    def by_place(self, tokens: Float[Tensor, "batch token width"]) -> Float[Tensor, "batch width *grid"]:
        """Features as an array over the grid, the mean over the channel groups that a sample has; zero where it has none."""
        parts = tokens.unflatten(1, (len(self.layout.groups), -1))
        if self.there is None:
            mean = parts.mean(dim=1)
        else:
            kept = self.there[:, :, None, None]
            mean = torch.where(kept, parts, 0.0).sum(dim=1) / kept.sum(dim=1).clamp(min=1)
        out: Tensor = mean.transpose(1, 2).unflatten(2, self.layout.grid)
        return out


def all_tokens(
    layout: TokenLayout,
    pixels: Float[Tensor, "batch channel *space"],
    has_value: Bool[Tensor, "batch *space"] | None = None,
    present: Bool[Tensor, "batch channel"] | None = None,
) -> AllTokens:
    """Every token of a batch in normalised units.

    With `has_value`, tokens without any value are not used; with `present`, neither are those of channel groups of which a
    sample has no channel, as in pretraining.
    """
    ids = torch.arange(math.prod(layout.full_grid), device=pixels.device).expand(len(pixels), -1)
    valid, there = None, None
    if has_value is not None:
        valid = group_tokens_valid(layout, has_value, 0.0)
    if present is not None and len(layout.groups) > 1:
        some = layout.any_present(present)
        if not bool(some.all()):
            there, absent = some, ~some[:, :, None]
            valid = ~absent.expand(-1, -1, layout.num_places) if valid is None else valid & ~absent
    used = None if valid is None or bool(valid.all()) else valid.flatten(1)
    return AllTokens(layout.pick(layout.split(pixels), ids), ids, used, layout, there)


def token_size(context: Context | None, step: Sequence[int]) -> Float[Tensor, "batch axis"] | None:
    """Physical distance between tokens along each axis, if the distance between voxels is known."""
    return None if context is None else torch.stack([context.spacing[:, axis] * size for axis, size in enumerate(step)], dim=1)


def channel_groups(
    groups: Sequence[Sequence[str]] | Literal["each"], channels: Sequence[str], footprints: Sequence[int] = ()
) -> tuple[tuple[int, ...], ...]:
    """Channel numbers of each group; where none are given one of all, or one for each footprint.

    Raises:
        ValueError: The groups are no division of the channels, or one has channels of several footprints.
    """
    if groups == "each":
        return tuple((number,) for number in range(len(channels)))
    if not groups:
        sizes = footprints or (1,) * len(channels)
        return tuple(tuple(number for number, own in enumerate(sizes) if own == size) for size in sorted(set(sizes)))
    named = [name for group in groups for name in group]
    if sorted(named) != sorted(channels) or not all(groups):
        raise ValueError(
            f"model.encoder.groups={[list(group) for group in groups]} must name each channel of the data once: {list(channels)}"
        )
    found = tuple(tuple(list(channels).index(name) for name in group) for group in groups)
    if footprints and any(len({footprints[number] for number in group}) > 1 for group in found):
        listed = dict(zip(channels, footprints, strict=True))
        raise ValueError(f"model.encoder.groups puts channels of several footprints into one group: {listed}; one group has one footprint")
    return found


def pooled(
    features: Float[Tensor, "batch prefix_and_token width"], num_prefix: int, used: Tensor | None, how: Literal["class", "mean"]
) -> Float[Tensor, "batch width"]:
    """One vector per sample: the class token, or the mean of its tokens (zero where it has none).

    Raises:
        ValueError: There is no class token.
    """
    if how == "class":
        if not num_prefix:
            raise ValueError("this encoder has no class token; pool=mean takes the mean of its tokens")
        return features[:, 0]
    tokens = features[:, num_prefix:]
    kept = torch.ones_like(tokens[..., 0], dtype=torch.bool) if used is None else used
    return torch.where(kept[..., None], tokens, 0.0).sum(dim=1) / kept.sum(dim=1, keepdim=True).clamp(min=1)


def prepend(token: Tensor, tokens: Tensor) -> Tensor:
    """`tokens` behind some more that all samples share."""
    return torch.cat([token.to(tokens.dtype).expand(len(tokens), -1, -1), tokens], dim=1)


def mlp(width: int, ratio: float) -> nn.Sequential:
    """Two linear layers with GELU between them; the hidden one is `ratio` times as wide."""
    hidden = round(width * ratio)
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


def init_linears(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for every linear layer inside, as in the paper's appendix."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
