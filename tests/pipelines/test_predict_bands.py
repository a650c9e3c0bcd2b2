"""How a segmenter's channels were found is kept with it and counts in prediction, too, where nothing else is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch

from mae_core.bands import BandSettings
from mae_core.export import Description, save_model
from mae_core.heads import HeadSettings, Segmenter
from mae_core.parallel import Parallel
from mae_core.vit import Encoder
from pipelines import predict
from pipelines.bands import PredictBandSettings
from pipelines.finetune_segmentation import FinetuneSettings, make_job, segmenter_description
from pipelines.labelled import labelled_store
from tests.pipelines.test_bands import NAMES, WAVES, about_of, images, pixels_of
from tests.synthetic_rasters import north_up, write_raster
from tests.tiny_runs import quick, wide

__all__ = ["quick", "wide"]

LANDSAT = ("OLI_B2", "OLI_B3", "OLI_B4")


def segmenter(bands: BandSettings) -> tuple[Segmenter, Description]:
    """A segmenter of Sentinel-2 bands that reads rasters of Landsat's."""
    described = [{"name": name, "position": place, "wavelength_nm": WAVES[name]} for place, name in enumerate(LANDSAT, 1)]
    more = {"kind": "segmenter", "head": HeadSettings(features=4), "classes": ((1, "a"), (2, "b")), "bands": bands}
    about = about_of(1.0).model_copy(update=more | {"reader": {"kind": "raster", "bands": described}})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Segmenter(Encoder(about.encoder, NAMES), HeadSettings(features=4), 2), about


def labels(folder: Path, image: Path, name: str, *more: str) -> np.ndarray:
    out = folder / f"{name}.tif"
    uri = f"tracking.uri=sqlite:///{folder}/tracking.db"
    assert predict.main([f"model={folder / 'run'}", f"data={image}", f"out={out}", uri, "device=cpu", *more]) == 0
    with rasterio.open(out) as found:
        values: np.ndarray = found.read(1)
    return values


def test_a_segmenter_that_was_fed_by_wavelength_is_fed_so_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = write_raster(tmp_path / "scene.tif", pixels_of(0), north_up())
    save_model(tmp_path / "run" / "model", *segmenter(BandSettings(match="wavelength")))
    found = labels(tmp_path, image, "kept")
    assert "matched by wavelength, as in the model's fine-tuning" in " ".join(capsys.readouterr().out.split())
    np.testing.assert_array_equal(found, labels(tmp_path, image, "told", "bands.match=wavelength"))
    words = [f"model={tmp_path / 'run'}", f"data={image}", f"out={tmp_path / 'no.tif'}", "device=cpu"]
    assert predict.main([*words, "--check"]) == 0
    assert predict.main([*words, "bands.match=name", "--check"]) == 2
    assert "none in common" in capsys.readouterr().err


def test_one_that_was_fed_by_name_wants_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = write_raster(tmp_path / "scene.tif", pixels_of(0), north_up())
    save_model(tmp_path / "run" / "model", *segmenter(BandSettings()))
    words = [f"model={tmp_path / 'run'}", f"data={image}", f"out={tmp_path / 'no.tif'}", "device=cpu", "--check"]
    assert predict.main(words) == 2
    assert "none in common" in capsys.readouterr().err
    assert predict.main([*words, "bands.match=wavelength"]) == 0
    assert predict.main([*words, "bands.match=wavelength", "bands.max_distance_nm=1"]) == 2


def test_what_is_left_open_is_the_models_and_accepting_units_is_never_kept() -> None:
    about = about_of().model_copy(update={"bands": BandSettings(match="wavelength", max_distance_nm=40, accept_units=True)})
    assert PredictBandSettings().for_model(about) == BandSettings(match="wavelength", max_distance_nm=40)
    given = PredictBandSettings(match="name", max_distance_nm=7, accept_units=True)
    assert given.for_model(about) == BandSettings(match="name", max_distance_nm=7, accept_units=True)


def test_fine_tuning_writes_it_down(tmp_path: Path) -> None:
    images(tmp_path)
    about = about_of(1.0)
    told: dict[str, Any] = {"match": "wavelength", "max_distance_nm": 30, "accept_units": True}
    prepare = {"tile": (8, 8), "num_workers": 0, "split": {"val_fraction": 0.5}}
    words = {"encoder": "e", "data": tmp_path / "images", "labels": tmp_path / "labels", "out": tmp_path / "out", "prepare": prepare}
    settings = FinetuneSettings.model_validate(words | {"bands": told, "crop": (8, 8)})
    job = make_job(
        settings,
        Encoder(about.encoder, NAMES),
        about,
        labelled_store(settings, about),
        Parallel(0, 1, torch.device("cpu")),
        {"encoder_weights": "abc"},
    )
    found = segmenter_description(job, "pretrained", 0, "run").bands
    assert found == BandSettings(match="wavelength", max_distance_nm=30)
