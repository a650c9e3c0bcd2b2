"""Masked autoencoders of other libraries behind one call, so that their training step can be measured beside ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mae_core.nd import patchify
from mae_core.vit import PRESETS

Peer = Literal["transformers", "monai"]


class PeerError(RuntimeError):
    """A peer cannot take part; the message says why."""


@dataclass(frozen=True)
class PeerShape:
    """What a peer is built to, so that it does the work of ours.

    Attributes:
        preset: Width, depth and heads of the encoder.
        decoder: Width, depth and heads of the decoder.
        mlp_ratio: Hidden width of the MLPs over the token width.
        channels: Channels of a crop.
        space: Voxels per axis.
        patch: Voxels of a token per axis.
        mask_ratio: Share of the tokens that is hidden.
    """

    preset: str
    decoder: tuple[int, int, int]
    mlp_ratio: float
    channels: int
    space: tuple[int, ...]
    patch: tuple[int, ...]
    mask_ratio: float


class MonaiWithLoss(nn.Module):
    """MONAI's model, which predicts every patch and has no loss, with the loss on normalised hidden patches around it."""

    def __init__(self, model: nn.Module, patch: tuple[int, ...]) -> None:
        super().__init__()
        self.model, self.patch = model, patch

    def forward(self, pixels: Tensor) -> Tensor:
        """Mean squared error over the hidden patches, each normalised by its own mean and deviation."""
        predicted, hidden = self.model(pixels)
        return hidden_loss(predicted, hidden, pixels, self.patch)


def hidden_loss(predicted: Tensor, hidden: Tensor, pixels: Tensor, patch: tuple[int, ...]) -> Tensor:
    """Mean squared error over hidden patches in fp32 (He et al. 2021, section 3).

    Args:
        predicted: `(batch, token, element)`.
        hidden: `(batch, token)`, 1 where a token was not shown.
        pixels: `(batch, channel, *space)`.
        patch: Voxels of a token per axis.
    """
    values = patchify(pixels, patch).flatten(2)
    variance, mean = torch.var_mean(values, dim=2, keepdim=True)
    error = (predicted.float() - (values - mean) / (variance + 1e-6).sqrt()).square().mean(dim=2)
    return (error * hidden).sum() / hidden.sum()


def make_peer(name: Peer, shape: PeerShape) -> tuple[nn.Module, Callable[[Tensor], Tensor], str]:
    """A peer's model, the loss of a batch of pixels, and its version.

    Raises:
        PeerError: It is not installed, or cannot be built to this shape.
    """
    build = {"transformers": _transformers, "monai": _monai}[name]
    try:
        model, loss = build(shape)
    except ImportError as error:
        raise PeerError(f"not installed ({error}); pip install {name}") from error
    except (ValueError, NotImplementedError, AssertionError) as error:
        raise PeerError(f"cannot be built to space {shape.space}, patch {shape.patch}: {error}") from error
    return model.train(), loss, version(name)


def _transformers(shape: PeerShape) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    if len(shape.space) != 2 or len({*shape.space}) != 1 or len({*shape.patch}) != 1:
        raise ValueError("its images and patches are squares")
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    (width, depth, heads), (inner, layers, inner_heads) = PRESETS[shape.preset], shape.decoder
    config = ViTMAEConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=round(width * shape.mlp_ratio),
        decoder_hidden_size=inner,
        decoder_num_hidden_layers=layers,
        decoder_num_attention_heads=inner_heads,
        decoder_intermediate_size=round(inner * shape.mlp_ratio),
        image_size=shape.space[0],
        patch_size=shape.patch[0],
        num_channels=shape.channels,
        norm_pix_loss=True,
        attn_implementation="sdpa",
        mask_ratio=shape.mask_ratio,
    )
    model: Any = ViTMAEForPreTraining(config)
    return model, lambda pixels: model(pixels).loss


def _monai(shape: PeerShape) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    from monai.networks.nets import MaskedAutoEncoderViT

    (width, depth, heads), (inner, layers, inner_heads) = PRESETS[shape.preset], shape.decoder
    hiding = {"masking_ratio": shape.mask_ratio}
    model = MaskedAutoEncoderViT(
        in_channels=shape.channels,
        img_size=shape.space,
        patch_size=shape.patch,
        hidden_size=width,
        mlp_dim=round(width * shape.mlp_ratio),
        num_layers=depth,
        num_heads=heads,
        decoder_hidden_size=inner,
        decoder_mlp_dim=round(inner * shape.mlp_ratio),
        decoder_num_layers=layers,
        decoder_num_heads=inner_heads,
        pos_embed_type="learnable",
        decoder_pos_embed_type="learnable",
        spatial_dims=len(shape.space),
        qkv_bias=True,
        **hiding,
    )
    with_loss = MonaiWithLoss(model, shape.patch)
    return with_loss, with_loss
