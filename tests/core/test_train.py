"""The loop: killed and resumed it gives the same bits, divided it gives the same update, and it stops at what is not finite."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mae_core.checkpoint import restore, steps
from mae_core.divergence import TrainingError
from mae_core.store import TileStore
from mae_core.train import Surroundings, TrainSettings, autocast, train
from tests.synthetic_batches import with_index
from tests.tiny_runs import TinyRun, curve, quick, shared_store, tiny_recipe, tiny_run

__all__ = ["quick"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TileStore:
    return shared_store(tmp_path_factory)


def weights(run: TinyRun) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in run.state.model.state_dict().items()}


@pytest.mark.parametrize("axes", [2, 3])
def test_killed_and_resumed_it_ends_in_the_same_bits(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, axes: int) -> None:
    store = shared_store(tmp_path_factory, axes)
    recipe = tiny_recipe(train__steps=6, train__eval_steps=3, augment__flips=True, augment__quarter_turns=True, loader__crops_per_tile=2)
    whole = tiny_run(store, recipe)
    reports = whole.train()
    cut = tiny_run(store, recipe)
    before = cut.train(last=4, checkpoints=tmp_path)
    assert [path.name for path in steps(tmp_path)] == ["step-00000003"]
    torch.manual_seed(99)
    later = tiny_run(store, recipe)
    restore(later.state, tmp_path, pytest.fail)
    assert later.state.step == 3
    after = later.train(checkpoints=tmp_path)
    known = weights(whole)
    assert all(torch.equal(tensor, known[name]) for name, tensor in weights(later).items())
    for key in ("train/loss", "train/grad_norm", "train/lr", "val/error", "val/skill/A"):
        assert {**curve(before, key), **curve(after, key)} == curve(reports, key), key
    assert sorted(curve(after)) == [4, 5, 6]


def test_another_seed_is_another_run(store: TileStore) -> None:
    first, second = (tiny_run(store, tiny_recipe(train__steps=2, train__seed=seed)).train() for seed in (0, 1))
    assert curve(first) != curve(second)


@pytest.mark.parametrize("micro", [1, 2])
def test_micro_batches_that_count_unevenly_give_the_update_of_the_whole_batch(store: TileStore, micro: int) -> None:
    whole, divided = (tiny_run(store, tiny_recipe(train__steps=4, loader__micro_batch_size=size)) for size in (None, micro))
    counts = [float(divided.task.loss(divided.state.model, raw, 0.0).count) for raw in next(divided.stream.steps(0, 1))[0]]
    assert len(set(counts)) > 1, "the micro-batches of this test must not count alike"
    left, right = whole.train(), divided.train()
    for key in ("train/loss", "train/grad_norm"):
        assert curve(right, key) == pytest.approx(curve(left, key), rel=1e-5), key


@pytest.mark.parametrize("micro", [None, 1, 2])
def test_an_update_moves_by_the_gradient_of_the_mean_over_all_counted_voxels(store: TileStore, micro: int | None) -> None:
    """Against autograd over the whole batch at once; plain SGD moves by the gradient itself."""
    recipe = tiny_recipe(train__steps=1, optim__clip_norm=1e9, optim__warmup_fraction=0)
    naive = tiny_run(store, recipe)
    ((whole,), _) = next(naive.stream.steps(0, 1))
    loss = naive.task.loss(naive.state.model, whole, 0.0)
    (loss.total / loss.count).backward()
    known = {name: weight.grad for name, weight in naive.state.model.named_parameters() if weight.grad is not None}

    run = tiny_run(store, tiny_recipe(train__steps=1, optim__clip_norm=1e9, optim__warmup_fraction=0, loader__micro_batch_size=micro))
    before = weights(run)
    run.state.optimiser = torch.optim.SGD([{"params": list(run.state.model.parameters()), "lr_scale": 1e3}])
    run.train()
    rate = run.state.optimiser.param_groups[0]["lr"]
    largest = max(float(gradient.abs().max()) for gradient in known.values())
    for name, gradient in known.items():
        moved = (before[name] - run.state.model.state_dict()[name]) / rate
        torch.testing.assert_close(moved, gradient, rtol=0, atol=1e-6 * max(largest, 1), msg=name)


def spoilt(store: TileStore, run: TinyRun, step: int) -> tuple[TinyRun, int]:
    """The run with a store whose index gives the first sample of a step an infinite scale; and its tile."""
    tile = next(run.stream.steps(step - 1, step))[0][0].sample.tile.tolist()[0]
    scale = store.index.scale.copy()
    scale[np.flatnonzero(store.index.tile == tile), 0] = np.inf
    bad = with_index(store, scale=scale)
    return dataclasses.replace(run, stream=dataclasses.replace(run.stream, store=bad)), tile


@pytest.mark.parametrize("log_steps", [1, 100])
def test_a_sample_that_is_not_finite_stops_the_run_and_is_named(tmp_path: Path, store: TileStore, log_steps: int) -> None:
    often = {"train__checkpoint_steps": 1 if log_steps == 1 else 2, "train__log_steps": log_steps}
    recipe = tiny_recipe(train__steps=100, train__max_skipped_in_row=1, **often)
    run, tile = spoilt(store, tiny_run(store, recipe), step=3)
    with pytest.raises(
        TrainingError, match=rf"step 3: loss nan, gradient norm nan: not finite, in tiles \[{tile}\]\. .*lower optim\.base_lr"
    ):
        run.train(checkpoints=tmp_path)
    assert [path.name for path in steps(tmp_path)][-1:] == ["step-00000002"]
    sound = tiny_run(store, recipe)
    restore(sound.state, tmp_path, pytest.fail)
    assert all(torch.isfinite(weight).all() for weight in sound.state.model.parameters())


def test_a_rate_that_explodes_stops_the_run_before_a_checkpoint(tmp_path: Path, store: TileStore) -> None:
    run = tiny_run(store, tiny_recipe(train__steps=50, optim__base_lr=1e38, train__checkpoint_steps=50, train__eval_steps=50))
    with pytest.raises(TrainingError, match=r"step \d+: loss .*not finite, in .* 5 steps in a row made no update"):
        run.train(checkpoints=tmp_path)
    assert steps(tmp_path) == []


def test_reports_come_when_due_and_at_the_end(store: TileStore) -> None:
    reports = tiny_run(store, tiny_recipe(train__steps=7, train__log_steps=3, train__eval_steps=5)).train()
    assert list(curve(reports)) == [3, 6, 7]
    assert list(curve(reports, "val/skill")) == [5, 7]
    assert {"train/grad_norm", "train/lr", "speed/samples_per_second", "speed/data_wait_fraction"} <= reports[0].metrics.keys()
    every = tiny_run(store, tiny_recipe(train__steps=7)).train()
    losses = curve(every)
    assert curve(reports) == pytest.approx(
        {3: sum(losses[n] for n in (1, 2, 3)) / 3, 6: sum(losses[n] for n in (4, 5, 6)) / 3, 7: losses[7]}
    )


def test_it_learns(store: TileStore) -> None:
    losses = curve(tiny_run(store, tiny_recipe(train__steps=60, train__log_steps=20, train__eval_steps=60)).train())
    assert losses[60] < losses[20]


def test_a_finished_run_is_left_as_it_is(store: TileStore) -> None:
    run = tiny_run(store, tiny_recipe(train__steps=2))
    run.train()
    before = weights(run)
    assert run.train() == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(run).items())


def test_a_store_without_held_out_tiles_can_be_trained_on(store: TileStore) -> None:
    run = tiny_run(store, tiny_recipe(train__steps=2))
    task = dataclasses.replace(run.task, held_out=np.empty(0, np.int64))
    reports: list[Any] = []
    train(task, run.state, run.stream, run.recipe.train, run.recipe.optim, Surroundings(), reports.append)
    assert curve(reports, "val/skill") == {}


def test_half_precision_is_what_is_asked_for() -> None:
    cpu = torch.device("cpu")
    weight = torch.ones(2, 2)
    with autocast("bf16", cpu):
        assert (weight @ weight).dtype is torch.bfloat16
    with autocast("fp32", cpu):
        assert (weight @ weight).dtype is torch.float32


def test_intervals_are_at_least_one_step() -> None:
    with pytest.raises(ValueError, match="checkpoint_steps"):
        TrainSettings(checkpoint_steps=0)
