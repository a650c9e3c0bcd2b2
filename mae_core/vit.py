"""A plain Vision Transformer over a set of tokens, for any number of spatial axes and any set of named channels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mae_core.nd import sincos_positions, take
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

    preset: Literal["nano", "tiny", "small", "base", "large", "huge"] = Field(
        "tiny", description="Width, depth and heads of the encoder; base, large and huge as in the paper"
    )
    patch: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (8,), min_length=1, max_length=3, description="Voxels of a token per axis; one number serves every axis"
    )
    mlp_ratio: float = Field(4.0, gt=0, description="Hidden width of the MLP over the token width")

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
    """Multi-head self-attention through torch's fused kernel."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} cannot be divided among {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, tokens: Float[Tensor, "batch length width"], used: Bool[Tensor, "batch length"] | None) -> Tensor:
        """Tokens after attention; tokens that are not `used` are seen by no other."""
        batch, length, width = tokens.shape
        query, key, value = self.qkv(tokens).reshape(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        exclude = None if used is None else used[:, None, None, :]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=exclude)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return out


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        hidden = round(width * mlp_ratio)
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, tokens: Tensor, used: Tensor | None) -> Tensor:
        """Tokens of the same shape."""
        tokens = tokens + self.attention(self.norm1(tokens), used)
        out: Tensor = tokens + self.mlp(self.norm2(tokens))
        return out


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
    """ViT encoder over the tokens that it is shown, with a class token and fixed sine-cosine positions."""

    def __init__(self, settings: EncoderSettings, channels: Sequence[str]) -> None:
        super().__init__()
        self.settings = settings
        self.embed = ChannelEmbedding(channels, math.prod(settings.patch), settings.width)
        self.class_token = nn.Parameter(torch.zeros(1, 1, settings.width))
        self.blocks = nn.ModuleList(Block(settings.width, settings.heads, settings.mlp_ratio) for _ in range(settings.depth))
        self.norm = nn.LayerNorm(settings.width, eps=1e-6)
        nn.init.normal_(self.class_token, std=0.02)
        init_linears(self.blocks)

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the channels that can be fed."""
        return self.embed.channels

    def forward(
        self,
        patches: Float[Tensor, "batch token channel voxel"],
        ids: Int[Tensor, "batch token"],
        grid: Sequence[int],
        used: Bool[Tensor, "batch token"] | None = None,
        channels: Sequence[str] | None = None,
    ) -> Float[Tensor, "batch token_and_class width"]:
        """Features of the shown tokens behind the class token (index 0).

        Args:
            patches: Pixels of the shown tokens, in normalised units, zero where there is no value.
            ids: Their numbers on the token grid, which give the positions.
            grid: Tokens per axis.
            used: False for slots that hold no token; nothing attends to them.
            channels: Names of the channel axis, if not all in the encoder's own order.
        """
        return self.norm(self.layers(patches, ids, grid, used, channels)[-1])  # type: ignore[no-any-return]

    def layers(
        self,
        patches: Tensor,
        ids: Tensor,
        grid: Sequence[int],
        used: Tensor | None = None,
        channels: Sequence[str] | None = None,
    ) -> list[Tensor]:
        """Output of every block, before the last norm; arguments as for `forward`."""
        tokens = self.embed(patches, channels)
        tokens = tokens + take(positions(grid, tokens).expand(len(tokens), -1, -1), ids)
        tokens, used = prepend(self.class_token, tokens, used)
        outputs = []
        for block in self.blocks:
            tokens = block(tokens, used)
            outputs.append(tokens)
        return outputs


def positions(grid: Sequence[int], like: Tensor) -> Float[Tensor, "1 length width"]:
    """Position codes of a whole grid on the device of `like`, whose last axis gives the width.

    They stay fp32, and so does the residual stream that they are added to, under autocast too.
    """
    return sincos_positions(grid, like.shape[-1]).to(like.device)[None]


def prepend(token: Tensor, tokens: Tensor, used: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """`tokens` behind one more that is always used."""
    tokens = torch.cat([token.to(tokens.dtype).expand(len(tokens), -1, -1), tokens], dim=1)
    return tokens, None if used is None else F.pad(used, (1, 0), value=True)


def init_linears(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for every linear layer inside, as in the paper's appendix."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
