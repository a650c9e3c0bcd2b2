"""Published MAE checkpoints become models of ours: names, orders of elements, positions. Of their projects no code is used."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mae_core.decoders import DECODER_PRESETS, DecoderSettings
from mae_core.mae import MaskedAutoencoder, ModelSettings
from mae_core.positions import PositionSettings, sincos_positions
from mae_core.targets import NormalisedPixelTarget, PixelTarget
from mae_core.vit import PRESETS, Encoder, EncoderSettings
from mae_core.weights import Kind, Move, Transfer, WeightsError

Order = Literal["reversed", "array"]
ORDERS: tuple[Order, ...] = ("reversed", "array")
TOLERANCE = 1e-4
"""Largest difference at which a stored table of positions is taken for our fixed codes."""


@dataclass(frozen=True)
class Layout:
    """Names of one family of published checkpoints, by ours.

    Attributes:
        title: Of the family.
        encoder: `embed`, `class_token`, `positions`, `blocks`, `norm`.
        decoder: `embed`, `mask_token`, `positions`, `blocks`, `norm`, `head`.
        parts: Layers of a block; several are stacked along their outputs.
    """

    title: str
    encoder: Mapping[str, str]
    decoder: Mapping[str, str]
    parts: Mapping[str, tuple[str, ...]]

    @property
    def signature(self) -> tuple[str, ...]:
        """Tensors by which the family is told."""
        first = f"{self.encoder['blocks']}.0.{self.parts['attention.qkv'][0]}.weight"
        return f"{self.encoder['embed']}.weight", self.encoder["class_token"], self.encoder["positions"], first

    @property
    def decoder_names(self) -> tuple[str, ...]:
        """Globs of the tensors of the decoder."""
        return tuple(name if key in ("mask_token", "positions") else f"{name}.*" for key, name in self.decoder.items())


def _published(title: str, encoder: str, decoder: str, parts: Mapping[str, tuple[str, ...]]) -> Layout:
    return Layout(
        title,
        dict(zip(("embed", "class_token", "positions", "blocks", "norm"), encoder.split(), strict=True)),
        dict(zip(("embed", "mask_token", "positions", "blocks", "norm", "head"), decoder.split(), strict=True)),
        parts,
    )


_BLOCK = {
    "norm1": ("norm1",),
    "attention.qkv": ("attn.qkv",),
    "attention.out": ("attn.proj",),
    "norm2": ("norm2",),
    "mlp.0": ("mlp.fc1",),
    "mlp.2": ("mlp.fc2",),
}
_LAYER = {
    "norm1": ("layernorm_before",),
    "attention.qkv": ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    "attention.out": ("attention.output.dense",),
    "norm2": ("layernorm_after",),
    "mlp.0": ("intermediate.dense",),
    "mlp.2": ("output.dense",),
}
_LAYERS = (
    "{0}embeddings.patch_embeddings.projection {0}embeddings.cls_token {0}embeddings.position_embeddings {0}encoder.layer {0}layernorm"
)
_DECODER = "{0}decoder_embed {0}mask_token {0}decoder_pos_embed {0}{1} {0}decoder_norm {0}decoder_pred"
LAYOUTS = (
    _published("facebookresearch/mae", "patch_embed.proj cls_token pos_embed blocks norm", _DECODER.format("", "decoder_blocks"), _BLOCK),
    _published("transformers ViTMAEForPreTraining", _LAYERS.format("vit."), _DECODER.format("decoder.", "decoder_layers"), _LAYER),
    _published("transformers ViTMAEModel", _LAYERS.format(""), _DECODER.format("decoder.", "decoder_layers"), _LAYER),
)
"""The families that are read. Names of tensors are facts; no code of these projects is used."""


@dataclass(frozen=True)
class Published:
    """A published checkpoint of a layout that is known.

    Attributes:
        layout: How it names its tensors.
        tensors: By name, in fp32.
        where: What to call it in messages.
        grid: Tokens per axis that its positions are for; empty: equal on all axes.
    """

    layout: Layout
    tensors: dict[str, Tensor]
    where: str
    grid: tuple[int, ...] = ()

    def tensor(self, name: str) -> Tensor:
        """One of them.

        Raises:
            WeightsError: It is missing.
        """
        if name not in self.tensors:
            raise WeightsError(f"{self.where} is laid out as {self.layout.title} and has no tensor {name}; give the whole checkpoint")
        return self.tensors[name]

    @property
    def kernel(self) -> Float[Tensor, "width channel *patch"]:
        """Of the convolution that embeds patches."""
        return self.tensor(f"{self.layout.encoder['embed']}.weight")

    @property
    def has_decoder(self) -> bool:
        """Whether the decoder is there, too."""
        return f"{self.layout.decoder['embed']}.weight" in self.tensors

    def depth(self, blocks: str) -> int:
        """Number of blocks below a name."""
        found = {
            int(name.removeprefix(f"{blocks}.").split(".")[0]) for name in self.tensors if re.match(re.escape(blocks) + r"\.\d+\.", name)
        }
        return len(found)

    def mlp_width(self, blocks: str) -> int:
        """Hidden width of the MLP of the first block below a name."""
        return len(self.tensor(f"{blocks}.0.{self.layout.parts['mlp.0'][0]}.bias"))

    def table(self, name: str) -> tuple[Float[Tensor, " width"], Float[Tensor, "token width"], tuple[int, ...]]:
        """Stored positions: of the class token, of the others, and the grid that these are for.

        Raises:
            WeightsError: Their number is that of no grid that is known.
        """
        rows = self.tensor(name)[0]
        count, axes = len(rows) - 1, self.kernel.ndim - 2
        grid = self.grid or (round(count ** (1 / axes)),) * axes
        if len(grid) != axes or math.prod(grid) != count:
            raise WeightsError(
                f"{self.where}: {name} holds {count} positions on {axes} axes, which are not those of a grid {grid}; "
                "give grid, the tokens per axis that it was trained with"
            )
        return rows[0], rows[1:], grid


def recognise(tensors: Mapping[str, Tensor], where: str = "the checkpoint", grid: Sequence[int] = ()) -> Published:
    """The checkpoint with its layout. Nothing is guessed: all tensors that tell a layout must be there.

    Args:
        tensors: As `read_tensors` gives them.
        where: What to call it in messages.
        grid: Tokens per axis that its positions are for; needed where these differ.

    Raises:
        WeightsError: The layout is none that is known, or values are not finite.
    """
    layout = next((known for known in LAYOUTS if all(name in tensors for name in known.signature)), None)
    if layout is None:
        names, looked = list(tensors), "".join(f"\n  {known.title}: {', '.join(known.signature)}" for known in LAYOUTS)
        raise WeightsError(
            f"{where} is of no layout that is read: it holds {len(names)} tensors ({', '.join(names[:6])}, …) "
            f"and all of one of these lines were looked for:{looked}"
        )
    bad = [name for name, value in tensors.items() if not value.isfinite().all()]
    if bad:
        raise WeightsError(f"{where} holds values that are not finite in {', '.join(bad[:5])}; take an earlier checkpoint")
    return Published(layout, {name: value.float() for name, value in tensors.items()}, where, tuple(grid))


def import_encoder(published: Published, channels: Sequence[str], heads: int | None = None) -> tuple[Encoder, Transfer]:
    """Our encoder with the weights of a published one. Its decoder, and what is not known, is dropped and told of.

    LayerNorm has ours and the paper's epsilon of 1e-6; transformers' own default is 1e-12.

    Args:
        published: From `recognise`.
        channels: Names of its input channels, in its order.
        heads: Attention heads where they are known; a checkpoint does not hold them, and ours follow from its width and depth.

    Raises:
        WeightsError: Shape, heads or number of channels are none of ours.
    """
    encoder = Encoder(encoder_settings(published, channels, heads), channels)
    parts = _encoder_parts(published, encoder.settings)
    _load(encoder, parts, published)
    return encoder.eval(), _transfer(parts, published, encoder)


def import_mae(
    published: Published,
    channels: Sequence[str],
    target: NormalisedPixelTarget | PixelTarget | None = None,
    heads: tuple[int | None, int | None] = (None, None),
) -> tuple[MaskedAutoencoder, Transfer]:
    """Our whole autoencoder with published weights: with the same hidden set it has the same loss.

    Args:
        published: From `recognise`.
        channels: Names of its input channels, in its order.
        target: What it predicts (`norm_pix_loss` or pixels); a checkpoint does not hold it. Default: normalised pixels.
        heads: Attention heads of encoder and decoder where they are known.

    Raises:
        WeightsError: As for `import_encoder`; or there is no decoder, or one that ours cannot be.
    """
    encoder = encoder_settings(published, channels, heads[0])
    decoder = decoder_settings(published, encoder, heads[1])
    settings = ModelSettings(encoder=encoder, decoder=decoder, target=target or NormalisedPixelTarget())
    model = MaskedAutoencoder(settings, channels)
    parts = _encoder_parts(published, encoder, "encoder.")
    _decoder_parts(published, encoder, parts)
    _load(model, parts, published)
    return model.eval(), _transfer(parts, published, model)


def encoder_settings(published: Published, channels: Sequence[str], heads: int | None = None) -> EncoderSettings:
    """Shape of a published encoder, read off its tensors.

    Raises:
        WeightsError: Width and depth, heads or channels are none of ours; the message lists ours.
    """
    width, number, *patch = published.kernel.shape
    if number != len(channels):
        raise WeightsError(
            f"{published.where} takes {number} channels and {len(channels)} are named: {list(channels)}; name each, in its order"
        )
    depth, mlp = published.depth(published.layout.encoder["blocks"]), published.mlp_width(published.layout.encoder["blocks"])
    preset = next((name for name, shape in PRESETS.items() if shape[:2] == (width, depth)), None)
    if preset is None or heads not in (None, PRESETS[preset][2]):
        ours = ", ".join(f"{name} {shape}" for name, shape in PRESETS.items())
        raise WeightsError(
            f"{published.where} has width {width}, {depth} blocks and {heads or 'any number of'} heads, which is no shape of ours; "
            f"ours are, as (width, blocks, heads): {ours}"
        )
    _, table, grid = published.table(published.layout.encoder["positions"])
    positions = position_settings(table, grid)
    return EncoderSettings.model_validate({"preset": preset, "patch": patch, "mlp_ratio": mlp / width, "positions": positions})


def decoder_settings(published: Published, encoder: EncoderSettings, heads: int | None = None) -> DecoderSettings:
    """Shape of a published decoder, to go with its encoder.

    Raises:
        WeightsError: There is none, its heads are not known, or its MLP or positions cannot be ours beside that encoder.
    """
    names, where = published.layout.decoder, published.where
    width, blocks = len(published.tensor(f"{names['embed']}.bias")), names["blocks"]
    usual = DECODER_PRESETS[encoder.preset]
    if heads is None and width != usual[0]:
        raise WeightsError(f"{where}: a decoder of width {width} is not the usual one, so its heads are not known; give them")
    if published.mlp_width(blocks) != round(width * encoder.mlp_ratio):
        raise WeightsError(
            f"{where}: the decoder's MLP is {published.mlp_width(blocks)} wide and the encoder's share of {encoder.mlp_ratio:g} would be "
            f"{round(width * encoder.mlp_ratio)}; ours have one share, so load the encoder alone"
        )
    row, table, grid = published.table(names["positions"])
    found, wanted = position_settings(table, grid), encoder.positions
    if found != wanted or row.any():
        words = "its class token has a position" if row.any() else f"they are {found.kind}, {found.axis_order}"
        raise WeightsError(
            f"{where}: the decoder's positions cannot be ours beside an encoder whose are {wanted.kind}, {wanted.axis_order}: {words}; "
            "load the encoder alone"
        )
    return DecoderSettings(width=width, depth=published.depth(blocks), heads=heads or usual[2])


def position_settings(table: Float[Tensor, "token width"], grid: tuple[int, ...]) -> PositionSettings:
    """Fixed codes, in the order of axes that gives a stored table to 1e-4; else a table of weights.

    Published codes are made for the axes of the array with the last one first (He et al. 2021's code and its ports).
    """
    for order in ORDERS:
        if (sincos_positions(grid, table.shape[1], order) - table).abs().max() <= TOLERANCE:
            return PositionSettings(axis_order=order)
    return PositionSettings(kind="learned", grid=grid)


@dataclass
class _Parts:
    """State of a model of ours, as far as it is filled, and how."""

    state: dict[str, Tensor] = field(default_factory=dict)
    moves: list[Move] = field(default_factory=list)

    def put(self, kind: Kind, source: tuple[str, ...], target: str, value: Tensor, note: str = "") -> None:
        self.state[target] = value
        self.moves.append(Move(kind, source, target, note))


def _encoder_parts(published: Published, settings: EncoderSettings, prefix: str = "") -> _Parts:
    names, parts = published.layout.encoder, _Parts()
    note = "(width, channel, *patch) to (channel, voxel, width)"
    parts.put("permuted", (f"{names['embed']}.weight",), f"{prefix}embed.weight", published.kernel.flatten(2).permute(1, 2, 0), note)
    _copy(published, parts, f"{names['embed']}.bias", f"{prefix}embed.bias")
    row, table, grid = published.table(names["positions"])
    token = published.tensor(names["class_token"])
    if row.any():
        sources = (names["class_token"], names["positions"])
        parts.put("folded", sources, f"{prefix}class_token", token + row, "the class token's own position is added to it")
    else:
        parts.put("copied", (names["class_token"],), f"{prefix}class_token", token)
    _place_parts(parts, names["positions"], prefix, settings.positions, table, grid)
    _block_parts(published, parts, names["blocks"], f"{prefix}blocks")
    for end in ("weight", "bias"):
        _copy(published, parts, f"{names['norm']}.{end}", f"{prefix}norm.{end}")
    return parts


def _decoder_parts(published: Published, encoder: EncoderSettings, parts: _Parts) -> None:
    names, voxels = published.layout.decoder, math.prod(encoder.patch)
    _, table, grid = published.table(names["positions"])
    _copy(published, parts, names["mask_token"], "decoder.mask_token")
    _place_parts(parts, names["positions"], "decoder.", encoder.positions, table, grid)
    _block_parts(published, parts, names["blocks"], "decoder.blocks")
    for end in ("weight", "bias"):
        _copy(published, parts, f"{names['embed']}.{end}", f"decoder.embed.{end}")
        _copy(published, parts, f"{names['norm']}.{end}", f"decoder.norm.{end}")
        rows = published.tensor(f"{names['head']}.{end}")
        if len(rows) != voxels * published.kernel.shape[1]:
            raise WeightsError(
                f"{published.where}: {names['head']}.{end} has {len(rows)} rows and a patch {voxels * published.kernel.shape[1]} elements; "
                "it predicts something else, so load the encoder alone"
            )
        value = rows.unflatten(0, (voxels, -1)).transpose(0, 1).flatten(0, 1)
        parts.put("permuted", (f"{names['head']}.{end}",), f"decoder.head.{end}", value, "rows (voxel, channel) to (channel, voxel)")


def _place_parts(parts: _Parts, source: str, prefix: str, settings: PositionSettings, table: Tensor, grid: tuple[int, ...]) -> None:
    if settings.kind == "learned":
        parts.put("copied", (source,), f"{prefix}places.positions.table_token", table, f"a table over a grid of {grid}")
        return
    first = "last axis first" if settings.axis_order == "reversed" else "first axis first"
    parts.moves.append(Move("computed", (source,), "", f"fixed sine-cosine codes, {first}, within {TOLERANCE:g}"))


def _block_parts(published: Published, parts: _Parts, source: str, target: str) -> None:
    for number in range(published.depth(source)):
        for ours, theirs in published.layout.parts.items():
            for end in ("weight", "bias"):
                names = tuple(f"{source}.{number}.{name}.{end}" for name in theirs)
                value = torch.cat([published.tensor(name) for name in names])
                kind: Kind = "copied" if len(names) == 1 else "permuted"
                parts.put(kind, names, f"{target}.{number}.{ours}.{end}", value, "" if len(names) == 1 else "stacked")


def _copy(published: Published, parts: _Parts, source: str, target: str) -> None:
    parts.put("copied", (source,), target, published.tensor(source))


def _load(model: nn.Module, parts: _Parts, published: Published) -> None:
    try:
        model.load_state_dict(parts.state)
    except RuntimeError as error:
        raise WeightsError(f"{published.where} does not fit its own shape: {error}") from error


def _transfer(parts: _Parts, published: Published, model: nn.Module) -> Transfer:
    known = {name for move in parts.moves for name in move.source}
    left = tuple(name for name in published.tensors if name not in known)
    moves = (*parts.moves, *(Move("dropped", (name,)) for name in left))
    return Transfer(moves, tuple(published.tensors), tuple(model.state_dict()))
