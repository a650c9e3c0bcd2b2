"""X-ray pictures: grey values, what was exposed, place without a map, labels in and out; and pictures that are none."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modalities.catalogue import scan
from modalities.grey_png import read_png
from modalities.ground import centres
from modalities.medical import XraySettings
from modalities.quality import Quality
from modalities.scene import SceneError
from modalities.xray import XrayScene, exposed_of
from modalities.xray_scan import scan_xrays
from tests.synthetic_pictures import save_png, shades


def scan_picture(path: Path, **settings: Any) -> XrayScene:
    found = scan_xrays([path], path.parent, XraySettings(**settings))
    assert not found.rejected, found.rejected
    return found.scenes[0]


def refused(path: Path, **settings: Any) -> str:
    found = scan_xrays([path], path.parent, XraySettings(**settings))
    assert not found.scenes
    (rejected,) = found.rejected
    assert path.stem not in f"{rejected.file} {rejected.reason}"
    return rejected.code


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_a_grey_png_is_a_scene_that_lies_on_no_map(tmp_path: Path, dtype: str) -> None:
    values = (shades() % 251).astype(dtype)
    scene = pickle.loads(pickle.dumps(scan_picture(save_png(tmp_path / "patient-7.png", values))))
    pixels, quality = scene.read((slice(3, 9), slice(2, 20)))
    assert np.array_equal(pixels[0], values[3:9, 2:20])
    assert pixels.dtype == scene.dtype == dtype
    assert not quality.any()
    assert (scene.grid.frame, scene.grid.unit, scene.times) == ("", "index", ())
    assert np.isnan(centres([scene.grid.frame], [scene.grid.matrix.ravel()], [scene.grid.space])).all()
    assert "7" not in scene.group.split("-")[0]
    assert "patient-7" not in repr(scene)


@pytest.mark.parametrize("intensity", ["zscore", "percentile"])
def test_values_are_normalised_over_what_was_exposed(tmp_path: Path, intensity: str) -> None:
    values = np.zeros((60, 50), np.uint16)
    values[10:, :45] = shades((50, 45))
    scene = scan_picture(save_png(tmp_path / "a.png", values), intensity=intensity)
    pixels, quality = scene.read(scene.grid.full)
    assert np.array_equal(quality == Quality.OUTSIDE, values == 0)
    (channel,) = scene.channels
    fed = (pixels[0] * channel.scale + channel.offset)[quality == 0]
    assert channel.unit == {"zscore": "z-score", "percentile": "percentile"}[intensity]
    if intensity == "zscore":
        assert abs(fed.mean()) < 0.05
        assert fed.std() == pytest.approx(1, abs=0.1)
    else:
        assert fed.min() == pytest.approx(0, abs=1e-9)
        assert fed.max() == pytest.approx(1, abs=1e-9)
        assert ((fed <= 0).mean(), (fed >= 1).mean()) == pytest.approx((0.005, 0.005), abs=0.003)


def test_a_shadow_with_noise_and_a_dark_line_inside_count_as_picture() -> None:
    values = shades((30, 30))
    values[:4] = np.random.default_rng(0).integers(0, 5, (4, 30))
    values[15] = 0
    assert exposed_of(values, None).all()
    assert np.array_equal(exposed_of(values, 0), values != 0)


def test_labels_go_in_and_out_at_the_size_of_the_picture(tmp_path: Path) -> None:
    scene = scan_picture(save_png(tmp_path / "a.png", shades()))
    labels = (np.indices((24, 20)).sum(axis=0) % 3).astype(np.uint8)
    scene.write_labels(tmp_path / "out.png", labels, 0)
    assert np.array_equal(read_png(tmp_path / "out.png"), labels)
    found = scene.open_labels(tmp_path / "out.png")
    assert np.array_equal(found.read((slice(2, 9), slice(0, 20))), labels[2:9])
    save_png(tmp_path / "small.png", labels[:-1])
    with pytest.raises(SceneError, match=r"^labels of scan-\w+: the labels: a label picture of \(23, 20\) for a picture of \(24, 20\)"):
        scene.open_labels(tmp_path / "small.png")


def test_three_equal_colours_are_grey_and_others_are_refused(tmp_path: Path) -> None:
    values = shades(dtype="uint16")
    scene = scan_picture(save_png(tmp_path / "a.png", np.stack([values] * 3)))
    assert np.array_equal(scene.read(scene.grid.full)[0][0], values)
    assert refused(save_png(tmp_path / "coloured_one.png", np.stack([values, values, values + 1]))) == "colour"


def test_what_is_no_usable_picture_is_refused_without_its_name_and_all_files_are_counted(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = save_png(tmp_path / "secret-name.png", shades())
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert refused(path) == "damaged_picture"
    path.write_bytes(data[:8] + b"garbage" + data[20:])
    assert refused(path) == "damaged_picture"
    assert refused(save_png(tmp_path / "flat.png", np.full((9, 9), 7, np.uint8))) == "constant"
    good = save_png(tmp_path / "good.png", shades())
    assert refused(good, spacing_mm=(0.2, 0.2)) == "no_spacing"
    assert refused(good, max_pixels=10) == "too_large"
    (tmp_path / "notes.txt").write_text("no picture")
    catalogue = scan(tmp_path, XraySettings())
    assert (catalogue.num_used, len(catalogue.rejected), catalogue.ignored) == (1, 2, ("notes.txt",))
    assert any("nobody says how large a pixel is in 1 picture:" in note for note in catalogue.notes)
    told = capfd.readouterr()
    assert "secret" not in told.out + told.err
