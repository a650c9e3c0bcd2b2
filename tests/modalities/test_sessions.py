"""Sequences of one session: one scene where they lie on one lattice, in whatever order of files and axes; nothing is lost."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from modalities.medical import MriSettings
from modalities.quality import Quality
from modalities.volume import VolumeScene
from modalities.volume_scan import Scanned, scan_volumes
from tests.synthetic_volumes import NATIVE, OBLIQUE, REAL, SPACE, head, needs_real, orientations, save_volume, texture, turned, world

TOGETHER = NATIVE.model_copy(update={"sequences": "session"})


def scanned(folder: Path, settings: MriSettings = TOGETHER, *, backwards: bool = False) -> Scanned:
    files = sorted(folder.rglob("*.nii*"), reverse=backwards)
    found = scan_volumes(files, folder, settings)
    assert sum(len(scene.files) for scene in found.scenes) + sum(item.num_files for item in found.rejected) == len(files)
    return found


def names(scene: VolumeScene) -> tuple[str, ...]:
    return tuple(channel.name for channel in scene.channels)


def session(folder: Path, **volumes: NDArray[Any]) -> Path:
    for name, values in volumes.items():
        save_volume(folder / f"{name}.nii.gz", values)
    return folder


def test_a_session_is_one_scene_whatever_the_order_of_files_and_axes(tmp_path: Path) -> None:
    """Voxel values are functions of the place, so a sequence that is not turned as it must be is a wrong number."""
    x, y, z = world(SPACE, OBLIQUE)
    planes = {"FLAIR": 100 + x, "T1w": 200 + 2 * y + x, "T2w": 300 + 3 * z + y}
    for number, (name, values) in zip((0, 29, 41), planes.items(), strict=True):
        stored, affine = turned(values.astype(np.float32), OBLIQUE, orientations()[number])
        save_volume(tmp_path / f"patient07/{name}.nii.gz", stored, affine)
    scene = scanned(tmp_path).scenes[0]
    assert names(scene) == ("FLAIR", "T1w", "T2w")
    there = world(scene.grid.space, scene.grid.matrix)
    wanted = (100 + there[0], 200 + 2 * there[1] + there[0], 300 + 3 * there[2] + there[1])
    pixels, quality = scene.read(scene.grid.full)
    np.testing.assert_allclose(pixels, wanted, rtol=0, atol=1e-3)
    assert not quality.any()
    assert scanned(tmp_path, backwards=True).scenes == (scene,)
    for settings in (MriSettings(sequences="session", duplicates="keep"), TOGETHER):
        alone = {names(one)[0]: one for one in scanned(tmp_path, settings.model_copy(update={"sequences": "each"})).scenes}
        together = scanned(tmp_path, settings).scenes[0]
        assert together.voxel_digests == tuple(alone[name].voxel_digests[0] for name in names(together))
        assert together.channels == tuple(alone[name].channels[0] for name in names(together))
        assert together.group == alone["T1w"].group


def test_sessions_are_told_by_bids_by_folder_and_by_what_is_left_of_a_name(tmp_path: Path) -> None:
    pairs = {
        ("sub-1/ses-1/anat/sub-1_ses-1_T1w", "sub-1/ses-1/anat/sub-1_ses-1_FLAIR"): True,
        ("sub-2/ses-1/anat/sub-2_ses-1_T1w", "sub-2/ses-2/anat/sub-2_ses-2_FLAIR"): False,
        ("MNI/patient07/T1_N4", "MNI/patient07/FLAIR_N4"): True,
        ("MNI/patient08/T1/brain", "MNI/patient08/FLAIR/brain"): True,
        ("MNI/patient09/2019/T1", "MNI/patient09/2020/FLAIR"): False,
        ("a/case1_T1", "a/case1_T2"): True,
        ("T1/case2", "T2/case2"): True,
        ("b/case1_T1", "b/case2_T2"): False,
        ("1001/T1", "1002/T2"): False,
    }
    for number, (pair, is_one) in enumerate(pairs.items()):
        folder = tmp_path / str(number)
        for name in pair:
            save_volume(folder / f"{name}.nii.gz", texture((5, 5, 5)))
        assert len(scanned(folder).scenes) == (1 if is_one else 2), pair
        assert len(scanned(folder, NATIVE).scenes) == 2, "each is the default"


def test_sequences_that_no_name_tells_are_given_by_pattern(tmp_path: Path) -> None:
    session(tmp_path / "patient1", mprage=texture(SPACE), ax_tirm=texture(SPACE, 1), T2=texture(SPACE, 2))
    given = {"*mprage*": "T1w", "patient1/ax_*": "FLAIR"}
    found = scanned(tmp_path, TOGETHER.model_copy(update={"sequence_names": given}))
    assert [names(scene) for scene in found.scenes] == [("FLAIR", "T1w", "T2w")]
    assert sorted(names(scene) for scene in scanned(tmp_path).scenes) == [("MR",), ("MR", "T2w")]


def test_other_lattices_are_scenes_of_their_own_with_those_that_share_them_or_refused(tmp_path: Path) -> None:
    folder = session(tmp_path / "patient1", T1w=texture(SPACE), FLAIR=texture(SPACE, 1), T2w=texture(SPACE, 2))
    shifted = np.eye(4)
    shifted[0, 3] = 0.5
    for name in ("adc", "dwi"):
        save_volume(folder / f"{name}.nii", texture(SPACE, 3), shifted)
    save_volume(folder / "swi.nii", texture((9, 7, 9), 4))
    found = scanned(tmp_path)
    assert sorted(names(scene) for scene in found.scenes) == [("FLAIR", "T1w", "T2w"), ("adc", "dwi"), ("swi",)]
    assert len({scene.group for scene in found.scenes}) == 1
    assert found.notes[:2] == (
        "sequences: 6 scans of 1 sessions in 3 scenes: FLAIR+T1w+T2w (1), adc+dwi (1), swi (1)",
        "3 scans lie on another lattice than most of their session: scenes of their own",
    )
    found = scanned(tmp_path, TOGETHER.model_copy(update={"other_lattice": "refuse"}))
    assert [names(scene) for scene in found.scenes] == [("FLAIR", "T1w", "T2w")]
    assert {item.code for item in found.rejected} == {"not_coregistered"}
    assert found.rejected[0].reason.startswith("lies on another lattice than FLAIR of its session, which has shape (9, 7, 8); register")
    assert "patient1" not in str(found.rejected)


def test_affines_that_differ_by_less_than_the_tolerance_are_one_lattice(tmp_path: Path) -> None:
    for name, shift in (("T1w", 0.0), ("T2w", 0.0009), ("FLAIR", 0.0012)):
        affine = np.eye(4)
        affine[1, 3] = shift
        save_volume(tmp_path / f"patient1/{name}.nii", texture(SPACE), affine)
    assert sorted(names(scene) for scene in scanned(tmp_path).scenes) == [("FLAIR", "T2w"), ("T1w",)]


@pytest.mark.parametrize("backwards", [False, True])
def test_a_second_scan_of_a_sequence_is_a_scene_of_its_own_or_refused(tmp_path: Path, backwards: bool) -> None:
    for number, name in enumerate(("run-2_T1w", "run-1_T1w", "run-1_FLAIR")):
        save_volume(tmp_path / f"sub-1/anat/sub-1_{name}.nii", texture(SPACE, number))
    found = scanned(tmp_path, backwards=backwards)
    by_names = {names(scene): scene for scene in found.scenes}
    assert set(by_names) == {("FLAIR", "T1w"), ("T1w",)}
    assert by_names["FLAIR", "T1w"].files[1].name == "sub-1_run-1_T1w.nii"
    assert found.notes[1:-1] == ("1 scans repeat a sequence of their session on its lattice: scenes of their own",)
    refused = scanned(tmp_path, TOGETHER.model_copy(update={"repeated": "refuse"}), backwards=backwards)
    assert [item.code for item in refused.rejected] == ["repeated_sequence"]
    assert refused.scenes == (by_names["FLAIR", "T1w"],)


def test_air_is_background_only_where_all_sequences_are_and_one_without_a_number_counts_nowhere(tmp_path: Path) -> None:
    flair, t1 = head(), head(seed=1)
    flair[:, :, :12] = 0  # its field of view is the upper half
    t1[12, 12, 20] = np.nan
    scene = scanned(session(tmp_path, patient1_FLAIR=flair, patient1_T1w=t1)).scenes[0]
    alone = {names(one)[0]: one.read(one.grid.full)[1] for one in scanned(tmp_path, NATIVE).scenes}
    _, quality = scene.read(scene.grid.full)
    is_air = {name: (flags & Quality.BACKGROUND) > 0 for name, flags in alone.items()}
    assert (is_air["FLAIR"] & ~is_air["T1w"]).sum() > 1000
    assert np.array_equal((quality & Quality.BACKGROUND) > 0, is_air["FLAIR"] & is_air["T1w"])
    assert np.argwhere(quality & Quality.NOT_FINITE).tolist() == [[12, 12, 20]]
    assert (scene.flags, scene.num_not_finite) == (("not_finite",), 1)


def test_integers_stay_integers_where_all_are(tmp_path: Path) -> None:
    wanted: dict[tuple[str, ...], str] = {
        ("uint8", "int16"): "int16",
        ("int16", "uint16"): "int32",
        ("uint8", "float32"): "float32",
        ("int32", "float32"): "float32",
        ("float64", "float64"): "float32",
    }
    for number, (types, dtype) in enumerate(wanted.items()):
        values = texture(SPACE, number)
        folder = session(tmp_path / str(number), **{name: values.astype(kind) for name, kind in zip(("T1w", "T2w"), types, strict=True)})
        scene = scanned(folder).scenes[0]
        pixels, _ = scene.read(scene.grid.full)
        assert scene.dtype == pixels.dtype == dtype
        for plane, kind in zip(pixels, types, strict=True):
            assert np.array_equal(plane, values.astype(kind))


def test_every_subset_of_a_session_is_a_scene_with_these_channels(tmp_path: Path) -> None:
    every = ("FLAIR", "T1ce", "T1w", "T2w")
    subsets = [part for count in range(1, 5) for part in itertools.combinations(every, count)]
    for number, part in enumerate(subsets):
        session(tmp_path / f"patient{number}", **{name: texture((5, 5, 5), every.index(name)) for name in reversed(part)})
    found = scanned(tmp_path)
    assert sorted(names(scene) for scene in found.scenes) == sorted(subsets)
    assert "15 sessions in 15 scenes" in found.notes[0]
    assert found.notes[0].endswith("and 9 more")


@needs_real
def test_real_sessions_of_three_sequences() -> None:
    folder = REAL / "mri" / "open_ms_mni"
    files = sorted((folder / "MNI" / "patient07").glob("*.nii.gz"))
    found = scan_volumes(files, folder, TOGETHER)
    assert [names(scene) for scene in found.scenes] == [("FLAIR", "T1w", "T2w")]
    assert [item.code for item in found.rejected] == ["looks_like_labels"]
