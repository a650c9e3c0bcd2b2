"""Every option of the method, as `pretrain` puts it together: it trains, is evaluated, gives pictures, and resumes bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mae_core.checkpoint import restore
from mae_core.evaluate import Panel, fit_basis
from mae_core.export import load_encoder
from pipelines.pretrain import main, resolved
from pipelines.run_folder import RunError, recall
from tests.tiny_runs import TinyRun, arguments, one_thread, shared_store, shared_tracking, tiny_recipe, tiny_run

OPTIONS: dict[str, dict[str, Any]] = {
    "pca": {"model__target": {"kind": "pca", "num_components": 5}},
    "whitened pca": {"model__target": {"kind": "pca", "num_components": 5, "whiten": True}},
    "hog": {"model__target": {"kind": "hog"}},
    "l1": {"model__error__kind": "l1"},
    "smooth l1, weighted": {"model__error__kind": "smooth_l1", "model__error__channel_weights": {"A": 2.0}},
    "block": {"hiding": {"kind": "block"}},
    "grid": {"hiding": {"kind": "grid"}},
    "tube": {"hiding": {"kind": "tube", "axis": 1}},
    "slice": {"hiding": {"kind": "slice", "axis": 0, "mask_ratio": 0.5}},
    "whole channels": {"hiding": {"kind": "slice", "axis": "channels", "mask_ratio": 0.5}, "model__encoder__groups": "each"},
    "schedule": {"hiding__final_mask_ratio": 0.9, "hiding__num_stages": 2},
    "cross-attention": {"model__decoder": {"kind": "cross_attention", "width": 16, "depth": 1, "heads": 2, "predicted_fraction": 0.5}},
    "sparse convolution": {"model__encoder": {"kind": "sparse_conv", "preset": "nano", "patch": [4, 4]}},
    "overlap": {"model__encoder__stride": [2, 2]},
    "physical, resolution": {"model__encoder__positions__unit": "physical", "model__encoder__context": {"kinds": ["resolution"]}},
    "drop path": {"model__encoder__drop_path": 0.5},
    "resized": {"augment__resized_crop": [0.3, 1.0], "augment__intensity": 0.1},
    "dropped channels": {"augment__channel_drop_fraction": 0.5},
    "recompute": {"model__encoder__recompute": True},
}
each_option = pytest.mark.parametrize("changes", OPTIONS.values(), ids=list(OPTIONS))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    store = shared_store(tmp_path_factory)

    def make(**changes: Any) -> TinyRun:
        run = tiny_run(store, tiny_recipe(**{"crop": [12]} | changes))
        fit_basis(run.task, run.state.model, run.stream.rows)
        return run

    return make


@each_option
def test_it_trains_and_is_looked_at(runs: Any, changes: dict[str, Any]) -> None:
    run, seen = runs(train__steps=4, train__eval_steps=4, train__log_steps=2, **changes), []
    object.__setattr__(run.task, "on_panels", lambda step, panels: seen.extend(panels))
    with one_thread():
        reports = run.train()
    figures = {name: value for report in reports for name, value in report.metrics.items()}
    assert all(np.isfinite(value) for value in figures.values())
    assert figures["val/error"] > 0
    assert "val/skill" in figures
    panel: Panel
    for panel in seen:
        assert panel.pixels.shape == panel.shown.shape == panel.filled.shape == panel.error.shape
        hidden = np.isnan(panel.shown)
        assert hidden.any()
        np.testing.assert_allclose(panel.filled[~hidden], panel.pixels[~hidden], atol=1e-5)
    assert seen


@pytest.mark.parametrize("name", ["pca", "drop path", "schedule", "dropped channels", "resized", "cross-attention"])
def test_cut_off_and_resumed_it_ends_in_the_same_bits(runs: Any, tmp_path: Path, name: str) -> None:
    changes = {"train__steps": 6, "train__checkpoint_steps": 2, "train__log_steps": 1} | OPTIONS[name]
    with one_thread():
        whole, cut, again = runs(**changes), runs(**changes), runs(**changes)
        whole.train()
        keep = tmp_path / "checkpoints"
        cut.train(last=3, checkpoints=keep)
        restore(again.state, tmp_path / "checkpoints", print)
        assert again.state.step == 2
        again.train(checkpoints=keep)
    for key, weight in whole.state.model.state_dict().items():
        assert torch.equal(weight, again.state.model.state_dict()[key]), key


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__target": {"kind": "hog"}, "model__encoder__stride": [2, 2]}, "target.kind=hog needs patches that do not overlap"),
        ({"model__target": {"kind": "pca", "num_components": 500}}, "target.num_components=500 is more than the"),
        ({"model__encoder__stride": [3, 3]}, "larger by an even number on every axis"),
        ({"model__encoder__groups": (("A",),)}, "must name each channel of the data once"),
        ({"hiding": {"kind": "tube", "axis": 2}}, "hiding.axis=2 and the data have 2 axes"),
        ({"hiding": {"kind": "slice", "axis": "channels"}}, "needs more than one channel group"),
        ({"model__error__channel_weights": {"B99": 1.0}}, r"channel_weights name \['B99'\]"),
        ({"model__encoder__positions__kind": "learned"}, "needs positions.grid"),
        ({"model__target": {"kind": "hog"}, "perceptual__encoder": "x"}, "perceptual.encoder needs a target"),
        (
            {"model__target": {"kind": "pca", "num_components": 5}, "model__error__channel_weights": {"A": 1.0}},
            "cannot weigh target.kind=pca",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_done(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RunError, match=message):
        resolved(tiny_recipe(**{"crop": [12]} | changes), shared_store(tmp_path_factory))


def test_a_frozen_encoder_judges_another_run(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    store, uri = shared_store(tmp_path_factory), shared_tracking(tmp_path_factory)
    assert main(arguments(store, tmp_path / "judge", uri, train__steps=2)) == 0
    changes = {"perceptual.encoder": str(tmp_path / "judge"), "perceptual.weight": 1.0, "train__steps": 2, "train__log_steps": 1}
    assert main(arguments(store, tmp_path / "judged", uri, **changes)) == 0
    plain, judged = (recall(tmp_path / name)["figures"]["train/loss"] for name in ("judge", "judged"))
    assert judged > plain, "the term is in the loss"


@pytest.mark.parametrize("name", ["overlap", "whole channels", "sparse convolution", "physical, resolution"])
def test_the_verb_goes_to_its_end_and_keeps_a_model_that_loads(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, name: str) -> None:
    store, uri = shared_store(tmp_path_factory), shared_tracking(tmp_path_factory)
    assert main(arguments(store, tmp_path / "run", uri, **{"crop": [12], "train__steps": 2} | OPTIONS[name])) == 0
    encoder, about = load_encoder(tmp_path / "run" / "model")
    assert about.encoder == resolved(tiny_recipe(**{"crop": [12]} | OPTIONS[name]), store).model.encoder
    assert encoder.channels == store.channels
