"""Where lattices lie on the globe: against places that are known, and against PROJ's own geocentric coordinates."""

from __future__ import annotations

import numpy as np
import pytest
from rasterio.warp import transform

from modalities.grid import Grid
from modalities.ground import centres, footprints, from_earth_centre, metres_apart, on_globe


def test_corners_go_round_and_the_middle_is_the_middle() -> None:
    affine = [0, 10.0, 500_005, -10.0, 0, 4_999_995, 0, 0, 1]  # row down, column right
    found = footprints(["EPSG:32633"], [affine], [[20, 40]])
    east, north = transform(
        "EPSG:32633", "EPSG:4326", [500_000, 500_400, 500_400, 500_000, 500_200], [5e6, 5e6, 4_999_800, 4_999_800, 4_999_900]
    )
    np.testing.assert_allclose(found.longitude[0], east, atol=1e-8)
    np.testing.assert_allclose(found.latitude[0], north, atol=1e-8)
    sides = np.linalg.norm(np.diff(found.corners[0], axis=0), axis=1)
    np.testing.assert_allclose(sides, [400, 200, 400], rtol=5e-4, err_msg="the scale of UTM on its central meridian is 0.9996")
    assert found.voxel_m == pytest.approx([10], rel=5e-4)
    np.testing.assert_allclose(centres(["EPSG:32633"], [affine], [[20, 40]]), [[north[4]], [east[4]]], atol=1e-8)


def test_a_series_lies_where_its_dates_do() -> None:
    image = [0, 10.0, 500_005, -10.0, 0, 4_999_995, 0, 0, 1]
    series = [5.0, 0, 0, 0, 0, 0, 10.0, 500_005, 0, -10.0, 0, 4_999_995, 0, 0, 0, 1]
    np.testing.assert_array_equal(
        footprints(["EPSG:32633"], [series], [[7, 20, 40]]).corners, footprints(["EPSG:32633"], [image], [[20, 40]]).corners
    )


def test_points_on_the_ellipsoid_are_those_of_proj() -> None:
    rng = np.random.default_rng(0)
    latitude, longitude = rng.uniform(-90, 90, 50), rng.uniform(-180, 180, 50)
    known = transform("EPSG:4326", "EPSG:4978", longitude.tolist(), latitude.tolist(), [0.0] * 50)
    np.testing.assert_allclose(from_earth_centre(latitude, longitude), np.stack(known, axis=1), atol=1e-3)


@pytest.mark.parametrize("frame", ["", "RAS+", "EPSG:0", 'LOCAL_CS["a room",UNIT["metre",1]]'])
def test_what_has_no_place_has_none(frame: str) -> None:
    assert np.isnan(on_globe(frame, [1.0], [2.0])).all()
    assert not footprints([frame], [np.eye(3).ravel()], [[3, 3]]).placed.any()


def test_frames_are_mixed_and_rows_stay_in_place() -> None:
    frames = ["EPSG:4326", "", "EPSG:32633", "EPSG:4326"]
    affines = [
        [0, 1e-4, 10, -1e-4, 0, 50, 0, 0, 1],
        np.eye(3).ravel(),
        [0, 10, 5e5, -10, 0, 5e6, 0, 0, 1],
        [0, 1e-4, 190, -1e-4, 0, -50, 0, 0, 1],
    ]
    latitude, longitude = centres(frames, affines, [[3, 3]] * 4)
    np.testing.assert_allclose(longitude, [10.0001, np.nan, 15.0001, -169.9999], atol=1e-4)
    np.testing.assert_allclose(latitude[[0, 3]], [49.9999, -50.0001], atol=1e-9)
    assert footprints(frames, affines, [[3, 3]] * 4).placed.tolist() == [True, False, True, True]


def test_a_tile_as_wide_as_a_continent_is_no_place() -> None:
    world = [0, 1.0, -179.5, -1.0, 0, 89.5, 0, 0, 1]
    assert not footprints(["EPSG:4326"], [world], [[180, 360]]).placed.any()
    assert footprints(["EPSG:4326"], [world], [[10, 10]]).placed.all(), "though it touches the pole"


def test_steps_in_degrees_become_metres_at_their_latitude() -> None:
    matrix = np.array([[0, 0.001, 15.0], [-0.001, 0, 60.0], [0, 0, 1]])
    rows, columns = metres_apart(Grid.from_matrix((10, 10), matrix, "EPSG:4326", "degree"))
    assert rows == pytest.approx(111.41, rel=1e-3)
    assert columns == pytest.approx(55.80, rel=1e-3)
    assert metres_apart(Grid.from_matrix((10, 10), matrix, "", "m")) == pytest.approx((0.001, 0.001))
