"""Pretraining as a task of the loop, and its health: does the model beat what needs no model?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from mae_core.augment import Batch, Normaliser, RawBatch
from mae_core.context import dropped
from mae_core.errors import channel_weights, elementwise_error
from mae_core.loader import fixed_batches
from mae_core.mae import MaeOutput, MaskedAutoencoder, ModelSettings, hidden_counted, tokens_valid
from mae_core.masking import AnyHiding, HidingPlan, at_progress, hide
from mae_core.nd import TokenLayout, per_channel
from mae_core.parallel import Parallel, unwrap
from mae_core.perceptual import PerceptualTerm
from mae_core.settings import to_plain
from mae_core.store import TileStore
from mae_core.targets import PcaTarget, fit_pca
from mae_core.train import Loss

EVALUATION_SEED = 20_211_111
"""Hidden sets of held-out tiles are drawn from this, whatever the run's seed, so that runs can be compared."""


@dataclass(frozen=True)
class Panel:
    """One held-out sample to look at, in normalised units.

    Attributes:
        pixels: What was fed before hiding, `(channel, *space)`.
        shown: The same with NaN in hidden voxels and where there is no token.
        filled: Shown voxels and, in hidden ones, the prediction brought back with each patch's **true** mean and
            standard deviation where the target is normalised (they are not predicted).
        error: Absolute difference in counted hidden voxels, NaN elsewhere.
        channels: Names of the first axis.
        mean, std: Physical value = value · std + mean, per channel.
        axes: Names of the spatial axes, such as `("time", "y", "x")`; empty where nobody said.
    """

    pixels: NDArray[np.float32]
    shown: NDArray[np.float32]
    filled: NDArray[np.float32]
    error: NDArray[np.float32]
    channels: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    axes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PerceptualLoss:
    """The perceptual term as a share of the loss, with another encoder's view of our data.

    Attributes:
        term: Holds the frozen encoder.
        weight: Of the term beside the error on the target.
        channels: Ours, as the frozen encoder names them.
        gain, shift: From our normalised units to those of the frozen encoder, per channel.
    """

    term: PerceptualTerm
    weight: float
    channels: tuple[str, ...]
    gain: tuple[float, ...]
    shift: tuple[float, ...]

    def __call__(self, model: MaskedAutoencoder, batch: Batch, output: MaeOutput) -> Float[Tensor, " batch"]:
        """Weighted mean error of a sample's features."""
        pixels, plan = batch.pixels, output.plan
        guess = model.predicted_pixels(output)
        assert guess is not None
        layout = model.encoder.layout(pixels.shape[2:])
        filled, reached = layout.join(guess, plan.hidden, plan.hidden_used)
        known = per_channel(batch.counted, batch.present)
        filled = torch.where(reached & known, filled, pixels)
        hidden = reached.any(dim=1) & batch.counted
        parts = (torch.tensor(part).to(pixels.device, non_blocking=True) for part in (self.gain, self.shift))
        gain, shift = (part.reshape(-1, *(1,) * len(layout.grid)) for part in parts)
        true, made = (torch.where(known, image * gain + shift, 0.0) for image in (pixels, filled))
        sums, count = self.term(true, made, hidden, None, self.channels)
        mean: Tensor = sums / count.clamp(min=1)
        return self.weight * mean


@dataclass(frozen=True)
class Pretraining:
    """Masked-autoencoder pretraining over a tile store.

    Attributes:
        model: Settings of the model.
        hiding: How tokens are hidden.
        normaliser: Makes training batches.
        seed: Of the hidden sets.
        store: Where held-out tiles are read.
        held_out: Rows that are evaluated; empty for none.
        batch_size: Of the evaluation.
        parallel: This process.
        on_panels: Is given some held-out samples at each evaluation, on rank 0: of each set of channels in turn.
        num_panels: How many.
        perceptual: A further loss, or None.
    """

    model: ModelSettings
    hiding: AnyHiding
    normaliser: Normaliser
    seed: int
    store: TileStore
    held_out: NDArray[np.int64]
    batch_size: int
    parallel: Parallel
    on_panels: Callable[[int, Sequence[Panel]], None] | None = None
    num_panels: int = 4
    perceptual: PerceptualLoss | None = None

    def loss(self, model: nn.Module, raw: RawBatch, progress: float) -> Loss:
        """Squared error over hidden and counted voxels, as a sum and a count."""
        batch = self.normaliser(raw, self.parallel.device)
        hiding = at_progress(self.hiding, progress)
        context = None if batch.context is None else dropped(batch.context, self.model.encoder.context, self.seed, batch.sample)
        inner = unwrap(model)
        assert isinstance(inner, MaskedAutoencoder)
        output: MaeOutput = model(batch.pixels, batch.counted, batch.present, self._plan(inner, batch, hiding, self.seed), context)
        weights = self.weights(output.count)
        sums, counts = (output.error_sum * weights).sum(dim=1), (output.count * weights).sum(dim=1)
        if self.perceptual is not None:
            sums = sums + counts * self.perceptual(inner, batch, output)
        return Loss(sums.sum(), counts.sum(), sums.detach(), batch.sample.tile, float(output.predicted.numel()))

    def facts(self, model: nn.Module) -> dict[str, Any]:
        """Model, hiding and normaliser; of a perceptual term only that there is one."""
        del model
        return {
            "kind": "pretraining",
            "channels": list(self.store.channels),
            "model": to_plain(self.model),
            "hiding": to_plain(self.hiding),
            "normaliser": self.normaliser.facts(),
            "seed": self.seed,
            "left_out": [] if self.perceptual is None else ["perceptual"],
        }

    def weights(self, like: Tensor) -> Tensor:
        """Weight of each channel of the target; counts stay whole numbers where none is set."""
        if not self.model.error.channel_weights:
            return torch.ones((), dtype=like.dtype, device=like.device)
        return channel_weights(self.model.error, self.store.channels).to(like.device)

    def evaluate(self, model: nn.Module, step: int) -> Iterator[tuple[str, float]]:
        """`val/error` and `val/skill`, overall and per channel.

        Skill is 1 − error / error of the best trivial predictor, all in the space of the target; a target whose channels
        are not those of the data, such as `pca`, has no values per channel. Trivial predictors are
        zero (each patch's own mean where the target is normalised, the channel's where it is not), the mean of the
        sample's visible patches, and interpolation from its visible tokens by inverse distance. The best is chosen per
        channel, and once more for the total.
        """
        assert isinstance(model, MaskedAutoencoder)
        if not len(self.held_out):
            return
        sums = torch.zeros(5, model.decoder.shape[0], dtype=torch.float64)
        for batch, output in self._outputs(model, self.held_out, self.parallel):
            layout = model.encoder.layout(batch.pixels.shape[2:])
            parts = [output.error_sum, *trivial_errors(batch, layout, output, model), output.count]
            sums += torch.stack([part.double().sum(dim=0).cpu() for part in parts])
        totals = self.parallel.sum(sums.to(self.parallel.device)).cpu()
        if self.on_panels is not None and self.parallel.is_first:
            self.on_panels(step, self.panels(model))
        yield from _skill("", totals.sum(dim=1))
        if totals.shape[1] == len(self.store.channels):
            for name, column in zip(self.store.channels, totals.T, strict=True):
                yield from _skill(f"/{name}", column)

    def panels(self, model: MaskedAutoencoder) -> list[Panel]:
        """Held-out samples to look at: evenly spread, of each set of channels that there is in turn."""
        rows = self.held_out[various(self.store.index.present[self.held_out], self.num_panels)]
        alone = Parallel(0, 1, self.parallel.device)
        of = Seen(self.store.channels, self.normaliser.mean, self.normaliser.std, tuple(self.store.attributes.get("axes", ())))
        return [
            make_panel(index, batch, model, output, of)
            for batch, output in self._outputs(model, rows, alone)
            for index in range(len(batch.pixels))
        ]

    def _outputs(self, model: MaskedAutoencoder, rows: NDArray[np.int64], parallel: Parallel) -> Iterator[tuple[Batch, MaeOutput]]:
        """What the model makes of the central crops of some rows, under hidden sets that no run changes."""
        plain = self.normaliser.plain
        for raw in fixed_batches(self.store, rows, self.batch_size, parallel):
            batch = plain(raw, parallel.device)
            plan = self._plan(model, batch, at_progress(self.hiding, 1.0), EVALUATION_SEED)
            yield batch, model(batch.pixels, batch.counted, batch.present, plan, batch.context)

    def _plan(self, model: MaskedAutoencoder, batch: Batch, hiding: AnyHiding, seed: int) -> HidingPlan:
        layout = model.encoder.layout(batch.pixels.shape[2:])
        valid = tokens_valid(layout, batch.counted, batch.present, self.model.min_token_valid_fraction)
        unknown = None if valid.device.type == "cpu" else False  # looking would wait for the device
        return hide(valid, layout.full_grid, hiding, seed, batch.sample, batch.complete or unknown)


def fit_basis(task: Pretraining, model: MaskedAutoencoder, rows: NDArray[np.int64], most: int = 20_000) -> None:
    """Fit the principal components of a `pca` target to the central crops of training tiles, at most `most` patches.

    The same rows give the same components on every process, so none has to be sent.
    """
    if not isinstance(task.model.target, PcaTarget):
        return
    plain = task.normaliser.plain
    patches, counted = [], []
    for raw in fixed_batches(task.store, rows, task.batch_size, Parallel(0, 1, task.parallel.device)):
        batch = plain(raw, torch.device("cpu"))
        layout = model.encoder.layout(batch.pixels.shape[2:])
        patches.append(layout.split(batch.pixels).flatten(0, 1))
        counted.append(layout.split(per_channel(batch.counted, batch.present)).flatten(0, 1))
        if sum(map(len, patches)) >= most:
            break
    model.set_basis(fit_pca(torch.cat(patches)[:most], torch.cat(counted)[:most], task.model.target.num_components))


def trivial_errors(batch: Batch, layout: TokenLayout, output: MaeOutput, model: MaskedAutoencoder) -> list[Float[Tensor, "batch channel"]]:
    """Summed errors of zero, visible mean and interpolation over the elements that the model is judged on."""
    plan, target = output.plan, output.target
    seen = model.target(layout, batch.pixels, batch.counted, batch.present, plan.visible, plan.visible_used)
    near = _closeness(layout, plan)
    guesses = [torch.zeros_like(target.values)]
    with torch.autocast(near.device.type, enabled=False):
        for weights in (torch.ones_like(near), near):
            total = torch.einsum("bhv,bvcp->bhcp", weights, torch.where(seen.counted, seen.values, 0.0))
            share = torch.einsum("bhv,bvcp->bhcp", weights, seen.counted.to(weights.dtype))
            guesses.append(total / share.clamp(min=1e-12))
        errors = [elementwise_error(guess, target.values, target.counted, model.settings.error) for guess in guesses]
    return [error.sum(dim=(1, 3)) for error in errors]


def various(present: NDArray[np.bool_], most: int) -> NDArray[np.int64]:
    """At most `most` numbers of rows of `(row, channel)`, rising: alike many of each pattern, evenly spread over its rows."""
    kind = np.unique(present, axis=0, return_inverse=True)[1].reshape(-1)
    kinds = sorted((np.flatnonzero(kind == number) for number in range(kind.max() + 1)), key=lambda rows: -len(rows))
    shares = [len(range(place, most, len(kinds))) for place in range(len(kinds))]
    for place, rows in enumerate(kinds):  # what one pattern cannot fill is left to the next
        spare = shares[place] - min(shares[place], len(rows))
        shares[place] -= spare
        shares[(place + 1) % len(kinds)] += spare
    chosen = [
        rows[np.linspace(0, len(rows) - 1, min(share, len(rows))).round().astype(np.int64)]
        for rows, share in zip(kinds, shares, strict=True)
    ]
    return np.sort(np.concatenate(chosen)).astype(np.int64)


@dataclass(frozen=True)
class Seen:
    """What all panels of a store have in common; see `Panel`."""

    channels: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    axes: tuple[str, ...] = ()


def make_panel(index: int, batch: Batch, model: MaskedAutoencoder, output: MaeOutput, of: Seen) -> Panel:
    """The panel of one sample of a batch; without prediction and error where the target is not made of pixels."""
    plan, one = output.plan, slice(index, index + 1)
    pixels = batch.pixels[one].float()
    layout = model.encoder.layout(pixels.shape[2:])
    patches = layout.split(pixels)
    shown, is_shown = layout.join(layout.pick(patches, plan.visible[one]), plan.visible[one], plan.visible_used[one])
    every = model.predicted_pixels(output)
    filled, wrong = shown, torch.zeros_like(shown)
    is_filled, is_counted = torch.zeros_like(is_shown), torch.zeros_like(is_shown)
    if every is not None:
        guess = every[one].to(pixels.dtype)
        filled, is_filled = layout.join(guess, plan.hidden[one], plan.hidden_used[one])
        counted = output.target.counted[one]
        if counted.shape != guess.shape:
            counted = hidden_counted(layout, batch.counted[one], batch.present[one], _only(plan, one))
        wrong, is_counted = _counted_error(layout, guess, layout.pick(patches, plan.hidden[one]), counted, plan.hidden[one])
    return Panel(
        pixels=_picture(pixels, pixels.isfinite()),
        shown=_picture(shown, is_shown),
        filled=_picture(torch.where(is_shown, shown, filled), is_shown | is_filled),
        error=_picture(wrong, is_counted),
        channels=of.channels,
        mean=of.mean,
        std=of.std,
        axes=of.axes,
    )


def _only(plan: HidingPlan, one: slice) -> HidingPlan:
    return HidingPlan(plan.visible[one], plan.visible_used[one], plan.hidden[one], plan.hidden_used[one], plan.full)


def _counted_error(layout: TokenLayout, guess: Tensor, true: Tensor, counted: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Mean absolute error on each voxel over the counted elements that lie on it, and where there is any."""
    every = torch.ones_like(ids, dtype=torch.bool)
    wrong = layout.join(torch.where(counted, (guess - true).abs(), 0.0), ids, every)[0]
    share = layout.join(counted.to(guess.dtype), ids, every)[0]
    return wrong / share.clamp(min=1e-6), share > 0


def _picture(array: Tensor, there: Tensor) -> NDArray[np.float32]:
    return np.asarray(torch.where(there, array, torch.nan)[0].float().cpu())


def _closeness(layout: TokenLayout, plan: HidingPlan) -> Float[Tensor, "batch hidden visible"]:
    """Weights that fall with the distance between tokens to the power of the number of axes plus one."""
    grid, device = layout.grid, plan.visible.device
    places = torch.cartesian_prod(*(torch.arange(size, device=device) for size in grid)).reshape(-1, len(grid)).float()
    distance = torch.cdist(places[plan.hidden % layout.num_places], places[plan.visible % layout.num_places])
    return distance.clamp(min=1e-6) ** -(len(grid) + 1)


def _skill(suffix: str, sums: Tensor) -> Iterator[tuple[str, float]]:
    model, zero, mean, interpolated, count = (float(value) for value in sums)
    if count == 0:
        return
    yield f"val/error{suffix}", model / count
    best = min(zero, mean, interpolated)
    yield f"val/skill{suffix}", 1 - model / best if best > 0 else 0.0
    if not suffix:
        yield "val/error_of_zero", zero / count
        yield "val/error_of_visible_mean", mean / count
        yield "val/error_of_interpolation", interpolated / count
