"""A pretraining begins with the weights of an encoder of other bands, in that encoder's units, and says what became of each tensor."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mae_core.export import load_encoder
from mae_core.store import TileStore
from modalities.scene import Channel
from pipelines.preparation import PrepareSettings, prepare
from pipelines.pretrain import main
from pipelines.tiling_plan import SplitSettings
from tests.synthetic_scenes import Scenes, make_scene
from tests.tiny_runs import arguments, one_thread, shared_store, shared_tracking


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    with one_thread():
        yield


def store_with(folder: Path, channels: tuple[str, ...], scale: float = 1.0, unit: str = "") -> TileStore:
    """A store of the tiny one's places in other channels."""
    scenes = [make_scene(folder, name, (36, 24), channels=channels, scale=scale) for name in "abc"]
    waves = {"A": 490.0, "B": 560.0, "C": 665.0}
    told = tuple(Channel(name, waves[name], None, scale, 0.0, unit) for name in channels)
    settings = PrepareSettings(
        tile=(12, 12), tiles_per_shard=4, num_workers=0, min_valid_fraction=0.1, split=SplitSettings(val_fraction=0.2, seed=1)
    )
    prepare(
        Scenes(tuple(replace(scene, channels=told) for scene in scenes)),
        folder / "store",
        settings,
        attributes={"kind": "raster", "reader": {}},
    )
    return TileStore.open(folder / "store")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of an encoder of channels A and B."""
    out = tmp_path_factory.mktemp("encoder") / "run"
    with one_thread():
        words = arguments(shared_store(tmp_path_factory), out, shared_tracking(tmp_path_factory), train__steps=2, train__eval_steps=2)
        assert main(words) == 0
    return out


def words_of(store: TileStore, out: Path, factory: pytest.TempPathFactory, encoder: Path, **more: Any) -> list[str]:
    return arguments(store, out, shared_tracking(factory), train__steps=1, train__eval_steps=1, init__encoder=str(encoder), **more)


def test_common_channels_go_on_as_they_were_and_new_ones_are_added(
    tmp_path_factory: pytest.TempPathFactory, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = store_with(tmp_path, ("C", "B"))
    # A learning rate of nothing, so that what comes out is what was begun with.
    words = words_of(store, tmp_path / "run", tmp_path_factory, encoder, optim__base_lr=1e-30, init__new_bands="zero")
    assert main(words) == 0
    assert "weights of" in capsys.readouterr().out
    before, old = load_encoder(encoder / "model")
    after, new = load_encoder(tmp_path / "run" / "model")
    assert new.channels == ("C", "B")
    place = old.channels.index("B")
    assert (new.mean[1], new.std[1]) == (old.mean[place], old.std[place]), "what it knows stays in its units"
    assert new.mean[0] == pytest.approx(store.statistics.mean[0])
    patches = torch.randn(1, 4, 1, 16)
    ids = torch.arange(4)[None]
    one, two = (model(patches, ids, (2, 2), channels=("B",)) for model in (before, after))
    torch.testing.assert_close(one, two)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert ["copied", "embed.weight[B]", "embed.weight[B]", "1", ""] in result["transfer"]
    assert ["new", "", "embed.weight[C]", "1", "zeros"] in result["transfer"]
    assert ["dropped", "embed.weight[A]", "", "1", "the new encoder has no such band"] in result["transfer"]
    assert new.lineage["begun_with_weights"] == json.loads((encoder / "result.json").read_text())["digests"]["weights"]
    assert new.wavelengths_nm == (665.0, 560.0)
    np.testing.assert_array_equal(np.array(new.percentiles, float), store.statistics.percentiles)


def test_a_killed_run_goes_on_and_tells_the_same(tmp_path_factory: pytest.TempPathFactory, encoder: Path, tmp_path: Path) -> None:
    store = store_with(tmp_path, ("A", "B", "C"))
    words = words_of(store, tmp_path / "run", tmp_path_factory, encoder)
    assert main(words) == 0
    before = load_encoder(tmp_path / "run" / "model")[0].state_dict()
    (tmp_path / "run" / "result.json").unlink()
    assert main(words) == 0
    after = load_encoder(tmp_path / "run" / "model")[0].state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    "case",
    [
        (("A", "B"), 1e-4, {}, r"channel A has values of 0\.5.* trained on 5.*other units"),
        (("C",), 1.0, {}, r"none in common; .*bands\.match=wavelength"),
        (("A", "B"), 1.0, {"model__encoder__patch": [2]}, r"set model\.encoder\.patch=\[4, 4\]"),
    ],
    ids=["other units", "other channels", "other patch"],
)
def test_what_cannot_go_on_is_refused(
    tmp_path_factory: pytest.TempPathFactory,
    encoder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    case: tuple[tuple[str, ...], float, dict[str, Any], str],
) -> None:
    channels, scale, changes, words = case
    store = store_with(tmp_path, channels, scale)
    given = words_of(store, tmp_path / "run", tmp_path_factory, encoder, **changes)
    for more, code in ((["--check"], 2), ([], 1)):
        assert main([*given, *more]) == code
        told = capsys.readouterr()
        assert re.search(words, " ".join((told.out + told.err).split()))
