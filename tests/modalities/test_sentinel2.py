from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from modalities.catalogue import Catalogue, scan
from modalities.labels import match_labels
from modalities.quality import Quality
from modalities.raster import Radiometry, RasterScene
from modalities.scene import SceneError
from modalities.sentinel2 import BANDS, Sentinel2Settings, band_name, scan_sentinel2, split_band
from tests.synthetic_rasters import check_scene, north_up, world_values, write_raster, write_world

DATA = Path(__file__).parents[2].parent / "shared" / "data" / "satellite"
TEN = Sentinel2Settings()
NO_BAND = "neither the end of its name nor its band's description says which Sentinel-2 band (B01 … B12) it is"


def found_in(folder: Path, chosen: Sentinel2Settings = TEN) -> tuple[list[RasterScene], dict[str, str]]:
    files = [file for file in sorted(folder.rglob("*")) if file.suffix.lower() in (".tif", ".tiff", ".jp2")]
    scenes, rejected = scan_sentinel2(files, folder, chosen)
    assert sum(len(scene.files) for scene in scenes) + len(rejected) == len(files)
    return scenes, {item.file: item.reason for item in rejected}


def names(scene: RasterScene) -> list[str]:
    return [channel.name for channel in scene.channels]


def write_product(folder: Path, stem: str = "T33_2020_{}.tif", dtype: str = "float32") -> None:
    """All 13 bands of 120 × 180 pixels of 10 m at their own resolutions."""
    for i, (name, band) in enumerate(BANDS.items()):
        step = int(band.resolution_m / 10)
        write_world(folder / stem.format(name), (120 // step, 180 // step), band.resolution_m, i, dtype)


@pytest.mark.parametrize(
    ("text", "band"),
    [
        ("B2", "B02"),
        ("B02", "B02"),
        ("b02", "B02"),
        ("band 2", "B02"),
        ("Band_12", "B12"),
        ("B8A", "B8A"),
        ("b08a", "B8A"),
        ("B10", "B10"),
        ("_B02_10m", "B02"),
        ("T48QUE_20200223_B02.tif", "B02"),
        ("T48QUE_20200223T032739_B8A_20m.jp2", "B8A"),
        ("2020-01-27-00_00_2020-01-27-23_59_Sentinel-2_L2A_B05_(Raw).tiff", "B05"),
        ("B4, central wavelength 665 nm", "B04"),
        ("B8_median", "B08"),
        ("blue", "B02"),
        ("Green", "B03"),
        ("red", "B04"),
        ("nir", "B08"),
        ("Red Edge 1", "B05"),
        ("rededge3", "B07"),
        ("nir08", "B8A"),
        ("narrow NIR", "B8A"),
        ("swir16", "B11"),
        ("SWIR 2", "B12"),
        ("coastal aerosol", "B01"),
        ("Red Edge", None),
        ("swir", None),
        ("B0", None),
        ("B13", None),
        ("B4/B3", None),
        ("B8-B4", None),
        ("B04_mean_of_B03_and_more", "B04"),
        ("SCL", None),
        ("VV", None),
        ("", None),
        ("T33_2020_TCI_10m.jp2", None),
        ("sen2_20210527_aber_tile11.tif", None),
        ("subB02", None),
    ],
)
def test_band_names(text: str, band: str | None) -> None:
    assert band_name(text) == band


@given(name=st.sampled_from(list(BANDS)), before=st.text("abT0_-.", max_size=8), after=st.sampled_from(["", "_10m", "_20m"]))
def test_a_band_at_the_end_of_a_file_name_is_found_and_the_rest_is_common(name: str, before: str, after: str) -> None:
    split = split_band(f"{before}_{name}{after}")
    assert split == (name, f"{before}".strip("_-. "))


def test_the_table_is_the_instrument() -> None:
    assert len(BANDS) == 13
    assert [name for name, band in BANDS.items() if band.resolution_m == 10] == ["B02", "B03", "B04", "B08"]
    assert [name for name, band in BANDS.items() if band.resolution_m == 60] == ["B01", "B09", "B10"]
    assert all(band_name(name) == name for name in BANDS)


def test_settings() -> None:
    assert Sentinel2Settings(channels=("b2", "nir")).channels == ("B02", "B08")
    for wrong, message in (
        ({"channels": ["B02", "B14"]}, "no Sentinel-2 band: B14; the bands are B01, B02"),
        ({"bands": ["B2", "B02"]}, "named once only"),
        ({"channels": ["B02"], "min_channels": 2}, "min_channels is 2, but only 1 channels"),
        ({"chanels": ["B02"]}, "Extra inputs"),
    ):
        with pytest.raises(ValidationError, match=message):
            Sentinel2Settings.model_validate(wrong)


def test_files_of_one_band_become_one_scene_on_the_ten_metre_grid(tmp_path: Path) -> None:
    write_product(tmp_path / "S2A")
    scenes, rejected = found_in(tmp_path)
    (scene,) = scenes
    assert (scene.name, names(scene)) == ("S2A/T33_2020", list(TEN.channels))
    assert rejected == {f"S2A/T33_2020_{b}.tif": f"band {b} is not among the wanted channels" for b in ("B01", "B09", "B10")}
    assert scene.grid.space == (120, 180)
    check_scene(scene)
    pixels, quality = scene.read(scene.grid.full)
    assert not quality.any()
    for i, channel in enumerate(scene.channels):
        wanted = world_values(north_up(), (120, 180), list(BANDS).index(channel.name))
        np.testing.assert_allclose(pixels[i, 6:-6, 6:-6], wanted[6:-6, 6:-6], atol=2e-3)
        assert (channel.wavelength_nm, channel.resolution_m) == (BANDS[channel.name].wavelength_nm, BANDS[channel.name].resolution_m)
        assert (channel.scale, channel.offset) == (1e-4, 0)


def test_the_order_is_that_of_the_channels_and_the_reference_the_finest_wanted_band(tmp_path: Path) -> None:
    write_product(tmp_path, dtype="uint16")
    (scene,), rejected = found_in(tmp_path, Sentinel2Settings(channels=("B11", "B09", "B8A")))
    assert names(scene) == ["B11", "B09", "B8A"]
    assert scene.grid.space == (60, 90)
    assert len(rejected) == 10
    check_scene(scene)


def test_a_product_folder_and_doubled_resolutions(tmp_path: Path) -> None:
    for step, bands in ((1, ("B02", "B03")), (2, ("B02", "B05", "SCL")), (6, ("B02", "B05"))):
        for name in bands:
            path = tmp_path / "IMG_DATA" / f"R{step}0m" / f"T33_{name}_{step}0m.tif"
            write_world(path, (24 // step, 24 // step), 10.0 * step, dtype="uint16")
    (scene,), rejected = found_in(tmp_path)
    assert (scene.name, names(scene), scene.grid.space) == ("IMG_DATA/T33", ["B02", "B03", "B05"], (24, 24))
    assert rejected == {
        "IMG_DATA/R20m/T33_B02_20m.tif": "band B02 is read from T33_B02_10m.tif, which is finer",
        "IMG_DATA/R60m/T33_B02_60m.tif": "band B02 is read from T33_B02_10m.tif, which is finer",
        "IMG_DATA/R60m/T33_B05_60m.tif": "band B05 is read from T33_B05_20m.tif, which is finer",
        "IMG_DATA/R20m/T33_SCL_20m.tif": NO_BAND,
    }


def test_bare_band_names_take_the_folders_name(tmp_path: Path) -> None:
    for name in ("B2.tif", "B02.TIF", "b3.tif"):
        write_world(tmp_path / "product" / name, (8, 8), dtype="uint16")
    assert [scene.name for scene in found_in(tmp_path)[0]] == ["product"]
    (scene,), rejected = found_in(tmp_path / "product")
    assert (scene.name, names(scene)) == ("product", ["B02", "B03"])
    assert rejected == {"B2.tif": "band B02 is read from B02.TIF"}


def test_a_band_on_another_grid_and_too_few_bands_are_rejected(tmp_path: Path) -> None:
    for name in ("B02", "B03"):
        write_world(tmp_path / "a" / f"{name}.tif", (8, 8), dtype="uint16")
    write_world(tmp_path / "a" / "B04.tif", (8, 8), dtype="uint16", crs="EPSG:32634")
    (scene,), rejected = found_in(tmp_path)
    assert names(scene) == ["B02", "B03"]
    assert rejected["a/B04.tif"].startswith("its CRS (EPSG:32634) is not that of the scene's other bands (EPSG:32633)")
    scenes, rejected = found_in(tmp_path, Sentinel2Settings(min_channels=3))
    assert not scenes
    assert rejected["a/B02.tif"] == "its scene has 2 of the wanted channels (B02, B03), reader.min_channels is 3"


def test_one_file_of_named_bands(tmp_path: Path) -> None:
    pixels = np.arange(1, 6, dtype=np.uint16)[:, None, None] * np.ones((1, 8, 8), np.uint16)
    write_raster(tmp_path / "stac.tif", pixels, north_up(), names=("red", "green", "blue", "nir", "scl"))
    write_raster(tmp_path / "bare.tif", pixels, north_up())
    write_raster(tmp_path / "counted.tif", pixels, north_up(), names=tuple(f"Band {i}" for i in range(1, 6)))
    write_raster(tmp_path / "twice.tif", pixels, north_up(), names=("B02", "B2", "B03", "B04", "B05"))
    write_raster(tmp_path / "sixty.tif", pixels[:2], north_up(), names=("B01", "QA60"))
    (scene,), rejected = found_in(tmp_path)
    assert (scene.name, names(scene)) == ("stac", ["B02", "B03", "B04", "B08"])
    assert scene.read(scene.grid.full)[0][:, 0, 0].tolist() == [3, 2, 1, 4]
    unnamed = "its 5 bands have no names: name them with reader.bands=[...]"
    sixty = "none of its bands (B01) is among the wanted channels"
    assert rejected == {"bare.tif": unnamed, "counted.tif": unnamed, "twice.tif": unnamed, "sixty.tif": sixty}
    scenes, rejected = found_in(tmp_path, Sentinel2Settings(bands=("B08", "B04", "B03", "B02", "B01")))
    assert [scene.name for scene in scenes] == ["bare", "counted", "stac", "twice"]
    assert scenes[0].read(scenes[0].grid.full)[0][:, 0, 0].tolist() == [4, 3, 2, 1]
    assert rejected == {"sixty.tif": sixty}
    rejected = found_in(tmp_path, Sentinel2Settings(bands=("B08", "B04", "B03")))[1]
    assert rejected["bare.tif"] == "it has 5 bands where reader.bands names 3 (B08, B04, B03)"
    rejected = found_in(tmp_path, Sentinel2Settings(min_channels=5))[1]
    assert rejected["stac.tif"] == "its scene has 4 of the wanted channels (B02, B03, B04, B08), reader.min_channels is 5"


def test_special_values_and_the_validity_band(tmp_path: Path) -> None:
    pixels = np.full((2, 6, 6), 1000, np.uint16)
    pixels[1] = 1
    pixels[0, 0, :2], pixels[1, 1, :3] = (0, 65535), 0
    write_raster(tmp_path / "x_B02.tif", pixels, north_up())
    (scene,), _ = found_in(tmp_path)
    quality = scene.read(scene.grid.full)[1]
    assert names(scene) == ["B02"]
    assert quality[0].tolist() == [Quality.NODATA, Quality.SATURATED, 0, 0, 0, 0]
    assert quality[1].tolist() == [1, 1, 1, 0, 0, 0]
    pixels[1, 5, 5] = 2
    write_raster(tmp_path / "x_B02.tif", pixels, north_up())
    assert found_in(tmp_path)[1] == {"x_B02.tif": "its 2 bands have no names: name them with reader.bands=[...]"}
    write_raster(tmp_path / "x_B02.tif", pixels[:1].astype(np.int16), north_up(), nodata=-1)
    (scene,), _ = found_in(tmp_path)
    assert scene.read(scene.grid.full)[1][0].tolist() == [0, 1, 0, 0, 0, 0]


def test_radiometry_comes_from_the_glob_then_the_file_then_the_settings(tmp_path: Path) -> None:
    for name in ("a_B02", "a_B03"):
        path = write_world(tmp_path / f"{name}.tif", (4, 4), dtype="uint16")
    with rasterio.open(path, "r+") as target:
        target.scales, target.offsets = (1e-4,), (-0.1,)
    chosen = Sentinel2Settings(scale=1e-3, offset=0.5)
    assert [(c.scale, c.offset) for c in found_in(tmp_path, chosen)[0][0].channels] == [(1e-3, 0.5), (1e-4, -0.1)]
    chosen = Sentinel2Settings(radiometry=(Radiometry(match="*B03.tif", scale=2),))
    assert [(c.scale, c.offset) for c in found_in(tmp_path, chosen)[0][0].channels] == [(1e-4, 0), (2, 0)]


def real(name: str, **chosen: object) -> Catalogue:
    if not (DATA / name).is_dir():
        pytest.skip(f"real files are not at {DATA / name}")
    return scan(DATA / name, Sentinel2Settings.model_validate(chosen))


def reasons(catalogue: Catalogue) -> dict[str, int]:
    counted: dict[str, int] = {}
    for item in catalogue.rejected:
        counted[item.reason] = counted.get(item.reason, 0) + 1
    return counted


REAL = [
    ("majortom_core_199U_1099R", (1068, 1068), 1, {"B01": 1, "B09": 1, NO_BAND: 1}),
    ("bigearthnet_tiny", (120, 120), 1, {"B01": 1, "B09": 1}),
    ("ssl4eo_s12_0000200", (264, 264), 4, {"B01": 4, "B09": 4, "B10": 2, NO_BAND: 4}),
    ("aquileia_s2", (689, 1200), 1, {"B01": 1, "B09": 1}),
    ("sundarbans_s2", (954, 298), 1, {"B01": 1, "B09": 1, "its 3 bands have no names: name them with reader.bands=[...]": 1}),
]


@pytest.mark.parametrize(("name", "space", "count", "rejected"), REAL)
def test_real_products_of_one_file_a_band(name: str, space: tuple[int, int], count: int, rejected: dict[str, int]) -> None:
    found = real(name)
    assert len(found.scenes) == count
    assert reasons(found) == {f"band {key} is not among the wanted channels" if key in BANDS else key: n for key, n in rejected.items()}
    assert len({scene.group for scene in found.scenes}) == 1
    for scene in found.scenes:
        assert (scene.grid.space, [channel.name for channel in scene.channels]) == (space, list(TEN.channels))
        assert scene.dtype == np.uint16
    check_scene(found.scenes[0])


def test_real_twenty_metre_bands_keep_their_means_on_the_ten_metre_grid() -> None:
    (scene,) = real("majortom_core_199U_1099R").scenes
    pixels, quality = scene.read(scene.grid.full)
    assert not quality.any()
    with rasterio.open(next(file for file in scene.files if file.name == "B11.tif")) as source:
        native = source.read(1).astype(float)
    means = pixels[list(TEN.channels).index("B11")].reshape(534, 2, 534, 2).mean(axis=(1, 3))
    weights = np.array([1, 6, 1]) / 8
    smooth = sum(w * v * np.roll(native, (i - 1, j - 1), (0, 1)) for i, w in enumerate(weights) for j, v in enumerate(weights))
    np.testing.assert_allclose(means[1:-1, 1:-1], smooth[1:-1, 1:-1], atol=0.5)


def test_the_validity_band_of_the_portal_export() -> None:
    (scene,) = real("sundarbans_s2").scenes
    with rasterio.open(scene.files[0]) as source:
        empty = source.read(2) == 0
    quality = scene.read(scene.grid.full)[1]
    assert empty.sum() == 20316
    assert (quality[empty] & Quality.NODATA).all()
    assert (quality == Quality.NODATA).sum() == 20436


@pytest.mark.parametrize(
    ("name", "count", "num_bands", "rejected"),
    [
        ("aberystwyth_s2_landcover", 16, 10, {NO_BAND: 2}),
        ("hydro_patches", 4, 12, {}),
        ("eurosat_ms", 2, 13, {}),
        (
            "terramind_examples",
            3,
            12,
            {
                NO_BAND: 6,
                "it has 2 bands where reader.bands names 12 ({})": 3,
                "it has 13 bands where reader.bands names 12 ({})": 3,
            },
        ),
    ],
)
def test_real_files_of_unnamed_bands(name: str, count: int, num_bands: int, rejected: dict[str, int]) -> None:
    with pytest.raises(
        SceneError,
        match=rf"holds nothing usable as sentinel2[\s\S]*its {13 if num_bands == 12 and rejected else num_bands} bands have no names",
    ):
        real(name)
    everything = [band for band in BANDS if band != "B10" or num_bands == 13]
    bands = list(TEN.channels) if num_bands == 10 else everything
    found = real(name, bands=bands)
    assert len(found.scenes) == count
    assert reasons(found) == {key.format(", ".join(bands)): n for key, n in rejected.items()}
    assert len({scene.group for scene in found.scenes}) == count
    check_scene(found.scenes[0])


def test_one_land_cover_map_serves_every_tile_of_the_real_scene() -> None:
    found = real("aberystwyth_s2_landcover", bands=list(TEN.channels), scale=1e-3)
    labelling = match_labels(found, DATA / "aberystwyth_s2_landcover" / "sen2_20210527_aber_cls.tif")
    assert (len(labelling.pairs), labelling.without) == (16, [])
    with rasterio.open(DATA / "aberystwyth_s2_landcover" / "sen2_20210527_aber_cls.tif") as source:
        whole, affine = source.read(1), source.transform
    water, land = [], []
    for scene, labels in labelling.pairs:
        assert isinstance(scene, RasterScene)
        read = labels.read(scene.grid.full)
        x, y = scene.grid.world((0, 0))
        column, row = round((x - affine.c) / 10 - 0.5), round((affine.f - y) / 10 - 0.5)
        np.testing.assert_array_equal(read, whole[row : row + read.shape[0], column : column + read.shape[1]])
        nir = scene.read(scene.grid.full)[0][list(TEN.channels).index("B08")]
        water.append(nir[read == 4])
        land.append(nir[read == 2])
    assert np.median(np.concatenate(water)) < np.median(np.concatenate(land)) / 2
