"""A folder becomes a catalogue, whatever it holds; and labels find their scenes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio import Affine

from modalities.catalogue import scan
from modalities.labels import match_labels
from modalities.medical import MriSettings
from modalities.pseudonyms import pseudonyms
from modalities.raster import RasterSettings
from modalities.scene import SceneError
from modalities.sentinel2 import Sentinel2Settings
from tests.synthetic_volumes import NATIVE, REAL, head, needs_real, save_volume, texture

SPACE = (8, 8, 8)


def save_raster(path: Path, values: Any, west: float = 500_000.0, bands: tuple[str, ...] = ()) -> Path:
    """A GeoTIFF of `(band, row, column)` at 10 m in UTM 33N."""
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = {"count": values.shape[0], "height": values.shape[1], "width": values.shape[2], "dtype": values.dtype}
    with rasterio.open(path, "w", driver="GTiff", crs="EPSG:32633", transform=Affine(10, 0, west, 0, -10, 5_000_000), **profile) as file:
        file.write(values)
        for position, name in enumerate(bands, start=1):
            file.set_band_description(position, name)
    return path


def optical(seed: int, num_bands: int = 2, size: int = 16) -> Any:
    return np.random.default_rng(seed).integers(100, 3000, (num_bands, size, size), dtype=np.uint16)


def archive(folder: Path) -> Path:
    """Two good volumes, one label map, one broken file, three files of another kind and a hidden one."""
    for name in ("sub-1/sub-1_T1w.nii.gz", "sub-2/sub-2_T1w.nii"):
        save_volume(folder / name, texture(SPACE))
    save_volume(folder / "sub-1" / "sub-1_T1w_seg.nii.gz", (texture(SPACE) > 75).astype(np.uint8))
    (folder / "sub-2" / "broken.NII").write_bytes(b"no volume")
    save_raster(folder / "map.tif", optical(0))
    (folder / "readme.md").write_text("text")
    (folder / "sub-1" / "sub-1_T1w.json").write_text("{}")
    (folder / ".hidden.nii").write_bytes(b"hidden")
    return folder


def test_files_used_rejected_and_ignored_add_up_to_files_found(tmp_path: Path) -> None:
    catalogue = scan(archive(tmp_path), NATIVE)
    assert sorted(item.code for item in catalogue.rejected) == ["looks_like_labels", "not_nifti"]
    assert catalogue.ignored == ("map.tif", "readme.md", "sub-1/sub-1_T1w.json")
    assert (catalogue.num_used, catalogue.num_files) == (2, 7)
    assert [scene.name for scene in catalogue.scenes] == sorted(scene.name for scene in catalogue.scenes)


@pytest.mark.parametrize("settings", [RasterSettings(), Sentinel2Settings(channels=("B02", "B04"))], ids=lambda settings: settings.kind)
def test_the_same_folder_in_the_other_world(tmp_path: Path, settings: Any) -> None:
    archive(tmp_path)
    save_raster(tmp_path / "map.tif", optical(0), bands=("B02", "B04"))
    (tmp_path / "torn.tif").write_bytes(b"no raster")
    catalogue = scan(tmp_path, settings)
    assert (len(catalogue.scenes), catalogue.num_used, len(catalogue.rejected), len(catalogue.ignored)) == (1, 1, 1, 6)
    assert catalogue.rejected[0].file == "torn.tif"
    assert catalogue.num_files == 8
    pixels, _ = catalogue.scenes[0].read(catalogue.scenes[0].grid.full)
    assert np.array_equal(pixels, optical(0))


@pytest.mark.parametrize(
    "address", ["https://x.example/S2.zip", "s3://bucket/S2.SAFE", "/vsicurl/https://x.example/a.tif", "/vsizip/a.zip/b.tif"]
)
def test_nothing_remote_is_read(address: str) -> None:
    with pytest.raises(SceneError, match=r"is not on this machine, and nothing remote is read; fetch it"):
        scan(Path(address), Sentinel2Settings())


@pytest.mark.parametrize("pattern", ["sub-2/*", "*.nii", "sub-2_T1w*"])
def test_excluded_files_are_ignored_not_rejected(tmp_path: Path, pattern: str) -> None:
    catalogue = scan(archive(tmp_path), MriSettings(spacing_mm=None, exclude=(pattern, "broken*", "*_seg.nii.gz")))
    assert catalogue.rejected == ()
    assert len(catalogue.ignored) == 6
    assert [scene.files[0].name for scene in catalogue.scenes] == ["sub-1_T1w.nii.gz"]


def test_names_do_not_depend_on_where_the_folder_lies(tmp_path: Path) -> None:
    one = scan(archive(tmp_path / "one"), NATIVE)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    two = scan(tmp_path / "two", NATIVE)
    assert [(s.name, s.group) for s in one.scenes] == [(s.name, s.group) for s in two.scenes]


def test_a_single_file_is_a_catalogue_too(tmp_path: Path) -> None:
    path = save_volume(tmp_path / "a.nii.gz", texture(SPACE))
    assert (scan(path, NATIVE).num_files, scan(path, NATIVE).num_used) == (1, 1)


def test_nothing_there_or_nothing_usable_is_an_error_that_counts_the_reasons(tmp_path: Path) -> None:
    with pytest.raises(SceneError, match=r"^--data does not exist; --data wants a folder of files or one file"):
        scan(tmp_path / "gone", NATIVE)
    for number in range(12):
        save_volume(tmp_path / f"{number:02}.nii", np.zeros(SPACE, np.uint8))
    (tmp_path / "note.txt").write_text("text")
    counts = r"holds nothing usable as mri: 13 files found, 12 rejected, 1 of another kind, excluded or not asked for\."
    wanted = counts + r"\n  file-[0-9a-f]{16} and 11 more: all voxels are zero$"
    with pytest.raises(SceneError, match=wanted):
        scan(tmp_path, NATIVE)


# Labels


def test_labels_go_to_the_scene_of_the_same_name_and_scenes_without_are_told(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d"):
        save_volume(tmp_path / "images" / f"{name}.nii.gz", texture(SPACE))
    for number, name in enumerate(("a", "b_seg", "c_labels")):
        save_volume(tmp_path / "labels" / f"{name}.nii.gz", np.full(SPACE, number, np.uint8))
    catalogue = scan(tmp_path / "images", NATIVE)
    labelling = match_labels(catalogue, tmp_path / "labels")
    pairs, missing = labelling.pairs, labelling.without
    found = {scene.files[0].name[0]: int(labels.read(scene.grid.full).max()) for scene, labels in pairs}
    assert found == {"a": 0, "b": 1, "c": 2}
    [unlabelled] = [scene.name for scene in catalogue.scenes if scene.files[0].name == "d.nii.gz"]
    assert [(item.file, item.reason) for item in missing] == [(unlabelled, "no label file of the same name, session or patient")]


def test_one_map_serves_every_raster_that_it_covers(tmp_path: Path) -> None:
    whole = np.arange(16 * 32, dtype=np.uint16).reshape(1, 16, 32) % 5
    for number in range(2):
        save_raster(tmp_path / "images" / f"tile_{number}.tif", optical(number), 500_000.0 + 160 * number)
    labelling = match_labels(scan(tmp_path / "images", RasterSettings()), save_raster(tmp_path / "cover.tif", whole.astype(np.uint8)))
    assert labelling.without == []
    for scene, labels in labelling.pairs:
        column = 16 * int(scene.files[0].stem[-1])
        assert np.array_equal(labels.read(scene.grid.full), whole[0, :, column : column + 16])


def test_a_label_volume_never_serves_two_patients(tmp_path: Path) -> None:
    for seed, patient in enumerate(("sub-1", "sub-2")):
        for name in ("T1w", "FLAIR"):
            save_volume(tmp_path / "images" / patient / f"{patient}_{name}.nii.gz", texture(SPACE, seed))
            save_volume(tmp_path / "same_names" / patient / f"{name}.nii.gz", texture(SPACE, seed))
    ones = np.ones(SPACE, np.uint8)
    only = save_volume(tmp_path / "lesions.nii.gz", ones)
    with pytest.raises(SceneError, match=r"^one label file would label scans of several patients, one of them scan-\w{16}; name each"):
        match_labels(scan(tmp_path / "images", NATIVE), only)
    labels = save_volume(tmp_path / "labels" / "sub-1" / "T1w_seg.nii.gz", ones).parents[1]
    save_volume(tmp_path / "labels" / "sub-1" / "FLAIR_seg.nii.gz", ones)
    labelling = match_labels(scan(tmp_path / "same_names", NATIVE), labels)
    assert {scene.files[0].parent.name for scene, _ in labelling.pairs} == {"sub-1"}
    assert (len(labelling.pairs), len(labelling.without)) == (2, 2)
    assert len(match_labels(scan(tmp_path / "images" / "sub-1", NATIVE), only).pairs) == 2


def test_labels_that_cannot_be_matched_are_an_error_that_says_why(tmp_path: Path) -> None:
    save_volume(tmp_path / "images" / "a.nii.gz", texture(SPACE))
    catalogue = scan(tmp_path / "images", NATIVE)
    with pytest.raises(SceneError, match=r"^--labels does not exist; --labels wants a folder of label files or one file"):
        match_labels(catalogue, tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SceneError, match=r"^no label volume belongs to a scan: 0 label files and 1 scans; .* Name each label file"):
        match_labels(catalogue, tmp_path / "empty")
    for name in ("x", "y"):
        save_volume(tmp_path / "others" / f"{name}.nii.gz", np.ones(SPACE, np.uint8))
    with pytest.raises(SceneError, match=r"^no label volume belongs to a scan: 2 label files and 1 scans; .* Name each label file"):
        match_labels(catalogue, tmp_path / "others")
    save_volume(tmp_path / "wrong" / "a.nii.gz", np.ones((4, 4, 4), np.uint8))
    with pytest.raises(SceneError, match=r"^label-[0-9a-f]{16}: labels of scan-[0-9a-f]{16}: shape \(4, 4, 4\)"):
        match_labels(catalogue, tmp_path / "wrong")


# Real files


@needs_real
@pytest.mark.parametrize(
    ("folder", "counts"),
    [("mri/ptbp_tissue", (8, 8, 2, 18)), ("odd/nibabel", (1, 4, 4, 9)), ("odd/nifti_orientations", (8, 0, 2, 10))],
)
def test_real_volumes_add_up(folder: str, counts: tuple[int, ...]) -> None:
    catalogue = scan(REAL / folder, NATIVE)
    assert (len(catalogue.scenes), len(catalogue.rejected), len(catalogue.ignored), catalogue.num_files) == counts


@needs_real
def test_real_labels_without_image_and_image_without_label(tmp_path: Path) -> None:
    source = REAL / "mri" / "msd_hippocampus"
    for kind, names in (("images", ("001", "003", "004")), ("labels", ("001", "003"))):
        (tmp_path / kind).mkdir()
        for name in names:
            shutil.copy(source / kind / f"hippocampus_{name}.nii.gz", tmp_path / kind)
    shutil.copy(REAL / "odd" / "hippocampus_unpaired" / "labels" / "hippocampus_010.nii.gz", tmp_path / "labels")
    labelling = match_labels(scan(tmp_path / "images", MriSettings()), tmp_path / "labels")
    pairs, missing = labelling.pairs, labelling.without
    assert len(pairs) == 2
    assert [item.file for item in missing] == [pseudonyms().of("scan", "hippocampus_004.nii.gz")]
    assert all(np.unique(labels.read(scene.grid.full)).tolist() == [0, 1, 2] for scene, labels in pairs)


@needs_real
@pytest.mark.parametrize(
    ("folder", "settings"), [("odd/rasterio", RasterSettings()), ("satellite/majortom_core_199U_1099R", Sentinel2Settings())]
)
def test_real_rasters_add_up(folder: str, settings: Any) -> None:
    catalogue = scan(REAL / folder, settings)
    assert catalogue.num_used + len(catalogue.rejected) + len(catalogue.ignored) == catalogue.num_files
    assert catalogue.scenes


def test_volumes_of_one_patient_share_a_group_in_the_catalogue(tmp_path: Path) -> None:
    for seed, name in enumerate(("sub-1_T1w", "sub-1_FLAIR", "sub-2_T1w")):
        save_volume(tmp_path / f"{name}.nii.gz", head(seed=seed))
    assert len({scene.group for scene in scan(tmp_path, NATIVE).scenes}) == 2


def test_scenes_hold_absolute_paths_because_workers_stand_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "images").mkdir()
    save_volume(tmp_path / "images" / "a_T1w.nii.gz", head())
    monkeypatch.chdir(tmp_path)
    [scene] = scan(Path("images"), MriSettings()).scenes
    assert all(file.is_absolute() for file in scene.files)
