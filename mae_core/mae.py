"""Masked autoencoder: hide most tokens, encode the rest, predict what was hidden (He et al. 2021, figure 1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from mae_core.attention import AttentionShape
from mae_core.context import Context
from mae_core.decoders import CrossDecoder, CrossDecoderSettings, Decoder, DecoderChoice, DecoderFrame, DecoderSettings
from mae_core.encoders import AnyEncoder, EncoderChoice, build_encoder
from mae_core.errors import ErrorSettings, elementwise_error
from mae_core.hog import oriented_gradients
from mae_core.masking import HidingPlan, num_kept, num_predicted
from mae_core.native import group_tokens_valid, measured_elements
from mae_core.nd import TokenLayout, token_valid
from mae_core.settings import Settings, default_kind
from mae_core.targets import (
    HogTarget,
    NormalisedPixelTarget,
    PcaBasis,
    PcaTarget,
    Target,
    TargetSettings,
    from_pca,
    make_target,
    target_shape,
)
from mae_core.vit import Encoder, EncoderSettings, token_size


class ModelSettings(Settings):
    """A masked autoencoder."""

    encoder: EncoderChoice = EncoderSettings()
    decoder: DecoderChoice = DecoderSettings()
    target: Annotated[TargetSettings, default_kind("normalised_pixels")] = NormalisedPixelTarget()
    error: ErrorSettings = ErrorSettings()
    min_token_valid_fraction: Annotated[
        float, Field(ge=0, le=1, description="A patch with a smaller share of counted voxels is no token")
    ] = 0.5


@dataclass(frozen=True)
class MaeOutput:
    """Prediction, target and the error between them.

    Attributes:
        predicted: `(batch, hidden, channel, feature)` in fp32, in the space of the target.
        target: What was to be predicted, with the elements that count.
        error_sum: Sum of errors over counted elements, `(batch, channel)`; channels are those of the target.
        count: Number of counted elements, `(batch, channel)`.
        plan: What was shown and what was predicted: the plan that was handed in, or its part that the decoder chose.
    """

    predicted: Float[Tensor, "batch hidden channel feature"]
    target: Target
    error_sum: Float[Tensor, "batch channel"]
    count: Tensor
    plan: HidingPlan


class MaskedAutoencoder(nn.Module):
    """Encoder, decoder and the loss between prediction and target on the hidden tokens."""

    def __init__(self, settings: ModelSettings, channels: Sequence[str]) -> None:
        super().__init__()
        self.settings = settings
        self.encoder = build_encoder(settings.encoder, channels)
        self.decoder = build_decoder(settings, self.encoder)
        if isinstance(settings.target, PcaTarget):
            elements, number = len(channels) * math.prod(settings.encoder.patch), settings.target.num_components
            for name, shape in (("mean", (elements,)), ("components", (number, elements)), ("scale", (number,))):
                self.register_buffer(f"basis_{name}", torch.zeros(shape, dtype=torch.float64))

    @property
    def basis(self) -> PcaBasis | None:
        """Principal components of the target, where it has any; zero until `set_basis` has been called."""
        if not isinstance(self.settings.target, PcaTarget):
            return None
        return PcaBasis(self.get_buffer("basis_mean"), self.get_buffer("basis_components"), self.get_buffer("basis_scale"))

    def set_basis(self, basis: PcaBasis) -> None:
        """Take principal components that were fitted to training patches."""
        for name in ("mean", "components", "scale"):
            self.get_buffer(f"basis_{name}").copy_(getattr(basis, name))

    def forward(
        self,
        pixels: Float[Tensor, "batch channel *space"],
        counted: Bool[Tensor, "batch *space"],
        present: Bool[Tensor, "batch channel"],
        plan: HidingPlan,
        context: Context | None = None,
    ) -> MaeOutput:
        """Predict the hidden tokens of a batch.

        Args:
            pixels: Normalised units; zero where there is no value and in channels that a sample lacks.
            counted: Voxels that count in target and loss.
            present: Channels that each sample has; the others are in no sum, no target and no loss.
            plan: What is shown and what is hidden.
            context: What else is known of the samples.
        """
        layout = self.encoder.layout(pixels.shape[2:])
        plan = self.decoder.chosen(plan)
        patches = layout.split(pixels)
        shown, used = layout.pick(patches, plan.visible), None if plan.full else plan.visible_used
        features = self.encoder(shown, plan.visible, layout.grid, used, None, context)
        predicted = self.decoder(features, plan, layout.grid, token_size(context, self.settings.encoder.step)).float()
        if isinstance(self.settings.target, HogTarget):
            target = self.target(layout, pixels, counted, present, plan.hidden, plan.hidden_used)
        else:
            judged = hidden_counted(layout, counted, present, plan)
            target = make_target(layout.pick(patches, plan.hidden), judged, self.settings.target, self.basis)
        error = elementwise_error(predicted, target.values, target.counted, self.settings.error)
        return MaeOutput(predicted, target, error.sum(dim=(1, 3)), target.counted.sum(dim=(1, 3)), plan)

    def target(self, layout: TokenLayout, pixels: Tensor, counted: Tensor, present: Tensor, ids: Tensor, used: Tensor) -> Target:
        """The target of any tokens, hidden or not; slots that are not used count nothing."""
        voxels = layout.measured(counted, present)
        if isinstance(self.settings.target, HogTarget):
            patches, known = oriented_gradients(pixels, voxels, layout.patch, self.settings.target)
        else:
            patches, known = layout.split(pixels), layout.split(voxels)
        known = layout.pick(known, ids) & used[:, :, None, None]
        return make_target(layout.pick(patches, ids), known, self.settings.target, self.basis)

    def predicted_pixels(self, output: MaeOutput) -> Float[Tensor, "batch hidden channel voxel"] | None:
        """The prediction in input units, with each patch's **true** mean and deviation where the target is normalised by them.

        None where the target cannot be brought back to pixels.
        """
        target = output.target
        values = output.predicted * target.std + target.mean
        match self.settings.target:
            case HogTarget():
                return None
            case PcaTarget():
                assert self.basis is not None
                return from_pca(values, self.basis, len(self.encoder.channels))
            case _:
                return values


def build_decoder(settings: ModelSettings, encoder: AnyEncoder) -> Decoder | CrossDecoder:
    """The decoder that is set, to fit an encoder."""
    own = settings.encoder
    coarse = any(footprint > 1 for footprint in encoder.footprints)
    if isinstance(settings.target, HogTarget | PcaTarget) and (own.step != own.patch or len(encoder.groups) > 1 or coarse):
        raise ValueError(
            f"target.kind={settings.target.kind} needs patches that do not overlap, one channel group and a measurement in every voxel; "
            "take target.kind=normalised_pixels or pixels, or prepare all channels on one grid"
        )
    head = target_shape(settings.target, len(encoder.channels), own.patch)
    elements = measured_elements(own.patch, encoder.footprints) if coarse else ()
    frame = DecoderFrame(own.preset, own.width, own.mlp_ratio, own.positions, len(encoder.groups), head, elements)
    match settings.decoder:
        case DecoderSettings():
            return Decoder(settings.decoder, frame)
        case CrossDecoderSettings():
            return CrossDecoder(settings.decoder, frame)


def attention_shapes(model: MaskedAutoencoder, space: Sequence[int], mask_ratio: float) -> tuple[AttentionShape, ...]:
    """What the blocks of a model do in training on crops in which every token is valid; convolutions attend to nothing."""
    encoder, decoder = model.encoder, model.decoder
    tokens = math.prod(encoder.layout(space).full_grid)
    kept = num_kept(tokens, mask_ratio)
    own = (encoder.attention_shape(kept),) if isinstance(encoder, Encoder) else ()
    width, _, heads = model.settings.decoder.shape(model.settings.encoder.preset)
    keys, queries = tokens + encoder.num_prefix, tokens + encoder.num_prefix
    if isinstance(decoder, CrossDecoder):
        keys, queries = kept + encoder.num_prefix, num_predicted(tokens - kept, decoder.settings.predicted_fraction)
    return (*own, AttentionShape("decoder", heads, width // heads, queries, keys))


def hidden_counted(
    layout: TokenLayout, counted: Bool[Tensor, "batch *space"], present: Bool[Tensor, "batch channel"], plan: HidingPlan
) -> Bool[Tensor, "batch hidden channel voxel"]:
    """Elements of the hidden tokens that can be judged: valid, of a channel that is there, and in no token that was shown."""
    if not layout.overlaps and not layout.coarse and len(layout.groups) == 1:  # the same as below without an array of all channels
        return layout.pick(layout.split(counted[:, None]), plan.hidden) & present[:, None, :, None] & plan.hidden_used[:, :, None, None]
    voxels = layout.measured(counted, present)
    if layout.overlaps:
        voxels = voxels & ~layout.seen(plan.visible, plan.visible_used)
    return layout.pick(layout.split(voxels), plan.hidden) & plan.hidden_used[:, :, None, None]


def tokens_valid(
    layout: TokenLayout, counted: Bool[Tensor, "batch *space"], present: Bool[Tensor, "batch channel"], min_fraction: float
) -> Bool[Tensor, "batch length"]:
    """Which tokens there are: enough of the voxels between it and the next count, and a channel of its group is there.

    In a group of coarse channels whole blocks of voxels count.
    """
    if len(layout.groups) == 1 and not layout.coarse:
        return token_valid(counted, layout.stride, min_fraction)
    valid = group_tokens_valid(layout, counted, min_fraction)
    return (valid & layout.any_present(present)[:, :, None]).flatten(1)
