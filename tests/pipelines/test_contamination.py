"""Who was in pretraining and is held out now is found by pseudonym and by voxels, and going on is a choice that is recorded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mae_core.export import load_encoder
from mae_core.store import TileStore
from mae_core.tracking import Tracker, TrackingSettings
from modalities.catalogue import scan
from modalities.medical import MriSettings
from pipelines.contamination import (
    TRAINING_DATA,
    Exposure,
    Sides,
    TrainingData,
    blocks_of,
    load_training_data,
    preferred,
    shows_patients,
    source_of,
    trained_on,
    verdict_facts,
    verdict_on,
)
from pipelines.finetune_segmentation import FinetuneSettings
from pipelines.finetune_segmentation import main as finetune
from pipelines.frozen_split import Group
from pipelines.labelled import labelled_store
from pipelines.preparation import PrepareSettings
from pipelines.prepare import prepare_store
from pipelines.pretrain_mri import main as pretrain
from pipelines.run_folder import RunError, recall
from pipelines.tiling_plan import SplitSettings
from tests.synthetic_volumes import head, orientations, save_volume, turned
from tests.tiny_runs import quick, shared_tracking, tiny_store, wide

__all__ = ["quick", "wide"]

SIZE = 14
READER = MriSettings(spacing_mm=None)


def archive(folder: Path, numbers: range, sessions: int = 1) -> Path:
    for number in numbers:
        for session in range(sessions):
            name = f"sub-{number:02}_ses-{session}_T1w.nii.gz"
            save_volume(folder / f"sub-{number:02}" / name, head(SIZE, seed=100 * session + number))
    return folder


def prepared(data: Path, out: Path, **split: Any) -> TileStore:
    settings = PrepareSettings(tile=(SIZE,) * 3, num_workers=0, split=SplitSettings(**split))
    prepare_store(scan(data, READER), out, READER, settings)
    return TileStore.open(out)


def learned(store: TileStore) -> TrainingData:
    return TrainingData(sources=(source_of(store, "pretraining"),))


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> TileStore:
    """A pretraining's store of ten patients with two sessions each."""
    folder = tmp_path_factory.mktemp("before")
    return prepared(archive(folder / "data", range(10), 2), folder / "store", val_fraction=0.2)


def sides(store: TileStore) -> dict[str, str]:
    return dict(zip(store.index.group.tolist(), store.index.split.tolist(), strict=True))


def test_what_a_model_was_trained_on_is_pseudonyms_and_digests_by_side(before: TileStore) -> None:
    source = source_of(before, "pretraining")
    found = sides(before)
    assert set(source.patients.train) == {group for group, side in found.items() if side == "train"}
    assert set(source.patients.held_out) == {group for group, side in found.items() if side == "val"}
    assert (len(source.scans.train), len(source.scans.held_out)) == (2 * len(source.patients.train), 2 * len(source.patients.held_out))
    assert source.key == before.attributes["pseudonym_key"]
    assert source.split == before.manifest["split_digest"]
    assert TrainingData.model_validate_json(learned(before).files()[TRAINING_DATA]) == learned(before)
    assert b"sub-0" not in learned(before).files()[TRAINING_DATA]


def test_a_held_out_patient_that_was_trained_on_is_an_error_until_it_is_allowed(
    tmp_path: Path, before: TileStore, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other sessions of the same patients: known by pseudonym alone."""
    later = prepared(archive(tmp_path / "data", range(5, 15)), tmp_path / "store", val_fraction=0.5, seed=3)
    trained = set(source_of(before, "pretraining").patients.train)
    seen = sorted(group for group, side in sides(later).items() if side == "val" and group in trained)
    assert seen, "the draw is such that some are held out"
    with pytest.raises(RunError) as caught:
        verdict_on(learned(before), later, allow=False)
    assert f"{len(seen)} of 5 held-out patients were in the encoder's training data ({', '.join(seen)}; " in str(caught.value)
    assert "allow_seen_patients=true, which is recorded" in str(caught.value)
    verdict = verdict_on(learned(before), later, allow=True)
    assert verdict is not None
    assert (verdict.status, verdict.patients) == ("allowed", tuple(seen))
    assert verdict.words == f"allowed: {len(seen)} held-out patients were trained on"
    assert "the figures tell what it remembers, too" in " ".join(capsys.readouterr().out.split())


def test_a_renamed_turned_copy_is_known_by_its_voxels_under_another_key_too(tmp_path: Path, before: TileStore) -> None:
    data = archive(tmp_path / "data", range(20, 24))
    trained = before.index.scene[before.rows("train")[0]]
    number = next(
        number
        for number in range(10)
        for scene in scan(archive(tmp_path / f"one{number}", range(number, number + 1)), READER).scenes
        if scene.name == trained or scene.group == before.index.group[before.rows("train")[0]]
    )
    values, affine = turned(head(SIZE, seed=number), np.eye(4), orientations()[17])
    save_volume(data / "sub-99_T1w.nii", values.astype(np.float64) * 3, affine)
    copied = next(scene.group for scene in scan(data, READER).scenes if "sub-99" in scene.files[0].name)
    store = prepared(data, tmp_path / "store", val_fraction=0.1, hold_out_first=(copied,))
    for key in (store.attributes["pseudonym_key"], "key-0123456789abcdef"):
        foreign = learned(before)
        foreign = foreign.model_copy(update={"sources": (foreign.sources[0].model_copy(update={"key": key}),)})
        verdict = verdict_on(foreign, store, allow=True)
        assert verdict is not None
        assert (verdict.patients, verdict.num_scans) == ((copied,), 1)
        assert ("another key" in verdict.why) is (key == "key-0123456789abcdef")


def test_of_patients_who_share_a_scan_one_who_was_trained_on_is_enough(tmp_path: Path, before: TileStore) -> None:
    """The encoder knows other scans of both; in the store they are one, called by the first of their pseudonyms."""
    trained = set(source_of(before, "pretraining").patients.train)
    alone = {number: scan(archive(tmp_path / f"{number}", range(number, number + 1)), READER).scenes[0].group for number in range(10)}
    known = next(number for number, group in alone.items() if group in trained)
    for stranger in range(70, 90):
        group = scan(archive(tmp_path / f"{stranger}", range(stranger, stranger + 1)), READER).scenes[0].group
        if group < alone[known]:
            break
    data = archive(tmp_path / "data", range(91, 93))
    for number in (known, stranger):
        save_volume(data / f"sub-{number:02}_ses-5_T1w.nii.gz", head(SIZE, seed=777))
    store = prepared(data, tmp_path / "store", val_fraction=0.1, hold_out_first=(group,))
    assert sides(store)[group] == "val"
    assert alone[known] not in sides(store)
    verdict = verdict_on(learned(before), store, allow=True)
    assert verdict is not None
    assert (verdict.patients, verdict.num_scans) == ((group,), 0)
    both = {group, alone[known]}
    assert set(source_of(store, "fine-tuning").patients.held_out) == both
    assert set(source_of(prepared(data, tmp_path / "other", never_hold_out=(group,)), "fine-tuning").patients.train) >= both


def test_what_cannot_be_checked_is_told_and_is_not_passed(tmp_path: Path, before: TileStore, capsys: pytest.CaptureFixture[str]) -> None:
    verdict = verdict_on(None, before, allow=False)
    assert verdict is not None
    assert verdict.record() == {"status": "unchecked", "patients": [], "scans": 0, "why": "the encoder does not say what it was trained on"}
    assert "not checked whether held-out patients were in" in " ".join(capsys.readouterr().out.split())
    gone_on = trained_on(None, before, "pretraining", "the encoder that it began with")
    assert gone_on is not None
    other = prepared(archive(tmp_path / "data", range(30, 34)), tmp_path / "store", val_fraction=0.3)
    partly = verdict_on(gone_on, other, allow=False)
    assert partly is not None
    assert (partly.status, partly.why) == ("unchecked", "the encoder that it began with does not say what it was trained on")
    assert verdict_on(learned(before), other, allow=False).record()["status"] == "none"  # type: ignore[union-attr]


def test_images_of_places_are_left_alone(tmp_path: Path) -> None:
    store = tiny_store(tmp_path)
    assert not shows_patients(store)
    assert trained_on(None, store, "pretraining", "") is None
    assert verdict_on(None, store, allow=False) is None


def test_pseudonyms_of_another_key_or_of_none_name_nobody(before: TileStore) -> None:
    """Equal words under two keys are two people; names of a store without a key are not kept at all."""
    source, key = source_of(before, "pretraining"), before.attributes["pseudonym_key"]
    blind = source.model_copy(update={"scans": Sides()})
    trained, held = source.patients.train[0], source.patients.held_out[0]
    for ours, theirs, is_known in ((key, key, True), (key, "key-1", False), ("", "", False)):
        exposure = Exposure(TrainingData(sources=(blind.model_copy(update={"key": theirs}),)), ours, "")
        assert exposure.of([trained], ()) == (is_known, frozenset(), False)
        assert exposure.of([held], ()) == (False, frozenset(), is_known)
        assert bool(exposure.doubts) is not is_known
    nameless = replace(before, whole=replace(before.whole, attributes={**before.attributes, "pseudonym_key": ""}))
    assert source_of(nameless, "pretraining").patients == Sides()
    assert source_of(nameless, "pretraining").scans == source.scans
    assert shows_patients(
        replace(before, whole=replace(before.whole, index=replace(before.index, voxel_digests=np.full(len(before), None))))
    )


def test_who_was_trained_on_once_is_not_held_out_by_another_training(before: TileStore) -> None:
    """Known by voxels alone, and in two trainings on two sides."""
    source = source_of(before, "pretraining")
    other = source.model_copy(update={"scans": Sides(train=source.scans.held_out)})
    scan = source.scans.held_out[0]
    assert Exposure(learned(before), "", "").of(["new"], [scan]) == (False, frozenset(), True)
    assert Exposure(TrainingData(sources=(source, other)), "", "").of(["new"], [scan]) == (False, {scan}, False)


def test_the_test_side_is_held_out_too_and_a_later_form_is_refused(tmp_path: Path, before: TileStore) -> None:
    side = before.index.split.copy()
    side[before.rows("train")] = "test"
    later = replace(before, whole=replace(before.whole, index=replace(before.index, split=side)))
    verdict = verdict_on(learned(before), later, allow=True)
    assert verdict is not None
    assert set(verdict.patients) == set(source_of(before, "pretraining").patients.train)
    (tmp_path / TRAINING_DATA).write_text('{"format_version": 2}')
    with pytest.raises(RunError, match=r"training_data\.json of the model is not of a form that this version reads \(1 entries\)"):
        load_training_data(tmp_path)


def test_what_pretraining_held_out_is_held_out_first_and_what_it_saw_is_not(before: TileStore) -> None:
    held = {group for group, side in sides(before).items() if side == "val"}
    trained = set(sides(before)) - held
    changes = preferred(learned(before), before.attributes["pseudonym_key"], "", {name: Group((name,)) for name in (*sides(before), "new")})
    assert (set(changes["hold_out_first"]), set(changes["never_hold_out"])) == (held, trained)
    assert preferred(learned(before), before.attributes["pseudonym_key"], "", {"new": Group(("new",))}) == {}
    assert preferred(None, "", "", {"new": Group(("new",))}) == {}


def test_parts_of_patients_are_compared_as_parts_only_where_both_are_cut_alike(tmp_path: Path, before: TileStore) -> None:
    data = archive(tmp_path / "data", range(2))
    settings = {"unit": "block", "block_tiles": 1, "val_fraction": 0.3}
    reader = PrepareSettings(tile=(7, 7, 7), num_workers=0, min_valid_fraction=0.0, split=SplitSettings.model_validate(settings))
    prepare_store(scan(data, READER), tmp_path / "blocks", READER, reader)
    blocks = TileStore.open(tmp_path / "blocks")
    same = verdict_on(learned(blocks), blocks, allow=False)
    assert same is not None
    assert same.status == "none", "each block is on one side, though each scan is on both"
    row = blocks.rows("train")[0]
    group, (digest,) = blocks.index.group[row], blocks.index.voxel_digests[row]
    part = digest + group[group.index(" block ") :]
    assert Exposure(learned(blocks), "", blocks_of(blocks)).of([group], [digest]) == (False, {part}, False), (
        "known by the voxels of the block"
    )
    whole = verdict_on(learned(blocks), prepared(data, tmp_path / "whole", val_fraction=0.3), allow=True)
    assert whole is not None
    assert len(whole.patients) == 1, "a patient of whom a part was trained on"
    assert Exposure(learned(before), before.attributes["pseudonym_key"], "1 tiles of 7x7x7").of([blocks.index.group[0]], ())[0] is (
        sides(before)[blocks.index.group[0].partition(" block ")[0]] == "train"
    )


def test_the_line_holds_out_what_pretraining_did_and_records_who_it_was_told_to_go_on_with(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pretraining holds out one of six patients, fine-tuning asks for two: by default it is judged on the one."""
    uri = shared_tracking(tmp_path_factory)
    images = archive(tmp_path / "data", range(6))
    for image in sorted(images.rglob("*.nii.gz")):
        labels = (head(SIZE) > 50).astype(np.uint8)
        save_volume(tmp_path / "labels" / image.relative_to(images), labels)
    tiny = ["model.encoder.preset=nano", "model.encoder.patch=[7]", "crop=[14]"]
    tiny += ["model.decoder.width=16", "model.decoder.depth=1", "model.decoder.heads=2", "prepare.split.val_fraction=0.1"]
    common = ["train.steps=1", "train.eval_steps=1", "train.device=cpu", "train.precision=fp32", "loader.global_batch_size=2"]
    common += [f"prepare.tile=[{SIZE},{SIZE},{SIZE}]", "prepare.num_workers=0", f"tracking.uri={uri}", "tracking.system_metrics=false"]
    encoder = tmp_path / "encoder"
    assert pretrain([f"data={images}", f"out={encoder}", *tiny, *common]) == 0
    data = load_training_data(encoder / "model")
    assert data is not None
    assert recall(encoder)["digests"]["split"] == data.sources[0].split == recall(encoder)["config"]["split_digest"]
    assert len(data.sources[0].patients.held_out) == 1

    prepare = PrepareSettings(tile=(SIZE,) * 3, num_workers=0, split=SplitSettings(val_fraction=0.3, seed=5))
    settings = FinetuneSettings(encoder=str(encoder), data=images, labels=tmp_path / "labels", out=tmp_path / "first", prepare=prepare)
    first = labelled_store(settings, load_encoder(encoder / "model")[1], data)
    told = " ".join(capsys.readouterr().out.split())
    assert "5 of 6 patients were in the encoder's training data and are trained on again; held out are the 1 that its" in told
    assert [group for group, side in sides(first).items() if side == "val"] == list(data.sources[0].patients.held_out)
    verdict = verdict_on(data, first, allow=False)
    assert verdict is not None
    assert verdict_facts(verdict) == {"seen_patients": {"status": "none", "patients": [], "scans": 0, "why": ""}}

    anew = [f"encoder={encoder}", f"data={images}", f"labels={tmp_path / 'labels'}", "init=pretrained", "head.features=4", *common]
    anew += ["prepare.split.val_fraction=0.3", "prepare.split.seed=5", "split_like_pretraining=false", f"out={tmp_path / 'second'}"]
    assert finetune(anew) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "2 of 2 held-out patients were in the encoder's training data" in told
    assert "2 of their scans are known by their voxels" in told
    assert finetune([*anew, "allow_seen_patients=true"]) == 0
    second = recall(tmp_path / "second")
    assert (second["seen_patients"]["status"], len(second["seen_patients"]["patients"])) == ("allowed", 2)
    words = json.loads((tmp_path / "second" / "model" / "model.json").read_text())["lineage"]["seen_patients"]
    assert words == "allowed: 2 held-out patients were trained on"
    tags = Tracker(TrackingSettings(uri=uri), tmp_path / "second").client.get_run(second["mlflow"]["run_id"]).data.tags
    assert tags["seen_patients"] == words
    both = load_training_data(tmp_path / "second" / "model")
    assert both is not None
    assert [source.role for source in both.sources] == ["pretraining", "fine-tuning"]
    assert set(both.sources[1].patients.held_out) == set(second["seen_patients"]["patients"])
