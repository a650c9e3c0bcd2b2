"""Labels of every kind find their scenes; names, colours, pixels and what was left out are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio.crs import CRS
from rasterio.features import shapes
from rasterio.warp import transform
from scipy.io import savemat

from modalities.catalogue import Catalogue, scan
from modalities.label_classes import read_sidecar
from modalities.label_file import LabelOptions
from modalities.labels import match_labels
from modalities.raster import RasterSettings
from modalities.scene import SceneError
from modalities.tile_file import corner_affine
from tests.synthetic_rasters import UTM, north_up, write_raster
from tests.synthetic_vectors import Feature, box, write_features

DATA = Path(__file__).parents[2].parent / "shared" / "data" / "satellite"
COVER = DATA / "aberystwyth_s2_landcover" / "sen2_20210527_aber_cls.tif"
SPACE = (16, 20)


def images(folder: Path, count: int = 3) -> Catalogue:
    """Images `place0`, `place1`, … of 16 × 20 pixels of 10 m, side by side from west to east."""
    for number in range(count):
        pixels = np.full((1, *SPACE), 100 + number, np.uint16)
        write_raster(folder / "images" / f"place{number}.tif", pixels, north_up(x=500_000 + 200 * number))
    return scan(folder / "images", RasterSettings())


def test_one_vector_file_serves_the_scenes_that_it_touches_and_the_others_are_told(tmp_path: Path) -> None:
    squares = [(box(500_000 + 200 * i, 4_999_900, 500_100 + 200 * i, 5_000_000), {"kind": "wood"}) for i in range(2)]
    path = write_features(tmp_path / "fields.gpkg", [*squares, (box(500_050, 4_999_900, 500_250, 5_000_000), {"kind": "lake"})])
    found = match_labels(images(tmp_path), path)
    assert [scene.name for scene, _ in found.pairs] == ["place0", "place1"]
    assert [(item.file, item.reason) for item in found.without] == [("place2.tif", "no label of fields.gpkg lies there")]
    assert found.pixels == {-1: 340, 1: 200, 2: 100}
    assert found.classes.names == {1: "lake", 2: "wood"}
    assert found.notes == [
        "fields.gpkg, layer fields: 3 features in EPSG:32633, class from attribute kind",
        "class numbers of the texts: 1 lake, 2 wood",
        "fields.gpkg for place0: 50 pixels lie under features of different classes; the later feature is on top (label_options.order)",
        "fields.gpkg for place1: 50 pixels lie under features of different classes; the later feature is on top (label_options.order)",
    ]
    far = write_features(tmp_path / "far.gpkg", [(box(600_000, 4_999_900, 600_100, 5_000_000), {"kind": "wood"})])
    with pytest.raises(SceneError, match=r"no feature of .*far\.gpkg lies on place"):
        match_labels(images(tmp_path), far)


def test_files_named_like_the_images_share_one_numbering(tmp_path: Path) -> None:
    for number, kind in enumerate(("wood", "lake", "wood")):
        west = 500_000 + 200 * number
        write_features(tmp_path / "labels" / f"place{number}.geojson", [(box(west, 4_999_900, west + 100, 5_000_000), {"kind": kind})])
    found = match_labels(images(tmp_path), tmp_path / "labels")
    assert [int(labels.read(scene.grid.full)[0, 0]) for scene, labels in found.pairs] == [2, 1, 2]


def test_reprojected_rasters_are_told_and_ignored_numbers_are_no_label(tmp_path: Path) -> None:
    values = np.kron(np.array([[[1, 255], [3, 4]]]), np.ones((1, 4, 15), int)).astype(np.uint8)
    path = write_raster(tmp_path / "cover.tif", values, north_up(20))
    found = match_labels(images(tmp_path), path, None, (255, 4))
    assert found.pixels == {-1: 480, 1: 240, 3: 240}
    assert [len(found.pairs), found.without] == [3, []]
    assert found.notes[0] == (
        "cover.tif for place0: reprojected with nearest neighbour from CRS EPSG:32633, 8×30 pixels of 20 × 20 "
        "to CRS EPSG:32633, 16×20 pixels of 10 × 10"
    )
    with pytest.raises(SceneError, match=r"give label_options\.reproject=true"):
        match_labels(images(tmp_path), path, LabelOptions(reproject=False))
    with pytest.raises(SceneError, match=r"label_options\.attribute is for vector files, and the labels are cover\.tif; leave it out"):
        match_labels(images(tmp_path), path, LabelOptions(attribute="kind"))


def test_a_raster_that_covers_some_of_the_scenes_serves_those(tmp_path: Path) -> None:
    path = write_raster(tmp_path / "cover.tif", np.ones((1, 16, 30), np.uint8), north_up())
    found = match_labels(images(tmp_path), path)
    assert [len(found.pairs), [item.file for item in found.without]] == [2, ["place2.tif"]]
    for name in ("place0", "place2"):
        write_raster(tmp_path / "named" / f"{name}.tif", np.ones((1, 16, 20), np.uint8), north_up())
    with pytest.raises(SceneError, match="covers no part of place2"):
        match_labels(images(tmp_path), tmp_path / "named")


# Names and colours

SIDECAR = """<PAMDataset><PAMRasterBand band="1">
<CategoryNames><Category>nothing</Category><Category>wood</Category><Category></Category></CategoryNames>
<GDALRasterAttributeTable>
<FieldDefn index="0"><Name>Value</Name><Type>0</Type><Usage>5</Usage></FieldDefn>
<FieldDefn index="1"><Name>Class</Name><Type>2</Type><Usage>2</Usage></FieldDefn>
<FieldDefn index="2"><Name>R</Name><Type>0</Type><Usage>6</Usage></FieldDefn>
<FieldDefn index="3"><Name>G</Name><Type>0</Type><Usage>7</Usage></FieldDefn>
<FieldDefn index="4"><Name>B</Name><Type>0</Type><Usage>8</Usage></FieldDefn>
<Row index="0"><F>4</F><F>lake</F><F>0</F><F>10</F><F>255</F></Row>
</GDALRasterAttributeTable></PAMRasterBand></PAMDataset>"""


def test_names_and_colours_come_from_the_colour_table_and_the_file_beside(tmp_path: Path) -> None:
    values = np.array([[[1, 4, 0, 9]]], np.uint8).repeat(16, 1).repeat(5, 2)
    path = write_raster(tmp_path / "cover.tif", values, north_up(), photometric="palette")
    with rasterio.open(path, "r+") as target:
        target.write_colormap(1, {1: (0, 120, 0, 255), 4: (9, 9, 9, 255), 200: (1, 2, 3, 255)})
    path.with_name("cover.tif.aux.xml").write_text(SIDECAR)
    found = match_labels(images(tmp_path, 1), path).classes
    assert found.names == {0: "nothing", 1: "wood", 4: "lake"}
    assert (found.colours[1], found.colours[4]) == ((0, 120, 0), (0, 10, 255))
    assert set(found.colours) == {0, 1, 4, 9}


def test_gdal_itself_writes_such_a_file(tmp_path: Path) -> None:
    """What GDAL leaves beside a raster of a driver without colour tables of its own."""
    path = tmp_path / "map.bmp"
    with rasterio.open(path, "w", driver="ENVI", width=2, height=2, count=1, dtype="uint8", crs=UTM, transform=north_up()) as target:
        target.write(np.ones((1, 2, 2), np.uint8))
        target.update_tags(1, note="x")
    assert read_sidecar(path.with_name("map.bmp.aux.xml")).names == {}


@pytest.mark.parametrize(
    "text", ["<PAMDataset>", SIDECAR.replace("<F>255</F>", "<F>256</F>"), '<!DOCTYPE a [<!ENTITY b "c">]><PAMDataset>&b;</PAMDataset>']
)
def test_a_damaged_or_malicious_file_beside_is_an_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "cover.tif.aux.xml"
    path.write_text(text)
    with pytest.raises(
        SceneError, match=r"cover\.tif\.aux\.xml is no table of classes that can be read .*; move it away, or write it anew"
    ):
        read_sidecar(path)


def test_files_that_call_a_class_differently_are_refused(tmp_path: Path) -> None:
    for number in range(2):
        path = write_raster(tmp_path / "labels" / f"place{number}.tif", np.ones((1, *SPACE), np.uint8), north_up(x=500_000 + 200 * number))
        path.with_name(path.name + ".aux.xml").write_text(SIDECAR.replace("wood", f"wood{number}"))
    with pytest.raises(SceneError, match=r"class 1 is called wood0 in place0\.tif and wood1 in place1\.tif; make them agree"):
        match_labels(images(tmp_path, 2), tmp_path / "labels")


# MATLAB


def test_a_matrix_of_the_very_size_is_laid_onto_the_image(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 5, SPACE, dtype=np.int32)
    path = tmp_path / "truth.mat"
    savemat(path, {"gt": values, "turned": values.T, "text": "abc"}, do_compression=True)
    found = match_labels(images(tmp_path, 1), path)
    [(scene, labels)] = found.pairs
    assert np.array_equal(labels.read(scene.grid.full), values)
    assert np.array_equal(labels.read((slice(3, 9), slice(4, 20))), values[3:9, 4:20])
    assert found.notes == ["truth.mat for place0: variable gt has no place of its own and was laid onto the image, which has the same size"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"gt": np.ones((20, 16))},
            r"holds gt double 20×16; for place0 one matrix of 16×20 numbers is wanted: a matrix without a place must",
        ),
        ({"a": np.ones(SPACE), "b": np.ones(SPACE)}, r"wanted: say which by label_options\.layer"),
        ({"gt": np.full(SPACE, 0.5)}, r"holds numbers that are not whole, such as 0\.5"),
        ({"gt": np.full(SPACE, 1j)}, r"labels are whole numbers"),
        (None, "cannot be read as a MATLAB file"),
    ],
)
def test_other_matlab_files_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "truth.mat"
    if content is None:
        path.write_bytes(b"no matrix" * 50)
    else:
        savemat(path, content)
    with pytest.raises(SceneError, match=message):
        match_labels(images(tmp_path, 1), path)


# Real files


@pytest.mark.skipif(not COVER.is_file(), reason="no ../shared/data")
def test_the_real_ground_truth_of_the_sundarbans_lies_as_its_image_lies() -> None:
    folder = DATA / "sundarbans_s2" / "sundarbans_data"
    catalogue = scan(next(folder.glob("*_B08_*")), RasterSettings())
    [(scene, labels)] = match_labels(catalogue, folder / "Sundarbands_gt.mat").pairs
    classes, bright = labels.read(scene.grid.full), scene.read(scene.grid.full)[0][0].astype(np.float64)

    def told(given: Any) -> float:
        within = sum(bright[given == value].var() * (given == value).mean() for value in range(6))
        return float(1 - within / bright.var())

    assert told(classes) > 0.85
    assert max(told(classes[::-1]), told(classes[:, ::-1]), told(classes[::-1, ::-1])) < 0.2


def carried(features: list[Feature], source: str, target: str) -> list[Feature]:
    """Features of polygons in another CRS, corner by corner."""
    rings = [ring for geometry, _ in features for ring in geometry["coordinates"]]
    x, y = np.concatenate([np.array(ring) for ring in rings]).T.tolist()
    moved = np.stack(transform(CRS.from_user_input(source), CRS.from_user_input(target), x, y)[:2], axis=1)
    parts = iter(np.split(moved, np.cumsum([len(ring) for ring in rings])[:-1]))
    return [({"type": "Polygon", "coordinates": [next(parts).tolist() for _ in shape["coordinates"]]}, own) for shape, own in features]


@pytest.mark.skipif(not COVER.is_file(), reason="no ../shared/data")
@pytest.mark.parametrize(
    ("ending", "crs"), [(".gpkg", "EPSG:27700"), (".geojson", "EPSG:27700"), (".shp", "EPSG:27700"), (".gpkg", "EPSG:4326")]
)
def test_polygons_of_the_real_land_cover_give_its_pixels_back(tmp_path: Path, ending: str, crs: str) -> None:
    catalogue = scan(next(COVER.parent.rglob("*tile5.tif")), RasterSettings())
    [(scene, raster)] = match_labels(catalogue, COVER).pairs
    wanted = raster.read(scene.grid.full)
    assert np.unique(wanted).tolist() == [1, 2, 3, 4]
    traced = [(shape, {"class": int(value)}) for shape, value in shapes(wanted.astype(np.int16), None, 4, corner_affine(scene.grid))]
    features = traced if crs == "EPSG:27700" else carried(traced, "EPSG:27700", crs)
    [(_, labels)] = match_labels(catalogue, write_features(tmp_path / f"cover{ending}", features, crs)).pairs
    agree = (labels.read(scene.grid.full) == wanted).mean()
    assert agree == 1 if crs == "EPSG:27700" else agree > 0.9999
