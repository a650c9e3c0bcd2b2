"""A split in a file says the side of every patient, under whatever name, in every data set; and it is sealed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mae_core.shards import StoreError
from mae_core.store import TileStore
from modalities.catalogue import scan
from modalities.medical import MriSettings
from modalities.pseudonyms import pseudonyms
from pipelines.catalogue import main as catalogue
from pipelines.catalogue import split_of
from pipelines.frozen_split import (
    DrawSettings,
    FrozenSplit,
    Group,
    Member,
    freeze,
    frozen_from,
    joined_patients,
    read_split,
    sides_of,
    split_digest,
    write_split,
)
from pipelines.preparation import PreparationError, PrepareSettings
from pipelines.prepare import prepare_store
from pipelines.store import main
from pipelines.store_merge import merge_stores
from pipelines.tiling_plan import SplitSettings, group_order, held_out_groups
from tests.synthetic_volumes import head, orientations, save_volume, turned
from tests.tiny_runs import tiny_store, wide

__all__ = ["wide"]

SIZE = 14
READER = MriSettings(spacing_mm=None)


def prepared(data: Path, out: Path, split: SplitSettings) -> TileStore:
    prepare_store(scan(data, READER), out, READER, PrepareSettings(tile=(SIZE,) * 3, num_workers=0, split=split))
    return TileStore.open(out)


def patient(folder: Path, name: str, seed: int, turn: int = 0) -> Path:
    values, affine = turned(head(SIZE, seed=seed), np.eye(4), orientations()[turn])
    return save_volume(folder / f"{name}_T1w.nii", values, affine)


def sides(store: TileStore) -> dict[str, str]:
    return dict(zip(store.index.group.tolist(), store.index.split.tolist(), strict=True))


sizes = st.dictionaries(st.text("abcdef", min_size=1, max_size=3), st.integers(1, 9), min_size=3, max_size=12)


@given(sizes=sizes, val=st.floats(0, 0.49), test=st.floats(0, 0.49), seed=st.integers(0, 5))
def test_every_group_is_on_one_side_and_enough_is_held_out(sizes: dict[str, int], val: float, test: float, seed: int) -> None:
    settings = DrawSettings(val_fraction=val, test_fraction=test, seed=seed)
    split = freeze([Group((name,), frozenset(), size) for name, size in sizes.items()], settings)
    assert set(split.groups) == set(sizes)
    counts, total = split.counts(), sum(sizes.values())
    assert counts["train"] >= 1
    for side, fraction in (("val", val), ("test", test)):
        held = sum(size for name, size in sizes.items() if split.groups[name].side == side)
        assert (counts[side] > 0) is (fraction > 0)
        assert held >= fraction * total or counts["train"] == 1
    again = freeze([Group((name,), frozenset(), size) for name, size in reversed(sizes.items())], settings)
    assert again.digest == split.digest


def test_with_one_held_out_side_the_draw_is_that_of_prepare() -> None:
    sizes = {f"subject-{number}": 1 + number % 3 for number in range(30)}
    split = freeze([Group((name,), frozenset(), size) for name, size in sizes.items()], DrawSettings(val_fraction=0.3, seed=4))
    held = {name for name, member in split.groups.items() if member.side == "val"}
    assert held == held_out_groups(sizes, SplitSettings(val_fraction=0.3, seed=4))


def test_the_test_side_is_drawn_first_so_that_it_stays_whatever_is_held_out_beside_it() -> None:
    groups = [Group((f"subject-{number}",)) for number in range(8)]
    order = group_order([group.names[0] for group in groups], 3)
    for val, held in ((0.0, 0), (0.25, 2), (0.5, 4)):
        split = freeze(groups, DrawSettings(test_fraction=0.25, val_fraction=val, seed=3))
        found = [split.groups[name].side for name in order]
        assert found == ["test"] * 2 + ["val"] * held + ["train"] * (6 - held)


def test_too_few_groups_and_fractions_that_leave_nothing_are_errors() -> None:
    with pytest.raises(PreparationError, match="2 groups cannot be on 3 sides; give more patients"):
        freeze([Group(("a",)), Group(("b",))], DrawSettings(val_fraction=0.1, test_fraction=0.1))
    with pytest.raises(ValidationError, match="leave nothing to train on"):
        DrawSettings(val_fraction=0.5, test_fraction=0.5)


def test_a_file_that_was_altered_damaged_or_is_there_already_is_refused(tmp_path: Path) -> None:
    split = FrozenSplit(key="key-1", groups={"a": Member(side="train"), "b": Member(side="test", scans=("12",))})
    write_split(tmp_path / "split.json", split)
    assert read_split(tmp_path / "split.json") == split
    with pytest.raises(PreparationError, match="a frozen split is not overwritten"):
        write_split(tmp_path / "split.json", split)
    text = (tmp_path / "split.json").read_text()
    (tmp_path / "split.json").write_text(text.replace('"test"', '"train"'))
    with pytest.raises(PreparationError, match=r"prepare\.split\.file was altered: its content does not give its sha256"):
        read_split(tmp_path / "split.json")
    (tmp_path / "split.json").write_text(text.replace("key-1", "key-2"))
    with pytest.raises(PreparationError, match="was altered"):
        read_split(tmp_path / "split.json")
    for damage in (text[:-20], "[]", json.dumps({"sha256": ""}), text.replace('"format_version": 1', '"format_version": 2')):
        (tmp_path / "split.json").write_text(damage)
        with pytest.raises(PreparationError, match=r"prepare\.split\.file is no frozen split of this version"):
            read_split(tmp_path / "split.json")
    with pytest.raises(PreparationError, match=r"prepare\.split\.file cannot be read: No such file") as caught:
        read_split(tmp_path / "sub-07" / "split.json")
    assert "sub-07" not in str(caught.value)


def test_unknown_torn_and_foreign_groups_are_errors_that_count_them() -> None:
    split = FrozenSplit(key="key-1", groups={"a": Member(side="train", scans=("1",)), "b": Member(side="test", scans=("2",))})
    groups = {"a": Group(("a",)), "c": Group(("c",)), "d": Group(("d",), frozenset({"2"}))}
    with pytest.raises(PreparationError, match=r"does not know 1 of 3 groups \(c\); freeze anew with them, or set prepare.split.unknown"):
        sides_of(split, groups, "refuse", "key-1")
    assert sides_of(split, groups, "train", "key-1") == {"a": "train", "c": "train", "d": "test"}, "a copy is known by its voxels"
    assert sides_of(split, {"e": Group(("e", "b"))}, "refuse", "key-1") == {"e": "test"}, "by any of its names"
    with pytest.raises(PreparationError, match=r"1 groups on several sides"):
        sides_of(split, {"a": Group(("a", "b"))}, "train", "key-1")
    with pytest.raises(PreparationError, match=r"has 1 groups on several sides, because they share a scan with others \(a\)"):
        sides_of(split, {"a": Group(("a",), frozenset({"2"}))}, "train", "key-1")
    with pytest.raises(PreparationError, match="was frozen under the pseudonyms of key-1 and these are of key-2; set TERRAVOX_KEY_FILE"):
        sides_of(split, groups, "train", "key-2")


def test_two_sessions_two_data_sets_and_a_renamed_copy_of_a_patient_are_on_one_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The split is made from one data set; the other has a second session of every patient, and copies of scans under new names."""
    for number in range(8):
        patient(tmp_path / "one", f"sub-{number}_ses-1", number)
        patient(tmp_path / "two", f"sub-{number}_ses-2", 50 + number)
        patient(tmp_path / "copies", f"sub-{90 + number}", number, turn=5 * number)
    first = prepared(tmp_path / "one", tmp_path / "first", SplitSettings(val_fraction=0.3))
    file = tmp_path / "split.json"
    draw = ["draw.test_fraction=0.25", "draw.val_fraction=0.25", "draw.seed=3"]
    assert main(["split", str(first.path), "--out", str(file), *draw]) == 0
    assert "8 groups (4 train, 2 val, 2 test), digest" in " ".join(capsys.readouterr().out.split())
    fixed = SplitSettings(file=file)
    frozen = {name: member.side for name, member in read_split(file).groups.items()}
    assert b"sub-" not in file.read_bytes().replace(b"subject-", b"")
    one, two = (prepared(tmp_path / name, tmp_path / f"store-{name}", fixed) for name in ("one", "two"))
    assert sides(one) == sides(two) == frozen
    assert split_digest(one.index) == split_digest(two.index) == one.manifest["split_digest"]
    assert split_digest(first.index) != split_digest(one.index)
    copies = prepared(tmp_path / "copies", tmp_path / "store-copies", fixed)
    known = dict(zip(one.index.voxel_digests.tolist(), one.index.split.tolist(), strict=True))
    assert dict(zip(copies.index.voxel_digests.tolist(), copies.index.split.tolist(), strict=True)) == known
    assert not set(sides(copies)) & set(frozen), "under other pseudonyms"
    plan = json.loads((copies.path / "manifest.json").read_text())["plan"]
    assert plan["settings"]["split"]["frozen"] == read_split(file).digest
    assert str(tmp_path) not in json.dumps(plan["settings"])

    assert len(merge_stores([one.path, two.path, copies.path], tmp_path / "view")) == 24
    other = prepared(tmp_path / "copies", tmp_path / "other", SplitSettings(val_fraction=0.5, seed=1))
    with pytest.raises(StoreError, match=r"\d scans are trained on in .* and held out in .*, by their voxels; prepare them as one"):
        merge_stores([one.path, other.path], tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_a_store_that_grows_keeps_to_its_frozen_split_and_knows_a_copy(tmp_path: Path) -> None:
    for number in range(6):
        patient(tmp_path / "data", f"sub-{number}", number)
    first = prepared(tmp_path / "data", tmp_path / "store", SplitSettings(val_fraction=0.3))
    side = dict(zip(first.index.voxel_digests.tolist(), first.index.split.tolist(), strict=True))
    for number in range(6):
        (tmp_path / "data" / f"sub-{number}_T1w.nii").rename(tmp_path / "data" / f"sub-{number + 40}_T1w.nii")
    grown = prepared(tmp_path / "data", tmp_path / "store", SplitSettings(val_fraction=0.3))
    assert len(grown) == 12
    assert [side[scans] for scans in grown.index.voxel_digests] == grown.index.split.tolist()


def test_a_catalogue_freezes_the_split_of_its_patients(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(6):
        patient(tmp_path / "data", f"sub-{number}_ses-1", number)
    patient(tmp_path / "data", "sub-0_ses-2", 50)
    file = tmp_path / "sub-3.json"
    words = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"), "reader.spacing_mm=null", "--split", str(file)]
    assert catalogue([*words, "draw.test_fraction=0.2", "draw.val_fraction=0.2"]) == 0
    frozen = read_split(file)
    assert sum(frozen.counts().values()) == 6
    assert all(frozen.counts().values())
    result = (tmp_path / "out" / "result.json").read_text()
    assert json.loads(result)["split"] == {"sha256": frozen.digest, **frozen.counts()}
    assert "sub-3" not in result + (tmp_path / "out" / "config.json").read_text() + capsys.readouterr().out
    store = prepared(tmp_path / "data", tmp_path / "store", SplitSettings(file=file))
    assert sides(store) == {name: member.side for name, member in frozen.groups.items()}
    assert {scan for member in frozen.groups.values() for scan in member.scans} == {
        scan for scans in store.index.voxel_digests for scan in scans
    }
    assert catalogue(words) == 1
    assert "a frozen split is not overwritten" in " ".join(capsys.readouterr().err.split())


def test_a_split_that_leaves_nothing_to_train_on_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for number in range(2):
        patient(tmp_path / "data", f"sub-{number}", number)
    names = [scene.group for scene in scan(tmp_path / "data", READER).scenes]
    write_split(tmp_path / "split.json", FrozenSplit(key=pseudonyms().fingerprint, groups={name: Member(side="test") for name in names}))
    with pytest.raises(
        PreparationError, match=r"split\.file holds out all 2 groups of these data \(test\), and a store needs tiles to train"
    ):
        prepared(tmp_path / "data", tmp_path / "store", SplitSettings(file=tmp_path / "split.json"))
    assert not (tmp_path / "store").exists()


def test_patients_who_share_a_scan_are_known_by_all_their_names(tmp_path: Path) -> None:
    """Two are one; later each comes alone, with nothing but scans that nobody has seen."""
    for number in range(4):
        patient(tmp_path / "one", f"sub-{number}_ses-1", number)
    patient(tmp_path / "one", "sub-9_ses-1", 2)
    for number in (2, 9):
        patient(tmp_path / f"only-{number}", f"sub-{number}_ses-2", 60 + number)
    together = prepared(tmp_path / "one", tmp_path / "store", SplitSettings(val_fraction=0.3))
    (shared,) = joined_patients(together).values()
    assert len(shared) == 2
    alone = {number: scan(tmp_path / f"only-{number}", READER).scenes[0].group for number in (2, 9)}
    assert set(alone.values()) == set(shared)
    for draw in (None, DrawSettings(val_fraction=0.5, seed=1)):
        split = frozen_from(together, draw)
        assert set(split.groups) == set(sides(together)) | set(shared)
        assert split.groups[shared[0]].side == split.groups[shared[1]].side
        write_split(tmp_path / f"{draw is None}.json", split)
        for number, name in alone.items():
            store = prepared(
                tmp_path / f"only-{number}", tmp_path / f"{draw is None}-{number}", SplitSettings(file=tmp_path / f"{draw is None}.json")
            )
            assert sides(store) == {name: split.groups[shared[0]].side}
    assert set(split_of(scan(tmp_path / "one", READER), DrawSettings()).groups) == set(split.groups)
    (group,) = set(shared) & set(sides(together))
    (other,) = set(shared) - {group}
    write_split(tmp_path / "other.json", FrozenSplit(key=split.key, groups={other: Member(side="test")}))
    assert (
        sides(prepared(tmp_path / "one", tmp_path / "by-other", SplitSettings(file=tmp_path / "other.json", unknown="train")))[group]
        == "test"
    )
    away = "train" if sides(together)[group] == "val" else "test"
    write_split(tmp_path / "away.json", FrozenSplit(key=split.key, groups={other: Member(side=away)}))
    number = next(number for number, name in alone.items() if name == other)
    patient(tmp_path / f"only-{number}", "sub-8_ses-2", 90)
    torn = prepared(tmp_path / f"only-{number}", tmp_path / "torn", SplitSettings(file=tmp_path / "away.json", unknown="train"))
    with pytest.raises(StoreError, match=f"patient {other}, who shares a scan with others, is trained on in one store and held out in"):
        merge_stores([together.path, torn.path], tmp_path / "view")
    (tmp_path / "one" / "sub-9_ses-1_T1w.nii").unlink()
    (tmp_path / "only-9" / "sub-9_ses-2_T1w.nii").rename(tmp_path / "one" / "sub-9_ses-2_T1w.nii")
    grown = prepared(tmp_path / "one", tmp_path / "store", SplitSettings(val_fraction=0.3))
    assert len(grown) == 5
    assert set(sides(grown)) == set(sides(together)), "the one who came back is still of the two"


def test_the_tiles_of_a_store_are_what_is_shared_out_and_all_scans_of_a_patient_are_its_own(tmp_path: Path) -> None:
    for number, sessions in enumerate((3, 1, 1, 1)):
        for session in range(sessions):
            patient(tmp_path / "data", f"sub-{number}_ses-{session}", 10 * number + session)
    store = prepared(tmp_path / "data", tmp_path / "store", SplitSettings(val_fraction=0.3))
    known = {name: {scan for (scan,) in store.index.voxel_digests[store.index.group == name]} for name in sides(store)}
    assert {name: set(member.scans) for name, member in frozen_from(store, None).groups.items()} == known
    for seed in range(8):
        split = frozen_from(store, DrawSettings(val_fraction=0.5, seed=seed))
        held = [split.groups[name].side == "val" for name in store.index.group]
        assert split_of(scan(tmp_path / "data", READER), DrawSettings(val_fraction=0.5, seed=seed)) == split, "a tile is a scan here"
        assert 3 <= sum(held) < 6


def test_places_are_frozen_by_the_names_of_their_groups(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = tiny_store(tmp_path)
    assert main(["split", str(store.path), "--out", str(tmp_path / "split.json")]) == 0
    split = read_split(tmp_path / "split.json")
    assert {name: member.side for name, member in split.groups.items()} == sides(store)
    assert split.key == ""
    assert main(["split", str(store.path), "--out", str(tmp_path / "split.txt")]) == 1
    assert "the file of a split must end in .json" in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"unit": "block"}, {"regions": {"x": ("a*",)}}, {"hold_out_first": ("a",)}])
def test_a_frozen_split_goes_with_whole_groups_alone(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="file says the side of whole groups: leave out unit, regions"):
        SplitSettings.model_validate({"file": "split.json", **change})


@given(sizes=sizes, first=st.sets(st.text("abcdef", min_size=1, max_size=3)), never=st.sets(st.text("abcdef", min_size=1, max_size=3)))
def test_some_are_held_out_first_and_some_only_where_there_are_no_others(sizes: dict[str, int], first: set[str], never: set[str]) -> None:
    settings = SplitSettings(val_fraction=0.3, hold_out_first=tuple(first), never_hold_out=tuple(never))
    held = held_out_groups(sizes, settings)
    free = set(sizes) - (never - first)
    assert 0 < len(held) < len(sizes)
    if free:
        assert held <= free
    if held - first:
        assert first & free <= held
