"""Files of several volumes: what becomes of them by sequence and b-value, read one volume at a time."""

from __future__ import annotations

import gzip
import tracemalloc
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from pydantic import ValidationError

from modalities.four_d import chosen_volumes, with_defaults
from modalities.medical import MriSettings
from modalities.nifti_file import read_header, read_stored
from modalities.scene import SceneError
from tests.synthetic_volumes import OBLIQUE, REAL, SPACE, broken, needs_real, save_volume, scan_one, split_scan, texture

B_VALUES = "5 1000 995 0\n2000 1005 0"


def read(path: Path, **four_d: str) -> Any:
    scene = scan_one(path, MriSettings(spacing_mm=None, four_d=four_d))
    assert scene.flags == ("four_d",)
    return scene.read(scene.grid.full)[0][0]


@pytest.mark.parametrize("dtype", [np.int16, np.float32, ">f8"])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_first_mean_and_b_value_are_those_of_the_array(tmp_path: Path, suffix: str, dtype: Any) -> None:
    values = texture((*SPACE, 7)).astype(dtype)
    path = save_volume(tmp_path / f"sub-1_dwi{suffix}", values.astype(np.dtype(dtype).newbyteorder("=")))
    (tmp_path / "sub-1_dwi.bval").write_text(B_VALUES)
    first = read(path, dwi="first")
    assert first.dtype == (np.int16 if dtype is np.int16 else np.float32)
    assert np.array_equal(first, values[..., 0].astype(first.dtype))
    for how, chosen in (("mean", [0, 1, 2, 3, 4, 5, 6]), ("b0", [0, 3, 6]), ("b1000", [1, 2, 5]), ("b2000", [4])):
        found = read(path, dwi=how)
        wanted = values[..., chosen].astype(np.float64).mean(axis=-1)
        assert found.dtype == (np.int16 if how == "b2000" and dtype is np.int16 else np.float32), "a mean has fractions"
        assert np.allclose(found, wanted, rtol=1e-6)
    assert np.allclose(read(path), read(path, dwi="b0")), "the default"


def test_slope_and_numbers_that_are_none_go_through_a_mean(tmp_path: Path) -> None:
    values = texture((*SPACE, 3))
    values[1, 2, 3, 1] = np.nan
    path = save_volume(tmp_path / "x_bold.nii.gz", values, scl_slope=-2, scl_inter=10)
    scene = scan_one(path, MriSettings(spacing_mm=None, four_d={"bold": "mean"}))
    assert scene.flags == ("four_d", "not_finite")
    assert scene.num_not_finite == 1
    assert scene.channels[0].scale < 0


def test_what_a_sequence_is_decides(tmp_path: Path) -> None:
    values = texture((*SPACE, 2))
    names = ("sub-1_T1w", "sub-1_bold", "sub-2_FLAIR", "scan")
    files = [save_volume(tmp_path / f"{name}.nii.gz", values + number) for number, name in enumerate(names)]
    scenes, rejected = split_scan(files, tmp_path)
    assert sorted(scene.channels[0].name for scene in scenes) == ["FLAIR", "T1w"]
    assert sorted(item.reason.split(", or ")[1].split(" to ")[0] for item in rejected) == ["set reader.four_d.default"] * 2
    assert {item.code for item in rejected} == {"four_d"}


def test_settings_by_sequence_keep_the_defaults_of_others_and_know_their_words() -> None:
    assert with_defaults({"bold": "mean"}) == with_defaults({}) | {"bold": "mean"}
    for wrong in ("avg", "b", "B0", "first volume"):
        with pytest.raises(ValidationError, match=f"bold: {wrong} is none of reject, first, mean, or b and a b-value"):
            MriSettings(four_d={"bold": wrong})


def test_b_values_that_say_nothing_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "MILLER_dwi.nii.gz"
    with pytest.raises(SceneError, match=r"no \.bval file beside it") as missing:
        chosen_volumes(file, 3, "dwi", with_defaults({}))
    assert missing.value.code == "b_values_missing"
    for text in ("0 1", "0 1 x", "0 1 nan", "0 1 -1000", ""):
        (tmp_path / "MILLER_dwi.bval").write_text(text)
        with pytest.raises(SceneError, match="not one b-value for each of 3 volumes") as broken_values:
            chosen_volumes(file, 3, "dwi", with_defaults({}))
        assert broken_values.value.code == "b_values_broken"
    (tmp_path / "MILLER_dwi.bval").write_text("51 700 700")
    with pytest.raises(SceneError, match=r"within 50 of 0 s/mm²; there are \[51, 700\]"):
        chosen_volumes(file, 3, "dwi", with_defaults({}))


def test_labels_are_written_as_one_volume_and_several_are_no_labels(tmp_path: Path) -> None:
    path = save_volume(tmp_path / "x_T1w.nii.gz", texture((*SPACE, 2)), OBLIQUE)
    scene = scan_one(path)
    labels = np.random.default_rng(0).integers(0, 4, SPACE, dtype=np.uint8)
    scene.write_labels(tmp_path / "out.nii.gz", labels, 0)
    assert nib.load(tmp_path / "out.nii.gz").shape == SPACE
    assert np.array_equal(scene.open_labels(tmp_path / "out.nii.gz").read(scene.grid.full), labels)
    with pytest.raises(SceneError, match="labels of 2 volumes in one file") as several:
        scene.open_labels(path)
    assert several.value.code == "four_d"


def test_damage_behind_the_first_volume_is_found(tmp_path: Path) -> None:
    def bad(change: Any) -> str:
        path = broken(save_volume(tmp_path / "x_T1w.nii.gz", texture((*SPACE, 9))), change)
        _, (rejected,) = split_scan([path], tmp_path)
        return rejected.code

    assert bad(lambda data: data[:-8] + b"1234" + data[-4:]) == "damaged_gzip"
    assert bad(lambda data: data[:-2000]) == "truncated"
    assert bad(lambda data: gzip.compress(gzip.decompress(data)[:-100])) == "truncated"


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_no_more_than_a_volume_its_sum_and_one_to_add_are_held(tmp_path: Path, suffix: str) -> None:
    space = (48, 48, 48)
    path = save_volume(tmp_path / f"a{suffix}", texture((*space, 14)))
    header = read_header(path)
    tracemalloc.start()
    try:
        read_stored(path, header, range(14))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6 * 4 * 48**3, "a sum of doubles, and one volume as read and as a double"


@needs_real
def test_a_real_file_of_several_volumes_as_nibabel_reads_it() -> None:
    path = REAL / "odd" / "nibabel" / "example4d.nii.gz"
    scene = scan_one(path, MriSettings(spacing_mm=None, four_d={"default": "mean"}))
    wanted = nib.load(path).get_fdata().mean(axis=-1)
    assert np.allclose(scene.read(scene.grid.full)[0][0], scene.header.to_canonical(wanted), rtol=1e-6)
