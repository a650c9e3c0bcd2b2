"""The verb from files to a table: brightness is read out of pixels, a result is told again, bad input is refused with words."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from mae_core.export import Description, save_model
from mae_core.vit import Encoder, EncoderSettings
from modalities.quality import NO_VALUE
from pipelines.probe import main
from pipelines.terravox import main as terravox
from tests.synthetic_rasters import north_up, write_raster
from tests.tiny_runs import one_thread, quick, shared_tracking

__all__ = ["quick"]

NAMES = [f"place{number}" for number in range(6)]


@dataclass(frozen=True)
class World:
    """Images, label maps by folder, and an encoder; nothing else lies in `folder`."""

    folder: Path
    uri: str

    def arguments(self, out: str, *more: str, labels: str = "labels") -> list[str]:
        places = {"encoder": "encoder", "data": "images", "labels": labels, "out": out}
        own = [f"{key}={self.folder / name}" for key, name in places.items()]
        tile = ["prepare.tile=[16,16]", "prepare.num_workers=0", "device=cpu", "seeds=[0,1]", "k=5", "linear.l2=[0.1,0.01]"]
        return [*own, *tile, f"tracking.uri={self.uri}", *more]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Blocks of 4 × 4 voxels are dark (1) or bright (2), but labelled 7 in the first columns.

    Labels of another folder are drawn by chance, and in a third each place has one class only.
    """
    folder = tmp_path_factory.mktemp("world")
    for number, name in enumerate(NAMES):
        rng = np.random.default_rng(number)
        classes = np.kron(rng.integers(1, 3, (4, 4)), np.ones((4, 4), int))
        affine = north_up(x=500_000 + 1000 * number)
        pixels = 1000 * classes + rng.normal(0, 50, (2, 16, 16)).round()
        write_raster(folder / "images" / f"{name}.tif", pixels.astype(np.uint16), affine, names=("A", "B"))
        classes[:, :4] = 7
        write_raster(folder / "labels" / f"{name}.tif", classes[None].astype(np.uint8), affine)
        chance = np.kron(rng.integers(1, 3, (4, 4)), np.ones((4, 4), int))
        write_raster(folder / "chance" / f"{name}.tif", chance[None].astype(np.uint8), affine)
        classes[:] = 1 + (number == 0)
        write_raster(folder / "alike" / f"{name}.tif", classes[None].astype(np.uint8), affine)
    shape = EncoderSettings(preset="nano", patch=(4, 4), mlp_ratio=1)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        encoder = Encoder(shape, ("A", "B"))
    about = Description(
        kind="encoder",
        modality="raster",
        channels=("A", "B"),
        mean=(1500.0,) * 2,
        std=(500.0,) * 2,
        no_value=int(NO_VALUE),
        crop=(16, 16),
        spacing=(10.0, 10.0),
        spacing_unit="m",
        encoder=shape,
        reader={"kind": "raster"},
        lineage={},
    )
    save_model(folder / "encoder" / "model", encoder, about)
    return World(folder, shared_tracking(tmp_path_factory))


@pytest.fixture(scope="module")
def finished(world: World) -> dict[str, Any]:
    with one_thread():
        assert main(world.arguments("run", "ignore=[7]", "class_names=[dark,bright]")) == 0
    result: dict[str, Any] = json.loads((world.folder / "run" / "result.json").read_text())
    return result


def test_brightness_is_read_out_of_pixels_by_both_probes(finished: dict[str, Any]) -> None:
    figures = finished["figures"]
    assert list(figures["held_out"]) == ["pretrained", "random-seed0", "random-seed1", "pixels"]
    assert figures["held_out"]["pixels"]["linear"] == {"accuracy": 1, "balanced_accuracy": 1, "macro_f1": 1}
    assert all(0 <= value <= 1 for arm in figures["held_out"].values() for probe in arm.values() for value in probe.values())
    assert {name for arm in figures["held_out"].values() for name in arm} == {"linear", "knn"}
    assert figures["most_frequent_class"]["balanced_accuracy"] == 0.5


def test_the_result_says_what_was_fitted_and_judged_on(finished: dict[str, Any]) -> None:
    figures = finished["figures"]
    assert figures["groups"] == {"train": 4, "val": 2}
    assert {side: sum(found.values()) for side, found in figures["samples"].items()} == {"train": 4 * 12, "val": 2 * 12}
    assert figures["classes"] == ["dark", "bright"]
    assert all(fit["converged"] for fit in figures["linear"].values())
    assert finished["config"]["store_digest"] == finished["digests"]["store"]
    assert finished["verb"] == "probe"


def test_the_run_is_tracked_without_paths(finished: dict[str, Any], world: World) -> None:
    run = MlflowClient(world.uri).get_run(finished["mlflow"]["run_id"])
    assert run.info.status == "FINISHED"
    for arm, found in finished["figures"]["held_out"].items():
        assert run.data.metrics[f"held_out/{arm}/knn/macro_f1"] == found["knn"]["macro_f1"]
    assert run.inputs.dataset_inputs[0].dataset.name == "raster"
    assert str(world.folder) not in json.dumps(run.data.params)


def test_a_finished_run_is_told_again_and_other_settings_are_refused(
    finished: dict[str, Any], world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    words = world.arguments("run", "ignore=[7]", "class_names=[dark,bright]")
    assert main([*words, "batch_size=3"]) == 0
    told = capsys.readouterr().out
    assert "is finished; its result is told again" in told
    assert "random weights" in told
    assert "1.000" in told
    assert main([*words, "k=6"]) == 1
    assert "k: 5 -> 6" in capsys.readouterr().err
    assert json.loads((world.folder / "run" / "result.json").read_text()) == finished


def test_arms_differ_in_nothing_but_weights(world: World) -> None:
    assert main(world.arguments("arms", "seeds=[5,6]", labels="chance")) == 0
    found = json.loads((world.folder / "arms" / "result.json").read_text())["figures"]["held_out"]
    assert found["random-seed5"] == found["pretrained"] != found["random-seed6"], "the world's encoder is the random one of seed 5"


def test_tiles_and_the_class_token_can_be_probed(world: World) -> None:
    words = world.arguments("tiles", "ignore=[7]", "level=tile", "pool=class", "prepare.tile=[8,8]", "crop=[8]", "seeds=[]")
    assert main(words) == 0
    figures = json.loads((world.folder / "tiles" / "result.json").read_text())["figures"]
    assert list(figures["held_out"]) == ["pretrained", "pixels"]
    assert figures["level"] == "tile"
    assert {side: sum(found.values()) for side, found in figures["samples"].items()} == {"train": 4 * 4, "val": 2 * 4}


@pytest.mark.parametrize(
    ("labels", "more", "words"),
    [
        ("alike", [], ["the tokens of side", "have fewer than two classes", "give more labels"]),
        ("alike", ["level=tile"], ["the tiles of side", "have fewer than two classes", "use level=token"]),
        ("labels", ["ignore=[1,7]"], ["the labels hold classes [2] beside [1, 7], which are ignored; two classes are needed"]),
        ("labels", ["class_names=[a,b]"], ["class_names gives 2 names and the labels hold 3 classes: [1, 2, 7]"]),
        ("labels", ["prepare.split.val_fraction=0"], ["no tile is held out", "set prepare.split.val_fraction above 0"]),
    ],
)
def test_bad_input_is_refused_with_words(
    world: World, capsys: pytest.CaptureFixture[str], labels: str, more: list[str], words: list[str]
) -> None:
    out = f"refused-{labels}-{len(words)}-{len(more)}-{''.join(more)[:6]}"
    assert main(world.arguments(out, *more, labels=labels)) == 1
    errors = capsys.readouterr().err
    assert not [word for word in words if word not in errors], errors
    assert not (world.folder / out / "result.json").exists()


def test_it_is_checked_before_anything_is_done(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*world.arguments("checked"), "--check"]) == 0
    assert not (world.folder / "checked").exists()
    wrong = [word for word in world.arguments("checked", labels="absent") if not word.startswith("encoder=")]
    assert terravox(["probe", *wrong, f"encoder={world.folder / 'images'}", "--check"]) == 2
    errors = capsys.readouterr().err
    assert "  labels: does not exist\n" in errors, "without the place, as long as nothing tells that it is none of patients"
    assert "holds no model" in errors
    assert main([*world.arguments("checked"), "level=voxel", "k=0"]) == 2
    errors = capsys.readouterr().err
    assert "level" in errors
    assert "k" in errors
