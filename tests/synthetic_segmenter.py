"""A segmenter of volumes or pictures with random weights, as fine-tuning would save it."""

from __future__ import annotations

import torch

from mae_core.export import Description
from mae_core.heads import HeadSettings, Segmenter
from mae_core.vit import Encoder, EncoderSettings
from modalities.medical import MriSettings, XraySettings


def random_segmenter(classes: tuple[tuple[int, str], ...], reader: MriSettings | XraySettings) -> tuple[Segmenter, Description]:
    """For crops of 8³ voxels, or 8² pixels, of one channel; it gives all of its classes somewhere."""
    axes, channel = (2, "XR") if isinstance(reader, XraySettings) else (3, "MR")
    encoder = EncoderSettings(preset="nano", patch=(4,) * axes, mlp_ratio=1)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Segmenter(Encoder(encoder, (channel,)), HeadSettings(features=4), len(classes)).eval()
    about = Description(
        kind="segmenter",
        modality=reader.kind,
        channels=(channel,),
        mean=(0.0,),
        std=(1.0,),
        no_value=63,
        crop=(8,) * axes,
        spacing=(2.0,) * axes,
        spacing_unit="mm",
        encoder=encoder,
        head=HeadSettings(features=4),
        classes=classes,
        reader=reader.model_dump(mode="json"),
        lineage={},
    )
    return model, about
