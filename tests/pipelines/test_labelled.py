"""Fine-tuning from polygons as an analyst does it: which store they give, what is told of them, what the segmenter knows of its classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from rasterio.features import shapes

from mae_core.encoders import build_encoder
from mae_core.export import Description, load_description, load_encoder, save_model
from mae_core.loader import read_rows
from mae_core.masking import Sample
from mae_core.store import TileStore
from mae_core.vit import EncoderSettings
from modalities.quality import NO_VALUE
from pipelines import finetune_segmentation
from pipelines.finetune_segmentation import FinetuneSettings, Job, make_job
from pipelines.labelled import colours_of, labelled_store
from tests.synthetic_rasters import north_up, write_raster
from tests.synthetic_vectors import box, write_features
from tests.tiny_runs import ALONE, quick, shared_tracking

__all__ = ["quick"]

OWN = ["train.steps=2", "train.log_steps=1", "train.eval_steps=2", "train.device=cpu", "loader.global_batch_size=4"]
OWN += ["tracking.system_metrics=false"]
TEXTS = {1: "barley", 2: "lake", 3: "wood"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Four places with labels of three classes: as rasters with a colour table, as one GeoPackage of texts; an encoder of them."""
    folder, uri = tmp_path_factory.mktemp("labelled"), shared_tracking(tmp_path_factory)
    features = []
    for number in range(4):
        rng = np.random.default_rng(number)
        classes = np.kron(rng.integers(1, 4, (4, 5)), np.ones((4, 4), int)).astype(np.uint8)
        affine = north_up(x=500_000 + 1000 * number)
        pixels = 1000.0 * classes + rng.normal(0, 50, (2, 16, 20)).round()
        write_raster(folder / "images" / f"place{number}.tif", pixels.astype(np.uint16), affine, names=("A", "B"))
        write_raster(folder / "labels" / f"place{number}.tif", classes[None], affine)
        features += [(shape, {"cover": TEXTS[int(value)], "area": 1}) for shape, value in shapes(classes, None, 4, affine)]
    write_features(folder / "cover.gpkg", features)
    about = Description(
        kind="encoder",
        modality="raster",
        channels=("A", "B"),
        mean=(2000.0, 2000.0),
        std=(800.0, 800.0),
        no_value=NO_VALUE,
        crop=(16, 16),
        spacing=(10.0, 10.0),
        spacing_unit="m",
        encoder=EncoderSettings(preset="nano", patch=(4, 4)),
        reader={"kind": "raster"},
        lineage={},
    )
    save_model(folder / "encoder" / "model", build_encoder(about.encoder, about.channels), about)
    return folder, uri


def store_of(folder: Path, labels: Path, **changes: Any) -> TileStore:
    """The labelled store that fine-tuning would use."""
    _, about = load_encoder(folder / "encoder" / "model")
    places = {"encoder": str(folder / "encoder"), "data": folder / "images", "labels": labels, "out": folder / "out"}
    prepared = {"tile": (16, 16), "num_workers": 0, "split": {"val_fraction": 0.3}}
    return labelled_store(FinetuneSettings.model_validate({**places, "prepare": prepared, **changes}), about)


def test_polygons_give_the_same_tiles_as_the_raster_they_were_drawn_from(world: tuple[Path, str]) -> None:
    folder, _ = world
    raster = store_of(folder, folder / "labels")
    vector = store_of(folder, folder / "cover.gpkg", label_options={"attribute": "cover"})
    assert vector.attributes["classes"] == raster.attributes["classes"] == [1, 2, 3]
    assert len(raster) == len(vector) == 8
    for row in range(len(raster)):
        one, other = raster.read(row), vector.read(row)
        assert one.labels is not None
        assert other.labels is not None
        assert np.array_equal(one.labels, other.labels)
        assert np.array_equal(one.pixels, other.pixels)
    assert vector.attributes["class_names"] == {"1": "barley", "2": "lake", "3": "wood"}
    assert "class_names" not in raster.attributes
    ignored = store_of(folder, folder / "labels", ignore=(2,))
    assert ignored.attributes["classes"] == [1, 3]


def test_a_segmenter_from_polygons_knows_the_names_and_colours_of_its_classes(
    world: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, uri = world
    places = ["--encoder", str(folder / "encoder"), "--data", str(folder / "images"), "--labels", str(folder / "cover.gpkg")]
    words = ["label_options.attribute=cover", 'class_colours=["#ffcc00","#0000ff","#006600"]', "head.features=4", "init=pretrained"]
    split = ["prepare.tile=[16,16]", "prepare.split.val_fraction=0.3", "prepare.num_workers=0"]
    out = ["--out", str(folder / "segmenter"), f"tracking.uri={uri}"]
    assert finetune_segmentation.main([*places, *words, *split, *out, *OWN]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "cover.gpkg, layer cover: " in told
    assert "class numbers of the texts: 1 barley, 2 lake, 3 wood" in told
    assert "labels of 4 scenes" in told
    result = json.loads((folder / "segmenter" / "result.json").read_text())["figures"]
    assert result["classes"] == ["barley", "lake", "wood"]
    assert {"dice/barley", "iou/lake", "mean_iou"} <= set(result["held_out"]["pretrained-seed0"])
    confused = np.array(result["confusion"]["pretrained-seed0"])
    hit, wrong = np.diag(confused), confused.sum(axis=0) + confused.sum(axis=1) - np.diag(confused)
    assert confused.sum() == 2 * 16 * 20, "every voxel of the held-out places once"
    assert result["held_out"]["pretrained-seed0"]["iou/barley"] == pytest.approx(hit[0] / wrong[0])
    assert "share of each class's held-out voxels by what was predicted" in told
    about = load_description(folder / "segmenter" / "model", "segmenter")
    assert about.classes == ((1, "barley"), (2, "lake"), (3, "wood"))
    assert about.colours == ((255, 204, 0), (0, 0, 255), (0, 102, 0))


def test_named_regions_are_what_a_segmenter_is_judged_on(world: tuple[Path, str]) -> None:
    folder, _ = world
    split = {"val_fraction": 0.3, "regions": {"last": ("place3",)}}
    named = store_of(folder, folder / "labels", prepare={"tile": (16, 16), "num_workers": 0, "split": split})
    assert finetune_segmentation.judged_side(named) == "test"
    assert set(named.index.scene[named.rows("test")]) == {"place3"}
    assert finetune_segmentation.judged_side(store_of(folder, folder / "labels")) == "val"


@pytest.mark.parametrize(
    ("labels", "words", "message"),
    [
        ("cover.gpkg", [], "has attributes cover, area; say which holds the class by label_options.attribute"),
        ("cover.gpkg", ["label_options.attribute=cover", "class_names=[a]"], "class_names gives 1 names and the labels hold 3 classes"),
        ("cover.gpkg", ["label_options.attribute=cover", "class_names=[a,a,b]"], "two classes are called the same: a, a, b"),
        ("cover.gpkg", ["label_options.value=1"], "the labels hold classes [1] beside [], which are ignored; two classes are needed"),
        ("labels", ["label_options.background=0"], "label_options.background is for vector files, and the labels are place0.tif"),
        ("far.gpkg", [], "no feature of"),
    ],
)
def test_labels_that_do_not_do_are_refused_with_words(
    world: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], labels: str, words: list[str], message: str
) -> None:
    folder, uri = world
    if not (folder / "far.gpkg").exists():
        write_features(folder / "far.gpkg", [(box(700_000, 0, 700_010, 10), {"class": 1})])
    places = ["--encoder", str(folder / "encoder"), "--data", str(folder / "images"), "--labels", str(folder / labels)]
    split = ["prepare.tile=[16,16]", "prepare.split.val_fraction=0.3", "prepare.num_workers=0"]
    out = ["--out", str(tmp_path / "refused"), f"tracking.uri={uri}"]
    assert finetune_segmentation.main([*places, *words, *split, *out, *OWN]) == 1
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_colour_that_is_none_is_refused_before_any_file_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"{name}={tmp_path}" for name in ("encoder", "data", "labels", "out")]
    assert finetune_segmentation.main([*words, "class_colours=[red]"]) == 2
    assert "class_colours" in capsys.readouterr().err


def test_colours_of_a_raster_come_from_its_colour_table(world: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = world
    settings = FinetuneSettings.model_validate({"encoder": "e", "data": folder, "labels": folder, "out": folder})
    assert colours_of(settings, store_of(folder, folder / "labels"), (1, 2, 3)) == ()
    for path in (folder / "labels").iterdir():
        with rasterio.open(path) as source:
            write_raster(tmp_path / path.name, source.read(), source.transform, photometric="palette")
        with rasterio.open(tmp_path / path.name, "r+") as target:
            target.write_colormap(1, {1: (200, 0, 0, 255), 2: (0, 0, 200, 255), 3: (0, 100, 0, 255)})
    store = store_of(folder, tmp_path)
    assert store.attributes["class_colours"] == {"1": [200, 0, 0], "2": [0, 0, 200], "3": [0, 100, 0]}
    assert colours_of(settings, store, (1, 3)) == ((200, 0, 0), (0, 100, 0))


@pytest.mark.parametrize(("ignore", "classes"), [((), (2, 3)), ((2,), (3,)), ((0, 2), (1, 3))])
def test_crops_of_training_are_placed_on_labels_that_are_no_background(
    world: tuple[Path, str], ignore: tuple[int, ...], classes: tuple[int, ...]
) -> None:
    folder, _ = world
    encoder, about = load_encoder(folder / "encoder" / "model")
    store = store_of(folder, folder / "labels")
    words = {"encoder": "e", "data": folder, "labels": folder, "out": folder / "out", "crop": (4, 4), "ignore": ignore}

    def job(fraction: float) -> Job:
        settings = FinetuneSettings.model_validate(words | {"augment": {"foreground_fraction": fraction}})
        return make_job(settings, encoder, about, store, ALONE, {})

    assert job(0.0).task.normaliser.foreground is None
    task, rows = job(1.0).task, np.arange(len(store))
    raw = read_rows(store, rows, Sample(*[torch.from_numpy(rows)] * 3))
    assert raw.labels is not None
    there = torch.isin(raw.labels, torch.tensor(classes)).flatten(1).any(dim=1)
    assert there.any()
    batch = task.normaliser(raw, ALONE.device)
    assert torch.equal(torch.isin(batch.labels, torch.tensor(classes)).flatten(1).any(dim=1), there)
