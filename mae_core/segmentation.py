"""Segmentation as a task of the loop, and its measures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from mae_core.augment import Batch, Normaliser, RawBatch
from mae_core.context import Context
from mae_core.export import ModelError
from mae_core.heads import Segmenter
from mae_core.loader import fixed_batches, read_rows
from mae_core.masking import Sample
from mae_core.native import common_footprint
from mae_core.parallel import Parallel, unwrap
from mae_core.settings import to_plain
from mae_core.store import TileStore
from mae_core.tiling import Blend, Window
from mae_core.train import Loss

IGNORE = -1
"""Class index of voxels that count in no loss and no measure."""


@dataclass(frozen=True)
class Segmentation:
    """Supervised segmentation over a tile store with labels.

    Attributes:
        values: Class numbers in the store's labels, in the order of the scores; others are ignored.
        names: Their names.
        columns: The store's channels in the model's order, as `columns_of` gives them.
        normaliser: Makes training batches.
        store: Where held-out tiles are read.
        held_out: Rows that are evaluated.
        batch_size: Of the evaluation.
        parallel: This process.
    """

    values: tuple[int, ...]
    names: tuple[str, ...]
    columns: tuple[int, ...]
    normaliser: Normaliser
    store: TileStore
    held_out: NDArray[np.int64]
    batch_size: int
    parallel: Parallel

    def loss(self, model: nn.Module, raw: RawBatch, progress: float) -> Loss:
        """Dice + cross-entropy per sample, over voxels that have a value and a label."""
        del progress
        batch = self.normaliser(raw, self.parallel.device)
        scores = model(arrange(batch.pixels, self.columns), self.has_value(batch), batch.context, present_of(batch, self.columns))
        sums, counted = dice_cross_entropy(scores.float(), self.classes(batch))
        return Loss(sums.sum(), counted.sum(), sums.detach(), batch.sample.tile, float(len(sums)))

    def facts(self, model: nn.Module) -> dict[str, Any]:
        """Segmenter, classes and normaliser."""
        inner = unwrap(model)
        assert isinstance(inner, Segmenter)
        return {
            "kind": "segmentation",
            "channels": list(inner.encoder.channels),
            "encoder": to_plain(inner.encoder.settings),
            "drop_path": [float(getattr(block, "drop_path", 0.0)) for block in inner.encoder.blocks],
            "head": to_plain(inner.settings),
            "values": list(self.values),
            "names": list(self.names),
            "columns": list(self.columns),
            "normaliser": self.normaliser.facts(),
            "left_out": [],
        }

    def evaluate(self, model: nn.Module, step: int) -> Iterator[tuple[str, float]]:
        """Dice and IoU per class from the summed confusion of the held-out tiles' central crops."""
        del step
        assert isinstance(model, Segmenter)
        size = len(self.values)
        total = torch.zeros(size, size, dtype=torch.int64)
        plain = self.normaliser.plain
        for raw in fixed_batches(self.store, self.held_out, self.batch_size, self.parallel):
            batch = plain(raw, self.parallel.device)
            present = present_of(batch, self.columns)
            guess = model(arrange(batch.pixels, self.columns), self.has_value(batch), batch.context, present).argmax(dim=1)
            total += confusion(guess, self.classes(batch), size).cpu()
        total = self.parallel.sum(total.to(self.parallel.device)).cpu()
        yield from (("val_crops/" + name, value) for name, value in measures(total, self.names))

    def has_value(self, batch: Batch) -> Tensor:
        """Voxels of a batch that hold a value, `(batch, *space)`."""
        return (batch.quality & self.normaliser.no_value) == 0

    def classes(self, batch: Batch) -> Tensor:
        """Class indices of a batch, `(batch, *space)`; `IGNORE` where there is no value or no label."""
        assert batch.labels is not None
        return torch.where(self.has_value(batch), class_indices(batch.labels, self.values), IGNORE)


def class_indices(labels: Int[Tensor, "*shape"], values: Sequence[int]) -> Int[Tensor, "*shape"]:
    """Index of each class number in `values`; `IGNORE` for all others."""
    out = torch.full_like(labels, IGNORE)
    for index, value in enumerate(values):
        out = torch.where(labels == value, index, out)
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
    """Layer of a segmenter's parameter for layer-wise decay: whatever comes before the blocks 0, block `i` `i + 1`, the rest last.

    Raises:
        ValueError: The name carries a wrapper's prefix, which would silently put everything in the last group.
    """
    if not name.startswith(("encoder.", "head.")):
        raise ValueError(f"parameter {name} belongs to neither encoder nor head; is the model wrapped?")
    if name.startswith(("encoder.embed.", "encoder.class_token", "encoder.register_token", "encoder.places.", "encoder.context.")):
        return 0
    if name.startswith("encoder.blocks."):
        return int(name.split(".")[2]) + 1
    return depth + 1


def arrange(pixels: Float[Tensor, "batch channel *space"], columns: Sequence[int]) -> Float[Tensor, "batch ordered *space"]:
    """Channels in a model's order: column `i` of the result is `pixels[:, columns[i]]`, or zero where that is -1."""
    if tuple(columns) == tuple(range(pixels.shape[1])):
        return pixels
    empty = torch.zeros_like(pixels[:, 0])
    return torch.stack([pixels[:, column] if column >= 0 else empty for column in columns], dim=1)


def present_of(batch: Batch, columns: Sequence[int]) -> Bool[Tensor, "batch ordered"]:
    """Which channels of a model each sample of a batch has; `columns` as for `arrange`."""
    if tuple(columns) == tuple(range(batch.present.shape[1])):
        return batch.present
    place = torch.tensor(columns).to(batch.present.device, non_blocking=True)  # a list would let the host wait for the device
    return batch.present.index_select(1, place.clamp(min=0)) & (place >= 0)


def columns_of(wanted: Sequence[str], have: Sequence[str]) -> tuple[int, ...]:
    """Where each wanted channel stands among those at hand; -1 for one that is missing.

    Raises:
        ModelError: None of them is there.
    """
    if not set(wanted) & set(have):
        raise ModelError(
            f"the data have channels {list(have)} and the model knows {list(wanted)}: none in common; name them alike in reader settings "
            "(of scans: reader.sequence, reader.sequence_names)"
        )
    return tuple(list(have).index(name) if name in have else -1 for name in wanted)


def probabilities(
    model: Segmenter,
    crop: Sequence[int],
    overlap: float,
    pixels: Float[Tensor, "channel *space"],
    has_value: Bool[Tensor, "*space"],
    context: Context | None = None,
    present: Bool[Tensor, "1 channel"] | None = None,
) -> Float[Tensor, "class *space"]:
    """Class probabilities of an array of any size in normalised units, from blended crops; what a crop lacks is padded without value."""

    def predict(windows: list[Window]) -> Tensor:
        chosen = [(pixels[(slice(None), *window)][None], has_value[window][None]) for window in windows]
        return torch.cat([chances(model, crop, part, known, context, present) for part, known in chosen])

    step = common_footprint([1, *model.encoder.settings.footprints.values()])
    return Blend(tuple(has_value.shape), tuple(crop), overlap, predict, step=step).whole()


def chances(
    model: Segmenter,
    crop: Sequence[int],
    pixels: Float[Tensor, "batch channel *space"],
    has_value: Bool[Tensor, "batch *space"],
    context: Context | None,
    present: Bool[Tensor, "batch channel"] | None = None,
) -> Float[Tensor, "batch class *crop"]:
    """Class probabilities, in main memory, of arrays that are at most as large as a crop and padded to it without value."""
    missing = [want - have for want, have in zip(crop, has_value.shape[1:], strict=True)]
    padding = [amount for extra in reversed(missing) for amount in (0, extra)]
    scores: Tensor = model(F.pad(pixels, padding), F.pad(has_value, padding), context, present).float()
    return scores.softmax(dim=1).cpu()


@torch.inference_mode()
def confusion_by_scene(task: Segmentation, model: Segmenter, overlap: float) -> dict[str, Int[Tensor, "class class"]]:
    """Confusion of every held-out scene (or part of one): whole tiles predicted from blended crops, each voxel counted once."""
    store, size = task.store, len(task.values)
    whole = replace(task.normaliser.plain, crop=store.space)
    totals: dict[str, Tensor] = {}
    for row in task.held_out:
        batch = whole(read_rows(store, np.asarray([row]), _unnamed()), task.parallel.device)
        pixels, has_value = arrange(batch.pixels, task.columns)[0], task.has_value(batch)[0]
        present = present_of(batch, task.columns)
        guess = probabilities(model, task.normaliser.crop, overlap, pixels, has_value, batch.context, present).argmax(dim=0)
        owned = tuple(slice(0, int(length)) for length in store.index.owned[row])
        found = confusion(guess[owned], task.classes(batch)[0].cpu()[owned], size)
        scene = str(store.index.scene[row])
        totals[scene] = totals.get(scene, torch.zeros_like(found)) + found
    return totals


def _unnamed() -> Sample:
    zero = torch.zeros(1, dtype=torch.int64)
    return Sample(zero, zero, zero)
