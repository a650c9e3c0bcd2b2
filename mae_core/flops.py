"""Arithmetic of a training step: every matrix product of the model with its shape, and what torch counts in any step."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mae_core.decoders import CrossDecoder
from mae_core.encoders import AnyEncoder
from mae_core.heads import Segmenter
from mae_core.mae import MaskedAutoencoder
from mae_core.masking import num_kept, num_predicted
from mae_core.nd import block_of
from mae_core.vit import Encoder


@dataclass(frozen=True)
class Work:
    """What a training does with one sample.

    Attributes:
        name: What the user reads in front of every line.
        tokens: That the encoder sees; hidden ones are not among them.
        flops: Operations of its forward and backward pass, a multiply-add counting two; None where nobody has counted them.
    """

    name: str = "training"
    tokens: int = 0
    flops: int | None = None


@dataclass(frozen=True)
class Product:
    """Equal matrix products `(rows, inner) @ (inner, columns)` in the forward pass of one sample.

    Attributes:
        name: Where it is, such as `encoder.mlp_in`; the part before the dot is encoder, bridge, decoder, head or embed.
        rows: Tokens.
        inner: Length of the sums.
        columns: Width of the result; for attention, all heads together.
        times: How many there are, one per block.
        is_linear: Between tokens and weights; False for the two products inside attention.
    """

    name: str
    rows: int
    inner: int
    columns: int
    times: int = 1
    is_linear: bool = True

    @property
    def part(self) -> str:
        """Part of the model."""
        return self.name.split(".")[0]

    @property
    def forward(self) -> int:
        """Operations of the forward pass, a multiply-add counting two."""
        return 2 * self.rows * self.inner * self.columns * self.times

    @property
    def training(self) -> int:
        """Operations of forward and backward: three times the forward ones, but two for the embedding, whose input has no gradient."""
        return self.forward * (2 if self.part == "embed" else 3)


def products(model: MaskedAutoencoder, space: Sequence[int], mask_ratio: float) -> tuple[Product, ...]:
    """The matrix products of one sample in which every token is valid, as the model is trained.

    Tokens are embedded where they are visible and predicted where they are hidden (with cross-attention: a part of
    them). Norms, biases, activations, softmax, positions, context and loss are not counted, and neither is what
    `recompute` computes twice: these are the operations of the model, not of the machine. Formulas: He et al. (2021),
    section 3; Fu et al. (2024), section 3 for cross-attention.

    Args:
        model: Gives widths, depths and the kind of the decoder; may be on the meta device.
        space: Voxels per axis of a crop.
        mask_ratio: Share of the tokens that is hidden.
    """
    encoder, decoder = model.encoder, model.decoder
    tokens = math.prod(encoder.layout(space).full_grid)
    kept = num_kept(tokens, mask_ratio)
    hidden, prefix = tokens - kept, encoder.num_prefix
    seen = kept + prefix
    width, outer = decoder.embed.out_features, decoder.head.out_features
    found = [_embedding(encoder, kept)]
    found += block_products("encoder", seen, encoder.settings.width, encoder.blocks)
    found.append(Product("bridge.linear", seen, encoder.settings.width, width))
    if isinstance(decoder, CrossDecoder):
        hidden = num_predicted(hidden, decoder.settings.predicted_fraction)
        found += cross_products("decoder", hidden, seen, width, decoder.blocks)
    else:
        found += block_products("decoder", tokens + prefix, width, decoder.blocks)
    return (*found, Product("head.linear", hidden, width, outer))


def pretraining_work(name: str, model: MaskedAutoencoder, space: Sequence[int], mask_ratio: float) -> Work:
    """What pretraining does with a crop in which every token is valid.

    Operations are the model's matrix products, see `products`; of convolutions over shown tokens alone they are not counted.
    """
    kept = num_kept(math.prod(model.encoder.layout(space).full_grid), mask_ratio)
    return Work(name, kept, training_flops(products(model, space, mask_ratio)) if isinstance(model.encoder, Encoder) else None)


def segmentation_work(name: str, model: Segmenter, space: Sequence[int]) -> Work:
    """What training a segmenter does with a crop in which every token is valid.

    Operations are the matrix products of the encoder, which sees all tokens, and what torch counts in the head, whose
    convolutions are most of a small segmenter; with a convolutional encoder they are not counted.
    """
    encoder = model.encoder
    tokens = math.prod(encoder.layout(space).full_grid)
    if not isinstance(encoder, Encoder):
        return Work(name, tokens)
    found = [_embedding(encoder, tokens), *block_products("encoder", tokens + encoder.num_prefix, encoder.settings.width, encoder.blocks)]
    return Work(name, tokens, training_flops(found) + _head_flops(model, space))


def _head_flops(model: Segmenter, space: Sequence[int]) -> int:
    """What torch's counter sees in a head's forward and backward pass of one crop; nothing is computed."""
    head = copy.deepcopy(model.head).to("meta")
    pixels = torch.empty(1, len(model.encoder.channels), *space, device="meta")
    grid = model.encoder.layout(space).grid
    maps = [torch.empty(1, model.encoder.settings.width, *grid, device="meta", requires_grad=True) for _ in model.taps]
    return counted_flops(lambda: head(pixels, maps).sum())


def _embedding(encoder: AnyEncoder, tokens: int) -> Product:
    patch = encoder.settings.patch
    voxels = sum(math.prod(patch) // math.prod(block_of(len(patch), footprint)) for footprint in encoder.footprints)
    return Product("embed.patches", tokens, voxels, encoder.settings.width)


def block_products(part: str, length: int, width: int, blocks: nn.ModuleList) -> list[Product]:
    """Products of pre-norm blocks in which `length` tokens attend to each other."""
    depth = len(blocks)
    return [
        Product(f"{part}.query_key_value", length, width, 3 * width, depth),
        Product(f"{part}.scores", length, width, length, depth, is_linear=False),
        Product(f"{part}.mix", length, length, width, depth, is_linear=False),
        Product(f"{part}.out", length, width, width, depth),
        *_mlp(part, length, width, blocks),
    ]


def cross_products(part: str, length: int, seen: int, width: int, blocks: nn.ModuleList) -> list[Product]:
    """Products of blocks in which `length` tokens attend to `seen` others."""
    depth = len(blocks)
    return [
        Product(f"{part}.query", length, width, width, depth),
        Product(f"{part}.key_value", seen, width, 2 * width, depth),
        Product(f"{part}.scores", length, width, seen, depth, is_linear=False),
        Product(f"{part}.mix", length, seen, width, depth, is_linear=False),
        Product(f"{part}.out", length, width, width, depth),
        *_mlp(part, length, width, blocks),
    ]


def _mlp(part: str, length: int, width: int, blocks: nn.ModuleList) -> list[Product]:
    inner = next(layer.out_features for layer in blocks[0].get_submodule("mlp").modules() if isinstance(layer, nn.Linear))
    return [Product(f"{part}.mlp_in", length, width, inner, len(blocks)), Product(f"{part}.mlp_out", length, inner, width, len(blocks))]


def forward_flops(found: Sequence[Product]) -> int:
    """Operations of one sample's forward pass."""
    return sum(product.forward for product in found)


def training_flops(found: Sequence[Product]) -> int:
    """Operations of one sample's forward and backward pass."""
    return sum(product.training for product in found)


def largest_linears(found: Sequence[Product], batch_size: int, count: int) -> dict[str, tuple[int, int, int]]:
    """Rows, inner length and columns of the linear layers that do most work, for a whole batch, by name; a shape comes once."""
    shapes: dict[tuple[int, int, int], str] = {}
    for product in sorted((product for product in found if product.is_linear), key=lambda product: -product.training):
        shapes.setdefault((product.rows * batch_size, product.inner, product.columns), product.name)
    return {name: shape for shape, name in list(shapes.items())[:count]}


def unfused_bytes(found: Sequence[Product], element_bytes: int) -> int:
    """Bytes that one sample's step moves outside its matrix products, if all that can be fused is.

    An estimate: 60 elements of the token width per token and block (norms, residuals, activations and their
    gradients), after Korthikanti et al. (2022), section 4, who count 34 bytes kept per token and width at 16 bits; each
    is written once and read at least once.
    """
    own = [product for product in found if product.name.endswith(".out")]
    return sum(60 * element_bytes * product.rows * product.columns * product.times for product in own)


def counted_flops(step: Callable[[], torch.Tensor]) -> int:
    """Operations that torch's counter sees in the forward and backward pass of a loss.

    Attention is taken apart into its products while counting, because the counter does not know the fused kernel of
    processors and counts those of GPUs with a recomputation in the backward pass. Gradients stay on the parameters.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step().backward()
    return int(counter.get_total_flops())
