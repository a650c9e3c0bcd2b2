"""Volumes become a store: damaged files stop it above a limit, those that go bad later are counted, padding is nowhere data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mae_core.nd import token_valid
from mae_core.store import TileStore
from modalities.catalogue import scan
from modalities.quality import Quality
from pipelines.preparation import PreparationError, PrepareSettings, prepare
from pipelines.preparation_report import refuse_damaged
from pipelines.prepare import main, prepare_store
from pipelines.tiling_plan import SplitSettings
from tests.synthetic_volumes import NATIVE, REAL, broken, needs_real, save_volume, texture
from tests.tiny_runs import quick

__all__ = ["quick"]

SPACE = (12, 11, 10)
HERE = PrepareSettings(tile=(16, 16, 16), num_workers=0, min_valid_fraction=0.0, split=SplitSettings(val_fraction=0.3))


def archive(folder: Path, num_good: int, num_bad: int) -> Path:
    """Scans of patients, of whom the last ones have a torn file."""
    for number in range(num_good + num_bad):
        path = save_volume(folder / f"sub-{number:02}" / f"sub-{number:02}_T1w.nii.gz", texture(SPACE, number))
        if number >= num_good:
            broken(path, lambda data: data[:-300])
    return folder


def test_too_many_damaged_files_stop_the_run_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = archive(tmp_path / "data", 4, 2)
    for number in range(4):
        save_volume(data / f"sub-{number:02}" / "T1w_seg.nii.gz", (texture(SPACE) > 75).astype(np.uint8))
    words = [f"data={data}", f"out={tmp_path / 'out'}", "modality=mri", "reader.spacing_mm=null", "prepare.num_workers=0"]
    assert main([*words, "prepare.tile=[16,16,16]"]) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "2 of 6 files are damaged, more than prepare.max_rejected_fraction 0.2 allows; nothing was written" in error
    assert "2 truncated (the first is file-" in error
    assert "sub-0" not in error
    assert not (tmp_path / "out").exists()
    found = scan(data, NATIVE)
    assert (found.num_files, found.num_used, len(found.ignored)) == (10, 4, 0)
    assert sorted(item.code for item in found.rejected) == ["looks_like_labels"] * 4 + ["truncated"] * 2
    prepare_store(found, tmp_path / "out", NATIVE, HERE.model_copy(update={"max_rejected_fraction": 0.34}))
    assert set(TileStore.open(tmp_path / "out").index.scene) == {scene.name for scene in found.scenes}


@pytest.mark.parametrize(("num_bad", "limit", "is_refused"), [(0, 0.0, False), (1, 0.0, True), (1, 0.25, False), (2, 0.39, True)])
def test_the_share_is_of_files_that_could_be_scans(tmp_path: Path, num_bad: int, limit: float, is_refused: bool) -> None:
    """Label maps beside scans, few slices and formats that are not read are no damage."""
    data = archive(tmp_path / "data", 3, num_bad)
    for number in range(9):
        save_volume(data / "others" / f"{number}.nii.gz", (texture(SPACE, number) > 75).astype(np.uint8))
        save_volume(data / "others" / f"{number}_thin.nii.gz", texture(SPACE, number)[:2])
        (data / "others" / f"{number}.mgz").write_bytes(b"MGZ")
    found = scan(data, NATIVE)
    if is_refused:
        with pytest.raises(PreparationError, match=f"^{num_bad} of {3 + num_bad} files are damaged"):
            refuse_damaged(found.rejected, found.num_used, limit)
    else:
        refuse_damaged(found.rejected, found.num_used, limit)


def test_a_file_that_goes_bad_after_the_scan_is_counted_or_stops_the_run(tmp_path: Path) -> None:
    found = scan(archive(tmp_path / "data", 6, 0), NATIVE)
    broken(found.scenes[1].files[0], lambda data: data[:-300])
    report = prepare(found, tmp_path / "one", HERE)
    assert list(report.quarantined) == [found.scenes[1].name]
    assert "truncated" in report.quarantined[found.scenes[1].name]
    assert (report.found, report.accepted) == (6, 5)
    assert found.scenes[1].name not in TileStore.open(tmp_path / "one").index.scene.tolist(), "nothing takes its place"
    broken(found.scenes[2].files[0], lambda data: data[:-300])
    with pytest.raises(PreparationError, match=r"2 of 6 scenes cannot be read, more than prepare\.max_rejected_fraction 0\.2") as error:
        prepare(found, tmp_path / "two", HERE)
    assert "sub-0" not in str(error.value)
    found.scenes[2].files[0].unlink()
    with pytest.raises(
        PreparationError, match=r"^scene scan-[0-9a-f]{16}: a file cannot be read any more: No such file or directory$"
    ) as gone:
        prepare(found, tmp_path / "three", HERE)
    assert gone.value.__suppress_context__, "the cause names the file"


def test_a_volume_smaller_than_the_tile_is_padded_and_the_padding_is_nowhere_data(tmp_path: Path) -> None:
    found = scan(archive(tmp_path / "data", 4, 0), NATIVE)
    prepare(found, tmp_path / "out", HERE)
    store = TileStore.open(tmp_path / "out")
    scenes = {scene.name: scene for scene in found.scenes}
    inside = tuple(slice(0, size) for size in SPACE)
    padding = np.ones(store.space, bool)
    padding[inside] = False
    scores = {}
    for row in range(len(store)):
        tile = store.read(row)
        assert tile.extent == SPACE
        assert (tile.quality[padding] == Quality.PADDING).all()
        assert not (tile.quality[inside] & Quality.PADDING).any()
        assert (tile.pixels[:, padding] == 0).all()
        tokens = token_valid(torch.from_numpy(tile.quality == 0)[None], (4, 4, 4), 0.5).reshape(4, 4, 4)
        assert tokens[:3, :2, :2].all()
        assert not any(tokens.select(axis, 3).any() for axis in range(3)), "no token of padding alone"
        scene = scenes[str(store.index.scene[row])]
        pixels, quality = scene.read(scene.grid.full)
        (channel,) = scene.channels
        scores[row] = (pixels[0].astype(np.float64) * channel.scale + channel.offset)[quality == 0]
        assert store.index.valid_fraction[row] == pytest.approx((quality == 0).mean()), "of the voxels that were measured"
    train = np.concatenate([scores[row] for row in np.flatnonzero(store.index.split == "train")])
    assert store.statistics.count[0] == len(train)
    assert store.statistics.mean[0] == pytest.approx(train.mean(), abs=1e-6)
    assert store.statistics.std[0] == pytest.approx(train.std(), rel=1e-6)


@needs_real
@pytest.mark.parametrize("folder", ["mri/ptbp_tissue", "odd/nibabel", "odd/nifti_orientations"])
def test_real_folders_of_scans_and_labels_are_not_damaged(folder: str) -> None:
    found = scan(REAL / folder, NATIVE)
    refuse_damaged(found.rejected, found.num_used, 0.0)
