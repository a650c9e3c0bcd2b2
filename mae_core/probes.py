"""Probes of frozen features: what a linear map and the nearest neighbours can read out of them, without any fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from mae_core.context import Context
from mae_core.encoders import AnyEncoder
from mae_core.loader import fixed_batches
from mae_core.masking import counter_bits
from mae_core.nd import patchify
from mae_core.segmentation import IGNORE, Segmentation, arrange, confusion, present_of
from mae_core.settings import Settings
from mae_core.vit import AllTokens, all_tokens, pooled

PIXELS = "pixels"
"""Name of the features that no network made."""

MIN_LABELLED_FRACTION = 0.5
"""Share of a token's voxels that must hold a value and a label for it to have a class."""

STREAM_TOKENS, STREAM_GROUPS = 101, 102
"""First counters of the draws made here; far from those of `mae_core.masking`."""

GRADIENT_TOLERANCE = 1e-6
"""Largest entry of the gradient at which a fit has converged."""

Level = Literal["token", "tile"]
Pool = Literal["mean", "class"]


class LinearSettings(Settings):
    """How the linear probe is trained."""

    l2: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (1e-1, 1e-2, 1e-3, 1e-4, 1e-5), min_length=1, description="Weight penalties to choose from, on the mean loss"
    )
    validation_fraction: float = Field(0.2, gt=0, lt=1, description="Share of the training groups that the penalty is chosen on")
    max_iterations: int = Field(1000, ge=1, description="Iterations of L-BFGS after which a fit is given up as not converged")


@dataclass(frozen=True)
class LinearFit:
    """A multinomial logistic regression: scores are `features @ weight + bias`.

    Attributes:
        weight, bias: At the minimum, float64.
        gradient: Largest entry of the objective's gradient there.
    """

    weight: Float[Tensor, "dim class"]
    bias: Float[Tensor, " class"]
    gradient: float

    def classes(self, features: Float[Tensor, "sample dim"]) -> Int[Tensor, " sample"]:
        """Most likely class of each sample."""
        return (features @ self.weight + self.bias).argmax(dim=1)


@dataclass(frozen=True)
class LinearProbe:
    """What a linear probe gave.

    Attributes:
        classes: Predicted for the test samples.
        l2: The penalty that was chosen.
        converged: The last fit reached its minimum.
    """

    classes: Int[Tensor, " sample"]
    l2: float
    converged: bool


@dataclass(frozen=True)
class Samples:
    """Features of the same samples by every arm.

    Attributes:
        features: `(sample, dim)` by name of the arm.
        classes: Class index of each sample.
        groups: Number of the group (patient, place) that each comes from.
    """

    features: dict[str, Float[Tensor, "sample _"]]
    classes: Int[Tensor, " sample"]
    groups: Int[Tensor, " sample"]


def standardise(
    train: Float[Tensor, "train dim"], test: Float[Tensor, "test dim"]
) -> tuple[Float[Tensor, "train dim"], Float[Tensor, "test dim"]]:
    """Both in float64, less the mean and over the standard deviation of the training features.

    This is the batch norm without affine part that precedes the linear layer in the paper's probe (He et al. 2021,
    appendix A.1), with the statistics of all training samples. Its 1e-6 on the variance lets a constant feature be zero.
    """
    centre = train.double().mean(dim=0)
    width = (train.double().var(dim=0, correction=0) + 1e-6).sqrt()
    return (train.double() - centre) / width, (test.double() - centre) / width


def logistic_regression(
    features: Float[Tensor, "sample dim"], classes: Int[Tensor, " sample"], num_classes: int, l2: float, max_iterations: int = 1000
) -> LinearFit:
    """The minimum of mean cross-entropy + l2 / 2 · the squared weights, found from zero by full-batch L-BFGS.

    The bias is not penalised. With n samples this is scikit-learn's objective at C = 1 / (n · l2).
    """
    features = features.double()
    both = torch.zeros(features.shape[1] + 1, num_classes, dtype=torch.float64, device=features.device, requires_grad=True)
    search = torch.optim.LBFGS(
        [both],
        max_iter=max_iterations,
        max_eval=2 * max_iterations,
        tolerance_grad=GRADIENT_TOLERANCE,
        tolerance_change=1e-14,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        loss = F.cross_entropy(features @ both[:-1] + both[-1], classes) + l2 / 2 * both[:-1].square().sum()
        both.grad = torch.autograd.grad(loss, both)[0]
        return loss

    with torch.enable_grad():
        search.step(objective)
        objective()
    assert both.grad is not None
    return LinearFit(both[:-1].detach(), both[-1].detach(), float(both.grad.abs().max()))


def linear_probe(
    train_x: Float[Tensor, "train dim"],
    train_y: Int[Tensor, " train"],
    groups: Int[Tensor, " train"],
    test_x: Float[Tensor, "test dim"],
    num_classes: int,
    settings: LinearSettings,
    seed: int,
) -> LinearProbe:
    """Classes of the test samples by a logistic regression on standardised training features.

    Unlike the paper's probe (LARS, 90 epochs, no weight decay) it is trained to its minimum, so that no learning rate can
    favour an arm, and with a penalty. The penalty is chosen on training groups alone, see `choose_l2`.

    Raises:
        ValueError: A feature is not finite.
    """
    _refuse_not_finite(train_x, test_x)
    l2 = choose_l2(train_x, train_y, groups, num_classes, settings, seed)
    train, test = standardise(train_x, test_x)
    fit = logistic_regression(train, train_y, num_classes, l2, settings.max_iterations)
    return LinearProbe(fit.classes(test), l2, fit.gradient <= 10 * GRADIENT_TOLERANCE)


def choose_l2(
    features: Float[Tensor, "sample dim"],
    classes: Int[Tensor, " sample"],
    groups: Int[Tensor, " sample"],
    num_classes: int,
    settings: LinearSettings,
    seed: int,
) -> float:
    """The penalty with the best balanced accuracy on groups that it was not fitted on; the largest of equals.

    Where there is one group only, nothing can be held out and it is the middle one of the list.
    """
    choices = sorted(settings.l2, reverse=True)
    aside = groups_aside(groups, settings.validation_fraction, seed)
    if len(choices) == 1 or not aside.any():
        return choices[len(choices) // 2]
    fitted, judged = standardise(features[~aside], features[aside])
    scores = []
    for l2 in choices:
        guess = logistic_regression(fitted, classes[~aside], num_classes, l2, settings.max_iterations).classes(judged)
        scores.append(classification_measures(confusion(guess, classes[aside], num_classes))["balanced_accuracy"])
    return choices[scores.index(max(scores))]


def groups_aside(groups: Int[Tensor, " sample"], fraction: float, seed: int) -> Bool[Tensor, " sample"]:
    """True for the samples of `fraction` of the groups, drawn by counter: at least one group, and never all of them."""
    numbers = groups.unique()
    order = numbers[torch.argsort(counter_bits(seed, STREAM_GROUPS, numbers), stable=True)]
    count = min(max(1, round(fraction * len(numbers))), len(numbers) - 1)
    return torch.isin(groups, order[:count])


def knn(
    train_x: Float[Tensor, "train dim"],
    train_y: Int[Tensor, " train"],
    test_x: Float[Tensor, "test dim"],
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
    block: int = 1024,
) -> Int[Tensor, " test"]:
    """Classes of the test samples by vote of their `k` most similar training samples, all of them if there are fewer.

    A neighbour of cosine similarity s votes with exp(s / temperature) (Wu et al. 2018, section 3.4; used by DINO, Caron et al.
    2021). The features are taken as they are. Similarities are computed for `block` test samples at a time.

    Raises:
        ValueError: A feature is not finite.
    """
    _refuse_not_finite(train_x, test_x)
    train = F.normalize(train_x.float(), dim=1)
    found = []
    for part in test_x.split(block):
        near = (F.normalize(part.float(), dim=1) @ train.T).topk(min(k, len(train)), dim=1)
        votes = torch.zeros(len(part), num_classes, dtype=torch.float64, device=part.device)
        votes.scatter_add_(1, train_y[near.indices], (near.values.double() / temperature).exp())
        found.append(votes.argmax(dim=1))
    return torch.cat(found) if found else train_y[:0]


def classification_measures(total: Int[Tensor, "class class"]) -> dict[str, float]:
    """Accuracy, balanced accuracy and macro F1 of a confusion by true class (row) and predicted class (column), each in [0, 1].

    Balanced accuracy is the mean recall of the classes that are there; macro F1 the mean F1 of those that are there or predicted.
    """
    hit = total.diagonal().double()
    true, guessed = total.sum(dim=1).double(), total.sum(dim=0).double()
    there, named = true > 0, (true + guessed) > 0
    return {
        "accuracy": float(hit.sum() / true.sum()),
        "balanced_accuracy": float((hit[there] / true[there]).mean()),
        "macro_f1": float((2 * hit[named] / (true + guessed)[named]).mean()),
    }


def token_classes(classes: Int[Tensor, "batch *space"], cell: Sequence[int], num_classes: int) -> Int[Tensor, "batch length"]:
    """Most frequent class of each cell's voxels that are not ignored, the smallest of equals.

    `IGNORE` where fewer than `MIN_LABELLED_FRACTION` of its voxels have a class. A token's cell is its patch, or the middle
    of it where patches overlap.
    """
    voxels = patchify(classes[:, None], cell)[:, :, 0]
    counts = torch.stack([(voxels == number).sum(dim=2) for number in range(num_classes)], dim=2)
    # argmax does not say which of equals it takes
    first = counts * num_classes + torch.arange(num_classes - 1, -1, -1, device=counts.device)
    enough = counts.sum(dim=2) >= MIN_LABELLED_FRACTION * voxels.shape[2]
    return torch.where(enough, first.argmax(dim=2), IGNORE)


def drawn(candidate: Bool[Tensor, "batch length"], quota: Int[Tensor, " batch"], tile: Int[Tensor, " batch"], seed: int) -> Tensor:
    """True for `quota` of the candidates of each tile, or all where there are fewer, drawn by counter: `(batch, length)`."""
    token = torch.arange(candidate.shape[1], device=candidate.device)
    keys = counter_bits(seed, STREAM_TOKENS, tile.to(candidate.device)[:, None], token)
    order = torch.argsort(torch.where(candidate, keys, torch.iinfo(torch.int64).max), dim=1, stable=True)
    return candidate & (torch.argsort(order, dim=1) < quota.to(candidate.device)[:, None])


@torch.no_grad()
def collect(
    task: Segmentation, encoders: Mapping[str, AnyEncoder], rows: NDArray[np.int64], level: Level, pool: Pool, max_tokens: int, seed: int
) -> Samples:
    """Features and classes of samples drawn evenly from the central crops of some tiles, by every encoder and by none.

    Without a network, under the name `pixels`, a token's features are its voxels in normalised units, and a tile's the mean
    and standard deviation of each channel.

    Args:
        task: What a voxel's class is and how crops are made.
        encoders: By name, one or more, of the same settings; in evaluation mode, on the task's device.
        rows: Of the store, one or more.
        level: A sample is a token, or a whole crop.
        pool: A crop's features: the mean over its tokens, or the class token. A token's are its own in any case.
        max_tokens: Samples at most.
        seed: Of the draw.
    """
    quota = max_tokens * np.arange(1, len(rows) + 1) // len(rows) - max_tokens * np.arange(len(rows)) // len(rows)
    wanted = {int(task.store.index.tile[row]): int(number) for row, number in zip(rows, quota, strict=True)}
    numbers = np.unique(task.store.index.group, return_inverse=True)[1]
    group_of = {int(tile): int(number) for tile, number in zip(task.store.index.tile, numbers, strict=True)}
    plain, device = task.normaliser.plain, task.parallel.device
    cell = next(iter(encoders.values())).settings.step
    features: dict[str, list[Tensor]] = {name: [] for name in (*encoders, PIXELS)}
    found_classes, groups = [torch.zeros(0, dtype=torch.int64, device=device)], [torch.zeros(0, dtype=torch.int64, device=device)]
    for raw in fixed_batches(task.store, rows[quota > 0], task.batch_size, task.parallel):
        batch = plain(raw, device)
        pixels, has_value = arrange(batch.pixels, task.columns), task.has_value(batch)
        classes = token_classes(task.classes(batch), cell if level == "token" else task.normaliser.crop, len(task.values))
        tile = batch.sample.tile
        chosen = drawn(classes != IGNORE, torch.tensor([wanted[number] for number in tile.tolist()]), tile, seed)
        present = present_of(batch, task.columns)
        for name, encoder in encoders.items():
            every = all_tokens(encoder.layout(pixels.shape[2:]), pixels, has_value, present)
            features[name].append(encoded(encoder, every, batch.context, level, pool)[chosen])
        features[PIXELS].append(unencoded(pixels, has_value, cell, level)[chosen])
        found_classes.append(classes[chosen])
        group = torch.tensor([group_of[number] for number in tile.tolist()], device=device)
        groups.append(group[:, None].expand_as(chosen)[chosen])
    return Samples({name: torch.cat(parts) for name, parts in features.items()}, torch.cat(found_classes), torch.cat(groups))


def encoded(
    encoder: AnyEncoder, every: AllTokens, context: Context | None, level: Level, pool: Pool
) -> Float[Tensor, "batch length width"]:
    """An encoder's output for all places of crops, the mean over channel groups, or one pooled token of each crop."""
    out: Tensor = encoder(every.patches, every.ids, every.layout.grid, every.used, None, context).float()
    if level == "tile":
        return pooled(out, encoder.num_prefix, every.used, pool)[:, None]
    return every.by_place(out[:, encoder.num_prefix :]).flatten(2).transpose(1, 2)


def unencoded(
    pixels: Float[Tensor, "batch channel *space"], has_value: Bool[Tensor, "batch *space"], cell: Sequence[int], level: Level
) -> Float[Tensor, "batch length dim"]:
    """The voxels of all tokens of crops, or mean and standard deviation of each crop's channels over voxels that hold a value."""
    if level == "token":
        return patchify(pixels, cell).flatten(2)
    known = has_value.flatten(1)[:, None]
    count = known.sum(dim=2).clamp(min=1)
    mean = torch.where(known, pixels.flatten(2), 0.0).sum(dim=2) / count
    spread = torch.where(known, pixels.flatten(2) - mean[:, :, None], 0.0).square().sum(dim=2) / count
    return torch.cat([mean, spread.sqrt()], dim=1)[:, None]


def _refuse_not_finite(*features: Tensor) -> None:
    for part in features:
        bad = (~part.isfinite()).any(dim=1)
        if bad.any():
            raise ValueError(f"features of {int(bad.sum())} of {len(bad)} samples are not finite; check the encoder's weights")
