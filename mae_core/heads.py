"""A segmentation head over the encoder's tokens: UNETR's decoder (Hatamizadeh et al. 2021) for any patch and 1–3 axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from mae_core.context import Context
from mae_core.encoders import AnyEncoder
from mae_core.nd import downsampling_factors
from mae_core.settings import Settings
from mae_core.vit import all_tokens


class HeadSettings(Settings):
    """Shape of the segmentation head."""

    kind: Literal["unetr"] = "unetr"
    features: int = Field(16, ge=4, multiple_of=4, description="Feature maps at full resolution; doubled at every halving")


class Segmenter(nn.Module):
    """Encoder and UNETR head: class scores for every voxel of a crop."""

    def __init__(self, encoder: AnyEncoder, settings: HeadSettings, num_classes: int) -> None:
        super().__init__()
        self.encoder, self.settings = encoder, settings
        self.head = UnetrHead(encoder.settings.step, encoder.settings.width, len(encoder.channels), settings.features, num_classes)
        stages = len(self.head.factors)
        depth = encoder.settings.depth
        self.taps = tuple(max(depth * stage // stages, 1) - 1 for stage in range(1, stages + 1))

    def forward(
        self,
        pixels: Float[Tensor, "batch channel *space"],
        has_value: Bool[Tensor, "batch *space"],
        context: Context | None = None,
        present: Bool[Tensor, "batch channel"] | None = None,
    ) -> Float[Tensor, "batch class *space"]:
        """Class scores in fp32's or autocast's dtype.

        Args:
            pixels: Normalised units, in the encoder's channel order, zero where there is no value and in channels that a sample lacks.
            has_value: False where there is none; a patch without any is seen by no other patch.
            context: What else is known of the samples.
            present: Channels that each sample has (default: all); a group without any has no tokens.
        """
        every = all_tokens(self.encoder.layout(pixels.shape[2:]), pixels, has_value, present)
        layers = self.encoder.layers(every.patches, every.ids, every.layout.grid, every.used, None, context)
        features = [layers[tap] for tap in self.taps[:-1]] + [self.encoder.norm(layers[-1])]
        arrays = [every.by_place(tokens[:, self.encoder.num_prefix :]) for tokens in features]
        maps = [norm(array.flatten(2)).reshape(array.shape) for norm, array in zip(self.head.norms, arrays, strict=True)]
        scores: Tensor = self.head(pixels, maps)
        return scores


class UnetrHead(nn.Module):
    """MONAI's UNETR blocks stacked along the prime factors of the patch, so that any patch size is brought to full resolution.

    `norms` calibrate the encoder's features channel by channel before the head sees them, as the paper does before its
    linear probe (He et al. 2021, appendix A.1). On noise as input, pretrained encoders' features had standard deviations of
    6 to 40 where random weights gave 1 to 2.5; the scale is taken out here. No gain in Dice from it has been measured.
    """

    def __init__(self, patch: Sequence[int], width: int, num_channels: int, features: int, num_classes: int) -> None:
        from monai.networks.blocks.dynunet_block import UnetOutBlock
        from monai.networks.blocks.unetr_block import UnetrBasicBlock, UnetrPrUpBlock, UnetrUpBlock

        super().__init__()
        axes = len(patch)
        norm = ("group", {"num_groups": 4})
        self.factors = downsampling_factors(patch)[::-1]
        stages = len(self.factors)
        sizes = [features * 2 ** (stages - 1 - stage) for stage in range(stages)]
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(stages))
        self.image = UnetrBasicBlock(axes, num_channels, features, kernel_size=3, stride=1, norm_name=norm, res_block=True)
        self.skips, self.ups = nn.ModuleList(), nn.ModuleList()
        for stage in range(stages):
            self.ups.append(
                UnetrUpBlock(
                    axes,
                    width if stage == 0 else sizes[stage - 1],
                    sizes[stage],
                    kernel_size=3,
                    upsample_kernel_size=self.factors[stage],
                    norm_name=norm,
                    res_block=True,
                )
            )
        for stage in range(stages - 1):
            climbs = [
                UnetrPrUpBlock(
                    axes,
                    width if step == 0 else sizes[stage],
                    sizes[stage],
                    num_layer=0,
                    kernel_size=3,
                    stride=1,
                    upsample_kernel_size=self.factors[step],
                    norm_name=norm,
                    conv_block=False,
                    res_block=True,
                )
                for step in range(stage + 1)
            ]
            self.skips.append(nn.Sequential(*climbs))
        self.out = UnetOutBlock(axes, features, num_classes)

    def forward(self, pixels: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """Scores at full resolution from the pixels and one feature map per stage, the deepest last."""
        out = maps[-1]
        for stage, up in enumerate(self.ups):
            last = stage == len(self.ups) - 1
            out = up(out, self.image(pixels) if last else self.skips[stage](maps[len(maps) - 2 - stage]))
        scores: Tensor = self.out(out)
        return scores
