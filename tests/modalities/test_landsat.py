"""Landsat and HLS products, synthetic: laid out, named, scaled and flagged as USGS and NASA document it, values by world position."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
import pytest
import rasterio
from pydantic import ValidationError

from modalities.landsat import LandsatQuality, LandsatSettings, scan_landsat
from modalities.landsat_metadata import read_metadata
from modalities.quality import Quality
from modalities.raster import RasterScene
from modalities.scene import SceneError
from tests.synthetic_rasters import check_scene, north_up, world_values, write_raster

OLI2 = "LC08_L2SP_001070_20190114_20200830_02_T2"
OLI1 = "LC09_L1TP_001070_20190114_20200830_02_T1"
ETM2 = "LE07_L2SP_021030_20100109_20200911_02_T1"
L30 = "HLS.L30.T13REN.2018013T172747.v2.0"
S30 = "HLS.S30.T33UUP.2020145T101031.v2.0"
SPACE = (40, 60)


def metadata(product: str, sun: float = 30.0) -> dict[str, dict[str, str]]:
    """The groups that are read, as they stand in real files, and in a product of Level 2 those of Level 1 beside them."""
    groups: dict[str, dict[str, str]] = {
        "PRODUCT_CONTENTS": {"LANDSAT_PRODUCT_ID": product},
        "IMAGE_ATTRIBUTES": {"DATE_ACQUIRED": "2019-01-14", "SCENE_CENTER_TIME": "14:34:30.4390740Z", "SUN_ELEVATION": str(sun)},
    }
    if "_L2" in product:
        thermal = "ST_B6" if product.startswith("LE") else "ST_B10"
        groups["LEVEL2_SURFACE_REFLECTANCE_PARAMETERS"] = {
            f"REFLECTANCE_{part}_BAND_{i}": value for i in range(1, 8) for part, value in (("MULT", "2.75e-05"), ("ADD", "-0.2"))
        }
        groups["LEVEL2_SURFACE_TEMPERATURE_PARAMETERS"] = {
            f"TEMPERATURE_MULT_BAND_{thermal}": "0.00341802",
            f"TEMPERATURE_ADD_BAND_{thermal}": "149.0",
        }
    groups["LEVEL1_RADIOMETRIC_RESCALING"] = {
        f"REFLECTANCE_{part}_BAND_{i}": value for i in range(1, 10) for part, value in (("MULT", "2.0000E-05"), ("ADD", "-0.100000"))
    }
    return groups


def write_metadata(folder: Path, product: str, ending: str, groups: Mapping[str, Mapping[str, str]]) -> Path:
    path = folder / f"{product}_MTL.{ending}"
    folder.mkdir(parents=True, exist_ok=True)
    if ending == "json":
        path.write_text(json.dumps({"LANDSAT_METADATA_FILE": groups}))
    elif ending == "xml":
        inside = "".join(
            f"<{name}>" + "".join(f"<{key}>{escape(value)}</{key}>" for key, value in group.items()) + f"</{name}>"
            for name, group in groups.items()
        )
        path.write_text(f'<?xml version="1.0" encoding="UTF-8"?><LANDSAT_METADATA_FILE>{inside}</LANDSAT_METADATA_FILE>')
    else:
        lines = ["GROUP = LANDSAT_METADATA_FILE"]
        for name, group in groups.items():
            entries = [f'    {key} = "{value}"' if re.search("[A-Z:]", value) else f"    {key} = {value}" for key, value in group.items()]
            lines += [f"  GROUP = {name}", *entries, f"  END_GROUP = {name}"]
        path.write_text("\n".join([*lines, "END_GROUP = LANDSAT_METADATA_FILE", "END", ""]))
    return path


def layer(folder: Path, name: str, values: np.ndarray, pixel: float = 30.0, **profile: Any) -> Path:
    return write_raster(
        folder / name, values[None], north_up(pixel), tiled=True, blockxsize=16, blockysize=16, compress="deflate", **profile
    )


def bands_of(folder: Path, product: str, layers: tuple[str, ...], **profile: Any) -> None:
    for i, name in enumerate(layers):
        pixel = 15.0 if name == "B8" else 30.0
        space = (SPACE[0] * 2, SPACE[1] * 2) if name == "B8" else SPACE
        layer(
            folder, f"{product}_{name}.TIF", np.rint(20_000 + world_values(north_up(pixel), space, i)).astype(np.uint16), pixel, **profile
        )


def oli2(root: Path, ending: str = "json") -> Path:
    folder = root / OLI2
    bands_of(folder, OLI2, ("SR_B2", "SR_B3", "SR_B4", "SR_B5", "ST_B10"), nodata=0)
    write_metadata(folder, OLI2, ending, metadata(OLI2))
    layer(folder, f"{OLI2}_QA_PIXEL.TIF", np.full(SPACE, 21824, np.uint16), nodata=1)
    layer(folder, f"{OLI2}_QA_RADSAT.TIF", np.zeros(SPACE, np.uint16))
    return folder


def hls(root: Path, product: str, bands: tuple[str, ...], fmask: np.ndarray | None = None) -> Path:
    folder = root / product
    for i, name in enumerate(bands):
        values = np.rint(1000 + world_values(north_up(30), SPACE, i) / 10).astype(np.int16)
        values[0, 0] = -9999
        layer(folder, f"{product}.{name}.tif", values, nodata=-9999)
    layer(folder, f"{product}.Fmask.tif", np.full(SPACE, 64, np.uint8) if fmask is None else fmask, nodata=255)
    return folder


def scanned(root: Path, **chosen: Any) -> tuple[list[RasterScene], dict[str, str]]:
    settings = LandsatSettings.model_validate(chosen)
    files = [path for path in root.rglob("*") if path.suffix.lower() in (".tif", ".tiff")]
    scenes, rejected = scan_landsat(files, root, settings)
    used = sum(len(scene.files) for scene in scenes)
    assert used + len(rejected) == len(files), "every file is accounted for"
    return scenes, {Path(item.file).name: item.reason for item in rejected}


@pytest.mark.parametrize("ending", ["json", "xml", "txt"])
def test_level_2_is_surface_reflectance_and_kelvin_by_its_own_metadata(tmp_path: Path, ending: str) -> None:
    oli2(tmp_path, ending)
    (scene,), rejected = scanned(tmp_path)
    check_scene(scene)
    assert (scene.name, scene.times) == (OLI2, ("2019-01-14T14:34:30Z",))
    assert [c.name for c in scene.channels] == ["OLI_B2", "OLI_B3", "OLI_B4", "OLI_B5"]
    assert {(c.scale, c.offset, c.unit, c.level, c.resolution_m) for c in scene.channels} == {(2.75e-5, -0.2, "reflectance", "C2L2", 30)}
    assert scene.channels[0].wavelength_nm == pytest.approx(482, abs=1)
    assert rejected == {f"{OLI2}_ST_B10.TIF": "band OLI_B10 is not among the wanted channels"}
    pixels, quality = scene.read(scene.grid.full)
    assert not quality.any()
    np.testing.assert_array_equal(pixels[2], np.rint(20_000 + world_values(north_up(30), SPACE, 2)))
    (warm,), rejected = scanned(tmp_path, channels=["OLI_B10", "OLI_B2"])
    assert [(c.name, c.unit, c.scale, c.offset) for c in warm.channels] == [
        ("OLI_B10", "K", 0.00341802, 149.0),
        ("OLI_B2", "reflectance", 2.75e-5, -0.2),
    ]
    assert len(rejected) == 3


def test_level_2_without_metadata_has_the_scale_of_all_of_it_and_the_day(tmp_path: Path) -> None:
    folder = oli2(tmp_path)
    with_it = scanned(tmp_path)[0][0]
    (folder / f"{OLI2}_MTL.json").unlink()
    without = scanned(tmp_path)[0][0]
    assert without.channels == with_it.channels
    assert without.times == ("2019-01-14T00:00:00Z",)


def test_level_1_is_divided_by_the_sine_of_the_suns_elevation(tmp_path: Path) -> None:
    folder = tmp_path / OLI1
    bands_of(folder, OLI1, ("B2", "B3", "B10"))
    layer(folder, f"{OLI1}_QA_PIXEL.TIF", np.full(SPACE, 21824, np.uint16), nodata=1)
    assert "Level 1 needs" in scanned(tmp_path)[1][f"{OLI1}_B2.TIF"]
    write_metadata(folder, OLI1, "json", metadata(OLI1, sun=30.0))
    (scene,), _ = scanned(tmp_path)
    for channel in scene.channels:
        assert (channel.level, channel.unit) == ("C2L1", "reflectance")
        assert (channel.scale, channel.offset) == pytest.approx((2e-5 / math.sin(math.pi / 6), -0.1 / math.sin(math.pi / 6)))
    _, rejected = scanned(tmp_path, channels=["OLI_B2", "OLI_B10"])
    assert "no linear function of kelvin" in rejected[f"{OLI1}_B10.TIF"]
    write_metadata(folder, OLI1, "json", metadata(OLI1, sun=-3.0))
    assert "says that the sun stood at -3.0°" in scanned(tmp_path)[1][f"{OLI1}_B2.TIF"]


def test_the_panchromatic_band_makes_a_grid_of_15_m_and_the_others_may_stay_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / OLI1
    bands_of(folder, OLI1, ("B2", "B8"))
    write_metadata(folder, OLI1, "json", metadata(OLI1))
    layer(folder, f"{OLI1}_QA_PIXEL.TIF", np.full(SPACE, 21824, np.uint16))
    (scene,), _ = scanned(tmp_path, channels=["OLI_B2", "OLI_B8"], resampling="native")
    check_scene(scene)
    assert [(c.name, c.footprint, c.resolution_m) for c in scene.channels] == [("OLI_B2", 2, 30), ("OLI_B8", 1, 15)]
    pixels, _ = scene.read(scene.grid.full)
    np.testing.assert_array_equal(pixels[0, ::2, ::2], np.rint(20_000 + world_values(north_up(30), SPACE, 0)))


BITS = {0: Quality.NODATA, 1: Quality.EXCLUDED, 2: Quality.CLOUD, 3: Quality.CLOUD, 4: Quality.CLOUD, 5: 0, 6: 0, 7: 0, 8: 0, 14: 0}


def test_bits_of_qa_pixel(tmp_path: Path) -> None:
    folder = oli2(tmp_path)
    numbers = np.zeros(SPACE, np.uint16)
    for column, bit in enumerate(BITS):
        numbers[:, column] = 1 << bit
    layer(folder, f"{OLI2}_QA_PIXEL.TIF", numbers, nodata=1)
    (scene,), _ = scanned(tmp_path)
    quality = scene.read(scene.grid.full)[1]
    assert quality[5, : len(BITS)].tolist() == list(map(int, BITS.values()))
    assert not quality[:, len(BITS) :].any()
    (snowy,), _ = scanned(tmp_path, quality={"bad": ["snow"], "dilation_m": 100})
    assert snowy.read(snowy.grid.full)[1][5, : len(BITS)].tolist() == [1, 0, 0, 0, 0, int(Quality.EXCLUDED), 0, 0, 0, 0]
    (wide,), _ = scanned(tmp_path, quality={"bad": ["cloud"], "dilation_m": 60})
    assert np.flatnonzero(wide.read(wide.grid.full)[1][5] & Quality.EXCLUDED).tolist() == [1, 2, 4, 5]


def test_saturation_counts_for_the_bands_that_are_read(tmp_path: Path) -> None:
    folder = oli2(tmp_path)
    numbers = np.zeros(SPACE, np.uint16)
    numbers[0, :12] = 1 << np.arange(12)
    layer(folder, f"{OLI2}_QA_RADSAT.TIF", numbers)
    (scene,), _ = scanned(tmp_path, channels=["OLI_B2", "OLI_B5"])
    quality = scene.read(scene.grid.full)[1]
    assert np.flatnonzero(quality == Quality.SATURATED).tolist() == [1, 4]
    assert np.flatnonzero(quality == Quality.EXCLUDED).tolist() == [11], "hidden by terrain"
    (folder / f"{OLI2}_QA_RADSAT.TIF").unlink()
    assert not scanned(tmp_path)[0][0].read(scene.grid.full)[1].any()


def test_etm_has_its_own_names_bits_and_temperature(tmp_path: Path) -> None:
    folder = tmp_path / "some where" / ETM2
    bands_of(folder, ETM2, ("SR_B1", "SR_B4", "SR_B7", "ST_B6", "ST_TRAD"), nodata=0)
    write_metadata(folder, ETM2, "xml", metadata(ETM2))
    numbers = np.zeros(SPACE, np.uint16)
    numbers[0, :12] = 1 << np.arange(12)
    layer(folder, f"{ETM2}_QA_RADSAT.TIF", numbers)
    layer(folder, f"{ETM2}_QA_PIXEL.TIF", np.full(SPACE, 5440, np.uint16))
    (scene,), rejected = scanned(tmp_path, channels=["ETM_B1", "ETM_B4", "ETM_B6", "ETM_B7"])
    assert scene.name == f"some where/{ETM2}"
    assert [(c.name, c.unit) for c in scene.channels][2] == ("ETM_B6", "K")
    quality = scene.read(scene.grid.full)[1]
    assert np.flatnonzero(quality == Quality.SATURATED).tolist() == [0, 3, 5, 6, 8]
    assert np.flatnonzero(quality == Quality.NODATA).tolist() == [9], "a dropped pixel"
    assert rejected == {f"{ETM2}_ST_TRAD.TIF": "ST_TRAD is a layer of its product that no channel is made of"}


def test_hls_of_landsat_and_of_sentinel(tmp_path: Path) -> None:
    hls(tmp_path, L30, ("B02", "B04", "B09", "B10", "SZA"))
    hls(tmp_path, S30, ("B02", "B8A", "B10", "B12"))
    (landsat, sentinel), rejected = scanned(tmp_path)
    for scene in (landsat, sentinel):
        check_scene(scene)
        assert {(c.scale, c.offset, c.unit, c.level, c.resolution_m) for c in scene.channels} == {(1e-4, 0, "reflectance", "HLS", 30)}
        quality = scene.read(scene.grid.full)[1]
        assert quality[0, 0] == Quality.NODATA
        assert np.count_nonzero(quality) == 1, "one pixel of fill makes one pixel invalid"
    assert [c.name for c in landsat.channels] == ["OLI_B2", "OLI_B4"]
    assert [c.name for c in sentinel.channels] == ["B02", "B8A", "B12"]
    assert landsat.times == ("2018-01-13T17:27:47Z",)
    assert sentinel.times == ("2020-05-24T10:10:31Z",)
    assert sorted(name.split(".")[-2] for name in rejected) == ["B09", "B10", "B10", "SZA"]
    (warm, _), _ = scanned(tmp_path, channels=["OLI_B10", "B02"])
    assert [(c.name, c.unit, c.scale, c.offset) for c in warm.channels] == [("OLI_B10", "K", 0.01, 273.15)]


def test_bits_of_fmask(tmp_path: Path) -> None:
    numbers = np.zeros(SPACE, np.uint8)
    numbers[1, :9] = [1, 2, 4, 8, 16, 32, 128, 192, 255]
    hls(tmp_path, L30, ("B02", "B03"), numbers)
    (scene,), _ = scanned(tmp_path)
    cloud, beside = int(Quality.CLOUD), int(Quality.EXCLUDED)
    assert scene.read(scene.grid.full)[1][1, :9].tolist() == [cloud, cloud, beside, cloud, 0, 0, 0, 0, int(Quality.NODATA)]
    (scene,), _ = scanned(tmp_path, quality={"bad": ["high_aerosol", "water"]})
    assert scene.read(scene.grid.full)[1][1, :9].tolist() == [0, 0, 0, 0, 0, beside, 0, beside, int(Quality.NODATA)]


def test_a_product_without_its_quality_is_rejected_unless_told_otherwise(tmp_path: Path) -> None:
    folder = oli2(tmp_path)
    (folder / f"{OLI2}_QA_PIXEL.TIF").unlink()
    scenes, rejected = scanned(tmp_path)
    assert not scenes
    assert "has no QA_PIXEL, which says what is cloud; download it, or set reader.quality.use=false" in rejected[f"{OLI2}_SR_B2.TIF"]
    (scene,), rejected = scanned(tmp_path, quality={"use": False})
    assert not scene.class_bands
    assert rejected[f"{OLI2}_QA_RADSAT.TIF"] == "reader.quality.use=false"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("B04.tif", "its name is not of the form LC08_L2SP_…_SR_B4.TIF of Landsat Collection 2 or HLS.L30.T….v2.0.B04.tif"),
        ("LC08_L1TP_042034_20170616_20170629_01_T1_B4.TIF", "of Landsat Collection 1, whose numbers and bits mean something else"),
        ("LM05_L1GS_001001_19850524_20210918_02_T2_B4.TIF", "LM05 is MSS; OLI, ETM+ and TM are read"),
        ("LT08_L1TP_001001_20150524_20210918_02_T2_B10.TIF", "LT08 is thermal only"),
        ("LC08_L2SP_001070_20191314_20200830_02_T2_SR_B4.TIF", "unconverted data remains"),
        ("HLS.S30.T33UUP.2020145T101031.v1.4.B04.tif", "of HLS version 1; only version 2"),
    ],
)
def test_files_of_other_makes_are_refused_by_name(tmp_path: Path, name: str, reason: str) -> None:
    layer(tmp_path, name, np.ones((4, 4), np.uint16))
    scenes, rejected = scanned(tmp_path)
    assert not scenes
    assert reason in rejected[name]


def test_contradictions_and_damage_are_named(tmp_path: Path) -> None:
    folder = oli2(tmp_path)
    with rasterio.open(folder / f"{OLI2}_SR_B3.TIF", "r+") as target:
        target.scales = (1e-4,)
    (folder / f"{OLI2}_SR_B4.TIF").write_bytes(b"no raster")
    (scene,), rejected = scanned(tmp_path)
    assert [c.name for c in scene.channels] == ["OLI_B2", "OLI_B5"]
    assert "its own tags say scale 0.0001 and offset 0, its product 2.75e-05 and -0.2" in rejected[f"{OLI2}_SR_B3.TIF"]
    assert "not a readable GeoTIFF" in rejected[f"{OLI2}_SR_B4.TIF"]
    assert not scanned(tmp_path, min_channels=3)[0]


DOCTYPE = '<!DOCTYPE x [<!ENTITY a "b">]><LANDSAT_METADATA_FILE></LANDSAT_METADATA_FILE>'


@pytest.mark.parametrize(
    ("ending", "text", "reason"),
    [
        ("xml", DOCTYPE, "_MTL.xml cannot be read as XML: DTDForbidden"),
        ("xml", "<LANDSAT", "cannot be read as XML: ParseError"),
        ("xml", "<OTHER/>", "it begins with OTHER"),
        ("json", "[1]", "there is no LANDSAT_METADATA_FILE in it"),
        ("json", "[" * 100_000, "cannot be read as JSON"),
        ("txt", "GROUP = LANDSAT_METADATA_FILE\n GROUP = A\n  X = 1\n END_GROUP = B\n", "END_GROUP = B closes no group"),
        ("txt", "hello", "there is no whole GROUP"),
        ("json", json.dumps({"LANDSAT_METADATA_FILE": metadata(ETM2)}), f"is the metadata of {ETM2}, not of {OLI2}"),
        ("json", '{"LANDSAT_METADATA_FILE": {"A": {}}}', "has no LANDSAT_PRODUCT_ID in PRODUCT_CONTENTS"),
        ("txt", "x" * ((1 << 20) + 1), "bytes, more than 1048576"),
    ],
)
def test_metadata_that_are_none_end_in_a_reason(tmp_path: Path, ending: str, text: str, reason: str) -> None:
    (tmp_path / f"{OLI2}_MTL.{ending}").write_text(text)
    with pytest.raises(SceneError, match=re.escape(reason)):
        read_metadata(tmp_path, OLI2)


def test_an_entry_that_is_missing_or_no_number_is_named(tmp_path: Path) -> None:
    folder = oli2(tmp_path)
    groups = metadata(OLI2)
    del groups["LEVEL2_SURFACE_REFLECTANCE_PARAMETERS"]["REFLECTANCE_MULT_BAND_2"]
    groups["LEVEL2_SURFACE_REFLECTANCE_PARAMETERS"]["REFLECTANCE_ADD_BAND_3"] = "nan"
    write_metadata(folder, OLI2, "json", groups)
    (scene,), rejected = scanned(tmp_path)
    assert len(scene.channels) == 2
    assert "has no REFLECTANCE_MULT_BAND_2 in LEVEL2_SURFACE_REFLECTANCE_PARAMETERS" in rejected[f"{OLI2}_SR_B2.TIF"]
    assert "REFLECTANCE_ADD_BAND_3 = 'nan'" in rejected[f"{OLI2}_SR_B3.TIF"]


def test_settings_know_the_bands() -> None:
    with pytest.raises(ValidationError, match="no band of Landsat or HLS: OLI_B12"):
        LandsatSettings(channels=("OLI_B12",))
    with pytest.raises(ValidationError, match="named once only"):
        LandsatSettings(channels=("B02", "B02"))
    with pytest.raises(ValidationError, match="bad"):
        LandsatQuality.model_validate({"bad": ["clouds"]})
