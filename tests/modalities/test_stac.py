from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modalities.catalogue import Catalogue, scan
from modalities.scene import SceneError
from modalities.sentinel2 import Sentinel2Settings
from modalities.sentinel2_bands import BANDS
from modalities.stac import read_json
from tests.synthetic_products import reflectance
from tests.synthetic_rasters import check_scene, north_up, write_raster

COMMON = {"B02": "blue", "B03": "green", "B04": "red", "B08": "nir", "B8A": "nir08", "B11": "swir16", "B12": "swir22"}
EXPECTED = Path(__file__).parents[2].parent / "shared" / "data" / "satellite" / "safe_metadata"


def found_in(folder: Path, **chosen: object) -> Catalogue:
    return scan(folder, Sentinel2Settings.model_validate(chosen))


def write_bands(folder: Path, added: int = 0) -> None:
    for band in COMMON:
        step = BANDS[band].resolution_m
        numbers = np.rint(reflectance(band, "L2A") * 1e4 + added).astype(np.uint16)
        write_raster(folder / f"{band}.tif", numbers[None], north_up(step), tiled=True, blockxsize=16, blockysize=16)


def item(href: str = "./{}.tif", scaling: dict[str, float] | None = None, **properties: Any) -> dict[str, Any]:
    """An item with assets under common names, as the large catalogues write them."""
    raster = [{"data_type": "uint16", "nodata": 0, **(scaling or {})}]
    assets: dict[str, Any] = {
        name: {"href": href.format(band), "eo:bands": [{"name": band, "common_name": name}], "raster:bands": raster, "roles": ["data"]}
        for band, name in COMMON.items()
    }
    assets["visual"] = {"href": "TCI.tif", "roles": ["visual"], "eo:bands": [{"name": "red"}, {"name": "green"}, {"name": "blue"}]}
    assets["scl"] = {"href": "SCL.tif", "roles": ["data"]}
    return {
        "type": "Feature",
        "stac_version": "1.0.0",
        "id": "S2B_33UXP_20250302_0_L2A",
        "collection": "sentinel-2-l2a",
        "properties": {
            "datetime": "2025-03-02T10:53:49.024000+01:00",
            "platform": "sentinel-2b",
            "s2:processing_baseline": "05.11",
            **properties,
        },
        "assets": assets,
    }


def write_item(path: Path, content: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_an_item_names_bands_level_time_scale_and_classes(tmp_path: Path) -> None:
    write_bands(tmp_path / "images", 1000)
    classes = np.full((1, 96, 96), 4, np.uint8)
    classes[0, 0] = 3
    write_raster(tmp_path / "SCL.tif", classes, north_up(20))
    path = write_item(tmp_path / "item.json", item("./images/{}.tif", {"scale": 1e-4, "offset": -0.1}))
    found = found_in(tmp_path)
    (scene,) = found.scenes
    assert (scene.name, scene.times) == ("item", ("2025-03-02T09:53:49Z",))
    assert [channel.name for channel in scene.channels] == list(COMMON)
    assert {(c.unit, c.level, c.scale, c.offset) for c in scene.channels} == {("reflectance", "L2A", 1e-4, -0.1)}
    assert path in scene.files
    assert (found.num_files, found.num_used, found.rejected, found.ignored) == (9, 9, (), ())
    pixels, quality = scene.read(scene.grid.full)
    assert (quality[:2] > 0).all()
    np.testing.assert_allclose(pixels[0] * 1e-4 - 0.1, reflectance("B02", "L2A"), atol=0.51e-4)
    check_scene(scene)


@pytest.mark.parametrize("form", ["raster:bands", "bands", "asset"])
def test_scale_and_offset_in_the_forms_of_all_versions(tmp_path: Path, form: str) -> None:
    content = item()
    for asset in content["assets"].values():
        bands = asset.pop("eo:bands", [])
        entry: dict[str, Any] = {"raster:scale": 1e-4, "raster:offset": -0.1} if form != "raster:bands" else {}
        asset["raster:bands"] = [{"scale": 1e-4, "offset": -0.1}] if form == "raster:bands" else []
        asset["bands"] = [{**band, **(entry if form == "bands" else {})} for band in bands]
        asset.update(entry if form == "asset" else {})
    write_bands(tmp_path, 1000)
    write_item(tmp_path / "item.json", content)
    assert {(c.scale, c.offset) for c in found_in(tmp_path).scenes[0].channels} == {(1e-4, -0.1)}


@pytest.mark.parametrize("stored", [0, 1000])
@pytest.mark.parametrize("applied", [None, False, True])
def test_the_catalogues_flags_are_held_against_the_pixels(tmp_path: Path, stored: int, applied: bool | None) -> None:
    """`raster:bands` says -0.1 either way, as a large catalogue's items do; the flag outranks it, the pixels outrank both."""
    write_bands(tmp_path, stored)
    flags = {} if applied is None else {"earthsearch:boa_offset_applied": applied}
    write_item(tmp_path / "item.json", item(scaling={"scale": 1e-4, "offset": -0.1}, **flags))
    if (stored == 0) == bool(applied):
        assert {c.offset for c in found_in(tmp_path).scenes[0].channels} == {-stored / 1e4}
        return
    with pytest.raises(SceneError) as caught:
        found_in(tmp_path)
    words = "carry +1000" if stored else "carry no +1000"
    assert f"its numbers {words}, as its darkest pixels show, but item.json says that there is{' none' if applied else ''};" in str(
        caught.value
    )
    found = found_in(tmp_path, layouts=[{"match": "*", "offset": -stored / 1e4}])
    assert {c.offset for c in found.scenes[0].channels} == {-stored / 1e4}


def test_an_item_that_gives_no_scale_leaves_it_to_pixels_and_settings(tmp_path: Path) -> None:
    write_bands(tmp_path, 1000)
    write_item(tmp_path / "item.json", item())
    with pytest.raises(
        SceneError, match=r"its numbers carry \+1000, as its pixels show .* say reader\.offset=-0\.1, or reader\.harmonize=true"
    ):
        found_in(tmp_path)
    assert {c.offset for c in found_in(tmp_path, harmonize=True).scenes[0].channels} == {-0.1}
    assert {c.offset for c in found_in(tmp_path, offset=-0.1).scenes[0].channels} == {-0.1}


def test_remote_and_absolute_addresses_are_never_opened(tmp_path: Path) -> None:
    for href in (
        "https://host.invalid/a/{}.tif?sig=x",
        "s3://bucket/a/{}.tif",
        "/elsewhere/{}.tif",
        "/vsicurl/https://host.invalid/{}.tif",
    ):
        path = write_item(tmp_path / "a" / "item.json", item(href))
        with pytest.raises(SceneError) as caught:
            found_in(tmp_path)
        first = href.format("B02")
        assert f"none of its bands is a file of this folder (8 elsewhere, such as {first}); fetch them beside it, nothing remote" in str(
            caught.value
        )
        write_bands(tmp_path / "a")
        assert found_in(tmp_path).scenes[0].files[0] == tmp_path / "a" / "B02.tif"
        for file in tmp_path.rglob("*.tif"):
            file.unlink()
        path.unlink()


def test_an_item_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    write_bands(tmp_path / "outside")
    write_item(tmp_path / "in" / "item.json", item("../outside/{}.tif"))
    with pytest.raises(
        SceneError, match=r"its asset \.\./outside/B02\.tif lies outside the scanned folder; put it inside, or scan the folder above"
    ):
        found_in(tmp_path / "in")
    assert [scene.name for scene in found_in(tmp_path).scenes] == ["in/item"]


def test_json_of_others_is_ignored_and_wrong_items_are_rejected(tmp_path: Path) -> None:
    write_bands(tmp_path / "S2_L2A")
    deep = "[" * 100_000
    for name, text in (
        ("list.json", "[1, 2]"),
        ("broken.json", "{"),
        ("deep.json", deep),
        ("landsat.json", json.dumps(item(platform="landsat-8") | {"collection": "landsat-c2-l2", "id": "LC08"})),
        ("hls.json", json.dumps(item() | {"collection": "HLSS30.v2.0", "id": "HLS.S30"})),
        ("odd.json", json.dumps(item("S2_L2A/{}.tif", {"scale": -1}))),
    ):
        (tmp_path / name).write_text(text)
    found = found_in(tmp_path)
    assert [scene.name for scene in found.scenes] == ["S2_L2A"]
    assert set(found.ignored) == {"list.json", "broken.json", "landsat.json", "hls.json"}
    assert {item.file: item.reason for item in found.rejected} == {
        "deep.json": "it is nested deeper than any STAC item",
        "odd.json": "it gives scale -1 and offset None for S2_L2A/B02.tif, which are no numbers to reckon with",
    }


def test_a_real_item_that_another_tool_made_of_a_product(tmp_path: Path) -> None:
    source = EXPECTED / "S2B_MSIL2A_20220413T150759_N0400_R025_T33XWJ_20220414T082126.SAFE" / "expected_output.json"
    if not source.is_file():
        pytest.skip(f"the real item is not at {source}")
    assets = read_json(source)["assets"]
    for band, name in COMMON.items():
        numbers = np.rint(reflectance(band, "L2A") * 1e4 + 1000).astype(np.uint16)
        write_raster(tmp_path / assets[name]["href"], numbers[None], north_up(BANDS[band].resolution_m))
    (tmp_path / "item.json").write_bytes(source.read_bytes())
    (scene,) = found_in(tmp_path).scenes
    assert scene.times == ("2022-04-13T15:07:59Z",)
    assert [channel.name for channel in scene.channels] == list(COMMON)
    assert {(c.level, c.scale, c.offset) for c in scene.channels} == {("L2A", 1e-4, -0.1)}


def test_earth_engines_properties_tell_level_and_time_but_nothing_of_the_offset(tmp_path: Path) -> None:
    write_bands(tmp_path / "20220604T054639_20220604T054831_T43RCP", 1000)
    properties = {"PRODUCT_ID": "S2B_MSIL2A_20220604T054639_N0400_R048_T43RCP_20220604T094332", "PROCESSING_BASELINE": "04.00"}
    write_item(tmp_path / "20220604T054639_20220604T054831_T43RCP" / "metadata.json", properties)
    with pytest.raises(SceneError, match=r"its numbers carry \+1000, as its pixels show"):
        found_in(tmp_path)
    (scene,) = found_in(tmp_path, offset=-0.1).scenes
    assert (scene.times, scene.channels[0].level) == (("2022-06-04T05:46:39Z",), "L2A")
    assert any(file.name == "metadata.json" for file in scene.files)


def test_an_item_by_itself_is_scanned_with_its_own_files_and_no_others(tmp_path: Path) -> None:
    write_bands(tmp_path / "a" / "bands")
    write_bands(tmp_path / "a" / "others")
    path = write_item(tmp_path / "a" / "item.json", item("./bands/{}.tif", {"scale": 1e-4, "offset": 0}))
    found = found_in(path)
    assert (found.num_files, found.num_used, found.ignored) == (len(COMMON) + 1, len(COMMON) + 1, ())
    assert [scene.name for scene in found.scenes] == ["item"]
    path.write_text(json.dumps(item("../bands/{}.tif")))
    with pytest.raises(SceneError, match=r"1 files found, 1 rejected[^$]*lies outside the scanned folder"):
        found_in(path)


def test_earth_engines_properties_are_of_the_image_of_their_name_where_there_are_several(tmp_path: Path) -> None:
    days = {"one": ("20220604T054639", "2022-06-04T05:46:39Z"), "two": ("20210101T054639", "2021-01-01T05:46:39Z")}
    for name, (day, _) in days.items():
        stack = np.stack([np.rint(np.repeat(np.repeat(reflectance(band, "L2A"), 2, 0), 2, 1) * 1e4) for band in ("B05", "B06", "B11")])
        write_raster(tmp_path / f"{name}.tif", stack.astype(np.uint16), north_up(), names=("B05", "B06", "B11"))
        write_item(tmp_path / f"{name}.json", {"PRODUCT_ID": f"S2B_MSIL2A_{day}_N0214_R048_T43RCP_{day}"})
    found = found_in(tmp_path)
    assert {scene.name: (scene.times, scene.channels[0].level) for scene in found.scenes} == {
        name: ((time,), "L2A") for name, (_, time) in days.items()
    }
    write_raster(tmp_path / "three.tif", stack.astype(np.uint16), north_up(), names=("B05", "B06", "B11"))
    (third,) = (scene for scene in found_in(tmp_path).scenes if scene.name == "three")
    assert (third.times, third.channels[0].level) == ((), ""), "which of the two it would be, nobody knows"


@pytest.mark.parametrize("roles", [[{"a": 1}], 5, {"data": 1}, [["data"]]])
def test_odd_roles_of_an_asset_are_no_roles(tmp_path: Path, roles: Any) -> None:
    write_bands(tmp_path)
    content = item("{}.tif")
    content["assets"]["red"]["roles"] = roles
    write_item(tmp_path / "item.json", content)
    (scene,) = found_in(tmp_path).scenes
    assert "B04" in [channel.name for channel in scene.channels]


def test_a_time_before_all_times_is_none(tmp_path: Path) -> None:
    write_bands(tmp_path)
    write_item(tmp_path / "item.json", item("{}.tif", datetime="0001-01-01T00:00:00+05:00"))
    (scene,) = found_in(tmp_path).scenes
    assert scene.times == ()
