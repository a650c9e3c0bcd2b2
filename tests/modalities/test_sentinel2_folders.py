"""The real Sentinel-2 folders, each read with settings alone; what their pixels say is a known answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio

from modalities.catalogue import Catalogue, scan
from modalities.labels import match_labels
from modalities.quality import Quality
from modalities.raster import RasterScene
from modalities.scene import SceneError
from modalities.sentinel2 import Sentinel2Settings
from modalities.sentinel2_bands import BANDS, ORDERS, split_band
from tests.synthetic_rasters import check_scene

DATA = Path(__file__).parents[2].parent / "shared" / "data" / "satellite"
TEN = Sentinel2Settings()
NO_BAND = "neither the end of its name nor its band's description says which Sentinel-2 band (B01 … B12) it is"
PORTAL = 1 / 65535
TERRAMIND: dict[str, Any] = {"layouts": [{"match": "S2L1C/*", "bands": "l1c13"}, {"match": "S2L2A/*", "bands": "l2a12"}]}


def real(name: str, **chosen: object) -> Catalogue:
    if not (DATA / name).is_dir():
        pytest.skip(f"real files are not at {DATA / name}")
    return scan(DATA / name, Sentinel2Settings.model_validate(chosen))


def reasons(catalogue: Catalogue) -> dict[str, int]:
    counted: dict[str, int] = {}
    for item in catalogue.rejected:
        counted[item.reason] = counted.get(item.reason, 0) + 1
    return counted


PICTURE = "its 3 bands have no names: name them with reader.bands=[...]"
REAL: list[tuple[str, dict[str, Any], tuple[int, int], str, dict[str, int]]] = [
    ("majortom_core_199U_1099R", {}, (1068, 1068), "L2A", {"B01": 1, "B09": 1, NO_BAND: 1}),
    ("bigearthnet_tiny", {}, (120, 120), "L2A", {"B01": 1, "B09": 1}),
    ("ssl4eo_s12_0000200", {"levels": ["L1C", "L2A"]}, (264, 264), "L1C L1C L2A L2A", {"B01": 4, "B09": 4, "B10": 2, NO_BAND: 4}),
    ("aquileia_s2", {"scale": PORTAL}, (689, 1200), "L2A", {"B01": 1, "B09": 1}),
    ("sundarbans_s2", {"scale": PORTAL}, (954, 298), "L2A", {"B01": 1, "B09": 1, PICTURE: 1}),
]


@pytest.mark.parametrize(("name", "chosen", "space", "levels", "rejected"), REAL, ids=lambda value: value if isinstance(value, str) else "")
def test_real_products_of_one_file_a_band(
    name: str, chosen: dict[str, Any], space: tuple[int, int], levels: str, rejected: dict[str, int]
) -> None:
    found = real(name, **chosen)
    assert sorted(channel.level for scene in found.scenes for channel in scene.channels[:1]) == levels.split()
    assert {len(scene.times) for scene in found.scenes} == {1}
    assert reasons(found) == {key: n for key, n in rejected.items() if key not in BANDS}
    not_asked_for = {f"ignored {n} files: band {key} is not among the wanted channels" for key, n in rejected.items() if key in BANDS}
    assert {note for note in found.notes if "wanted" in note} == not_asked_for
    assert sum(n for key, n in rejected.items() if key in BANDS) == sum(split_band(Path(file).stem) is not None for file in found.ignored)
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
    (scene,) = real("sundarbans_s2", scale=PORTAL).scenes
    with rasterio.open(scene.files[0]) as source:
        empty = source.read(2) == 0
    quality = scene.read(scene.grid.full)[1]
    assert empty.sum() == 20316
    assert (quality[empty] & Quality.NODATA).all()
    assert (quality == Quality.NODATA).sum() == 20436


STACKS: list[tuple[str, dict[str, Any], int, list[float], dict[str, int]]] = [
    ("aberystwyth_s2_landcover", {"bands": "land10", "scale": 1e-3}, 10, [0.0] * 16, {NO_BAND: 2}),
    ("hydro_patches", {"bands": "l2a12", "offset": -0.1}, 12, [-0.1] * 4, {}),
    ("hydro_patches", {"bands": "l2a12", "harmonize": True}, 12, [-0.1] * 4, {}),
    ("eurosat_ms", {"bands": "eurosat13"}, 13, [0.0] * 2, {}),
    (
        "terramind_examples",
        {**TERRAMIND, "harmonize": True, "levels": ["L1C", "L2A"]},
        13,
        [-0.1, 0.0, -0.1, 0.0, 0.0, -0.1],
        {NO_BAND: 6, "its 2 bands have no names: name them with reader.bands=[...]": 3},
    ),
]


@pytest.mark.parametrize(("name", "chosen", "num_bands", "offsets", "rejected"), STACKS)
def test_real_files_of_unnamed_bands(
    name: str, chosen: dict[str, Any], num_bands: int, offsets: list[float], rejected: dict[str, int]
) -> None:
    with pytest.raises(SceneError, match=rf"holds nothing usable as sentinel2[\s\S]*its {num_bands} bands have no names"):
        real(name)
    found = real(name, **chosen)
    assert [scene.channels[0].offset for scene in found.scenes] == offsets
    assert {channel.offset for scene in found.scenes for channel in scene.channels} == set(offsets)
    assert reasons(found) == rejected
    check_scene(found.scenes[0])


def test_the_known_flags_of_the_terramind_chips_come_from_their_pixels() -> None:
    with pytest.raises(SceneError) as caught:
        real("terramind_examples", **TERRAMIND)
    assert (
        "numbers with 1000 added in 3 images (S2L1C/282D_485L_3_3, S2L1C/433D_629L_3_1, S2L2A/433D_629L_3_1) "
        "and without in 3 images (S2L1C/38D_378R_2_3, S2L2A/282D_485L_3_3, S2L2A/38D_378R_2_3)"
    ) in str(caught.value)
    assert "level L1C (top of atmosphere) in 3 images" in str(caught.value)
    with pytest.raises(SceneError, match=r"1000 added in 1 images \(S2L2A/433D_629L_3_1\) and without in 2 images"):
        real("terramind_examples", **TERRAMIND, levels=["L2A"], offset=0.0)


@pytest.mark.parametrize(
    ("name", "chosen", "reason"),
    [
        (
            "hydro_patches",
            {"bands": "l2a12"},
            "its numbers carry +1000, as its pixels show (products do since baseline 04.00); say reader.offset=-0.1",
        ),
        (
            "hydro_patches",
            {"bands": "l2a12", "offset": 0},
            "its numbers carry +1000, as its darkest pixels show, but reader.offset says that there is none",
        ),
        (
            "eurosat_ms",
            {"bands": "eurosat13", "offset": -0.1},
            "its numbers carry no +1000, as its darkest pixels show, but reader.offset says that there is",
        ),
        ("eurosat_ms", {"bands": "l1c13"}, "the bands are in another order, name the right one with reader.bands or reader.layouts"),
        (
            "aberystwyth_s2_landcover",
            {"bands": "land10"},
            "probably reflectance · 1000; say reader.layouts=[{match: …, scale: 0.001, offset: 0}]",
        ),
        ("aberystwyth_s2_landcover", {"bands": "land10", "scale": 1e-4}, "probably reflectance · 1000; say reader.layouts"),
        (
            "majortom_core_199U_1099R",
            {"scale": 1e-3},
            "half of a band is above 1.6 with the scale of reader.scale, brighter than snow; say",
        ),
        (
            "aquileia_s2",
            {},
            "whole steps of 6.5535, as a portal writes reflectance · 65535; say reader.layouts=[{match: …, scale: 1.5259021896696422e-05",
        ),
        (
            "sundarbans_s2",
            {},
            "whole steps of 6.5535, as a portal writes reflectance · 65535; say reader.layouts=[{match: …, scale: 1.5259021896696422e-05",
        ),
    ],
)
def test_real_numbers_that_are_not_what_is_said_are_refused(name: str, chosen: dict[str, Any], reason: str) -> None:
    with pytest.raises(SceneError) as caught:
        real(name, **chosen)
    assert reason in str(caught.value)


def test_the_portal_exports_are_reflectance_once_their_scale_is_said() -> None:
    for name in ("sundarbans_s2", "aquileia_s2"):
        scene = real(name, scale=PORTAL).scenes[0]
        pixels, quality = scene.read(scene.grid.full)
        median = dict(zip(TEN.channels, np.median(pixels[:, quality == 0], axis=1) * PORTAL, strict=True))
        assert 0.05 < median["B04"] < 0.1
        assert 0.2 < median["B08"] < 0.3


def test_other_quantities_are_named_and_other_files_told_apart() -> None:
    found = real("majortom_core_199U_1099R", layouts=[{"match": "*/S2L2A/*", "unit": "counts", "scale": 1, "offset": 0}])
    assert {(channel.unit, channel.scale) for channel in found.scenes[0].channels} == {("counts", 1.0)}
    found = real(
        "majortom_core_199U_1099R", clouds={"file": "cloud_mask.tif", "cloud": [1]}, resampling="native", channels=list(ORDERS["l2a12"])
    )
    assert found.rejected == ()
    assert [channel.footprint for channel in found.scenes[0].channels] == [int(BANDS[name].resolution_m / 10) for name in ORDERS["l2a12"]]


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
