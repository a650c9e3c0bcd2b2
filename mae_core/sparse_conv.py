"""A convolutional encoder over the shown tokens alone, for any number of spatial axes and any set of named channels.

As in SparK (Tian et al. 2023, section 3.1) and ConvNeXt V2's FCMAE (Woo et al. 2023, section 3), a hidden place stays empty at every
layer and is never computed from. SparK takes dense convolutions and sets their hidden outputs to zero, FCMAE a library of sparse ones.
Here hidden places hold no features to begin with: all that works place by place (norms, MLPs, strided convolutions) runs on the shown
tokens only, and only the depthwise convolutions see the whole grid, zero where nothing is shown; their outputs are read back at the
shown tokens. The numbers are those of the masked dense network, every shape is independent of the data, and NaN in a hidden pixel has
no way in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from mae_core.context import Context, ContextSettings
from mae_core.nd import TokenLayout, downsampling_factors, patchify, take, token_grid, unpatchify
from mae_core.positions import PositionSettings
from mae_core.settings import Settings
from mae_core.vit import ChannelEmbedding, init_linears, mlp

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Torch's convolution for one, two and three axes."""

SPARSE_CONV_PRESETS: dict[str, tuple[int, int, int]] = {
    "nano": (128, 4, 1),
    "tiny": (192, 6, 2),
    "small": (384, 9, 3),
    "base": (768, 27, 3),
}
"""Width and blocks of the last stage, and blocks of every earlier one. Going back from the last stage, the width halves per stage.

Tiny, small and base take them from the first three stages of ConvNeXt V2-Femto, ConvNeXt-T and ConvNeXt-L (Woo et al. 2023; Liu et al.
2022, section 3), whose third stage is at a sixteenth of the image. Their first step is by 4 and ours by one prime factor, so a patch of
16 has one finer stage than theirs; their fourth stage is left out. Nano is ours.
"""


class SparseConvSettings(Settings):
    """Shape of the convolutional encoder.

    There is one stage per prime factor of the patch, as `downsampling_factors` says; a stage begins with a convolution whose kernel and
    stride are its factors, so the last stage has one place per token.
    """

    kind: Literal["sparse_conv"] = "sparse_conv"
    preset: Literal["nano", "tiny", "small", "base"] = Field("tiny", description="Widths and depths of the stages")
    patch: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (8,), min_length=1, max_length=3, description="Voxels of a token per axis; one number serves every axis"
    )
    kernel: int = Field(
        3,
        ge=3,
        le=11,
        description="Odd width of the depthwise kernel on every axis; 7 in the papers, for 2-D: in 3-D those are 343 taps",
    )
    mlp_ratio: float = Field(4.0, gt=0, description="Hidden width of the MLP over the width of its stage")
    positions: PositionSettings = Field(PositionSettings(), description="Of the decoder; convolutions know places by their neighbours")

    @field_validator("kernel")
    @classmethod
    def _odd(cls, kernel: int) -> int:
        if kernel % 2 == 0:
            raise ValueError(f"kernel={kernel} has no middle; give an odd number such as {kernel + 1}")
        return kernel

    @property
    def stride(self) -> tuple[int, ...]:
        """Not set: tokens do not overlap."""
        return ()

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Not set: all channels share tokens."""
        return ()

    @property
    def footprints(self) -> dict[str, int]:
        """Not set: every voxel holds a measurement of its own."""
        return {}

    @property
    def context(self) -> ContextSettings:
        """Nothing is told but voxels."""
        return ContextSettings()

    @property
    def step(self) -> tuple[int, ...]:
        """Voxels between tokens per axis: those of the patch."""
        return self.patch

    @property
    def width(self) -> int:
        """Token width: that of the last stage."""
        return SPARSE_CONV_PRESETS[self.preset][0]

    @property
    def depth(self) -> int:
        """Number of blocks of the last stage, which are those that `SparseConvEncoder.layers` gives."""
        return SPARSE_CONV_PRESETS[self.preset][1]

    @property
    def stage_widths(self) -> tuple[int, ...]:
        """Width of every stage, finest first: doubled per stage up to `width`, and never below 8."""
        stages = len(downsampling_factors(self.patch))
        return tuple(max(8, self.width // 2**back) for back in reversed(range(stages)))

    @property
    def stage_depths(self) -> tuple[int, ...]:
        """Blocks of every stage, finest first."""
        return (SPARSE_CONV_PRESETS[self.preset][2],) * (len(self.stage_widths) - 1) + (self.depth,)


class Placement(NamedTuple):
    """Where the shown tokens stand on the grid.

    Attributes:
        grid: Tokens per axis.
        ids: Token number of each slot, `(batch, slot)`.
        slot_at: Slot of each token number, `(batch, length)`; the number of slots where no token is shown.
    """

    grid: tuple[int, ...]
    ids: Tensor
    slot_at: Tensor

    def spread(self, tokens: Float[Tensor, "batch slot place width"], places: Sequence[int]) -> Float[Tensor, "batch width *space"]:
        """The map that has `places` per axis in every token: the tokens' features where one is shown, zero elsewhere.

        The width is the fastest axis in memory, which is the layout that convolutions are fastest in.
        """
        width = tokens.shape[-1]
        whole = take(F.pad(tokens.flatten(2), (0, 0, 0, 1)), self.slot_at)
        # The width goes along as one more axis that is one patch long.
        return unpatchify(whole[:, :, None], (*self.grid, 1), (*places, width)).squeeze(1).movedim(-1, 1)

    def collect(self, maps: Float[Tensor, "batch width *space"], places: Sequence[int]) -> Float[Tensor, "batch slot place width"]:
        """The features of a map at the shown tokens; undoes `spread` in every slot that is used."""
        width = maps.shape[1]
        whole = patchify(maps.movedim(1, -1).unsqueeze(1), (*places, width)).squeeze(2)
        return take(whole, self.ids).reshape(*self.ids.shape, math.prod(places), width)


class SparseConvBlock(nn.Module):
    """ConvNeXt's block: depthwise convolution over shown places, norm over channels, MLP, and the residual (Liu et al. 2022, figure 4).

    Nothing is normalised over places or samples, so a sample depends on no other. ConvNeXt V2's response normalisation is left out: it
    takes statistics over all places.
    """

    def __init__(self, axes: int, width: int, kernel: int, mlp_ratio: float) -> None:
        super().__init__()
        self.conv = CONVOLUTIONS[axes - 1](width, width, kernel, padding=kernel // 2, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = mlp(width, mlp_ratio)

    def forward(self, tokens: Tensor, place: Placement, places: Sequence[int]) -> Tensor:
        """Tokens of the same shape, `(batch, slot, place, width)`, with `places` per axis in each."""
        mixed = place.collect(self.conv(place.spread(tokens, places)), places)
        out: Tensor = tokens + self.mlp(self.norm(mixed))
        return out


class Downsampling(nn.Module):
    """Norm, then a convolution whose kernel is its stride. It never reaches beyond a token, so it needs no grid."""

    def __init__(self, factor: Sequence[int], width: int, width_out: int) -> None:
        super().__init__()
        self.factor = tuple(factor)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.merge = nn.Linear(math.prod(factor) * width, width_out)

    def forward(self, tokens: Tensor, places: Sequence[int]) -> Tensor:
        """Tokens `(batch, slot, place, width_out)` with fewer places in each; weights are in the order (place, width)."""
        batch, slots, _, width = tokens.shape
        inside = self.norm(tokens).reshape(batch * slots, 1, *places, width)
        out: Tensor = self.merge(patchify(inside, (*self.factor, width)).squeeze(2))
        # The residual stream keeps the dtype of the pixels, fp32 under autocast too.
        return out.reshape(batch, slots, -1, out.shape[-1]).to(tokens.dtype)


class SparseConvStem(nn.Module):
    """All stages before the last, and the step into it: from pixels of the shown tokens to one feature for each."""

    def __init__(self, settings: SparseConvSettings, channels: Sequence[str]) -> None:
        super().__init__()
        widths, axes = settings.stage_widths, len(settings.patch)
        self.patch = settings.patch
        self.factor, *factors = downsampling_factors(settings.patch)
        self.embed = ChannelEmbedding(channels, math.prod(self.factor), widths[0])
        self.stages = nn.ModuleList(
            nn.ModuleList(SparseConvBlock(axes, width, settings.kernel, settings.mlp_ratio) for _ in range(depth))
            for width, depth in zip(widths[:-1], settings.stage_depths[:-1], strict=True)
        )
        self.steps = nn.ModuleList(
            Downsampling(factor, width, width_out) for factor, width, width_out in zip(factors, widths[:-1], widths[1:], strict=True)
        )

    def forward(
        self, patches: Float[Tensor, "batch slot channel voxel"], place: Placement, channels: Sequence[str] | None = None
    ) -> Float[Tensor, "batch slot 1 width"]:
        """Features at token resolution; `channels` as for `ChannelEmbedding`."""
        batch, slots, num_channels, _ = patches.shape
        inside = patches.reshape(batch * slots, num_channels, *self.patch)
        embedded: Tensor = self.embed(patchify(inside, self.factor), channels)
        tokens = embedded.reshape(batch, slots, -1, embedded.shape[-1]).to(patches.dtype)
        places = token_grid(self.patch, self.factor)
        for blocks, step in zip(self.stages, self.steps, strict=True):
            assert isinstance(blocks, nn.ModuleList)
            assert isinstance(step, Downsampling)
            for block in blocks:
                tokens = block(tokens, place, places)
            tokens = step(tokens, places)
            places = token_grid(places, step.factor)
        return tokens


class SparseConvEncoder(nn.Module):
    """Convolutional encoder over the tokens that it is shown.

    A token's feature depends on the tokens that a chain of shown neighbours joins it to, and on where they are relative to it: beyond
    the border and hidden are the same, and there are no position codes and no class token.
    """

    def __init__(self, settings: SparseConvSettings, channels: Sequence[str]) -> None:
        super().__init__()
        self.settings = settings
        axes = len(settings.patch)
        self.embed = SparseConvStem(settings, channels)
        self.blocks = nn.ModuleList(
            SparseConvBlock(axes, settings.width, settings.kernel, settings.mlp_ratio) for _ in range(settings.depth)
        )
        self.norm = nn.LayerNorm(settings.width, eps=1e-6)
        init_linears(self)

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the channels that can be fed."""
        return self.embed.embed.channels

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Channel numbers of each group: there is one of all."""
        return (tuple(range(len(self.channels))),)

    @property
    def footprints(self) -> tuple[int, ...]:
        """Voxels per measurement of each channel: one."""
        return (1,) * len(self.channels)

    @property
    def num_prefix(self) -> int:
        """Features before those of the tokens: none."""
        return 0

    def layout(self, space: Sequence[int]) -> TokenLayout:
        """How a crop of all channels becomes tokens."""
        patch = self.settings.patch
        return TokenLayout(token_grid(space, patch), patch, patch, self.groups, len(self.channels))

    def forward(
        self,
        patches: Float[Tensor, "batch token channel voxel"],
        ids: Int[Tensor, "batch token"],
        grid: Sequence[int],
        used: Bool[Tensor, "batch token"] | None = None,
        channels: Sequence[str] | None = None,
        context: Context | None = None,
    ) -> Float[Tensor, "batch token width"]:
        """Features of the shown tokens, in the order of `ids`.

        Args:
            patches: Pixels of the shown tokens, in normalised units, zero where there is no value.
            ids: Their numbers on the token grid, which give the neighbours; no number twice in the used slots of a sample.
            grid: Tokens per axis.
            used: False for slots that hold no token; no other depends on them, and what comes out for them means nothing.
            channels: Names of the channel axis, if not all in the encoder's own order.
            context: Not looked at.

        Raises:
            ValueError: The grid has another number of axes than the patch, or a channel is not known.
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
        """Output of every block of the last stage, before the last norm, zero in slots that are not used; arguments as for `forward`.

        Earlier stages are finer than tokens and narrower. Bringing them here would take weights that pretraining never trains.
        """
        del context
        if len(grid) != len(self.settings.patch):
            raise ValueError(
                f"grid {tuple(grid)} has {len(grid)} axes and patch {self.settings.patch} has {len(self.settings.patch)}; "
                "give one size per axis to both"
            )
        place = placement(ids, grid, used)
        tokens = self.embed(_select(patches, used), place, channels)
        outputs = []
        for block in self.blocks:
            tokens = block(tokens, place, (1,) * len(grid))
            outputs.append(_select(tokens.squeeze(2), used))
        return outputs


def placement(ids: Int[Tensor, "batch token"], grid: Sequence[int], used: Bool[Tensor, "batch token"] | None = None) -> Placement:
    """Where tokens with these numbers stand; a slot that is not used stands nowhere, whatever number it holds."""
    (batch, slots), length = ids.shape, math.prod(grid)
    # All unused slots write to a spare place behind the last, which is cut off.
    index = ids if used is None else torch.where(used, ids, length)
    empty = torch.full((batch, length + 1), slots, dtype=ids.dtype, device=ids.device)
    slot_at = empty.scatter(1, index, torch.arange(slots, dtype=ids.dtype, device=ids.device).expand(batch, -1))
    return Placement(tuple(grid), ids, slot_at[:, :length])


def _select(values: Tensor, used: Tensor | None) -> Tensor:
    return values if used is None else torch.where(used.reshape(*used.shape, *(1,) * (values.ndim - 2)), values, 0.0)
