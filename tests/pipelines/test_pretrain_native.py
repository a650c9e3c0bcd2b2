"""A store whose channels keep their native resolution trains group by group; what does not go with it is refused before any step."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from mae_core.store import TileStore
from pipelines.pretrain import PretrainRecipe, resolved
from pipelines.pretrain_start import footprints_of, make_normaliser
from pipelines.run_folder import RunError
from tests.tiny_runs import curve, one_thread, shared_store, tiny_recipe, tiny_run


def coarse(store: TileStore, footprint: int = 2) -> TileStore:
    """The store as if its last channel held one measurement in several voxels."""
    channels = [dict(channel) for channel in store.attributes["channels"]]
    channels[-1]["footprint"] = footprint
    return replace(store, whole=replace(store.whole, attributes=store.attributes | {"channels": channels}))


def test_the_store_says_how_the_encoder_is_built_and_crops_are_cut(tmp_path_factory: pytest.TempPathFactory) -> None:
    store = coarse(shared_store(tmp_path_factory))
    name = store.channels[-1]
    recipe = resolved(tiny_recipe(), store)
    assert recipe.model.encoder.footprints == footprints_of(store) == {name: 2}
    assert make_normaliser(store, recipe.crop, 0, None).footprint == 2
    again = PretrainRecipe.model_validate(recipe.model_dump())
    assert resolved(again, store) == recipe, "what is recorded is the same when it is read again"
    with one_thread(), torch.no_grad():
        run = tiny_run(store, recipe)
        others = [channel for channel in store.channels if channel != name]
        assert run.state.model.encoder.groups == (tuple(range(len(others))), (len(others),))
    with one_thread():
        run = tiny_run(store, tiny_recipe(train__steps=4))
        reports = run.train()
    losses = curve(reports)
    assert len(losses) == 4
    assert all(math.isfinite(loss) for loss in losses.values())
    assert any(f"val/skill/{name}" in report.metrics for report in reports), "held-out skill of the coarse channel by itself"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__encoder__patch": [4], "footprint": 3}, r"does not hold whole measurements .* multiple of 3"),
        ({"augment__resized_crop": [0.5, 1.0]}, r"augment\.resized_crop would mix neighbouring measurements"),
        ({"model__encoder__kind": "sparse_conv"}, r"kind=sparse_conv wants a value of its own in every voxel .* take kind=vit"),
        ({"model__encoder__footprints": {"B99": 2}}, r"leave the setting out, it is the store's"),
        ({"model__target__kind": "hog"}, r"target\.kind=hog needs .* a measurement in every voxel"),
        ({"model__target__kind": "pca"}, r"target\.kind=pca needs .* a measurement in every voxel"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_go_with_native_resolution_is_refused(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any], words: str
) -> None:
    store = coarse(shared_store(tmp_path_factory), changes.get("footprint", 2))
    with pytest.raises(RunError, match=words):
        resolved(tiny_recipe(**{key: value for key, value in changes.items() if key != "footprint"}), store)
