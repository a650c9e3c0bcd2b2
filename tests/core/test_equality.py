"""One, two and four processes, the model whole on each or divided among them, are one and the same training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mae_core.evaluate import Pretraining
from mae_core.masking import hide
from mae_core.optim import learning_rate, make_optimiser
from mae_core.parallel import ParallelSettings, processes
from mae_core.sharding import gathered, is_divided, shard
from mae_core.store import TileStore
from tests.forked import together
from tests.tiny_runs import curve, shared_store, tiny_recipe, tiny_run

STEPS = 4
RECIPE: dict[str, Any] = {"train__steps": STEPS, "train__eval_steps": 2, "loader__micro_batch_size": 1, "loader__global_batch_size": 4}
METRICS = ("train/loss", "train/grad_norm", "val/error", "val/error_of_visible_mean", "val/error_of_interpolation")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TileStore:
    return shared_store(tmp_path_factory)


def trained(path: Path, divided: bool, held_out: int) -> dict[str, Any]:
    """What a process of a training sees and gets."""
    store = TileStore.open(path)
    with processes("cpu", ParallelSettings(shard=divided, timeout_s=60)) as parallel:
        run = tiny_run(store, tiny_recipe(**RECIPE), parallel)
        shard(run.state.model, parallel)
        rate = learning_rate(run.recipe.optim, run.recipe.loader.global_batch_size)
        run.state.optimiser = make_optimiser(run.state.model, run.recipe.optim, rate)
        assert is_divided(run.state.model) == (divided and parallel.world > 1)
        run = run.__class__(run.recipe, run.state, run.stream, _with(run.task, held_out))
        seen = [_sample(run.task, raw) for batches, _ in run.stream.steps(0, STEPS) for raw in batches]
        reports = run.train()
        model = gathered(run.state.model, lambda: tiny_run(store, tiny_recipe(**RECIPE), parallel).state.model)
        weights = {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
        own = [weight.to_local().numel() if is_divided(weight) else weight.numel() for weight in run.state.model.parameters()]
    return {"seen": seen, "curves": {key: curve(reports, key) for key in METRICS}, "weights": weights, "own": sum(own)}


def _with(task: Pretraining, held_out: int) -> Pretraining:
    return Pretraining(**{**vars(task), "held_out": task.held_out[:held_out], "batch_size": 1})


def _sample(task: Pretraining, raw: Any) -> tuple[list[int], list[int], float]:
    """Tiles, hidden tokens and counted voxels of a micro-batch."""
    batch = task.normaliser(raw, torch.device("cpu"))
    grid = tuple(size // 4 for size in batch.pixels.shape[2:])
    valid = torch.ones(len(batch.pixels), int(np.prod(grid)), dtype=torch.bool)
    plan = hide(valid, grid, task.hiding, task.seed, batch.sample, None)
    return raw.sample.tile.tolist(), plan.hidden.flatten().tolist(), float(batch.counted.sum())


def in_order(found: Sequence[dict[str, Any]]) -> list[Any]:
    """What all processes saw, in the order of the stream."""
    each = len(found[0]["seen"]) // STEPS
    return [found[rank]["seen"][step * each + place] for step in range(STEPS) for rank in range(len(found)) for place in range(each)]


@pytest.fixture(scope="module")
def alone(store: TileStore) -> dict[str, Any]:
    (found,) = together(1, trained, store.path, False, 2)
    return dict(found)


@pytest.mark.parametrize(("world", "divided"), [(2, False), (4, False), (2, True), (4, True)])
def test_any_number_of_processes_sees_the_same_samples_and_gives_the_same_curves(
    store: TileStore, alone: dict[str, Any], world: int, divided: bool
) -> None:
    """Two held-out tiles: of four processes two have none. The tiles of place `b` count for less than the others."""
    found = together(world, trained, store.path, divided, 2)
    assert in_order(found) == in_order([alone])
    assert len({counted for _, _, counted in in_order(found)}) > 1, "the samples of this test must not count alike"
    for key in METRICS:
        assert found[0]["curves"][key] == pytest.approx(alone["curves"][key], rel=1e-5), key
        assert len(alone["curves"][key]) == (STEPS if key.startswith("train") else STEPS // 2)
        assert all(other["curves"][key] == found[0]["curves"][key] for other in found), key
    for name, weight in alone["weights"].items():
        for other in found:
            assert np.array_equal(other["weights"][name], found[0]["weights"][name]), name
            if weight.ndim > 1:  # AdamW moves the biases of keys, which have no gradient, by the sign of what is rounded
                assert np.linalg.norm(other["weights"][name] - weight) < 1e-3 * np.linalg.norm(weight), name
    size = sum(weight.size for weight in alone["weights"].values())
    assert sum(other["own"] for other in found) == (size if divided else size * world)
