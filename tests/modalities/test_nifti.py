"""NIfTI scenes: where they lie, what they hold, how they behave."""

from __future__ import annotations

import gzip
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from modalities.medical import MriSettings
from modalities.quality import Quality
from modalities.scene import SceneError
from tests.synthetic_volumes import (
    NATIVE,
    OBLIQUE,
    REAL,
    SPACE,
    head,
    needs_real,
    orientations,
    save_volume,
    scan_one,
    split_scan,
    texture,
    turned,
    world,
)


@pytest.mark.parametrize("base", [np.diag([2.0, 1.5, 3.0, 1.0]), OBLIQUE], ids=["straight", "oblique"])
def test_all_48_orders_of_axes_give_the_same_scene_and_take_labels_back_exactly(tmp_path: Path, base: Any) -> None:
    values = texture(SPACE)
    labels = np.random.default_rng(1).integers(0, 4, SPACE, dtype=np.uint8)
    for number, turn in enumerate(orientations()):
        stored, affine = turned(values, base, turn)
        scene = scan_one(save_volume(tmp_path / f"{number}.nii.gz", stored, affine))
        pixels, _ = scene.read(scene.grid.full)
        assert np.array_equal(pixels[0], values)
        assert np.allclose(scene.grid.matrix, base, atol=1e-5)
        scene.write_labels(tmp_path / "out.nii.gz", labels, 0)
        written = nib.load(tmp_path / "out.nii.gz")
        assert np.array_equal(np.asarray(written.dataobj), turned(labels, base, turn)[0])
        assert np.array_equal(written.affine, nib.load(scene.files[0]).affine)


@pytest.mark.parametrize("wanted", [(1.0, 1.0, 1.0), (0.7, 2.0, 1.4), (2.0, 2.0, 2.9)])
@pytest.mark.parametrize("stored_as", ["RAS", "turned"])
def test_resampled_values_stay_where_they_are_in_the_world(tmp_path: Path, wanted: Any, stored_as: str) -> None:
    base = OBLIQUE @ np.diag([2.0, 1.5, 3.0, 1.0])
    space = (14, 12, 10)
    weights = np.array([1.7, -2.3, 0.9])
    values = (300 + np.einsum("i,i...->...", weights, world(space, base))).astype(np.float32)
    stored, affine = (values, base) if stored_as == "RAS" else turned(values, base, orientations()[37])
    scene = scan_one(save_volume(tmp_path / "world.nii.gz", stored, affine), MriSettings(spacing_mm=wanted))
    assert np.allclose(scene.grid.spacing, wanted, atol=1e-5)
    pixels, quality = scene.read(scene.grid.full)
    expected = 300 + np.einsum("i,i...->...", weights, world(scene.grid.space, scene.grid.matrix))
    assert np.abs(pixels[0] - expected).max() < 2e-2
    assert not quality.any()
    middle = [np.array(grid.world(tuple((n - 1) / 2 for n in grid.space))) for grid in (scene.grid, scene.header.canonical)]
    assert np.allclose(*middle, atol=1e-5)
    for size, has, now, mm in zip(space, (2.0, 1.5, 3.0), scene.grid.space, wanted, strict=True):
        assert now == np.floor((size - 1) * has / mm + 1e-6) + 1


def test_a_coarser_axis_is_smoothed_first(tmp_path: Path) -> None:
    values = np.where(np.arange(41) % 2, 100.0, 0.0).reshape(-1, 1, 1) + texture((41, 9, 9)) / 100
    scene = scan_one(save_volume(tmp_path / "stripes.nii.gz", values), MriSettings(spacing_mm=(4.0, 1.0, 1.0)))
    pixels, _ = scene.read(scene.grid.full)
    assert np.abs(pixels[0, 1:-1] - 50.75).max() < 5


def test_a_spacing_that_differs_by_less_than_a_micrometre_is_kept(tmp_path: Path) -> None:
    path = save_volume(tmp_path / "a.nii.gz", texture(SPACE), np.diag([1.0005, 0.9995, 1.0, 1.0]))
    scene = scan_one(path, MriSettings())
    assert scene.respacing.is_identity
    assert scene.grid.spacing == pytest.approx((1.0005, 0.9995, 1.0), abs=1e-6)
    assert (
        scan_one(save_volume(tmp_path / "b.nii.gz", texture(SPACE), np.diag([1.002, 1.0, 1.0, 1.0])), MriSettings()).respacing.step[0] != 1
    )


def test_metres_and_micrometres_become_millimetres(tmp_path: Path) -> None:
    for code, factor in ((1, 1000), (3, 0.001)):
        path = save_volume(tmp_path / f"{code}.nii.gz", texture(SPACE), np.diag([2 / factor, 2 / factor, 2 / factor, 1]), xyzt_units=code)
        assert scan_one(path).grid.spacing == pytest.approx((2, 2, 2), rel=1e-5)


def test_qform_is_used_without_sform(tmp_path: Path) -> None:
    path = save_volume(tmp_path / "q.nii.gz", texture(SPACE), OBLIQUE, sform_code=0, srow_x=[9, 9, 9, 9])
    assert np.allclose(scan_one(path).grid.matrix, OBLIQUE, atol=1e-5)


def test_a_sform_that_disagrees_with_the_qform_is_used_and_flagged(tmp_path: Path) -> None:
    scene = scan_one(save_volume(tmp_path / "s.nii.gz", texture(SPACE), srow_x=[1, 0, 0, 5]))
    assert scene.flags == ("sform_qform_disagree",)
    assert scene.grid.affine[0][3] == 5
    assert scan_one(save_volume(tmp_path / "t.nii.gz", texture(SPACE), srow_x=[1, 0, 0, 0.5])).flags == ()


@needs_real
def test_real_orientations_give_one_array() -> None:
    folder = REAL / "odd" / "nifti_orientations"
    scenes, rejected = split_scan(sorted(folder.rglob("*.nii.gz")), folder, NATIVE)
    assert (len(scenes), rejected) == (8, [])
    first = scenes[0].read(scenes[0].grid.full)
    for scene in scenes[1:]:
        assert np.allclose(scene.grid.matrix, scenes[0].grid.matrix, atol=1e-4)
        assert scene.channels == scenes[0].channels
        assert all(np.array_equal(a, b) for a, b in zip(scene.read(scene.grid.full), first, strict=True))


@pytest.mark.parametrize("dtype", ["u1", "i1", "<i2", ">i2", "<u2", ">u4", "<i4", "<i8", "<u8", "<f4", ">f4", "<f8", ">f8"])
def test_stored_values_keep_their_type_but_for_byte_order_and_doubles(tmp_path: Path, dtype: str) -> None:
    values = texture(SPACE).astype(dtype)
    path = save_volume(tmp_path / "a.nii.gz", values.astype(np.dtype(dtype).newbyteorder("=")))
    if np.dtype(dtype).byteorder == ">":
        header = nib.Nifti1Header(gzip.decompress(path.read_bytes())[:348]).as_byteswapped(">")
        path = tmp_path / "big.nii"
        path.write_bytes(header.binaryblock + bytes(4) + values.tobytes("F"))
    scene = scan_one(path)
    pixels, _ = scene.read(scene.grid.full)
    assert scene.dtype == pixels.dtype == (np.float32 if np.dtype(dtype).kind == "f" else np.dtype(dtype).newbyteorder("="))
    assert np.array_equal(pixels[0], values.astype(pixels.dtype))


@pytest.mark.parametrize(("slope", "inter", "sign"), [(np.nan, 5, 1), (0, 5, 1), (0.5, np.nan, 1), (1e-4, 1e6, 1), (-3, 10, -1)])
def test_scale_and_offset_give_the_z_score_of_physical_values_over_the_foreground(
    tmp_path: Path, slope: float, inter: float, sign: int
) -> None:
    values = (head() if sign > 0 else 200 - head()).astype(np.int16)
    scene = scan_one(save_volume(tmp_path / "a.nii.gz", values, scl_slope=slope, scl_inter=inter))
    assert 0.2 < scene.foreground_fraction < 0.35
    (channel,) = scene.channels
    pixels, quality = scene.read(scene.grid.full)
    assert pixels.dtype == np.int16
    body = pixels[0][quality == 0].astype(float) * sign
    low, high = np.percentile(body, (0.5, 99.5))
    core = body[(body >= low) & (body <= high)]
    score = pixels[0].astype(float) * channel.scale + channel.offset
    assert np.allclose(score, (pixels[0] * float(sign) - core.mean()) / core.std(), atol=1e-6)


def test_integers_stay_integers_when_resampled(tmp_path: Path) -> None:
    values = 2**24 + 5 * np.arange(36, dtype=np.int32).reshape(1, 6, 6) + np.arange(12, dtype=np.int32).reshape(-1, 1, 1)
    scene = scan_one(save_volume(tmp_path / "a.nii.gz", values, np.diag([4.0, 1, 1, 1])), MriSettings())
    pixels, _ = scene.read(scene.grid.full)
    assert pixels.dtype == np.int32
    assert np.array_equal(pixels[0, ::4], values)
    assert np.array_equal(pixels[0, 1::4], values[:-1])
    assert np.array_equal(pixels[0, 3::4], values[1:])


@pytest.mark.parametrize("spacing", [None, (0.5, 0.5, 0.5), (1.0, 2.0, 1.0)])
def test_what_is_not_finite_is_zero_and_flagged_and_does_not_spread(tmp_path: Path, spacing: Any) -> None:
    values = texture((10, 11, 12))
    values[4, 5, 6], values[0, 0, 0], values[7, 3:6, 3:6] = np.nan, np.inf, -np.inf
    scene = scan_one(save_volume(tmp_path / "a.nii.gz", values), MriSettings(spacing_mm=spacing))
    assert scene.flags == ("not_finite",)
    assert scene.num_not_finite == 11
    pixels, quality = scene.read(scene.grid.full)
    bad = quality == Quality.NOT_FINITE
    assert np.isfinite(pixels).all()
    assert (pixels[0][bad] == 0).all()
    assert pixels[0][~bad].min() > 49
    assert pixels[0][~bad].max() < 101
    assert bad.sum() == 11 if spacing is None else 0 < bad.mean() < 0.03


def test_a_double_beyond_float32_is_not_finite(tmp_path: Path) -> None:
    values = texture(SPACE).astype(np.float64)
    values[1, 2, 3] = 1e300
    assert scan_one(save_volume(tmp_path / "a.nii.gz", values)).num_not_finite == 1


def test_air_is_background_in_the_resampled_scene_too(tmp_path: Path) -> None:
    scene = scan_one(save_volume(tmp_path / "a.nii.gz", head(), np.diag([2.0, 2.0, 2.0, 1])), MriSettings())
    _, quality = scene.read(scene.grid.full)
    radius = np.sqrt(sum((axis - 23) ** 2 for axis in np.indices(scene.grid.space)))
    assert set(np.unique(quality)) == {0, Quality.BACKGROUND}
    assert (quality[radius < 17] == 0).all()
    assert (quality[radius > 21.5] == Quality.BACKGROUND).all()


def test_windows_are_parts_of_the_whole_and_leave_the_cache_alone(tmp_path: Path) -> None:
    scene = pickle.loads(pickle.dumps(scan_one(save_volume(tmp_path / "a.nii.gz", texture(SPACE), np.diag([2.0, 2, 2, 1])), MriSettings())))
    pixels, quality = (array.copy() for array in scene.read(scene.grid.full))
    window = (slice(2, 9), slice(0, 5), slice(4, 15))
    part, flags = scene.read(window)
    assert np.array_equal(part, pixels[(slice(None), *window)])
    assert np.array_equal(flags, quality[window])
    part[:], flags[:] = 0, 255
    assert np.array_equal(scene.read(window)[0], pixels[(slice(None), *window)])
    assert np.array_equal(scene.read(window)[1], quality[window])


@pytest.mark.parametrize(
    "window", [(slice(0, 3),) * 2, (slice(0, 10), slice(0, 3), slice(0, 3)), (slice(-1, 3),) * 3, (slice(2, 2),) * 3, (slice(None),) * 3]
)
def test_a_window_that_leaves_the_grid_is_an_error(tmp_path: Path, window: Any) -> None:
    with pytest.raises(SceneError, match=r"^scan-[0-9a-f]{16}: the window .* does not lie inside the grid of \(9, 7, 8\)"):
        scan_one(save_volume(tmp_path / "a.nii.gz", texture(SPACE))).read(window)


def test_many_threads_read_many_volumes_right(tmp_path: Path) -> None:
    volumes = [texture((6, 6, 6), seed) for seed in range(5)]
    scenes = [scan_one(save_volume(tmp_path / f"{i}.nii.gz", values)) for i, values in enumerate(volumes)]
    order = np.random.default_rng(0).integers(0, 5, 200).tolist()
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda i: scenes[i].read(scenes[i].grid.full)[0][0], order))
    assert all(np.array_equal(values, volumes[i]) for i, values in zip(order, read, strict=True))


def test_a_file_that_changes_or_goes_after_the_scan_is_noticed(tmp_path: Path) -> None:
    path = save_volume(tmp_path / "a.nii.gz", texture(SPACE))
    scene = scan_one(path)
    scene.read(scene.grid.full)
    save_volume(path, texture(SPACE, 1))
    os.utime(path, ns=(1, 1))
    assert np.array_equal(scene.read(scene.grid.full)[0][0], texture(SPACE, 1))
    save_volume(path, texture(SPACE), np.diag([2.0, 2, 2, 1]))
    with pytest.raises(SceneError, match=r"^scan-[0-9a-f]{16}: its header has changed since it was scanned; scan again$") as changed:
        scene.read(scene.grid.full)
    assert changed.value.code == "changed"
    path.unlink()
    with pytest.raises(SceneError, match=r"^scan-[0-9a-f]{16}: cannot be read: No such file or directory$") as gone:
        scene.read(scene.grid.full)
    assert gone.value.code == "unreadable"
    assert gone.value.__suppress_context__, "the cause names the file"


def test_nothing_of_file_name_or_header_text_leaves_the_scan(tmp_path: Path) -> None:
    folder = tmp_path / "Miller_Anna" / "sub-1967"
    path = save_volume(
        folder / "MILLER_T1w.nii.gz", head(), descrip=b"MILLER^ANNA", db_name=b"MILLER", aux_file=b"MILLER", intent_name=b"MILLER"
    )
    (scene,), _ = split_scan([path], tmp_path, NATIVE)
    scene.write_labels(folder / "out.nii.gz", np.ones(scene.grid.space, np.uint8), 0)
    told = repr(scene) + repr(scene.open_labels(folder / "out.nii.gz")) + str(gzip.decompress((folder / "out.nii.gz").read_bytes()))
    for secret in ("miller", "anna", "1967"):
        assert secret not in told.lower()
    assert bytes(nib.load(folder / "out.nii.gz").header["descrip"]).strip(b"\0") == b""
    assert scene.name.startswith("scan-")
    assert scene.group.startswith("subject-")
