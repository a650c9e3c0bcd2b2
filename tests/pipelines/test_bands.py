"""Data are fed to a model channel by channel: in any order with the same bits, in other units not at all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mae_core.bands import BandSettings
from mae_core.export import Description
from mae_core.probes import collect
from mae_core.vit import Encoder, EncoderSettings
from modalities.catalogue import scan
from modalities.quality import NO_VALUE
from modalities.raster import RasterSettings
from modalities.scene import Scene
from pipelines.bands import described, model_bands, sampled, scene_bands, scene_matching, store_matching, tell_bands
from pipelines.labelled import labelled_store, labelled_task
from pipelines.probe import ProbeSettings
from pipelines.run_folder import RunError
from tests.synthetic_rasters import north_up, write_raster
from tests.tiny_runs import ALONE, one_thread

NAMES = ("B02", "B03", "B04")
WAVES = {"B02": 492.4, "B03": 559.8, "B04": 664.6, "OLI_B2": 482.0, "OLI_B3": 561.4, "OLI_B4": 654.6}


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    with one_thread():
        yield


def pixels_of(number: int) -> NDArray[np.uint16]:
    return np.random.default_rng(number).integers(500, 2500, (3, 16, 20)).astype(np.uint16)


def images(folder: Path, order: tuple[int, ...] = (0, 1, 2), names: tuple[str, ...] = NAMES) -> Path:
    """Four places of three bands and their labels; the bands stand in `order`."""
    for number in range(4):
        affine, own = north_up(x=500_000 + 1000 * number), [names[place] for place in order]
        write_raster(folder / "images" / f"p{number}.tif", pixels_of(number)[list(order)], affine, names=tuple(own))
        write_raster(folder / "labels" / f"p{number}.tif", 1 + (pixels_of(number)[:1] > 1500).astype(np.uint8), affine)
    return folder


def about_of(scale: float = 1e-4, unit: str = "") -> Description:
    """An encoder of three bands in reflectance, or in what `scale` makes of the integers."""
    about = Description(
        kind="encoder",
        modality="raster",
        channels=NAMES,
        mean=(1500 * scale,) * 3,
        std=(577 * scale,) * 3,
        no_value=int(NO_VALUE),
        crop=(8, 8),
        spacing=(10.0, 10.0),
        spacing_unit="m",
        encoder=EncoderSettings(preset="nano", patch=(4, 4)),
        reader={"kind": "raster"},
        lineage={},
    )
    bands = tuple(replace(band, unit=unit, wavelength_nm=WAVES[band.name]) for band in model_bands(about))
    return about.model_copy(update=described(bands))


def settings_of(folder: Path, **more: Any) -> ProbeSettings:
    prepare = {"tile": (8, 8), "num_workers": 0, "split": {"val_fraction": 0.5}}
    words = {"encoder": "e", "data": folder / "images", "labels": folder / "labels", "out": folder / "out", "prepare": prepare}
    return ProbeSettings.model_validate(words | more)


def features(folder: Path, **more: Any) -> torch.Tensor:
    """What an encoder gives for every token of the training tiles, all the way from the files."""
    about, settings = about_of(1.0), settings_of(folder, **more)
    store = labelled_store(settings, about)
    task = labelled_task(settings, about, store, 4, ALONE)
    torch.manual_seed(0)
    encoder = Encoder(EncoderSettings(preset="nano", patch=(4, 4)), NAMES).eval()
    return collect(task, {"e": encoder}, store.rows("train"), "token", "mean", 999, 0).features["e"]


def test_channels_in_another_order_give_the_same_features_bit_for_bit(tmp_path: Path) -> None:
    whole = features(images(tmp_path / "a"))
    assert len(whole) > 10
    for number, order in enumerate([(2, 0, 1), (1, 0, 2), (2, 1, 0)]):
        assert torch.equal(features(images(tmp_path / f"b{number}", order)), whole)


def test_channels_of_another_name_are_fed_by_wavelength_where_that_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = features(images(tmp_path / "a"))
    landsat = images(tmp_path / "b", (1, 2, 0), ("OLI_B2", "OLI_B3", "OLI_B4"))
    with pytest.raises(RunError, match=r"none in common; .* bands\.match=wavelength"):
        features(landsat)
    about = about_of(1.0)
    store = labelled_store(settings_of(landsat), about)
    channels = [{**channel, "wavelength_nm": WAVES[channel["name"]]} for channel in store.attributes["channels"]]
    told = replace(store, whole=replace(store.whole, attributes=store.attributes | {"channels": channels}))
    settings = settings_of(landsat, bands={"match": "wavelength"})
    task = labelled_task(settings, about, told, 4, ALONE)
    torch.manual_seed(0)
    encoder = Encoder(EncoderSettings(preset="nano", patch=(4, 4)), NAMES).eval()
    assert torch.equal(collect(task, {"e": encoder}, told.rows("train"), "token", "mean", 999, 0).features["e"], whole)
    shown = capsys.readouterr().out
    assert "482 nm for 492.4 nm" in shown
    assert "all 3 channels of the model are there under their names" in shown, "of the first folder"


def scene_of(folder: Path, values: NDArray[np.generic], names: tuple[str, ...] = NAMES, **settings: Any) -> Scene:
    write_raster(folder / "scene.tif", values, names=names)
    return scanned(folder, settings)


def scanned(folder: Path, settings: dict[str, Any]) -> Scene:
    return scan(folder, RasterSettings.model_validate({"kind": "raster", **settings})).scenes[0]


def test_integers_do_not_reach_a_model_of_reflectance(tmp_path: Path) -> None:
    scene = scene_of(tmp_path, pixels_of(0))
    for unit in ("", "reflectance"):
        with pytest.raises(
            RunError, match=r"channel B02 has values of 1\d{3}.* trained on 0\.15 .*other units \(and 2 more\); .*radiometry"
        ):
            scene_matching(about_of(unit=unit), scene, BandSettings())
    scaled = scanned(tmp_path, {"radiometry": [{"match": "*", "scale": 1e-4}]})
    assert scene_matching(about_of(), scaled, BandSettings()).columns == (0, 1, 2)
    with pytest.raises(RunError, match=r"values of 0\.1\d+ .* trained on 1500"):
        scene_matching(about_of(1.0), scaled, BandSettings())


def test_other_units_are_fed_where_that_is_accepted_and_it_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scene = scene_of(tmp_path, pixels_of(0))
    assert scene_matching(about_of(), scene, BandSettings(accept_units=True)).columns == (0, 1, 2)
    assert "accepted because of bands.accept_units" in " ".join(capsys.readouterr().out.split())


def test_a_store_in_other_units_is_refused_with_a_remedy(tmp_path: Path) -> None:
    store = labelled_store(settings_of(images(tmp_path)), about_of())
    with pytest.raises(RunError, match=r"other units .*; set the scale and offset of the reader: reader\.radiometry.*accept_units=true"):
        labelled_task(settings_of(tmp_path), about_of(), store, 4, ALONE)
    channels = [{**channel, "unit": "DN", "level": "L1C"} for channel in store.attributes["channels"]]
    told = replace(store, whole=replace(store.whole, attributes=store.attributes | {"channels": channels}))
    with pytest.raises(RunError, match=r"channel B02 is in DN here, and the model was trained on reflectance \(and 2 more\)"):
        store_matching(about_of(1.0, "reflectance"), told, BandSettings())


def test_values_without_a_value_are_not_sampled(tmp_path: Path) -> None:
    values = np.full((3, 40, 300), 9999, np.int16)
    values[:, :, :100] = 7
    write_raster(tmp_path / "scene.tif", values, names=NAMES, nodata=9999)
    assert sampled(scanned(tmp_path, {}), int(NO_VALUE)) == dict.fromkeys(NAMES, (7.0, 0.0))
    values[:] = 9999
    write_raster(tmp_path / "scene.tif", values, names=NAMES, nodata=9999)
    assert sampled(scanned(tmp_path, {}), int(NO_VALUE)) == {}


def test_what_the_model_does_not_know_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scene = scene_of(tmp_path, np.concatenate([pixels_of(0), pixels_of(1)[:1]]), (*NAMES, "B99"))
    assert [band.name for band in scene_bands(scene)] == [*NAMES, "B99"]
    tell_bands(scene_matching(about_of(1.0), scene, BandSettings()))
    assert "B99" in capsys.readouterr().out
