"""Memory that runs out in a step ends the run with shapes and a micro-batch size, and leaves the weights whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from mae_core.augment import RawBatch
from mae_core.checkpoint import restore, steps
from mae_core.evaluate import Pretraining
from mae_core.exhaustion import TrainingMemoryError
from mae_core.store import TileStore
from mae_core.train import Loss
from tests.tiny_runs import quick, shared_store, tiny_recipe, tiny_run

__all__ = ["quick"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TileStore:
    return shared_store(tmp_path_factory)


def exhausted(monkeypatch: pytest.MonkeyPatch, error: Exception, most: int) -> None:
    """A micro-batch of more than `most` samples runs out of memory in the third step, after one that has left a gradient."""
    plain, before = Pretraining.loss, []

    def loss(task: Pretraining, model: nn.Module, raw: RawBatch, progress: float) -> Loss:
        if len(raw.scale) > most and progress == pytest.approx(2 / 6):
            if before:
                raise error
            before.append(raw)
        return plain(task, model, raw, progress)

    monkeypatch.setattr(Pretraining, "loss", loss)


CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79 GiB\nmore lines"
HOST = "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(CUDA), MemoryError("Unable to allocate 8 GiB"), RuntimeError(HOST)])
def test_a_smaller_micro_batch_is_suggested_and_does_it(
    tmp_path: Path, store: TileStore, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    recipe = tiny_recipe(
        train__steps=6, train__checkpoint_steps=2, train__eval_steps=6, loader__global_batch_size=8, loader__micro_batch_size=4
    )
    exhausted(monkeypatch, error, most=2)
    run = tiny_run(store, recipe)
    shapes = r"in a micro-batch of 4 samples of 2 channels from tiles of 12×12 \(uint16\)\."
    told = rf"step 3: memory ran out on cpu, {shapes} .*step 2, .*micro_batch_size=2"
    with pytest.raises(TrainingMemoryError, match=told) as caught:
        run.train(checkpoints=tmp_path)
    assert str(error).splitlines()[0] in str(caught.value)
    assert "more lines" not in str(caught.value)
    assert all(weight.grad is None for weight in run.state.model.parameters())
    assert [path.name for path in steps(tmp_path)] == ["step-00000002"]
    later = tiny_run(store, recipe.model_copy(update={"loader": recipe.loader.model_copy(update={"micro_batch_size": 2})}))
    restore(later.state, tmp_path, pytest.fail)
    assert all(map(torch.equal, run.state.model.parameters(), later.state.model.parameters()))
    if isinstance(error, MemoryError):
        later.train()
        assert later.state.step == 6


def test_where_one_sample_does_not_fit_another_model_is_suggested(store: TileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    exhausted(monkeypatch, MemoryError(), most=0)
    with pytest.raises(TrainingMemoryError, match=r"of 1 samples .*not even one sample fits: in a new run, lower crop .*Cause: not told"):
        tiny_run(store, tiny_recipe(train__steps=6, loader__micro_batch_size=1)).train()


def test_another_error_is_left_as_it_is(store: TileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    exhausted(monkeypatch, RuntimeError("shapes do not match"), most=0)
    with pytest.raises(RuntimeError, match=r"^shapes do not match$"):
        tiny_run(store, tiny_recipe(train__steps=6, loader__micro_batch_size=2)).train()
