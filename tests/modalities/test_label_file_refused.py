"""Vector files that are not read: several layers or attributes and none chosen, no CRS or a wrong one, other formats under a false name."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from modalities.label_file import LabelOptions, open_vector, read_layer
from modalities.scene import SceneError
from tests.synthetic_vectors import box, write_features

SQUARE = box(500_000, 4_999_900, 500_100, 5_000_000)


def reason(path: Path, **options: object) -> str:
    with pytest.raises(SceneError) as refused:
        open_vector(path, LabelOptions.model_validate(options))
    return " ".join(str(refused.value).split())


def test_one_layer_of_several_must_be_named(tmp_path: Path) -> None:
    path = tmp_path / "a.gpkg"
    for layer in ("fields", "towns"):
        write_features(path, [(SQUARE, {"class": 1})], layer=layer)
    assert reason(path).endswith("a.gpkg has 2 layers: fields, towns; say which by label_options.layer")
    assert "has layers with geometry ['fields', 'towns']; label_options.layer='roads' is none of them" in reason(path, layer="roads")
    assert open_vector(path, LabelOptions(layer="towns")).layer == "towns"


def test_one_attribute_of_several_must_be_named(tmp_path: Path) -> None:
    path = write_features(tmp_path / "a.geojson", [(SQUARE, {"class": 1, "name": "x"})])
    assert "has attributes class, name; say which holds the class by label_options.attribute" in reason(path)
    assert "label_options.attribute=crop is none of them" in reason(path, attribute="crop")
    assert "label_options.order=year is none of them" in reason(path, attribute="class", order="year")
    assert "gives attribute=class and value=1; give one of them" in reason(path, attribute="class", value=1)
    none = write_features(tmp_path / "b.geojson", [(SQUARE, {})])
    assert "has attributes none; give label_options.value=1 for one class" in reason(none)


def test_a_shapefile_without_prj_says_what_to_do(tmp_path: Path) -> None:
    path = write_features(tmp_path / "a.shp", [(SQUARE, {"class": 1})], None)
    assert "a.shp does not say its CRS (a Shapefile says it in a .prj beside it); add it, or give label_options.crs=EPSG:…" in reason(path)
    assert open_vector(path, LabelOptions(crs="EPSG:32633")).frame == "EPSG:32633"
    assert "the CRS EPSG:99 is not known" in reason(path, crs="EPSG:99")


def test_a_geojson_of_metres_that_claims_degrees_is_seen(tmp_path: Path) -> None:
    path = write_features(tmp_path / "a.geojson", [(SQUARE, {"class": 1})], None)
    assert "says its coordinates are degrees (EPSG:4326), but they run from 500000, 4.9999e+06 to 500100, 5e+06: another CRS" in reason(
        path
    )
    assert open_vector(path, LabelOptions(crs="EPSG:32633")).frame == "EPSG:32633"


VRT = "<OGRVRTDataSource><OGRVRTLayer name='a'><SrcDataSource>{}</SrcDataSource></OGRVRTLayer></OGRVRTDataSource>"


@pytest.mark.parametrize(
    ("name", "driver"), [("a.gpkg", "GPKG"), ("a.geojson", "GeoJSON"), ("a.json", "GeoJSON"), ("a.shp", "ESRI Shapefile")]
)
def test_a_virtual_file_under_another_name_is_never_followed(tmp_path: Path, name: str, driver: str) -> None:
    real = write_features(tmp_path / "real.gpkg", [(SQUARE, {"class": 1})])
    path = tmp_path / name
    path.write_text(VRT.format(real))
    assert f"begins with b'<OGRVRTDataS', not like a {driver} file; the labels cannot be used" in reason(path)


def test_json_that_is_no_geojson_is_refused(tmp_path: Path) -> None:
    real = write_features(tmp_path / "real.geojson", [(SQUARE, {"class": 1})])
    for number, content in enumerate(
        [
            {"type": "gdal_streamed_alg", "command_line": f"gdal vector pipeline ! read {real} ! write a.gpkg"},
            {"type": "Topology", "objects": {}, "arcs": []},
            {"stac_version": "1.0.0"},
        ]
    ):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(content))
        assert re.search(r"cannot be used", reason(path)), content
    path.write_text("{" + '"type": "FeatureCollection", "features": [')
    assert "cannot be used" in reason(path)


def test_a_name_that_pyogrio_takes_for_an_archive_is_refused(tmp_path: Path) -> None:
    path = write_features(tmp_path / "a.gpkg", [(SQUARE, {"class": 1})])
    odd = path.rename(tmp_path / "b.zip!a.gpkg")
    assert "is not a path of the file system, or has a ! in it; rename it" in reason(odd)


def test_a_file_too_large_or_with_too_many_features_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_features(tmp_path / "a.geojson", [(SQUARE, {"class": 1})] * 3)
    monkeypatch.setattr("modalities.label_file.MAX_FEATURES", 2)
    assert "holds 3 features, more than 2; cut it to the ground of the images" in reason(path)
    monkeypatch.setattr("modalities.label_file.MAX_BYTES", 100)
    assert "GiB, more than 0; cut it" in reason(path)


def test_a_file_that_changes_after_the_look_is_an_error(tmp_path: Path) -> None:
    path = write_features(tmp_path / "a.geojson", [(SQUARE, {"class": 1})])
    file = open_vector(path, LabelOptions())
    write_features(path, [(SQUARE, {"class": 12})])
    with pytest.raises(SceneError, match="has changed since it was looked at; start again"):
        read_layer(file)


def test_classes_that_are_no_numbers_or_texts_are_refused(tmp_path: Path) -> None:
    path = write_features(tmp_path / "a.geojson", [(SQUARE, {"class": "2020-01-01", "order": "x"})])
    with pytest.raises(SceneError, match=r"attribute class holds datetime64\[\w+\]; a class is a number or a text"):
        read_layer(open_vector(path, LabelOptions(attribute="class")))
    with pytest.raises(SceneError, match=r"label_options\.order=order holds object, not numbers; choose another attribute"):
        read_layer(open_vector(path, LabelOptions(value=1, order="order")))
