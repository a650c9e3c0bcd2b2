from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.transform import Affine

from modalities.grid import Grid
from modalities.quality import Quality
from modalities.raster import assemble
from modalities.resample import AxisMap, align, bilinear
from tests.synthetic_rasters import (
    UTM,
    band_of,
    check_scene,
    north_up,
    world_values,
    write_raster,
    write_world,
)


@pytest.mark.parametrize("coarse", [20.0, 60.0])
@pytest.mark.parametrize("dtype", ["float32", "uint16"])
def test_a_coarse_band_is_brought_to_the_fine_grid_without_a_shift(tmp_path: Path, coarse: float, dtype: str) -> None:
    fine = write_world(tmp_path / "fine.tif", (48, 60), dtype=dtype)
    step = int(coarse / 10)
    rough = write_world(tmp_path / "rough.tif", (48 // step, 60 // step), coarse, dtype=dtype)
    scene, left = assemble("s", [band_of(rough, "rough"), band_of(fine, "fine")])
    check_scene(scene)
    assert not left
    pixels, quality = scene.read(scene.grid.full)
    assert not quality.any()
    wanted = world_values(north_up(), (48, 60))
    inner = (slice(step, -step), slice(step, -step))
    np.testing.assert_allclose(pixels[0][inner], wanted[inner], atol=1e-3 if dtype == "float32" else 1.01)
    half_a_pixel = 0.5 * (10 / 10 + 10 / 5)
    assert abs(float((pixels[0].astype(float) - wanted)[inner].mean())) < half_a_pixel / 10
    assert scene.reference.path == fine


@given(
    coarse=st.tuples(st.sampled_from([20.0, 60.0, 30.0, 12.5]), st.sampled_from([20.0, 60.0, 30.0, 12.5])),
    corner=st.tuples(st.floats(-100, 100), st.floats(-100, 100)),
    upward=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_a_plane_stays_the_same_plane_wherever_the_lattices_lie(
    coarse: tuple[float, float], corner: tuple[float, float], upward: bool
) -> None:
    target = Grid.from_matrix((48, 60), np.array([[0, 10, 5], [-10, 0, -5], [0, 0, 1.0]]), UTM, "m")
    down = coarse[0] if upward else -coarse[0]
    top = (-600.0 if upward else 0.0) + corner[1]
    matrix = np.array([[0, coarse[1], corner[0] + coarse[1] / 2], [down, 0, top + down / 2], [0, 0, 1.0]])
    source = Grid.from_matrix((60, 60), matrix, UTM, "m")

    def plane(grid: Grid) -> np.ndarray:
        rows, columns = np.mgrid[: grid.space[0], : grid.space[1]]
        x, y, _ = np.tensordot(grid.matrix, np.stack([rows, columns, np.ones_like(rows)]), 1)
        return np.asarray(3 * x - 7 * y + 11)

    rows, columns = align(target, source)
    whole = (slice(0, 48), slice(0, 60))
    part = (rows.needed(whole[0]), columns.needed(whole[1]))
    got, flags = bilinear(plane(source)[part], np.zeros((60, 60), np.uint8)[part], (rows, columns), whole)
    between = np.logical_and.outer(
        *[(axis.positions(p) >= 0) & (axis.positions(p) <= 59) for axis, p in zip((rows, columns), whole, strict=True)]
    )
    assert between.sum() > 500
    np.testing.assert_allclose(got[between], plane(target)[between], atol=1e-5)
    assert not flags[between].any()


@given(
    rows=st.tuples(st.integers(0, 46), st.integers(1, 47)),
    columns=st.tuples(st.integers(0, 58), st.integers(1, 59)),
    seed=st.integers(0, 5),
    step=st.sampled_from([2, 6]),
    shift=st.sampled_from([0.0, 5.0, -10.0, 3.7]),
    dtype=st.sampled_from(["uint16", "float32", "int32"]),
)
@settings(max_examples=60, deadline=None)
def test_any_window_of_the_sampler_gives_the_numbers_of_the_whole(
    rows: tuple[int, int], columns: tuple[int, int], seed: int, step: int, shift: float, dtype: str
) -> None:
    rng = np.random.default_rng(seed)
    target = Grid.from_matrix((48, 60), np.array([[0, 10, 5], [-10, 0, -5], [0, 0, 1.0]]), UTM, "m")
    corner = np.array([[0, 10.0 * step, 5.0 * step + shift], [-10.0 * step, 0, -5.0 * step], [0, 0, 1.0]])
    source = Grid.from_matrix((48 // step, 60 // step), corner, UTM, "m")
    values = rng.normal(3000, 1000, source.space).astype(dtype)
    flags = (rng.random(source.space) < 0.3).astype(np.uint8)
    row_axis, column_axis = align(target, source)
    axes = (row_axis, column_axis)

    def read(window: tuple[slice, slice]) -> tuple[np.ndarray, np.ndarray]:
        part = (row_axis.needed(window[0]), column_axis.needed(window[1]))
        return bilinear(values[part], flags[part], axes, window)

    window = (slice(min(rows), max(rows) + 1), slice(min(columns), max(columns) + 1))
    whole, whole_flags = read((slice(0, 48), slice(0, 60)))
    some, some_flags = read(window)
    np.testing.assert_array_equal(some, whole[window])
    np.testing.assert_array_equal(some_flags, whole_flags[window])
    assert some.dtype == values.dtype


@pytest.mark.parametrize("shift", [(0, 0), (3, 0), (0, -4), (-2, 5)])
@pytest.mark.parametrize("step", [1.0, -1.0])
def test_bands_that_coincide_are_cut_out_and_nothing_is_made_up_where_one_ends(shift: tuple[int, int], step: float) -> None:
    rng = np.random.default_rng(2)
    rows, columns = AxisMap(step, float(shift[0] + 11 * (step < 0)), 12), AxisMap(1.0, float(shift[1]), 18)
    values, flags = rng.integers(1, 9, (12, 18)), (rng.random((12, 18)) < 0.3).astype(np.uint8)
    for window in ((slice(0, 12), slice(0, 18)), (slice(4, 7), slice(6, 9)), (slice(0, 12), slice(6, 9))):
        part = rows.needed(window[0]), columns.needed(window[1])
        got, got_flags = bilinear(values[part], flags[part], (rows, columns), window)
        assert got.shape == got_flags.shape == tuple(one.stop - one.start for one in window)
        for i, row in enumerate(range(*window[0].indices(12))):
            for j, column in enumerate(range(*window[1].indices(18))):
                y, x = int(step) * row + int(rows.offset), column + shift[1]
                if 0 <= y < 12 and 0 <= x < 18:
                    assert (got[i, j], got_flags[i, j]) == (values[y, x], flags[y, x])
                else:
                    assert got_flags[i, j] == Quality.OUTSIDE
    assert not AxisMap(0.5, 0.0, 12).runs_beside(slice(0, 4))


def test_the_sampler_equals_a_loop_over_pixels() -> None:
    rng = np.random.default_rng(1)
    target = Grid.from_matrix((12, 18), np.array([[0, 10, 5], [-10, 0, -5], [0, 0, 1.0]]), UTM, "m")
    source = Grid.from_matrix((4, 6), np.array([[0, 30, 15], [-30, 0, -15], [0, 0, 1.0]]), UTM, "m")
    values = rng.normal(size=(4, 6))
    flags = (rng.random((4, 6)) < 0.3).astype(np.uint8)
    rows, columns = align(target, source)
    got, got_flags = bilinear(values, flags, (rows, columns), (slice(0, 12), slice(0, 18)))
    for i in range(12):
        for j in range(18):
            y, x = (i + 0.5) / 3 - 0.5, (j + 0.5) / 3 - 0.5
            near = min(max(round(y), 0), 3), min(max(round(x), 0), 5)
            assert got_flags[i, j] == flags[near]
            total = weights = 0.0
            for r in range(4):
                for c in range(6):
                    y_in, x_in = min(max(y, 0), 3), min(max(x, 0), 5)
                    weight = max(0, 1 - abs(y_in - r)) * max(0, 1 - abs(x_in - c)) * (flags[r, c] == 0)
                    total, weights = total + weight * values[r, c], weights + weight
            assert got[i, j] == pytest.approx(0 if flags[near] else total / weights, abs=1e-7)


@pytest.mark.parametrize("bad", [0, 60_000])
def test_nodata_never_bleeds(tmp_path: Path, bad: int) -> None:
    rough = np.full((1, 10, 10), 1000, np.uint16)
    rough[0, 4:7, 3] = bad
    fine = np.full((1, 20, 20), 500, np.uint16)
    paths = [
        write_raster(tmp_path / "fine.tif", fine, north_up(), nodata=bad),
        write_raster(tmp_path / "rough.tif", rough, north_up(20), nodata=bad),
    ]
    scene, _ = assemble("s", [band_of(path, path.stem) for path in paths])
    pixels, quality = scene.read(scene.grid.full)
    assert set(np.unique(pixels[1][quality == 0])) == {1000}
    np.testing.assert_array_equal(quality != 0, np.kron(rough[0] == bad, np.ones((2, 2), bool)))
    assert set(np.unique(quality)) == {0, Quality.NODATA}


def test_a_coarse_band_that_does_not_reach_is_outside(tmp_path: Path) -> None:
    fine, rough = write_world(tmp_path / "fine.tif", (20, 20)), write_world(tmp_path / "rough.tif", (10, 8), 20)
    scene, _ = assemble("s", [band_of(fine, "fine"), band_of(rough, "rough")])
    _, quality = scene.read(scene.grid.full)
    assert (quality[:, 16:] == Quality.OUTSIDE).all()
    assert not quality[:, :16].any()
    assert (scene.read((slice(0, 2), slice(17, 20)))[1] == Quality.OUTSIDE).all()


@pytest.mark.parametrize(
    ("affine", "crs", "space", "reason"),
    [
        (north_up(20), "EPSG:32634", (10, 10), "its CRS (EPSG:32634) is not that of the scene's other bands (EPSG:32633)"),
        (Affine(19, 6, 500_000, 6, -19, 5_000_000), UTM, (10, 10), "turned or sheared"),
        (north_up(20, 600_000), UTM, (10, 10), "does not overlap"),
        (Affine(100, 0, 500_000, 0, -2, 5_000_000), UTM, (100, 2), "smaller than those of the scene's finest band (5 × 0.1"),
    ],
)
def test_a_band_that_cannot_be_related_is_left_out_with_its_reason(
    tmp_path: Path, affine: Affine, crs: str, space: tuple[int, int], reason: str
) -> None:
    first, second = (write_world(tmp_path / f"{i}.tif", (20, 20)) for i in range(2))
    odd = write_world(tmp_path / "odd.tif", space, affine=affine, crs=crs)
    scene, left = assemble("s", [band_of(odd, "odd"), band_of(first, "a"), band_of(second, "b")])
    assert [band.channel.name for band, _ in left] == ["odd"]
    assert reason in left[0][1]
    assert [channel.name for channel in scene.channels] == ["a", "b"]


def test_bands_without_a_place_must_have_one_size(tmp_path: Path) -> None:
    paths = [write_raster(tmp_path / f"{n}.tif", np.ones((1, n, n), np.uint8), None, None) for n in (20, 10)]
    scene, left = assemble("s", [band_of(path, path.stem) for path in paths])
    assert "none has a georeference" in left[0][1]
    assert (scene.grid.frame, scene.grid.unit) == ("", "index")
