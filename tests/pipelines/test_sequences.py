"""Sequences through the line: each alone in pretraining, together in fine-tuning; a session may lack some; patches of unequal sides."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from mae_core.export import load_encoder, load_segmenter
from mae_core.store import TileStore
from modalities.catalogue import scan
from modalities.medical import MriSettings
from pipelines import convert, finetune_segmentation, predict, pretrain_mri
from pipelines.label_scene import source_of
from tests.synthetic_volumes import head, save_volume
from tests.tiny_runs import quick, shared_tracking

__all__ = ["quick"]

SEQUENCES = ("FLAIR", "T1w", "T2w")
TINY = [
    "train.steps=2",
    "train.log_steps=1",
    "train.eval_steps=2",
    "train.device=cpu",
    "tracking.system_metrics=false",
    "prepare.num_workers=0",
    "prepare.tile=[16,16,8]",
    "crop=[16,16,8]",
    "reader.spacing_mm=null",
]
MODEL = ["model.encoder.preset=nano", "model.encoder.patch=[8,8,4]"]
DECODER = ["model.decoder.width=16", "model.decoder.depth=1", "model.decoder.heads=2"]


def words(**values: Any) -> list[str]:
    return [f"{key.replace('__', '.')}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]


def archive(folder: Path, patients: int = 4) -> Path:
    """Sessions of three sequences with a lesion beside; the second patient has no FLAIR."""
    for number in range(patients):
        place = folder / f"patient{number:02}"
        for row, name in enumerate(SEQUENCES):
            if (number, name) != (1, "FLAIR"):
                save_volume(place / f"{name}.nii.gz", (10 * head(16, seed=10 * number + row)).astype(np.int16))
        save_volume(place / "lesion.nii.gz", (head(16) > 50).astype(np.uint8))
    return folder


def run(verb: Any, *arguments: str) -> None:
    assert verb.main(list(arguments)) == 0


@pytest.mark.parametrize("kind", ["vit", "sparse_conv"])
def test_each_alone_then_together_then_one_lacks(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data, uri = archive(tmp_path / "data"), shared_tracking(tmp_path_factory)
    own = words(data=str(data), out=str(tmp_path / "pre"), tracking__uri=uri, reader__exclude=["lesion*"], hiding__mask_ratio=0.8)
    decoder = DECODER if kind == "vit" else []
    artefacts = ["augment.artefacts.noise=1", "augment.artefacts.low_resolution=1"]
    run(pretrain_mri, *own, *TINY, *MODEL, f"model.encoder.kind={kind}", *decoder, *artefacts, "loader.global_batch_size=4")
    _, about = load_encoder(tmp_path / "pre" / "model")
    assert (about.channels, about.encoder.step) == (SEQUENCES, (8, 8, 4)), "by name, whatever the key of the pseudonyms"
    [path] = (tmp_path / "stores").iterdir()
    assert (TileStore.open(path).index.present.sum(axis=1) == 1).all(), "each scan is a scene of its own"
    fine = words(
        encoder=str(tmp_path / "pre"),
        data=str(data),
        labels=str(data),
        label_options__files="lesion*",
        out=str(tmp_path / "fine"),
        reader__sequences="session",
        tracking__uri=uri,
        init="pretrained",
    )
    run(finetune_segmentation, *fine, *TINY, "loader.global_batch_size=2", "augment.channel_drop_fraction=0.3", "train.eval_steps=2")
    told = capsys.readouterr().out
    assert "FLAIR+T1w+T2w (3), T1w+T2w (1)" in " ".join(told.split())
    assert "4 scans are labelled by 4 of the label files" in " ".join(told.split())
    segmenter, about = load_segmenter(tmp_path / "fine" / "model")
    assert about.reader["sequences"] == "session"
    out = tmp_path / "out"
    run(predict, *words(model=str(tmp_path / "fine"), data=str(data), out=str(out), tracking__uri=uri, device="cpu"))
    found = sorted(out.rglob("*.nii.gz"))
    assert len(found) == 4, "as many as sessions: the segmenter knows how its scans were read"
    assert {nib.load(file).shape for file in found} == {(16, 16, 16)}
    assert segmenter is not None


def test_every_subset_in_any_order_gives_a_finite_output_and_the_order_does_not_matter(tmp_path: Path) -> None:
    """An encoder of four sequences, fed as `predict` feeds it."""
    from mae_core.encoders import build_encoder
    from mae_core.heads import HeadSettings, Segmenter
    from mae_core.segmentation import arrange
    from mae_core.vit import EncoderSettings

    every = ("FLAIR", "T1ce", "T1w", "T2w")
    for row, name in enumerate(every):
        save_volume(tmp_path / f"patient1/{name}.nii.gz", head(16, seed=row))
    [scene] = scan(tmp_path, MriSettings(spacing_mm=None, sequences="session")).scenes
    torch.manual_seed(0)
    shape = EncoderSettings(preset="nano", patch=(8, 8, 4))
    model = Segmenter(build_encoder(shape, every), HeadSettings(), 2).eval()
    source = source_of(scene, [channel.name for channel in scene.channels])
    pixels = torch.from_numpy(scene.read(scene.grid.full)[0].astype(np.float32))
    gains = torch.tensor(source.scale)[:, None, None, None], torch.tensor(source.offset)[:, None, None, None]
    values = (pixels * gains[0] + gains[1])[None]
    outputs = []
    for count in range(1, 5):
        for part in itertools.combinations(range(4), count):
            results = []
            for order in (part, tuple(reversed(part))):
                columns = [order.index(row) if row in order else -1 for row in range(4)]
                present = torch.tensor([[column >= 0 for column in columns]])
                with torch.no_grad():
                    results.append(
                        model(arrange(values[:, list(order)], columns), torch.ones(1, 16, 16, 16, dtype=torch.bool), None, present)
                    )
            assert results[0].isfinite().all()
            assert torch.equal(results[0], results[1])
            outputs.append(results[0])
    assert len({float(output.double().sum()) for output in outputs}) == 15, "every sequence has a say"


def test_an_encoder_of_one_unnamed_sequence_goes_to_three_by_copies_and_is_refused_without(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    data, uri = archive(tmp_path / "data"), shared_tracking(tmp_path_factory)
    own = words(data=str(data), out=str(tmp_path / "pre"), tracking__uri=uri, reader__exclude=["lesion*", "FLAIR*", "T2w*"])
    run(pretrain_mri, *own, *TINY, *MODEL, *DECODER, "reader.sequence=MR", "loader.global_batch_size=4")
    wide = tmp_path / "wide"
    run(
        convert,
        *words(
            source=str(tmp_path / "pre"),
            out=str(wide),
            to="bands",
            channels=list(SEQUENCES),
            new__weights="copy",
            reader__exclude=["*quix*"],
        ),
    )
    one, three = load_encoder(tmp_path / "pre" / "model"), load_encoder(wide / "model")
    assert three[1].reader["sequence"] is None
    assert not any(b"quix" in file.read_bytes() for file in wide.rglob("*") if file.is_file()), "a pattern can name a patient"
    assert three[1].mean == one[1].mean * 3
    torch.testing.assert_close(three[0].state_dict()["embed.weight"].sum(dim=0), one[0].state_dict()["embed.weight"][0])
    fine = words(
        data=str(data), labels=str(data), label_options__files="lesion*", reader__sequences="session", tracking__uri=uri, init="pretrained"
    )
    fine += [*TINY, "loader.global_batch_size=2"]
    run(finetune_segmentation, *fine, f"encoder={wide}", f"out={tmp_path / 'fine'}")
    capsys.readouterr()
    bare = [f"encoder={tmp_path / 'pre'}", f"out={tmp_path / 'bare'}", "reader.sequence=null"]
    assert finetune_segmentation.main([*fine, *bare]) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "none in common; name them alike in the reader's settings" in told
    assert "scans are named by reader.sequence_names" in told
