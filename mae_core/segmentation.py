"""Segmentation as a task of the loop, its measures, and the label map of a whole scene."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from mae_core.augment import Batch, Normaliser, RawBatch
from mae_core.export import Description
from mae_core.heads import Segmenter
from mae_core.loader import fixed_batches
from mae_core.parallel import Parallel
from mae_core.store import TileStore
from mae_core.train import Loss

IGNORE = -1
"""Class index of voxels that count in no loss and no measure."""


@dataclass(frozen=True)
class Segmentation:
    """Supervised segmentation over a tile store with labels.

    Attributes:
        values: Class numbers in the store's labels, in the order of the scores; others are ignored.
        names: Their names.
        normaliser: Makes training batches.
        store: Where held-out tiles are read.
        held_out: Rows that are evaluated.
        batch_size: Of the evaluation.
        parallel: This process.
    """

    values: tuple[int, ...]
    names: tuple[str, ...]
    normaliser: Normaliser
    store: TileStore
    held_out: NDArray[np.int64]
    batch_size: int
    parallel: Parallel

    def loss(self, model: nn.Module, raw: RawBatch) -> Loss:
        """Dice + cross-entropy per sample, over voxels that have a value and a label."""
        batch = self.normaliser(raw, self.parallel.device)
        scores = model(batch.pixels, self._has_value(batch))
        sums, counted = dice_cross_entropy(scores.float(), self._classes(batch))
        return Loss(sums.sum(), counted.sum(), sums.detach(), batch.sample.tile, float(len(sums)))

    def evaluate(self, model: nn.Module, step: int) -> Iterator[tuple[str, float]]:
        """Dice and IoU per class from the summed confusion of the held-out tiles' central crops."""
        del step
        assert isinstance(model, Segmenter)
        size = len(self.values)
        total = torch.zeros(size, size, dtype=torch.int64)
        plain = Normaliser(self.normaliser.crop, self.normaliser.mean, self.normaliser.std, self.normaliser.no_value, 0, None)
        for raw in fixed_batches(self.store, self.held_out, self.batch_size, self.parallel):
            batch = plain(raw, self.parallel.device)
            guess = model(batch.pixels, self._has_value(batch)).argmax(dim=1)
            total += confusion(guess, self._classes(batch), size).cpu()
        total = self.parallel.sum(total.to(self.parallel.device)).cpu()
        yield from (("val_crops/" + name, value) for name, value in measures(total, self.names))

    def _has_value(self, batch: Batch) -> Tensor:
        return (batch.quality & self.normaliser.no_value) == 0

    def _classes(self, batch: Batch) -> Tensor:
        assert batch.labels is not None
        return torch.where(self._has_value(batch), class_indices(batch.labels, self.values), IGNORE)


def class_indices(labels: Int[Tensor, "*shape"], values: Sequence[int]) -> Int[Tensor, "*shape"]:
    """Index of each class number in `values`; `IGNORE` for all others."""
    out = torch.full_like(labels, IGNORE)
    for index, value in enumerate(values):
        out[labels == value] = index
    return out


def dice_cross_entropy(
    scores: Float[Tensor, "batch class *space"], classes: Int[Tensor, "batch *space"]
) -> tuple[Float[Tensor, " batch"], Int[Tensor, " batch"]]:
    """Soft Dice loss plus cross-entropy of each sample, and 1 for samples that hold any counted voxel, else 0.

    Dice is averaged over the classes with both sums smoothed by 1e-5 (Milletari et al. 2016); ignored voxels are in
    neither term, so a class that is absent and not predicted costs nothing.
    """
    counted = classes != IGNORE
    number = counted.flatten(1).sum(dim=1)
    entropy = F.cross_entropy(scores, classes, ignore_index=IGNORE, reduction="none").flatten(1).sum(dim=1) / number.clamp(min=1)
    weight = counted[:, None].to(scores.dtype)
    truth = F.one_hot(classes.clamp(min=0), scores.shape[1]).movedim(-1, 1).to(scores.dtype) * weight
    chance = scores.softmax(dim=1) * weight
    both = (truth * chance).flatten(2).sum(dim=2)
    either = truth.flatten(2).sum(dim=2) + chance.flatten(2).sum(dim=2)
    dice = 1 - ((2 * both + 1e-5) / (either + 1e-5)).mean(dim=1)
    has_any = (number > 0).long()
    return (entropy + dice) * has_any, has_any


def confusion(guess: Int[Tensor, "*shape"], classes: Int[Tensor, "*shape"], size: int) -> Int[Tensor, "class class"]:
    """Counts by true class (row) and predicted class (column) over voxels that are not ignored."""
    counted = classes != IGNORE
    return torch.bincount(classes[counted] * size + guess[counted], minlength=size * size).reshape(size, size)


def measures(total: Int[Tensor, "class class"], names: Sequence[str]) -> Iterator[tuple[str, float]]:
    """Dice and IoU per class and their means; a class that is neither there nor predicted has none and is in no mean."""
    hit = total.diagonal().double()
    true, guessed = total.sum(dim=1).double(), total.sum(dim=0).double()
    present = (true + guessed) > 0
    dice = 2 * hit / (true + guessed).clamp(min=1)
    iou = hit / (true + guessed - hit).clamp(min=1)
    for index, name in enumerate(names):
        if present[index]:
            yield f"dice/{name}", float(dice[index])
            yield f"iou/{name}", float(iou[index])
    yield "mean_dice", float(dice[present].mean())
    yield "mean_iou", float(iou[present].mean())


def layer_number(name: str, depth: int) -> int:
    """Layer of a segmenter's parameter for layer-wise decay: embedding and class token 0, block `i` `i + 1`, the rest last.

    Raises:
        ValueError: The name carries a wrapper's prefix, which would silently put everything in the last group.
    """
    if not name.startswith(("encoder.", "head.")):
        raise ValueError(f"parameter {name} belongs to neither encoder nor head; is the model wrapped?")
    if name.startswith(("encoder.embed.", "encoder.class_token")):
        return 0
    if name.startswith("encoder.blocks."):
        return int(name.split(".")[2]) + 1
    return depth + 1


def predict_classes(
    model: Segmenter, description: Description, pixels: Float[Tensor, "channel *space"], has_value: Tensor
) -> Float[Tensor, "class *space"]:
    """Class probabilities of one crop in normalised units; a crop smaller than the model's is padded without value."""
    short = [want - have for want, have in zip(description.crop, pixels.shape[1:], strict=True)]
    padding = [amount for extra in reversed(short) for amount in (0, max(0, extra))]
    fed, known = F.pad(pixels, padding)[None], F.pad(has_value, padding)[None]
    return model(fed, known)[0].float().softmax(dim=0)
