"""A model folder is whole, its own and of the right kind, or it is refused with what to do; every tensor is accounted for."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mae_core import export
from mae_core.export import Description, ModelError, load_description, load_encoder, load_segmenter, save_model
from mae_core.heads import HeadSettings, Segmenter
from mae_core.sealed import seal, sha256
from mae_core.vit import Encoder, EncoderSettings

ENCODER = EncoderSettings(preset="nano", patch=(4, 4))


def description(**changes: Any) -> Description:
    values: dict[str, Any] = {
        "kind": "encoder",
        "modality": "raster",
        "channels": ("A", "B"),
        "mean": (1.0, 2.0),
        "std": (0.5, 3.0),
        "no_value": 127,
        "crop": (8, 8),
        "spacing": (10.0, 10.0),
        "spacing_unit": "m",
        "encoder": ENCODER,
        "reader": {"kind": "raster"},
        "lineage": {"store_digest": "abc"},
    }
    return Description.model_validate(values | changes)


def encoder(seed: int = 0) -> Encoder:
    torch.manual_seed(seed)
    return Encoder(ENCODER, ("A", "B"))


def features(model: Encoder) -> Tensor:
    torch.manual_seed(1)
    with torch.inference_mode():
        out: Tensor = model(torch.randn(2, 4, 2, 16), torch.arange(4).expand(2, -1), (2, 2))
    return out


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_model(tmp_path / "model", encoder(), description())
    return tmp_path / "model"


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the description as a person would, and seals it again."""
    file = folder / "model.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    seal(folder)


def replace_weights(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    seal(folder)


def test_an_encoder_comes_back_and_gives_the_same_features(tmp_path: Path) -> None:
    model = encoder().eval()
    digest = save_model(tmp_path / "model", model, description())
    loaded, about = load_encoder(tmp_path / "model")
    assert digest == sha256(tmp_path / "model" / "model.safetensors")
    assert about == description()
    assert not loaded.training
    assert loaded.channels == ("A", "B")
    assert torch.equal(features(loaded), features(model))
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["manifest.json", "model.json", "model.safetensors"]


def test_a_segmenter_comes_back_with_its_head_and_classes(tmp_path: Path) -> None:
    head = HeadSettings(features=8)
    torch.manual_seed(0)
    model = Segmenter(encoder(), head, 3).eval()
    about = description(kind="segmenter", head=head, classes=((0, "water"), (4, "field"), (9, "town")))
    save_model(tmp_path / "model", model, about)
    loaded, found = load_segmenter(tmp_path / "model")
    assert found == about
    known = model.state_dict()
    assert loaded.state_dict().keys() == known.keys()
    assert all(torch.equal(tensor, known[name]) for name, tensor in loaded.state_dict().items())


def test_the_wrong_kind_is_refused_with_what_to_do(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds an encoder, a segmenter is wanted; fine-tune it first"):
        load_segmenter(saved)
    segmenter = description(kind="segmenter", head=HeadSettings(), classes=((0, "a"), (1, "b")))
    save_model(tmp_path / "other", nn.Linear(1, 1), segmenter)
    with pytest.raises(ModelError, match="holds a segmenter, an encoder is wanted; give the run of a pretraining"):
        load_encoder(tmp_path / "other")


def test_a_folder_without_a_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no model \(model\.json is missing\); give a finished run or models:/NAME@ALIAS"):
        load_encoder(tmp_path)


@pytest.mark.parametrize("file", ["model.safetensors", "model.json", "manifest.json"])
def test_a_changed_byte_is_seen(saved: Path, file: str) -> None:
    data = bytearray((saved / file).read_bytes())
    data[len(data) // 2] ^= 0x80
    (saved / file).write_bytes(data)
    with pytest.raises(ModelError, match=rf"the model in {saved} is damaged: .*{file}"):
        load_encoder(saved)


@pytest.mark.parametrize("file", ["model.safetensors", "manifest.json"])
def test_a_missing_file_is_named(saved: Path, file: str) -> None:
    (saved / file).unlink()
    with pytest.raises(ModelError, match=rf"is damaged: {file} is missing"):
        load_encoder(saved)


def test_a_description_of_a_later_format_is_refused(saved: Path) -> None:
    edit(saved, lambda content: content.update(format=2))
    with pytest.raises(ModelError, match=r"(?s)model\.json is not a model description that this version reads: .*format"):
        load_description(saved, "encoder")
    edit(saved, lambda content: content.update(format=1, invented=3))
    with pytest.raises(ModelError, match=r"(?s)not a model description that this version reads: .*invented"):
        load_description(saved, "encoder")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop("class_token"), "Missing key.*class_token"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "Unexpected key.*extra"),
        (lambda tensors: tensors.update(class_token=torch.zeros(1, 1, 3)), "size mismatch for class_token"),
    ],
)
def test_every_tensor_is_accounted_for(saved: Path, change: Callable[[dict[str, Tensor]], None], words: str) -> None:
    replace_weights(saved, change)
    with pytest.raises(ModelError, match=rf"(?s)do not fit the model that is described beside them: .*{words}"):
        load_encoder(saved)


def test_weights_that_are_not_finite_are_refused(saved: Path) -> None:
    replace_weights(saved, lambda tensors: tensors["class_token"].fill_(torch.nan))
    with pytest.raises(ModelError, match="hold values that are not finite"):
        load_encoder(saved)


@pytest.mark.parametrize("moment", ["save_file", "seal"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_a_save_that_breaks_off_leaves_the_model_of_before(
    saved: Path, monkeypatch: pytest.MonkeyPatch, moment: str, error: BaseException
) -> None:
    def breaks(*_: object) -> None:
        raise error

    monkeypatch.setattr(export, moment, breaks)
    with pytest.raises((KeyboardInterrupt, ModelError)) as caught:
        save_model(saved, encoder(seed=5), description())
    if isinstance(error, OSError):
        assert f"the model could not be written to {saved}: " in str(caught.value)
        assert "free some space and run again" in str(caught.value)
    monkeypatch.undo()
    assert torch.equal(features(load_encoder(saved)[0]), features(encoder().eval()))
    save_model(saved, encoder(seed=5), description())
    assert torch.equal(features(load_encoder(saved)[0]), features(encoder(seed=5).eval()))
    assert [path.name for path in saved.parent.iterdir()] == ["model"]
