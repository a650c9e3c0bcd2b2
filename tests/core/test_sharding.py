"""A checkpoint of any number of processes, divided or not, goes on with any other; a divided update can be skipped; buffers stay alike."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mae_core.checkpoint import restore
from mae_core.checkpoint_writer import CheckpointWriter
from mae_core.mae import MaskedAutoencoder
from mae_core.optim import learning_rate, make_optimiser
from mae_core.parallel import Parallel, ParallelSettings, processes
from mae_core.sharding import is_divided, shard, undivided, whole
from mae_core.store import TileStore
from tests.forked import together
from tests.synthetic_batches import with_index
from tests.tiny_runs import TinyRun, curve, shared_store, tiny_recipe, tiny_run

RECIPE: dict[str, Any] = {"train__steps": 6, "train__eval_steps": 6, "train__checkpoint_steps": 3, "loader__global_batch_size": 4}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TileStore:
    return shared_store(tmp_path_factory)


def begun(store: TileStore, parallel: Parallel, **changes: Any) -> TinyRun:
    """The tiny run of a process, divided where that is asked for."""
    run = tiny_run(store, tiny_recipe(**{**RECIPE, **changes}), parallel)
    shard(run.state.model, parallel)
    rate = learning_rate(run.recipe.optim, run.recipe.loader.global_batch_size)
    run.state.optimiser = make_optimiser(run.state.model, run.recipe.optim, rate)
    return run


def bits(run: TinyRun) -> dict[str, bytes]:
    """All weights, and all of the optimiser's state, by name."""
    state = {name: whole(tensor) for name, tensor in run.state.model.state_dict().items()}
    for number, entries in run.state.optimiser.state_dict()["state"].items():
        state |= {f"{number}/{name}": whole(tensor) for name, tensor in entries.items()}
    return {name: tensor.detach().numpy().tobytes() for name, tensor in state.items()}


def trained(path: Path, checkpoints: Path, divided: bool, last: int) -> tuple[dict[str, bytes], dict[str, bytes], dict[int, float]]:
    """Goes on from the newest checkpoint to a step and saves it: what was restored, what was saved, and the losses."""
    with processes("cpu", ParallelSettings(shard=divided, timeout_s=60)) as parallel:
        run = begun(TileStore.open(path), parallel)
        assert is_divided(run.state.model) == (divided and parallel.world > 1)
        restore(run.state, checkpoints, pytest.fail)
        before = bits(run) if run.state.step else {}
        reports = run.train(last)
        with CheckpointWriter(checkpoints, {}, 2, parallel) as writer:
            writer.save(run.state)
        return before, bits(run), curve(reports)


def test_checkpoints_pass_between_any_number_of_processes_divided_or_not(tmp_path: Path, store: TileStore) -> None:
    ((_, _, quiet),) = together(1, trained, store.path, tmp_path / "quiet", False, 6)
    losses: dict[int, float] = {}
    saved: dict[str, bytes] = {}
    for world, divided, last in ((2, True, 2), (1, False, 3), (4, True, 5), (2, False, 6)):
        found = together(world, trained, store.path, tmp_path / "passed on", divided, last)
        assert all(restored == saved for restored, _, _ in found), f"{world} processes took over the same bits"
        saved = found[0][1]
        assert all(ended == saved for _, ended, _ in found), f"{world} processes agree"
        losses |= found[0][2]
    assert losses == pytest.approx(quiet, rel=1e-5)
    assert sorted(losses) == [1, 2, 3, 4, 5, 6]


def skipped(path: Path) -> tuple[bool, bool, float]:
    """Whether a step with an infinite sample left all bits alone, whether the next one moved them, and the count of skipped steps."""
    store = TileStore.open(path)
    with processes("cpu", ParallelSettings(shard=True, timeout_s=60)) as parallel:
        run = begun(store, parallel, train__steps=2)
        tile = run.stream.samples(np.asarray([4]))[1].tile.item()
        scale = store.index.scale.copy()
        scale[np.flatnonzero(store.index.tile == tile), 0] = np.inf
        spoilt = dataclasses.replace(run, stream=dataclasses.replace(run.stream, store=with_index(store, scale=scale)))
        spoilt.train(1)
        first = bits(run)
        (report, *_) = spoilt.train()
        second = bits(run)
        run.state.step = 0
        run.train(1)
        return first == second, second != bits(run), report.metrics["train/skipped_steps"]


def test_an_update_that_is_not_finite_is_skipped_where_the_model_is_divided(store: TileStore) -> None:
    """One of the two processes meets the sample; both leave their parts as they are."""
    assert together(2, skipped, store.path) == [(True, True, 1.0)] * 2


def looked_at(path: Path) -> tuple[float, int, bool]:
    """A buffer that differed, the panels that this process made for itself, and whether the model was divided again afterwards."""
    with processes("cpu", ParallelSettings(shard=True, timeout_s=60)) as parallel:
        run = begun(TileStore.open(path), parallel)
        model = run.state.model
        assert isinstance(model, MaskedAutoencoder)
        model.register_buffer("running", torch.full((2,), float(parallel.rank)))
        panels = 0
        with undivided(model), torch.inference_mode():
            if parallel.is_first:
                panels = len(run.task.panels(model))
        run.train(1)
        return float(model.get_buffer("running")[0]), panels, all(is_divided(weight) for weight in model.parameters())


def test_one_process_may_look_alone_and_buffers_are_those_of_the_first(store: TileStore) -> None:
    assert together(2, looked_at, store.path) == [(0.0, 4, True), (0.0, 0, True)]
