"""The encoders there are, told apart by their settings: a plain ViT, or convolutions that skip what is hidden."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from mae_core.settings import default_kind
from mae_core.sparse_conv import SparseConvEncoder, SparseConvSettings
from mae_core.vit import Encoder, EncoderSettings

AnyEncoder = Encoder | SparseConvEncoder
AnyEncoderSettings = EncoderSettings | SparseConvSettings
EncoderChoice = Annotated[AnyEncoderSettings, Field(discriminator="kind"), default_kind("vit")]


def build_encoder(settings: AnyEncoderSettings, channels: Sequence[str]) -> AnyEncoder:
    """An encoder with new weights.

    Raises:
        ValueError: The settings do not fit each other or the channels.
    """
    match settings:
        case EncoderSettings():
            return Encoder(settings, channels)
        case SparseConvSettings():
            return SparseConvEncoder(settings, channels)
