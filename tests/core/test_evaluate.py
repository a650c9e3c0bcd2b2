"""The health of a pretraining: an oracle has skill one, a predictor that says nothing has none, and panels show what was shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from mae_core.augment import AugmentSettings, Batch, Normaliser
from mae_core.context import Context
from mae_core.evaluate import Panel, Pretraining, Seen, make_panel, trivial_errors, various
from mae_core.loader import read_rows
from mae_core.mae import MaeOutput, MaskedAutoencoder, ModelSettings
from mae_core.masking import HidingPlan, RandomHiding
from mae_core.nd import patchify
from mae_core.parallel import Parallel
from mae_core.store import TileStore
from mae_core.targets import NormalisedPixelTarget, PixelTarget, make_target
from tests.contracts import hidden_set, shown_set
from tests.synthetic_batches import (
    CASES,
    CHANNELS,
    batch_of,
    by_axes,
    layout_of,
    model_of,
    names,
    one_thread,
    places,
    plan_of,
    settings_of,
    store_of,
)

__all__ = ["one_thread"]

SPACE, PATCH = (20, 24), (4, 4)
ALONE = Parallel(0, 1, torch.device("cpu"))
TARGETS = [NormalisedPixelTarget(), NormalisedPixelTarget(over="channel"), PixelTarget()]
TRIVIAL = ("zero", "visible_mean", "interpolation")
each_case = pytest.mark.parametrize(("space", "patch"), CASES, ids=by_axes)


class Fixed(MaskedAutoencoder):
    """Predicts a share of the truth: 1 is an oracle, 0 says nothing."""

    share = 1.0

    def forward(self, pixels: Tensor, counted: Tensor, present: Tensor, plan: HidingPlan, context: Context | None = None) -> MaeOutput:
        output = super().forward(pixels, counted, present, plan, context)
        predicted = self.share * output.target.values
        error = torch.where(output.target.counted, predicted - output.target.values, 0.0).square()
        return replace(output, predicted=predicted, error_sum=error.sum(dim=(1, 3)))


def fixed(settings: ModelSettings, share: float) -> Fixed:
    model = Fixed(settings, CHANNELS)
    model.share = share
    return model


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TileStore:
    return store_of(tmp_path_factory.mktemp("evaluate") / "store", SPACE)


def task(store: TileStore, settings: ModelSettings, rows: Sequence[int] = range(6), seed: int = 0) -> Pretraining:
    normaliser = Normaliser((16, 20), (0.0,) * 3, (0.5,) * 3, 1, seed, AugmentSettings())
    return Pretraining(settings, RandomHiding(mask_ratio=0.5), normaliser, seed, store, np.array(rows, dtype=np.int64), 4, ALONE)


@pytest.mark.parametrize("target", TARGETS, ids=str)
@torch.inference_mode()
def test_an_oracle_has_skill_one_and_saying_nothing_has_none(store: TileStore, target: NormalisedPixelTarget | PixelTarget) -> None:
    settings = settings_of(PATCH, target)
    oracle = dict(task(store, settings).evaluate(fixed(settings, 1), 0))
    nothing = dict(task(store, settings).evaluate(fixed(settings, 0), 0))
    for suffix in ("", *(f"/{name}" for name in CHANNELS)):
        assert oracle[f"val/error{suffix}"] == 0
        assert oracle[f"val/skill{suffix}"] == 1
        assert nothing[f"val/skill{suffix}"] <= 0
    assert nothing["val/error"] > 0
    assert oracle["val/error_of_interpolation"] == nothing["val/error_of_interpolation"] > 0
    wanted = {f"val/{key}{suffix}" for key in ("error", "skill") for suffix in ("", *(f"/{name}" for name in CHANNELS))}
    assert set(oracle) == wanted | {f"val/error_of_{name}" for name in TRIVIAL}


@torch.inference_mode()
def test_skill_is_one_less_the_error_over_the_best_trivial_error(store: TileStore) -> None:
    settings = settings_of(PATCH)
    found = dict(task(store, settings).evaluate(fixed(settings, 0.5), 0))
    best = min(found[f"val/error_of_{name}"] for name in TRIVIAL)
    assert found["val/skill"] == pytest.approx(1 - found["val/error"] / best, rel=1e-6)
    assert 0 < found["val/skill"] < 1


@torch.inference_mode()
def test_an_evaluation_depends_neither_on_the_runs_seed_nor_on_its_batches(store: TileStore) -> None:
    settings = settings_of(PATCH)
    model = model_of(settings)
    one = dict(task(store, settings).evaluate(model, 0))
    other = dict(task(store, settings, seed=99).evaluate(model, 500))
    alone = dict(replace(task(store, settings), batch_size=1).evaluate(model, 0))
    assert one == other
    assert one == pytest.approx(alone, rel=1e-5)


def test_nothing_held_out_is_nothing_to_say(store: TileStore) -> None:
    settings = settings_of(PATCH)
    assert dict(task(store, settings, rows=[]).evaluate(model_of(settings), 0)) == {}


@torch.inference_mode()
def test_samples_are_shown(store: TileStore) -> None:
    settings, seen = settings_of(PATCH), []
    shown = replace(task(store, settings), on_panels=lambda step, panels: seen.append((step, panels)), num_panels=5)
    dict(shown.evaluate(model_of(settings), 7))
    ((step, panels),) = seen
    assert step == 7
    assert len(panels) == 5, "from more than one batch"
    for tile, panel in zip(various(store.index.present[:6], 5), panels, strict=True):
        assert panel.channels == CHANNELS
        assert (panel.mean, panel.std) == (shown.normaliser.mean, shown.normaliser.std)
        np.testing.assert_allclose(panel.pixels, store.read(tile).pixels[:, 2:18, 2:22] / 0.5, rtol=1e-6)


def test_every_set_of_channels_is_shown_in_turn() -> None:
    """Ten tiles with both channels, two with the second alone, one with the first alone."""
    present = np.array([[True, True]] * 10 + [[False, True]] * 2 + [[True, False]])
    assert various(present, 4).tolist() == [0, 9, 10, 12]
    assert various(present, 2).tolist() == [0, 10]
    assert various(present[:10], 4).tolist() == [0, 3, 6, 9]
    assert various(present, 13).tolist() == list(range(13))
    assert various(present[10:], 4).tolist() == [0, 1, 2], "there are no more"


def test_the_training_loss_is_the_models(store: TileStore) -> None:
    settings = settings_of(PATCH)
    model, run = model_of(settings), task(store, settings)
    raw = read_rows(store, np.arange(3), names(3))
    loss = run.loss(model, raw, 0.0)
    batch = run.normaliser(raw, ALONE.device)
    output = model(batch.pixels, batch.counted, batch.present, plan_of(batch, settings, ratio=0.5))
    assert torch.equal(loss.total, output.error_sum.sum(dim=1).sum())
    assert int(loss.count) == int(output.count.sum()) > 0
    assert torch.equal(loss.per_sample, output.error_sum.sum(dim=1))
    assert not loss.per_sample.requires_grad
    assert loss.tile.tolist() == [100, 101, 102]


def uneven(space: tuple[int, ...]) -> Batch:
    batch = batch_of(space, size=3)
    quality = batch.quality.clone()
    quality[1, : space[0] // 2] = 1
    quality[0, -1] = 1
    present = torch.tensor([[True, True, True], [True, True, True], [True, False, True]])
    return replace(batch, quality=quality, present=present)


def naive_trivial(batch: Batch, plan: HidingPlan, output: MaeOutput, settings: ModelSettings, *, near: bool) -> Tensor:
    """Errors of a trivial predictor, element by element."""
    patch = settings.encoder.patch
    grid = [size // part for size, part in zip(batch.pixels.shape[2:], patch, strict=True)]
    place = list(places(tuple(grid)))
    counted = patchify(batch.counted[:, None], patch) & batch.present[:, None, :, None]
    truth = make_target(patchify(batch.pixels, patch), counted, settings.target)
    total = torch.zeros(batch.present.shape, dtype=torch.float64)
    for sample, slot in places(tuple(plan.hidden.shape)):
        token = int(plan.hidden[sample, slot])
        for channel, voxel in places(tuple(truth.values.shape[2:])):
            if not output.target.counted[sample, slot, channel, voxel]:
                continue
            top = bottom = 0.0
            for seen in shown_set(plan, sample):
                if truth.counted[sample, seen, channel, voxel]:
                    weight = math.dist(place[token], place[seen]) ** -(len(grid) + 1) if near else 1.0
                    top += weight * float(truth.values[sample, seen, channel, voxel])
                    bottom += weight
            guess = top / bottom if bottom else 0.0
            total[sample, channel] += (guess - float(output.target.values[sample, slot, channel, voxel])) ** 2
    return total.float()


@each_case
@pytest.mark.parametrize("target", [NormalisedPixelTarget(over="channel"), PixelTarget()], ids=str)
@torch.no_grad()
def test_trivial_errors_are_the_naive_loop(
    space: tuple[int, ...], patch: tuple[int, ...], target: NormalisedPixelTarget | PixelTarget
) -> None:
    settings = settings_of(patch, target)
    batch = uneven(space)
    plan = plan_of(batch, settings, ratio=0.5)
    model = model_of(settings)
    output = model(batch.pixels, batch.counted, batch.present, plan)
    zero, mean, interpolated = trivial_errors(batch, layout_of(batch, settings), output, model)
    torch.testing.assert_close(zero, torch.where(output.target.counted, output.target.values, 0).square().sum(dim=(1, 3)))
    torch.testing.assert_close(mean, naive_trivial(batch, plan, output, settings, near=False), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(interpolated, naive_trivial(batch, plan, output, settings, near=True), rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = trivial_errors(batch, layout_of(batch, settings), output, model)
    for one, other in zip(rounded, (zero, mean, interpolated), strict=True):
        assert torch.equal(one, other), "the precision of the model is not that of the yardstick"


def panel_of(batch: Batch, settings: ModelSettings, index: int) -> tuple[Panel, HidingPlan, MaeOutput]:
    plan = plan_of(batch, settings)
    oracle = fixed(settings, 1)
    output = oracle(batch.pixels, batch.counted, batch.present, plan)
    return make_panel(index, batch, oracle, output, Seen(CHANNELS, (0.0,) * 3, (1.0,) * 3)), plan, output


def in_tokens(image: np.ndarray, patch: tuple[int, ...]) -> Tensor:
    return patchify(torch.from_numpy(image)[None], patch)[0]


@each_case
@pytest.mark.parametrize("index", [0, 1])
@torch.no_grad()
def test_a_panel_shows_what_was_shown(space: tuple[int, ...], patch: tuple[int, ...], index: int) -> None:
    batch, settings = uneven(space), settings_of(patch)
    panel, plan, _ = panel_of(batch, settings, index)
    assert np.array_equal(panel.pixels, batch.pixels[index].numpy())
    shown, filled = in_tokens(panel.shown, patch), in_tokens(panel.filled, patch)
    for token in range(len(shown)):
        seen, hidden = token in shown_set(plan, index), token in hidden_set(plan, index)
        assert bool(shown[token].isnan().all()) == bool(shown[token].isnan().any()) == (not seen)
        assert bool(filled[token].isnan().any()) == (not seen and not hidden)
    kept = ~np.isnan(panel.shown)
    assert np.array_equal(panel.shown[kept], panel.pixels[kept])
    assert np.array_equal(panel.filled[kept], panel.pixels[kept])


@each_case
@torch.no_grad()
def test_an_oracles_panel_is_the_input_without_error(space: tuple[int, ...], patch: tuple[int, ...]) -> None:
    settings = settings_of(patch)
    panel, plan, output = panel_of(batch_of(space, size=3), settings, 2)
    np.testing.assert_allclose(panel.filled, panel.pixels, rtol=0, atol=1e-5)
    error = in_tokens(panel.error, patch)
    assert error[plan.hidden[2]][output.target.counted[2]].max() < 1e-5
    assert error[plan.visible[2]].isnan().all()


@torch.no_grad()
def test_error_is_shown_only_where_it_counts() -> None:
    settings, batch = settings_of((4,)), uneven((24,))
    panel, plan, output = panel_of(batch, settings, 0)
    error = in_tokens(panel.error, (4,))
    assert torch.equal(~error[plan.hidden[0]].isnan(), output.target.counted[0])
    assert np.isnan(panel.error[:, -1]).all()
