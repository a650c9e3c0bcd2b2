"""Memory that runs out where tiles are read: the run ends with the tiles and the settings by name, and nothing hangs."""

from __future__ import annotations

from typing import Any

import pytest

from mae_core.loader import LoaderError
from mae_core.store import TileStore
from pipelines.pretrain import EXPECTED
from tests.tiny_runs import curve, quick, shared_store, tiny_recipe, tiny_run

__all__ = ["quick"]


@pytest.mark.parametrize("part", ["fetch", "unpack"])
def test_memory_that_runs_out_in_a_loader_is_told_and_the_run_goes_on_with_less(
    part: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = shared_store(tmp_path_factory)
    calls: list[int] = []
    true = getattr(TileStore, part)

    def exhausted(self: TileStore, *words: Any) -> Any:
        calls.append(1)
        if len(calls) >= 3:
            raise MemoryError("Unable to allocate 9.00 GiB for an array")
        return true(self, *words)

    run = tiny_run(store, tiny_recipe(loader__prefetch=3, loader__window_shards=2))
    with monkeypatch.context() as patch:
        patch.setattr(TileStore, part, exhausted)
        with pytest.raises(LoaderError, match=r"ran out while tiles \[\d+, .*\] of .* were read \(Unable to allocate 9.00 GiB") as caught:
            run.train()
    assert "lower loader.prefetch=3, loader.window_shards=2" in str(caught.value)
    assert isinstance(caught.value, EXPECTED)
    assert max(curve(run.train())) == run.recipe.train.steps
