"""Polygons and points become class numbers on an image's grid: which pixels, which class, which feature on top, and what is refused."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.warp import transform

from modalities.grid import Grid
from modalities.label_file import LabelOptions, VectorLabels, number_texts, open_vector, open_vector_labels, summary
from modalities.label_raster import NoOverlapError
from modalities.scene import SceneError
from tests.synthetic_rasters import UTM
from tests.synthetic_vectors import ENDINGS, Feature, box, centres, inside, point, polygon, write_features

GRID = Grid.from_matrix((90, 70), np.array([[0, 10, 500_005], [-10, 0, 4_999_995], [0, 0, 1]]), UTM, "m")
"""Pixels of 10 m from (500 000, 5 000 000) to the south and east."""

CLASS = LabelOptions(attribute="class")


def east(metres: float) -> float:
    return 500_000 + metres


def north(metres: float) -> float:
    return 5_000_000 - metres


def labels_of(path: Path, options: LabelOptions = CLASS, grid: Grid = GRID) -> tuple[VectorLabels, str]:
    file = open_vector(path, options)
    return open_vector_labels(file, grid, "scene", options, number_texts([file], options))


def some_polygons(seed: int, count: int = 12) -> list[Feature]:
    """Stars with a hole each, over each other and over the edge of the image, of classes 1 to 5."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        x, y, size = rng.uniform(-50, 750), rng.uniform(-50, 950), rng.uniform(40, 300)
        turn = np.linspace(0, 2 * np.pi, 12, endpoint=False)
        reach = rng.uniform(0.4, 1, 12) * size
        star = np.stack([east(x) + reach * np.cos(turn), north(y) + reach * np.sin(turn)], axis=1)
        hole = star + 0.7 * ([east(x), north(y)] - star)
        found.append((polygon(star.tolist(), hole.tolist()), {"class": 1 + number % 5, "height": float(rng.permutation(count)[0])}))
    return found


def naive(features: list[Feature], xy: NDArray[np.float64], key: str = "class") -> NDArray[np.int64]:
    """Class of the last polygon that each place lies in; -1 for none."""
    out = np.full(xy.shape[1:], -1, np.int64)
    for geometry, properties in features:
        out[inside(geometry, xy)] = properties[key]
    return out


@pytest.mark.parametrize("ending", ENDINGS)
def test_pixels_take_the_class_of_the_last_polygon_that_their_centre_lies_in(tmp_path: Path, ending: str) -> None:
    features = some_polygons(0)
    labels, note = labels_of(write_features(tmp_path / f"fields{ending}", features))
    wanted = naive(features, centres(GRID))
    assert set(np.unique(wanted)) == {-1, 1, 2, 3, 4, 5}
    assert np.array_equal(labels.read(GRID.full), wanted)
    covers = np.stack([naive([feature], centres(GRID)) for feature in features])
    disputed = sum(len(set(column[column >= 0])) > 1 for column in covers.reshape(len(features), -1).T)
    assert note.startswith(f"{disputed} pixels lie under features of different classes; the later feature is on top")
    assert pickle.loads(pickle.dumps(labels)) == labels


def test_any_window_gives_the_numbers_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modalities.label_file.BLOCK", 32)
    labels, _ = labels_of(write_features(tmp_path / "fields.gpkg", some_polygons(1)))
    whole = labels.read(GRID.full)
    assert np.array_equal(whole, naive(some_polygons(1), centres(GRID)))
    rng = np.random.default_rng(0)
    for _ in range(25):
        (top, bottom), (left, right) = (sorted(rng.choice(size + 1, 2, replace=False)) for size in GRID.space)
        window = (slice(int(top), int(bottom)), slice(int(left), int(right)))
        assert np.array_equal(labels.read(window), whole[window])
    with pytest.raises(SceneError, match="leaves"):
        labels.read((slice(0, 91), slice(0, 1)))


def test_an_attribute_can_say_which_feature_lies_on_top(tmp_path: Path) -> None:
    features = some_polygons(2)
    path = write_features(tmp_path / "fields.gpkg", features)
    labels, note = labels_of(path, LabelOptions(attribute="class", order="height"))
    ordered = sorted(features, key=lambda feature: feature[1]["height"])
    assert [feature[1] for feature in ordered] != [feature[1] for feature in features]
    assert np.array_equal(labels.read(GRID.full), naive(ordered, centres(GRID)))
    assert "the higher height is on top" in note


def test_three_on_one_pixel_are_disputed_though_first_and_last_agree(tmp_path: Path) -> None:
    square = box(east(100), north(200), east(200), north(100))
    path = write_features(tmp_path / "a.geojson", [(square, {"class": number}) for number in (1, 2, 1)])
    assert labels_of(path)[1].startswith("100 pixels lie under")
    path = write_features(tmp_path / "b.geojson", [(square, {"class": 1})] * 2)
    assert labels_of(path)[1] == ""


def test_background_fills_what_no_feature_covers_and_features_without_class_stay_unlabelled(tmp_path: Path) -> None:
    left, right = box(east(0), north(900), east(100), north(0)), box(east(600), north(900), east(700), north(0))
    path = write_features(tmp_path / "a.gpkg", [(left, {"class": 3}), (right, {"class": None}), (right, {"class": None})])
    found = labels_of(path, LabelOptions(attribute="class", background=0))[0].read(GRID.full)
    assert np.array_equal(np.unique(found[:, :10]), [3])
    assert np.array_equal(np.unique(found[:, 10:60]), [0])
    assert np.array_equal(np.unique(found[:, 60:]), [-1])
    file = open_vector(path, CLASS)
    assert "3 features in EPSG:32633, class from attribute class; 2 have no class" in summary(file, CLASS, ())
    one = LabelOptions(value=7)
    assert set(np.unique(labels_of(path, one)[0].read(GRID.full))) == {-1, 7}


def test_all_touched_covers_every_pixel_that_a_polygon_touches(tmp_path: Path) -> None:
    path = write_features(tmp_path / "a.gpkg", [(box(east(108), north(132), east(122), north(108)), {"class": 1})])
    found = {touched: labels_of(path, LabelOptions(all_touched=touched))[0].read(GRID.full) == 1 for touched in (False, True)}
    assert np.argwhere(found[False]).tolist() == [[11, 11], [12, 11]]
    assert np.argwhere(found[True]).min(axis=0).tolist() == [10, 10]
    assert np.argwhere(found[True]).max(axis=0).tolist() == [13, 12]
    assert found[True].sum() == 12


# Texts


def test_texts_are_numbered_by_alphabet_whatever_the_order_of_features_and_files(tmp_path: Path) -> None:
    squares = [box(east(100 * i), north(100), east(100 * i + 100), north(0)) for i in range(4)]
    features = [(square, {"class": name}) for square, name in zip(squares, ("wheat", "barley", "oats", " barley "), strict=True)]
    one = open_vector(write_features(tmp_path / "a.gpkg", features), CLASS)
    other = open_vector(write_features(tmp_path / "b.geojson", [(squares[0], {"class": "apples"}), *features[::-1]]), CLASS)
    assert number_texts([one], CLASS) == (("barley", 1), ("oats", 2), ("wheat", 3))
    numbers = number_texts([one, other], CLASS)
    assert numbers == number_texts([other, one], CLASS) == (("apples", 1), ("barley", 2), ("oats", 3), ("wheat", 4))
    found = open_vector_labels(one, GRID, "scene", CLASS, numbers)[0].read(GRID.full)
    assert found[5, 5::10][:5].tolist() == [4, 2, 3, 2, -1]


def test_the_user_can_number_texts_and_what_he_leaves_out_is_no_label(tmp_path: Path) -> None:
    squares = [box(east(100 * i), north(100), east(100 * i + 100), north(0)) for i in range(3)]
    path = write_features(tmp_path / "a.gpkg", [(square, {"class": name}) for square, name in zip(squares, "abc", strict=True)])
    chosen = LabelOptions(attribute="class", numbers={"b": 7, "a": 2})
    assert labels_of(path, chosen)[0].read(GRID.full)[5, 5:35:10].tolist() == [2, 7, -1]
    with pytest.raises(SceneError, match=r"label_options\.numbers names x; the labels hold a, b, c"):
        labels_of(path, LabelOptions(attribute="class", numbers={"x": 1}))


def test_texts_that_are_numbers_are_these_numbers(tmp_path: Path) -> None:
    squares = [box(east(100 * i), north(100), east(100 * i + 100), north(0)) for i in range(2)]
    path = write_features(tmp_path / "a.geojson", [(square, {"class": name}) for square, name in zip(squares, ("10", "9"), strict=True)])
    assert labels_of(path)[0].read(GRID.full)[5, 5:25:10].tolist() == [10, 9]


# Points


def test_a_point_covers_the_pixel_that_it_lies_in(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    places = rng.uniform(0, [700, 900], (50, 2))
    path = write_features(tmp_path / "a.gpkg", [(point(east(x), north(y)), {"class": i}) for i, (x, y) in enumerate(places)])
    wanted = np.full(GRID.space, -1)
    for i, (x, y) in enumerate(places):
        wanted[int(y // 10), int(x // 10)] = i
    assert np.array_equal(labels_of(path)[0].read(GRID.full), wanted)


@pytest.mark.parametrize("crs", [UTM, "EPSG:4326"])
def test_a_radius_is_in_metres_also_where_the_image_is_in_degrees(tmp_path: Path, crs: str) -> None:
    grid, middle = GRID, (east(352.5), north(448.0))
    if crs != UTM:
        [x], [y] = transform(CRS.from_user_input(UTM), CRS.from_user_input(crs), [middle[0]], [middle[1]])[:2]
        grid = Grid.from_matrix((90, 70), np.array([[0, 1.3e-4, x - 35 * 1.3e-4], [-9e-5, 0, y + 45 * 9e-5], [0, 0, 1]]), crs, "degree")
    path = write_features(tmp_path / "a.gpkg", [(point(*middle), {"class": 4}), (point(middle[0] + 1e6, middle[1]), {"class": 5})])
    found = labels_of(path, LabelOptions(radius_m=200), grid)[0].read(grid.full)
    ground = centres(grid)
    if crs != UTM:
        flat = transform(CRS.from_user_input(crs), CRS.from_user_input(UTM), *(part.ravel().tolist() for part in ground))[:2]
        ground = np.array(flat).reshape(ground.shape)
    distance = np.hypot(ground[0] - middle[0], ground[1] - middle[1])
    assert (found[distance < 199] == 4).all()
    assert (found[distance > 201] == -1).all()
    outside = labels_of(write_features(tmp_path / "b.gpkg", [(point(east(-150), north(450)), {"class": 1})]), LabelOptions(radius_m=200))[0]
    assert 0 < (outside.read(GRID.full) == 1).sum() < 300, "a disc reaches into the image from a point outside of it"


def test_a_disc_smaller_than_a_pixel_is_not_lost(tmp_path: Path) -> None:
    path = write_features(tmp_path / "a.gpkg", [(point(east(9), north(9)), {"class": 4})])
    assert np.argwhere(labels_of(path, LabelOptions(radius_m=2))[0].read(GRID.full) == 4).tolist() == [[0, 0]]


# CRS


def test_edges_that_are_straight_in_degrees_are_bent_in_the_image(tmp_path: Path) -> None:
    """Edges of five degrees: corners alone would put the southern edge kilometres off."""
    shape = polygon([(12.5, 40.0), (17.5, 40.0), (17.5, 45.05), (12.5, 45.05)])
    assert not inside(shape, np.array([[15.0], [45.06]])).any()
    path = write_features(tmp_path / "a.gpkg", [(shape, {"class": 1})], "EPSG:4326")
    x, y = 500_005.0, 4_991_000.0
    grid = Grid.from_matrix((400, 90), np.array([[0, 10, x], [-10, 0, y], [0, 0, 1]]), UTM, "m")
    ground = centres(grid)
    flat = transform(CRS.from_user_input(UTM), CRS.from_user_input("EPSG:4326"), *(part.ravel().tolist() for part in ground))[:2]
    wanted = naive([(shape, {"class": 1})], np.array(flat).reshape(ground.shape))
    assert 0.2 < (wanted == 1).mean() < 0.8
    found = labels_of(path, CLASS, grid)[0].read(grid.full)
    assert (found != wanted).sum() <= 90, "one pixel along the edge at most"


def test_a_file_that_lies_elsewhere_touches_no_scene(tmp_path: Path) -> None:
    path = write_features(tmp_path / "a.gpkg", [(box(east(2000), north(100), east(2100), north(0)), {"class": 1})])
    with pytest.raises(NoOverlapError, match=r"no feature of .*a\.gpkg lies on scene \(CRS EPSG:32633, 90×70 pixels of 10 × 10\)"):
        labels_of(path)
    unplaced = Grid.from_matrix((9, 9), np.array([[0.0, 1, 0.5], [1, 0, 0.5], [0, 0, 1]]), "", "index")
    with pytest.raises(SceneError, match=r"scene has no CRS and affine, so nothing says where the features of .*a\.gpkg lie on it"):
        labels_of(path, CLASS, unplaced)


def test_what_cannot_be_drawn_is_counted(tmp_path: Path) -> None:
    good = box(east(0), north(100), east(100), north(0))
    flat = polygon([(east(0), north(0)), (east(9), north(0)), (east(5), north(0))])
    line = {"type": "LineString", "coordinates": [[east(0), north(0)], [east(9), north(9)]]}
    nothing: Any = None
    features = [(good, {"class": 1}), (nothing, {"class": 1}), (flat, {"class": 1}), (line, {"class": 1}), (line, {"class": 2})]
    path = write_features(tmp_path / "a.geojson", features)
    assert (labels_of(path)[0].read(GRID.full) == 1).sum() == 100
    told = summary(open_vector(path, CLASS), CLASS, ())
    assert told.endswith("4 of them left out: 1 a polygon without area, 1 empty, 2 neither polygon nor point")
