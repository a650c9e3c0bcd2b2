"""Pretraining as a task of the loop, and its health: does the model beat what needs no model?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from mae_core.augment import Batch, Normaliser, RawBatch
from mae_core.context import dropped
from mae_core.loader import fixed_batches
from mae_core.mae import MaeOutput, MaskedAutoencoder, ModelSettings, tokens_valid
from mae_core.masking import AnyHiding, HidingPlan, at_progress, hide
from mae_core.nd import TokenLayout, token_grid
from mae_core.parallel import Parallel
from mae_core.store import TileStore
from mae_core.targets import make_target
from mae_core.train import Loss
from mae_core.vit import channel_groups

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
    """

    pixels: NDArray[np.float32]
    shown: NDArray[np.float32]
    filled: NDArray[np.float32]
    error: NDArray[np.float32]
    channels: tuple[str, ...]


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
        on_panels: Is given the first held-out samples at each evaluation, on rank 0.
        num_panels: How many.
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

    def loss(self, model: nn.Module, raw: RawBatch, progress: float) -> Loss:
        """Squared error over hidden and counted voxels, as a sum and a count."""
        batch = self.normaliser(raw, self.parallel.device)
        hiding = at_progress(self.hiding, progress)
        context = None if batch.context is None else dropped(batch.context, self.model.encoder.context, self.seed, batch.sample)
        output: MaeOutput = model(batch.pixels, batch.counted, batch.present, self._plan(batch, hiding, self.seed), context)
        sums = output.error_sum.sum(dim=1)
        return Loss(sums.sum(), output.count.sum(), sums.detach(), batch.sample.tile, float(output.predicted.numel()))

    def evaluate(self, model: nn.Module, step: int) -> Iterator[tuple[str, float]]:
        """`val/error` and `val/skill`, overall and per channel.

        Skill is 1 − error / error of the best trivial predictor, all in the space of the target. Trivial predictors are
        zero (each patch's own mean where the target is normalised, the channel's where it is not), the mean of the
        sample's visible patches, and interpolation from its visible tokens by inverse distance. The best is chosen per
        channel, and once more for the total.
        """
        assert isinstance(model, MaskedAutoencoder)
        if not len(self.held_out):
            return
        sums = torch.zeros(5, len(self.store.channels), dtype=torch.float64)
        panels: list[Panel] = []
        plain = Normaliser(self.normaliser.crop, self.normaliser.mean, self.normaliser.std, self.normaliser.no_value, self.seed, None)
        for raw in fixed_batches(self.store, self.held_out, self.batch_size, self.parallel):
            batch = plain(raw, self.parallel.device)
            plan = self._plan(batch, at_progress(self.hiding, 1.0), EVALUATION_SEED)
            output = model(batch.pixels, batch.counted, batch.present, plan, batch.context)
            layout = model.encoder.layout(batch.pixels.shape[2:])
            parts = [output.error_sum, *trivial_errors(batch, layout, output, self.model), output.count]
            sums += torch.stack([part.double().sum(dim=0).cpu() for part in parts])
            wanted = range(min(len(batch.pixels), self.num_panels - len(panels)))
            panels += [make_panel(index, batch, layout, output, self.store.channels) for index in wanted]
        totals = self.parallel.sum(sums.to(self.parallel.device)).cpu()
        if self.on_panels is not None and self.parallel.is_first:
            self.on_panels(step, panels)
        yield from _skill("", totals.sum(dim=1))
        for name, column in zip(self.store.channels, totals.T, strict=True):
            yield from _skill(f"/{name}", column)

    def _plan(self, batch: Batch, hiding: AnyHiding, seed: int) -> HidingPlan:
        layout = self.layout(batch.pixels.shape[2:])
        valid = tokens_valid(layout, batch.counted, batch.present, self.model.min_token_valid_fraction)
        unknown = None if valid.device.type == "cpu" else False  # looking would wait for the device
        return hide(valid, layout.full_grid, hiding, seed, batch.sample, batch.complete or unknown)

    def layout(self, space: Sequence[int]) -> TokenLayout:
        """How a crop becomes tokens."""
        encoder, channels = self.model.encoder, self.store.channels
        return TokenLayout(
            token_grid(space, encoder.step), encoder.patch, encoder.step, channel_groups(encoder.groups, channels), len(channels)
        )


def trivial_errors(batch: Batch, layout: TokenLayout, output: MaeOutput, settings: ModelSettings) -> list[Float[Tensor, "batch channel"]]:
    """Summed squared errors of zero, visible mean and interpolation over the elements that the model is judged on."""
    plan = output.plan
    counted = batch.counted[:, None] & batch.present.reshape(*batch.present.shape, *(1,) * len(layout.grid))
    counted = layout.pick(layout.split(counted), plan.visible) & plan.visible_used[:, :, None, None]
    seen = make_target(layout.pick(layout.split(batch.pixels), plan.visible), counted, settings.target)
    near = _closeness(layout, plan)
    errors = [torch.where(output.target.counted, output.target.values, 0.0).square().sum(dim=(1, 3))]
    with torch.autocast(near.device.type, enabled=False):
        for weights in (torch.ones_like(near), near):
            total = torch.einsum("bhv,bvcp->bhcp", weights, torch.where(seen.counted, seen.values, 0.0))
            share = torch.einsum("bhv,bvcp->bhcp", weights, seen.counted.to(weights.dtype))
            guess = total / share.clamp(min=1e-12)
            wrong = torch.where(output.target.counted, guess - output.target.values, 0.0).square()
            errors.append(wrong.sum(dim=(1, 3)))
    return errors


def make_panel(index: int, batch: Batch, layout: TokenLayout, output: MaeOutput, channels: tuple[str, ...]) -> Panel:
    """The panel of one sample of a batch."""
    plan, target, one = output.plan, output.target, slice(index, index + 1)
    pixels = batch.pixels[one].float()
    patches = layout.split(pixels)
    shown, is_shown = layout.join(layout.pick(patches, plan.visible[one]), plan.visible[one], plan.visible_used[one])
    guess = output.predicted[one] * target.std[one] + target.mean[one]
    filled, is_filled = layout.join(guess.to(pixels.dtype), plan.hidden[one], plan.hidden_used[one])
    wrong, is_counted = _counted_error(layout, guess, layout.pick(patches, plan.hidden[one]), target.counted[one], plan.hidden[one])
    return Panel(
        pixels=_picture(pixels, pixels.isfinite()),
        shown=_picture(shown, is_shown),
        filled=_picture(torch.where(is_shown, shown, filled), is_shown | is_filled),
        error=_picture(wrong, is_counted),
        channels=channels,
    )


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
