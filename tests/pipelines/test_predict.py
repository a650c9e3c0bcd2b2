"""Scenes of any size become COGs: the numbers of whole-scene inference, gone on with after a kill, and an account at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from rio_cogeo import cog_validate

from mae_core.export import Description, load_segmenter, save_model
from mae_core.heads import HeadSettings, Segmenter
from mae_core.labelling import Labeller
from mae_core.vit import Encoder, EncoderSettings
from modalities.cog import RasterWriter
from modalities.raster_file import quiet
from pipelines import label_scene, predict
from pipelines.label_scene import source_of
from tests.synthetic_rasters import north_up, scene_of, write_raster
from tests.tiny_runs import quick

__all__ = ["quick"]

SPACE = (700, 90)
NAMES = ("A", "B", "C")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A segmenter of random weights for crops of 64², class numbers 1, 5 and 9."""
    folder = tmp_path_factory.mktemp("segmenter")
    encoder = EncoderSettings(preset="nano", patch=(16, 16), mlp_ratio=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Segmenter(Encoder(encoder, NAMES), HeadSettings(features=4), 3)
    description = Description(
        kind="segmenter",
        modality="raster",
        channels=NAMES,
        mean=(1000.0,) * 3,
        std=(300.0,) * 3,
        no_value=127,
        crop=(64, 64),
        spacing=(10.0, 10.0),
        spacing_unit="m",
        encoder=encoder,
        head=HeadSettings(features=4),
        classes=((1, "water"), (5, "forest"), (9, "town")),
        colours=((0, 0, 255), (0, 128, 0), (200, 0, 0)),
        reader={"kind": "raster"},
        lineage={},
    )
    save_model(folder / "model", model, description)
    return folder


def image(path: Path, space: tuple[int, int] = SPACE, seed: int = 0, names: tuple[str, ...] = NAMES, **profile: Any) -> Path:
    """Noise on a slope, with a hole of nodata."""
    pixels = np.random.default_rng(seed).normal(1000, 300, (3, *space)).clip(1) + np.linspace(0, 500, space[1])
    pixels[:, 5:20, 3:9] = 0
    return write_raster(path, pixels.astype(np.uint16), north_up(), names=names, nodata=0, **profile)


def words(run_folder: Path, data: Path, out: Path, *more: str) -> list[str]:
    uri = f"sqlite:///{run_folder}/tracking.db"
    return ["--model", str(run_folder), "--data", str(data), "--out", str(out), f"tracking.uri={uri}", "device=cpu", *more]


def whole(run_folder: Path, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Class numbers and probabilities of a scene that is held in memory, a crop at a time."""
    model, about = load_segmenter(run_folder / "model")
    scene = scene_of(path)
    bands = list(Labeller(model, about, 0.5, 0, 1).bands(source_of(scene, NAMES), slice(0, scene.grid.space[1])))
    return np.concatenate([band.labels for band in bands]), np.concatenate([band.probabilities for band in bands], axis=1)


def result(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_labels_and_probabilities_are_those_of_the_whole_scene(run_folder: Path, tmp_path: Path) -> None:
    source = image(tmp_path / "scene.tif")
    labels, chance = whole(run_folder, source)
    for how in ("uint8", "float32"):
        out = tmp_path / how / "map.tif"
        assert predict.main(words(run_folder, source, out, f"probabilities={how}", "batch_size=5")) == 0
        probabilities = out.with_name("map_probabilities.tif")
        with rasterio.open(out) as found, rasterio.open(source) as image_file:
            np.testing.assert_array_equal(found.read(1), labels)
            np.testing.assert_array_equal(found.read(1) == 0, image_file.read(1) == 0)
            assert (found.crs, found.transform, found.shape, found.nodata) == (image_file.crs, image_file.transform, SPACE, 0)
            assert [found.colormap(1)[value][:3] for value in (1, 5, 9)] == [(0, 0, 255), (0, 128, 0), (200, 0, 0)]
            assert json.loads(found.tags()["TERRAVOX_CLASSES"]) == {"1": "water", "5": "forest", "9": "town"}
            assert found.tags()["TERRAVOX_WEIGHTS"].startswith("sha256:")
        with rasterio.open(probabilities) as found:
            assert found.descriptions == ("water", "forest", "town")
            values = found.read(masked=True).astype(np.float64) * np.array(found.scales).reshape(3, 1, 1)
            np.testing.assert_array_equal(values.mask, np.isnan(chance))
            np.testing.assert_allclose(values.filled(np.nan), chance, rtol=0, atol=1e-5 if how == "float32" else 0.0021)
        assert cog_validate(out, strict=True) == cog_validate(probabilities, strict=True) == (True, [], [])
        done = result(out.with_name("map.tif.result.json"))
        names = {1: "water", 5: "forest", 9: "town", 0: "no value"}
        counts = {names[int(value)]: int((labels == value).sum()) for value in np.unique(labels)}
        assert done["figures"]["voxels_by_class"] == {str(out): counts}
        assert done["figures"]["megabytes"] == pytest.approx(700 * 90 * 3 * 2 / 1e6, abs=0.05)


def test_a_killed_call_is_gone_on_with_and_gives_the_same_file(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = image(tmp_path / "scene.tif"), tmp_path / "map.tif"
    computed: list[int] = []
    plain = RasterWriter.write

    def write(writer: RasterWriter, window: tuple[slice, ...], values: np.ndarray) -> None:
        if window[0].start >= 600 and not killed:
            killed.append(True)
            raise KeyboardInterrupt
        computed.append(window[0].start)
        plain(writer, window, values)

    killed: list[bool] = []
    monkeypatch.setattr(label_scene.RasterWriter, "write", write)
    assert predict.main(words(run_folder, source, out)) == 130
    assert not out.exists()
    assert predict.main([*words(run_folder, source, out), "--check"]) == 0
    assert "1 of them begun by an interrupted call" in capsys.readouterr().out
    assert computed[0] == 0
    computed.clear()
    assert predict.main(words(run_folder, source, out)) == 0
    assert computed[0] == 512, "what is on disk is not computed again"
    assert "1 went on after 512 rows of an interrupted call" in capsys.readouterr().out
    np.testing.assert_array_equal(rasterio.open(out).read(1), whole(run_folder, source)[0])

    computed.clear()
    before = out.read_bytes()
    assert predict.main(words(run_folder, source, out)) == 0
    assert "1 were there already, made from the same model, data and settings" in capsys.readouterr().out
    assert not computed
    assert out.read_bytes() == before
    assert predict.main(words(run_folder, source, out, "overlap=0.25")) == 0
    assert computed[0] == 0, "other settings, another map"
    image(source, seed=1)
    computed.clear()
    assert predict.main(words(run_folder, source, out)) == 0
    assert computed[0] == 0, "another image, another map"
    np.testing.assert_array_equal(rasterio.open(out).read(1), whole(run_folder, source)[0])


def test_a_wide_scene_is_labelled_in_strips_and_gone_on_with(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = image(tmp_path / "scene.tif", (80, 1100)), tmp_path / "map.tif"
    narrow = [slice(0, 512), slice(512, 1024), slice(1024, 1100)]
    monkeypatch.setattr(Labeller, "strips", lambda *_: narrow)
    plain, seen = RasterWriter.write, list[int]()

    def write(writer: RasterWriter, window: tuple[slice, ...], values: np.ndarray) -> None:
        seen.append(window[1].start)
        plain(writer, window, values)
        if len(seen) > 1 and seen[-2] != seen[-1] == 512:
            raise KeyboardInterrupt

    monkeypatch.setattr(label_scene.RasterWriter, "write", write)
    assert predict.main(words(run_folder, source, out)) == 130
    count = len(seen)
    assert predict.main(words(run_folder, source, out)) == 0
    assert set(seen[count:]) == {512, 1024}, "the first strip was on disk"
    np.testing.assert_array_equal(rasterio.open(out).read(1), whole(run_folder, source)[0])


@pytest.mark.parametrize(("space", "declared"), [((20, 31), None), ((64, 64), np.nan), ((65, 200), None)])
def test_small_scenes_and_scenes_without_a_place(run_folder: Path, tmp_path: Path, space: tuple[int, int], declared: float | None) -> None:
    pixels = np.random.default_rng(0).normal(1000, 300, (3, *space)).astype(np.float32)
    pixels[:, 0, 0] = np.nan
    source = write_raster(tmp_path / "scene.tif", pixels, None, None, names=NAMES, nodata=declared)
    assert predict.main(words(run_folder, source, tmp_path / "map.tif")) == 0
    with quiet(), rasterio.open(tmp_path / "map.tif") as found:
        labels, crs = found.read(1), found.crs
        assert np.argwhere(found.read(1, masked=True).mask).tolist() == [[0, 0]], "NaN is no value, declared or not"
    np.testing.assert_array_equal(labels, whole(run_folder, source)[0])
    assert (crs, labels[0, 0]) == (None, 0)


def test_one_bad_scene_does_not_keep_the_others_from_being_labelled(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    image(images / "a" / "same.1.tif", (40, 50))
    image(images / "a" / "same.2.tif", (40, 50), seed=2)
    image(images / "other.tif", (40, 50), names=("X", "Y", "Z"))
    assert predict.main(words(run_folder, images, tmp_path / "out")) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "not labelled other:" in text
    assert "2 label files written" in text
    assert "1 failed, see above" in text
    found = sorted(file.relative_to(tmp_path / "out").as_posix() for file in (tmp_path / "out").rglob("*.tif"))
    assert found == ["a/same.1_labels.tif", "a/same.2_labels.tif"], "two scenes of one short name do not share a file"
    assert [item["file"] for item in result(tmp_path / "out" / "result.json")["rejected"]] == ["other"]


def test_check_says_what_is_wrong_before_anything_is_done(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = image(tmp_path / "scene.tif", names=("X", "Y", "Z"))
    for out, message in (("map.tif", "none in common"), ("map.png", "must end in .tif")):
        assert predict.main([*words(run_folder, source, tmp_path / out), "--check"]) == 2
        assert message in capsys.readouterr().err
    assert predict.main([*words(run_folder, tmp_path / "no", tmp_path / "map.tif"), "--check"]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["scene.tif"]


def test_a_scene_in_other_units_is_refused_unless_that_is_accepted_and_recorded(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image(tmp_path / "images" / "good.tif", (70, 80))
    bad = tmp_path / "images" / "bad.tif"
    write_raster(bad, (np.random.default_rng(0).random((3, 70, 80)) / 10).astype(np.float32), north_up(), names=NAMES)
    assert predict.main(words(run_folder, bad, tmp_path / "bad.tif")) == 1
    assert "channel A has values of 0.0" in " ".join(capsys.readouterr().err.split()), "reflectance, and the model knows integers"
    assert not (tmp_path / "bad.tif").exists()
    assert predict.main(words(run_folder, tmp_path / "images", tmp_path / "labels")) == 1, "one of two"
    (failed,) = result(tmp_path / "labels" / "result.json")["rejected"]
    assert "bands.accept_units=true" in failed["reason"]
    assert (tmp_path / "labels" / "good_labels.tif").is_file()
    assert predict.main(words(run_folder, bad, tmp_path / "bad.tif", "bands.accept_units=true")) == 0
    assert result(tmp_path / "bad.tif.result.json")["config"]["bands"]["accept_units"] is True


def test_channels_are_told_and_found_in_any_order(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, other = image(tmp_path / "a.tif", (70, 80)), tmp_path / "b.tif"
    with rasterio.open(source) as file:
        pixels = file.read()
    write_raster(other, np.concatenate([pixels[[2, 0, 1]], pixels[:1]]), north_up(), names=("C", "A", "B", "Z"), nodata=0)
    for data in (source, other):
        assert predict.main(words(run_folder, data, tmp_path / f"labels_{data.name}", "probabilities=float32")) == 0
    for name in ("labels_{}.tif", "labels_{}_probabilities.tif"):
        with rasterio.open(tmp_path / name.format("a")) as one, rasterio.open(tmp_path / name.format("b")) as two:
            np.testing.assert_array_equal(one.read(), two.read())
    assert "not known to the model, not fed" in " ".join(capsys.readouterr().out.split())
    rows = result(tmp_path / "labels_b.tif.result.json")["bands"][str(tmp_path / "labels_b.tif")]
    assert rows == [[name, name, "same name"] for name in NAMES] + [["none", "Z", "not known to the model, not fed"]]
