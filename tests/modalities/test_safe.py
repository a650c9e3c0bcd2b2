from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from modalities.catalogue import Catalogue, scan
from modalities.quality import Quality
from modalities.safe import BAND_IDS, parse_metadata
from modalities.scene import SceneError
from modalities.sentinel2 import Sentinel2Settings
from modalities.sentinel2_bands import BANDS
from tests.synthetic_products import SIZE, metadata, offsets_of, reflectance, write_safe, zipped
from tests.synthetic_rasters import check_scene

REAL = Path(__file__).parents[2].parent / "shared" / "data" / "satellite" / "safe_metadata"
XML = Path("MTD_MSIL1C.xml")
EVERY = tuple(BANDS)


def found_in(folder: Path, **chosen: object) -> Catalogue:
    return scan(folder, Sentinel2Settings.model_validate(chosen))


def physical(catalogue: Catalogue, place: int = 0) -> dict[str, np.ndarray]:
    scene = catalogue.scenes[place]
    pixels, _ = scene.read(scene.grid.full)
    return {c.name: p * c.scale + c.offset for c, p in zip(scene.channels, pixels, strict=True)}


@pytest.mark.parametrize(("level", "added"), [("L1C", 0), ("L1C", 1000), ("L2A", 0), ("L2A", 1000)])
def test_a_product_is_one_scene_of_reflectance_by_its_own_metadata(tmp_path: Path, level: str, added: int) -> None:
    write_safe(tmp_path, level, added=added)
    found = found_in(tmp_path, channels=EVERY, scene_classes={"use": False})
    (scene,) = found.scenes
    assert scene.name == f"S2A_MSI{level}_{'20200717T221941' if level == 'L1C' else '20220413T150759'}_N0209_R029_T33XWJ_20200717T234135"
    assert scene.times == ("2020-07-17T22:19:41Z" if level == "L1C" else "2022-04-13T15:07:59Z",)
    assert [channel.name for channel in scene.channels] == [name for name in BANDS if level == "L1C" or name != "B10"]
    assert {(c.unit, c.level, c.scale, c.offset) for c in scene.channels} == {("reflectance", level, 1e-4, -added / 1e4)}
    assert scene.grid.space == (SIZE, SIZE)
    assert found.rejected == ()
    assert next(file for file in scene.files if file.suffix == ".xml").name == f"MTD_MSI{level}.xml"
    check_scene(scene)
    for name, values in physical(found).items():
        if BANDS[name].resolution_m == 10:
            np.testing.assert_allclose(values, reflectance(name, level), atol=0.51e-4)
    (note,) = found.notes
    assert f"level {level} by MTD_MSI{level}.xml" in note
    assert f"the pixels say {'+1000' if added else 'no +1000'}" in note


def test_a_zip_gives_the_pixels_of_the_folder_and_stands_for_itself(tmp_path: Path) -> None:
    product = write_safe(tmp_path / "a", "L2A", added=1000)
    (tmp_path / "b").mkdir()
    packed = zipped(product, tmp_path / "b" / f"{product.name}.zip")
    folder, archived = found_in(tmp_path / "a"), found_in(tmp_path / "b")
    (one,), (other,) = folder.scenes, archived.scenes
    assert (other.name, other.files, other.times, other.channels) == (one.name, (packed,), one.times, one.channels)
    assert (archived.num_files, archived.num_used, archived.rejected, archived.ignored) == (1, 1, (), ())
    copy = pickle.loads(pickle.dumps(other))
    for window in (one.grid.full, (slice(5, 90), slice(17, 61))):
        for wanted, got in zip(one.read(window), copy.read(window), strict=True):
            np.testing.assert_array_equal(got, wanted)
    assert len(found_in(packed).scenes) == 1


@pytest.mark.parametrize("level", ["L1C", "L2A"])
def test_a_product_is_known_by_its_folder_and_by_its_metadata_file(tmp_path: Path, level: str) -> None:
    product = write_safe(tmp_path, level)
    write_safe(tmp_path / "other", level)
    by_folder, by_file = found_in(product), found_in(product / f"MTD_MSI{level}.xml")
    assert by_folder.scenes == by_file.scenes
    assert [scene.name for scene in by_file.scenes] == [product.stem]
    assert by_file.num_files == by_folder.num_files


def test_scene_classes_become_quality_and_can_be_chosen(tmp_path: Path) -> None:
    write_safe(tmp_path, "L2A")
    (scene,) = found_in(tmp_path, scene_classes={"dilation_m": 0}).scenes
    quality = scene.read(scene.grid.full)[1]
    assert (quality[:2] == Quality.CLOUD).all()
    assert not quality[2:].any()
    assert any("SCL_20m" in file.name for file in scene.files)
    (scene,) = found_in(tmp_path, scene_classes={"dilation_m": 40}).scenes
    quality = scene.read(scene.grid.full)[1]
    assert (quality[2:6] == Quality.EXCLUDED).all()
    assert not quality[6:].any()
    (scene,) = found_in(tmp_path, scene_classes={"use": False}).scenes
    assert not scene.read(scene.grid.full)[1].any()


def test_what_a_product_has_beside_its_bands_is_ignored_and_the_files_add_up(tmp_path: Path) -> None:
    write_safe(tmp_path, "L2A")
    found = found_in(tmp_path)
    assert found.rejected == ()
    assert found.num_used == 10 + 2
    ignored = {Path(file).name.split("_")[-2] + "_" + Path(file).name.split("_")[-1] for file in found.ignored if file.endswith(".jp2")}
    assert ignored == {
        "B01_60m.jp2",
        "B09_60m.jp2",
        "TCI_10m.jp2",
        "CLDPRB_20m.jp2",
        "SCL_60m.jp2",
        *(f"B0{i}_20m.jp2" for i in (2, 3, 4, 8)),
    }


@pytest.mark.parametrize("level", ["L1C", "L2A"])
@pytest.mark.parametrize(("said", "stored", "words"), [(0, 1000, "carry +1000"), (1000, 0, "carry no +1000")])
def test_metadata_that_the_pixels_contradict_are_an_error_with_the_remedy(
    tmp_path: Path, level: str, said: int, stored: int, words: str
) -> None:
    xml = metadata(level, offsets_of(level) if said else None)
    product = write_safe(tmp_path, level, added=stored, xml=xml)
    remedy = f"if the pixels are right, say reader.layouts=[{{match: …, offset: {-stored / 1e4:g}}}]"
    with pytest.raises(SceneError) as caught:
        found_in(tmp_path)
    assert f"its numbers {words}, as its darkest pixels show, but MTD_MSI{level}.xml says" in str(caught.value)
    assert remedy in str(caught.value)
    found = found_in(tmp_path, layouts=[{"match": f"{product.name}/*", "offset": -stored / 1e4}])
    assert {c.offset for c in found.scenes[0].channels} == {-stored / 1e4}


def test_a_folder_of_both_conventions_is_refused_and_harmonised_to_one_reflectance(tmp_path: Path) -> None:
    write_safe(tmp_path / "old", "L2A")
    write_safe(tmp_path / "new", "L2A", added=1000)
    message = r"1000 added in 1 images \(new/S2A.*\) and without in 1 images \(old/S2A.*\); reader.harmonize=true takes each"
    with pytest.raises(SceneError, match=message):
        found_in(tmp_path)
    found = found_in(tmp_path, harmonize=True)
    assert [{c.offset for c in scene.channels} for scene in found.scenes] == [{-0.1}, {0.0}]
    assert found.scenes[0].dtype == np.uint16
    for name, values in physical(found, 0).items():
        step = 0 if BANDS[name].resolution_m == 10 else 1.01e-4  # ties are rounded to even numbers, in either convention
        np.testing.assert_allclose(values, physical(found, 1)[name], atol=step + 1e-9)


def test_a_folder_of_both_levels_is_refused_unless_they_are_named(tmp_path: Path) -> None:
    write_safe(tmp_path, "L1C")
    write_safe(tmp_path, "L2A")
    with pytest.raises(SceneError, match=r"level L1C .* in 1 images .* and L2A .* choose with reader.levels=\[L2A\]"):
        found_in(tmp_path)
    only = found_in(tmp_path, levels=["L1C"])
    assert [scene.channels[0].level for scene in only.scenes] == ["L1C"]
    assert {item.reason for item in only.rejected} == {"its level is L2A, reader.levels reads L1C"}
    assert len(found_in(tmp_path, levels=["L1C", "L2A"]).scenes) == 2


@pytest.mark.parametrize(
    ("xml", "reason"),
    [
        ("<broken", "is no readable XML"),
        ("", "is no readable XML"),
        (
            metadata("L1C", extra='<!DOCTYPE x [<!ENTITY a "b">]>'),
            "declares a document type or entities (DTDForbidden), which real ones never do",
        ),
        ("<Level-1B_User_Product/>", "describes a 'Level-1B_User_Product', not a Level-1C or Level-2A product"),
        (metadata("L1C", quantification=""), "has '' where a number belongs"),
        (metadata("L1C", quantification="0"), "says that the quantification is 0"),
        (metadata("L1C", quantification="nan"), "has 'nan' where a number belongs"),
        (metadata("L1C").replace("QUANTIFICATION_VALUE", "QUANTITY"), "has no QUANTIFICATION_VALUE"),
        (metadata("L1C", {0: -1000, 1: -1000}), "has a RADIO_ADD_OFFSET for some bands but none for B03, B04, B05"),
        (metadata("L1C", {**offsets_of("L1C"), 13: -1000}), "has a RADIO_ADD_OFFSET of band_id '13', which is no band or is there twice"),
        (metadata("L1C").replace("SATURATED", "OTHER"), "does not say which numbers mean NODATA and SATURATED"),
        (metadata("L1C").replace("2020-07", "2020-77"), "has no PRODUCT_START_TIME that is a time"),
        (
            metadata("L1C", extra='<?x y?><!-- <Spectral_Information bandId="0"/> -->').replace(
                "<List>", '<List><Spectral_Information bandId="8" physicalBand="B9"/>'
            ),
            "says that bandId '8' is 'B09', which is not the order of the instrument",
        ),
    ],
)
def test_metadata_that_cannot_be_trusted_are_an_error(xml: str, reason: str) -> None:
    with pytest.raises(SceneError) as caught:
        parse_metadata(xml.encode(), XML)
    assert str(caught.value).startswith(reason)


def test_a_product_without_metadata_to_trust_is_rejected(tmp_path: Path) -> None:
    product = write_safe(tmp_path, "L1C", xml="<broken")
    for reason in (
        "MTD_MSIL1C.xml of its product is no readable XML (unclosed token: line 1, column 0); fetch the product anew",
        "its product has neither MTD_MSIL1C.xml nor MTD_MSIL2A.xml, so quantification and offset are unknown; fetch the product anew",
    ):
        with pytest.raises(SceneError) as caught:
            found_in(tmp_path)
        assert reason in str(caught.value)
        assert "13 rejected" in str(caught.value)
        (product / "MTD_MSIL1C.xml").unlink(missing_ok=True)


def test_offsets_are_by_band_and_never_by_baseline() -> None:
    stated = parse_metadata(metadata("L1C", {number: -100 * number for number in range(13)}, "5000", "02.09").encode(), XML)
    assert stated.scaling == {band: (1 / 5000, -100 * number / 5000) for number, band in enumerate(BAND_IDS)}
    assert parse_metadata(metadata("L1C", None, baseline="05.10").encode(), XML).scaling["B8A"] == (1e-4, 0.0)
    assert (stated.tile, stated.orbit, stated.baseline, stated.nodata, stated.saturated) == ("33XWJ", 29, "02.09", 0, 65535)


PRODUCTS = [
    ("S2A_MSIL1C_20200717T221941_R029_T01LAC_20200717T234135.SAFE", "L1C", "02.09", "01LAC", 29, 0, "2020-07-17T22:19:41Z"),
    ("S2A_MSIL1C_20210908T042701_N0301_R133_T46RER_20210908T070248.SAFE", "L1C", "03.01", "46RER", 133, 0, "2021-09-08T04:27:01Z"),
    ("S2A_MSIL2A_20190212T192651_N0212_R013_T07HFE_20201007T160857.SAFE", "L2A", "02.12", "07HFE", 13, 0, "2019-02-12T19:26:51Z"),
    ("esa_S2B_MSIL2A_20210122T133229_N0214_R081_T22HBD_20210122T155500.SAFE", "L2A", "02.14", "22HBD", 81, 0, "2021-01-22T13:32:29Z"),
    ("S2B_MSIL2A_20220413T150759_N0400_R025_T33XWJ_20220414T082126.SAFE", "L2A", "04.00", "33XWJ", 25, 1000, "2022-04-13T15:07:59Z"),
]


@pytest.mark.parametrize("product", PRODUCTS, ids=lambda product: f"{product[1]}-{product[2]}")
def test_real_metadata(tmp_path: Path, product: tuple[str, str, str, str, int, int, str]) -> None:
    if not REAL.is_dir():
        pytest.skip(f"real metadata are not at {REAL}")
    name, level, baseline, tile, orbit, added, time = product
    path = REAL / name / f"MTD_MSI{level}.xml"
    stated = parse_metadata(path.read_bytes(), path)
    assert (stated.level, stated.baseline, stated.tile, stated.orbit, stated.time) == (level, baseline, tile, orbit, time)
    assert set(stated.scaling.values()) == {(1e-4, -added / 1e4)}
    assert set(stated.scaling) >= set(BANDS) - {"B10"}
    shutil.copy(path, write_safe(tmp_path, level, added=added, name=name) / path.name)
    (scene,) = found_in(tmp_path).scenes
    assert (scene.name, scene.times) == (name.removesuffix(".SAFE"), (time,))
    assert {(c.level, c.scale, c.offset) for c in scene.channels} == {(level, 1e-4, -added / 1e4)}
