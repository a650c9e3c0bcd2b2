"""Our encoder under MONAI's names, for its ViT and the encoder of its UNETR. MONAI itself is not needed here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mae_core.nd import token_grid
from mae_core.vit import Encoder, EncoderSettings
from mae_core.weights import Kind, Move, Transfer, WeightsError

LAYER_NORM_EPS = 1e-6
"""Ours and the paper's. MONAI's LayerNorms have 1e-5, and a file of weights cannot say so: set `eps` on each for equal features."""
UNUSED = "*.norm_cross_attn.*"
"""LayerNorms that MONAI's blocks hold and, without cross-attention, never call: the only tensors that are new."""
UNETR_DEPTH, UNETR_PATCH = 12, 16
PARTS = {
    "norm1": "norm1",
    "attention.qkv": "attn.qkv",
    "attention.out": "attn.out_proj",
    "norm2": "norm2",
    "mlp.0": "mlp.linear1",
    "mlp.2": "mlp.linear2",
}
"""Layers of a block: ours and MONAI's."""


@dataclass(frozen=True)
class MonaiWeights:
    """An encoder for MONAI.

    Attributes:
        tensors: By MONAI's names; what a network of MONAI holds beyond them (`classification_head`, UNETR's convolutions) is its own.
        arguments: Of the network's constructor, without those that are the user's own.
        transfer: What became of every tensor.
    """

    tensors: dict[str, Tensor]
    arguments: dict[str, Any]
    transfer: Transfer


def to_monai(
    encoder: Encoder, space: Sequence[int], network: Literal["vit", "unetr"] = "vit", spacing: Sequence[float] = ()
) -> MonaiWeights:
    """The weights for `monai.networks.nets.ViT` or `UNETR`, whose patches are embedded by a convolution (`proj_type="conv"`).

    A class token makes it a ViT with `classification=True`. Positions become a table of MONAI's for one size of input.

    Args:
        encoder: Ours.
        space: Voxels per axis of the inputs.
        network: Which class they are for.
        spacing: Distance between voxels along each axis, for positions in physical units.

    Raises:
        WeightsError: The encoder has what MONAI's network has no place for; the message names each.
    """
    settings = encoder.settings
    _check(encoder, space, network, spacing)
    prefix = "vit." if network == "unetr" else ""
    state, tensors, moves = encoder.state_dict(), dict[str, Tensor](), list[Move]()

    def put(kind: Kind, source: str, target: str, value: Tensor, note: str = "") -> None:
        tensors[prefix + target] = value.detach().clone().contiguous()
        moves.append(Move(kind, (source,) if source else (), prefix + target, note))

    embed = "patch_embedding.patch_embeddings"
    kernel = state["embed.weight"].permute(2, 0, 1).unflatten(2, settings.patch)
    put("permuted", "embed.weight", f"{embed}.weight", kernel, "(channel, voxel, width) to (width, channel, *patch)")
    put("copied", "embed.bias", f"{embed}.bias", state["embed.bias"])
    if settings.class_token:
        put("copied", "class_token", "cls_token", state["class_token"])
    put(*_positions(encoder, space, spacing))
    for number in range(settings.depth):
        for end, filling in (("weight", torch.ones), ("bias", torch.zeros)):
            for ours, theirs in PARTS.items():
                source = f"blocks.{number}.{ours}.{end}"
                put("copied", source, f"blocks.{number}.{theirs}.{end}", state[source])
            put("new", "", f"blocks.{number}.norm_cross_attn.{end}", filling(settings.width), "MONAI never calls it")
    for end in ("weight", "bias"):
        put("copied", f"norm.{end}", f"norm.{end}", state[f"norm.{end}"])
    transfer = Transfer(tuple(moves), tuple(state), tuple(tensors))
    transfer.complete((UNUSED,))
    return MonaiWeights(tensors, _arguments(settings, len(encoder.channels), space, network), transfer)


def _positions(encoder: Encoder, space: Sequence[int], spacing: Sequence[float]) -> tuple[Kind, str, str, Tensor, str]:
    settings, grid = encoder.settings, token_grid(space, encoder.settings.step)
    ids = torch.arange(math.prod(grid), device=encoder.embed.bias.device)[None]
    size = torch.tensor([[width * step for width, step in zip(spacing, settings.step, strict=True)]]) if spacing else None
    with torch.no_grad():
        table = encoder.places(ids, grid, None if size is None else size.to(ids.device))
    target = "patch_embedding.position_embeddings"
    if settings.positions.kind == "learned":
        kind: Kind = "copied" if settings.positions.grid == grid else "interpolated"
        return kind, "places.positions.table_token", target, table, f"for a grid of {grid}"
    return "computed", "", target, table, f"our codes for a grid of {grid}"


def _arguments(settings: EncoderSettings, channels: int, space: Sequence[int], network: Literal["vit", "unetr"]) -> dict[str, Any]:
    shared = {
        "in_channels": channels,
        "img_size": list(space),
        "hidden_size": settings.width,
        "mlp_dim": round(settings.width * settings.mlp_ratio),
        "num_heads": settings.heads,
        "proj_type": "conv",
        "spatial_dims": len(space),
        "qkv_bias": True,
    }
    own = {"patch_size": list(settings.patch), "num_layers": settings.depth, "classification": settings.class_token}
    return shared | (own if network == "vit" else {})


def _check(encoder: Encoder, space: Sequence[int], network: Literal["vit", "unetr"], spacing: Sequence[float]) -> None:
    settings, wrong = encoder.settings, list[str]()
    try:
        token_grid(space, settings.step)
    except ValueError as error:
        wrong.append(f"another size of input: {error}")
    if settings.num_registers:
        wrong.append(f"{settings.num_registers} registers, which all other tokens attend to")
    if len(encoder.groups) > 1:
        wrong.append(f"{len(encoder.groups)} channel groups; MONAI has one token per place")
    if any(footprint > 1 for footprint in encoder.footprints):
        wrong.append(f"channels with one measurement for several voxels: {settings.footprints}")
    if settings.step != settings.patch:
        wrong.append(f"patches {settings.patch} that overlap, with stride {settings.step}")
    if encoder.context is not None:
        wrong.append("context, which MONAI's network cannot be told")
    if settings.positions.unit == "physical" and not spacing:
        wrong.append("positions in physical units; give the spacing, and they become a table for it")
    if network == "unetr":
        wrong += _beyond_unetr(settings)
    if wrong:
        name = "UNETR" if network == "unetr" else "ViT"
        listed = "".join(f"\n  {line}" for line in wrong)
        raise WeightsError(f"the encoder cannot become the one of MONAI's {name}, because it has{listed}")


def _beyond_unetr(settings: EncoderSettings) -> list[str]:
    wrong = []
    if settings.class_token:
        wrong.append("a class token, which all other tokens attend to and UNETR has none; pretrain with model.encoder.class_token=false")
    if settings.depth != UNETR_DEPTH:
        wrong.append(f"{settings.depth} blocks; UNETR has {UNETR_DEPTH}")
    if set(settings.patch) != {UNETR_PATCH}:
        wrong.append(f"patches {settings.patch}; UNETR's are {UNETR_PATCH} on each axis")
    return wrong
