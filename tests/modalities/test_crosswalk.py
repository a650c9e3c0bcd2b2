"""A crosswalk is readable by its owner alone, lies where nobody is handed it, follows no link and covers all that a scan found."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest

from modalities.catalogue import scan
from modalities.crosswalk import HEAD, stands_for, write_crosswalk
from modalities.medical import MriSettings
from modalities.pseudonyms import pseudonyms
from modalities.scene import SceneError
from tests.synthetic_volumes import SPACE, save_volume, texture


def rows(path: Path) -> list[tuple[str, ...]]:
    with path.open(newline="") as stream:
        return [tuple(row) for row in csv.reader(stream)]


def test_only_its_owner_can_read_it_whatever_was_there_before(tmp_path: Path) -> None:
    path = tmp_path / "crosswalk.csv"
    before = os.umask(0)
    try:
        assert write_crosswalk(path, {"subject-1f": "Meyer, Anna"}, ()) == 1
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    assert rows(path) == [HEAD, ("subject-1f", "subject", "Meyer, Anna")]
    path.chmod(0o644)
    assert write_crosswalk(path, {"scan-2a": "b.nii\nc"}, ()) == 2
    assert path.stat().st_mode & 0o777 == 0o600
    assert rows(path) == [HEAD, ("scan-2a", "scan", "b.nii\nc"), ("subject-1f", "subject", "Meyer, Anna")]
    assert [entry.name for entry in tmp_path.iterdir()] == ["crosswalk.csv"]


@pytest.mark.parametrize("inside", ["run/crosswalk.csv", "run/deep/crosswalk.csv", "elsewhere/../run/crosswalk.csv", "link/crosswalk.csv"])
def test_it_does_not_lie_in_what_is_handed_on(tmp_path: Path, inside: str) -> None:
    (tmp_path / "run" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with pytest.raises(SceneError, match="lies in a folder of the run, of a store or of MLflow, which are handed on") as caught:
        write_crosswalk(tmp_path / inside, {"subject-1f": "Meyer"}, [tmp_path / "absent", tmp_path / "run"])
    assert str(tmp_path) not in str(caught.value)
    assert not list((tmp_path / "run").rglob("*.csv"))


def test_a_link_is_not_followed_and_no_other_file_is_written_over(tmp_path: Path) -> None:
    target = tmp_path / "target.csv"
    target.write_text(",".join(HEAD) + "\n")
    (tmp_path / "link.csv").symlink_to(target)
    with pytest.raises(SceneError, match="is a link"):
        write_crosswalk(tmp_path / "link.csv", {"subject-1f": "Meyer"}, ())
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(SceneError, match="there already and is no crosswalk"):
        write_crosswalk(tmp_path / "thesis.txt", {"subject-1f": "Meyer"}, ())
    with pytest.raises(SceneError, match=r"the folder of --crosswalk does not exist"):
        write_crosswalk(tmp_path / "absent" / "a.csv", {"subject-1f": "Meyer"}, ())
    assert target.read_text() == ",".join(HEAD) + "\n"
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_every_pseudonym_of_a_scan_is_in_it(tmp_path: Path) -> None:
    good = save_volume(tmp_path / "a" / "sub-anna_T1w.nii.gz", texture(SPACE))
    bad = tmp_path / "a" / "sub-bert_T1w.nii.gz"
    bad.write_bytes(good.read_bytes()[:200])
    odd = save_volume(Path(os.fsdecode(os.fsencode(tmp_path) + b"/a/sub-m\xfcller_T1w.nii.gz")), texture(SPACE, 1))
    catalogue = scan(tmp_path / "a", MriSettings())
    told = {scene.name for scene in catalogue.scenes} | {scene.group for scene in catalogue.scenes}
    told |= {item.file for item in catalogue.rejected}
    assert told <= catalogue.names.keys()
    assert {catalogue.names[scene.name] for scene in catalogue.scenes} == {str(good), str(odd)}
    assert catalogue.names[catalogue.rejected[0].file] == str(bad)
    assert catalogue.names[pseudonyms().of("subject", "sub-anna")] == "sub-anna"
    assert "anna" not in repr(catalogue)
    write_crosswalk(tmp_path / "crosswalk.csv", catalogue.names, ())
    assert os.fsencode(odd) in (tmp_path / "crosswalk.csv").read_bytes()


def test_a_series_is_told_by_its_folder_and_what_tells_it_apart() -> None:
    files = [Path("/pacs/anna/s1/1.dcm"), Path("/pacs/anna/s1/2.dcm")]
    assert stands_for(files, "1.2.840.7 echo 2") == "2 files in /pacs/anna/s1: 1.2.840.7 echo 2"
    assert stands_for(files[:1], "1.2.840.7") == "/pacs/anna/s1/1.dcm"
