"""Volumes of thick slices: interpolated apart along the slices' axis, and what lies at its place stays there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from modalities.medical import MriSettings
from modalities.spacing import Respacing
from tests.synthetic_volumes import OBLIQUE, dice, orientations, save_volume, scan_one, texture, turned, world

LINEAR = MriSettings(through_plane="linear")


@pytest.mark.parametrize("turn", [0, 21, 44])
def test_along_the_slices_each_keeps_its_values_and_within_them_they_are_linear(tmp_path: Path, turn: int) -> None:
    base = OBLIQUE @ np.diag([2.0, 1.5, 6.5, 1.0])
    space = (10, 12, 7)
    x, y, z = np.indices(space)
    values = (300 + 7.0 * x - 3.0 * y + 100.0 * (z**2 % 5)).astype(np.float32)
    stored, affine = turned(values, base, orientations()[turn])
    scene = scan_one(save_volume(tmp_path / "a.nii.gz", stored, affine), MriSettings())
    assert np.allclose(scene.grid.spacing, 1, atol=1e-5)
    pixels, _ = scene.read(scene.grid.full)
    index = np.einsum(
        "ij,j...->i...", np.linalg.inv(base), np.concatenate([world(scene.grid.space, scene.grid.matrix), np.ones((1, *scene.grid.space))])
    )
    u, v, w = index[:3]
    half_way = np.abs(w - np.floor(w) - 0.5) < 1e-3
    expected = 300 + 7.0 * u - 3.0 * v + 100.0 * (np.rint(w) ** 2 % 5)
    assert np.abs(pixels[0] - expected)[~half_way].max() < 2e-2
    assert half_way.mean() < 0.1
    smooth, _ = scan_one(save_volume(tmp_path / "a.nii.gz", stored, affine), LINEAR).read(scene.grid.full)
    below = np.floor(np.clip(w, 0, space[2] - 1.0001))
    mixed = 300 + 7.0 * u - 3.0 * v + 100.0 * ((1 - w + below) * (below**2 % 5) + (w - below) * ((below + 1) ** 2 % 5))
    assert np.abs(smooth[0] - mixed).max() < 5e-2


@pytest.mark.parametrize(
    ("spacing", "wanted", "axis"),
    [
        ((1, 1, 3), (1, 1, 1), None),
        ((1, 1, 3.1), (1, 1, 1), 2),
        ((5, 1, 1), (1, 1, 1), 0),
        ((0.4, 5, 0.4), (1, 1, 1), 1),
        ((1, 1, 5), (1, 1, 5), None),
        ((0.4, 0.4, 5), (1, 1, 6), None),
        ((1, 1, 5), None, None),
    ],
)
def test_slices_are_apart_above_a_ratio_of_three_and_only_where_they_come_closer(spacing: Any, wanted: Any, axis: int | None) -> None:
    assert Respacing.to((20, 20, 20), spacing, wanted, is_nearest=True).nearest_axis == axis
    assert Respacing.to((20, 20, 20), spacing, wanted).nearest_axis is None


def test_what_is_no_number_stays_in_its_slice(tmp_path: Path) -> None:
    values = texture((9, 9, 7))
    values[4, 4, 3] = np.nan
    scene = scan_one(save_volume(tmp_path / "a.nii.gz", values, np.diag([1.0, 1, 5, 1])), MriSettings())
    pixels, quality = scene.read(scene.grid.full)
    assert quality[4, 4].astype(bool).sum() == 5
    assert quality.astype(bool).sum() == 5
    assert np.array_equal(np.unique(pixels[0, 3, 3]), np.unique(values[3, 3]))


@pytest.mark.parametrize("settings", [MriSettings(), LINEAR], ids=["nearest", "linear"])
def test_labels_of_small_things_on_thick_slices_survive_the_way_there_and_back(tmp_path: Path, settings: MriSettings) -> None:
    affine = OBLIQUE @ np.diag([1.0, 1.0, 5.0, 1.0])
    space = (40, 44, 14)
    places = world(space, affine)
    centre = places.reshape(3, -1).mean(axis=1).reshape(3, 1, 1, 1)
    labels = (np.linalg.norm(places - centre, axis=0) < 9).astype(np.uint8)
    labels[np.linalg.norm(places - centre - 13, axis=0) < 6] = 2
    scene = scan_one(save_volume(tmp_path / "a.nii.gz", texture(space), affine), settings)
    there = scene.open_labels(save_volume(tmp_path / "l.nii.gz", labels, affine)).read(scene.grid.full)
    scene.write_labels(tmp_path / "out.nii.gz", there.astype(np.uint8), 0)
    written = nib.load(tmp_path / "out.nii.gz")
    back = np.asarray(written.dataobj)
    for number in (1, 2):
        assert dice(back == number, labels == number) >= 0.98
    assert np.abs(written.affine - nib.load(tmp_path / "a.nii.gz").affine).max() <= 1e-5


@pytest.mark.parametrize("version", [1, 2])
def test_all_48_orders_keep_codes_units_sizes_and_version_in_written_labels(tmp_path: Path, version: int) -> None:
    base = OBLIQUE @ np.diag([0.8, 0.9, 3.3, 1.0])
    space = (9, 8, 7)
    labels = np.random.default_rng(0).integers(0, 5, space, dtype=np.uint8)
    for number, turn in enumerate(orientations()):
        stored, affine = turned(texture(space), base, turn)
        codes = {"sform_code": number % 4 + 1, "qform_code": (number + 2) % 5}
        path = save_volume(tmp_path / "a.nii.gz", stored, affine, version, xyzt_units=(2, 10, 0)[number % 3], **codes)
        (path.parent / "l.nii.gz").unlink(missing_ok=True)
        scene = scan_one(path)
        there = scene.open_labels(save_volume(tmp_path / "l.nii.gz", turned(labels, base, turn)[0], affine)).read(scene.grid.full)
        assert np.array_equal(there, labels)
        scene.write_labels(tmp_path / "out.nii.gz", there.astype(np.uint8), 0)
        written, source = nib.load(tmp_path / "out.nii.gz"), nib.load(path)
        assert type(written) is type(source)
        assert written.get_data_dtype() == np.uint8
        assert np.array_equal(np.asarray(written.dataobj), turned(labels, base, turn)[0])
        assert np.abs(written.affine - source.affine).max() <= 1e-5
        for key in ("sform_code", "qform_code", "xyzt_units", "quatern_b", "quatern_c", "quatern_d", "qoffset_z"):
            assert np.array_equal(written.header[key], source.header[key]), key
        assert np.array_equal(written.header["pixdim"][:4], source.header["pixdim"][:4])


def test_a_big_endian_file_takes_its_labels_back(tmp_path: Path) -> None:
    values = texture((9, 8, 7))
    little = nib.load(save_volume(tmp_path / "a.nii", values, OBLIQUE))
    (tmp_path / "b.nii").write_bytes(little.header.as_byteswapped(">").binaryblock + bytes(4) + values.astype(">f4").tobytes("F"))
    scene = scan_one(tmp_path / "b.nii")
    labels = np.random.default_rng(0).integers(0, 5, (9, 8, 7), dtype=np.uint8)
    scene.write_labels(tmp_path / "out.nii.gz", labels, 0)
    written = nib.load(tmp_path / "out.nii.gz")
    assert np.array_equal(np.asarray(written.dataobj), scene.header.from_canonical(labels))
    assert np.abs(written.affine - nib.load(tmp_path / "b.nii").affine).max() <= 1e-5
    assert np.array_equal(scene.open_labels(tmp_path / "out.nii.gz").read(scene.grid.full), labels)
