"""The verb in both directions: published weights become a run that fine-tuning can take, a run becomes a file for MONAI."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mae_core.export import Description, load_encoder, save_model
from mae_core.published import import_encoder, recognise
from mae_core.tracking import TrackingSettings
from mae_core.vit import Encoder, EncoderSettings
from modalities.quality import NO_VALUE
from pipelines.convert import main
from pipelines.run_folder import model_folder, reader_of
from pipelines.terravox import main as terravox
from tests.synthetic_checkpoints import FOREIGN, facebook, reference
from tests.tiny_runs import quick, wide

__all__ = ["quick", "wide"]

INPUTS = ["channels=[B04,B03,B02]", "mean=[0.1,0.1,0.1]", "std=[0.2,0.2,0.3]", "modality=sentinel2"]


@dataclass(frozen=True)
class World:
    """A published checkpoint in the layout of facebookresearch/mae, a folder of transformers', and a run of ours."""

    folder: Path

    def words(self, source: str, out: str, *more: str) -> list[str]:
        return [f"source={self.folder / source}", f"out={self.folder / out}", *more]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    tensors = {name: value.clone() for name, value in reference().state_dict().items()}
    torch.save({"model": facebook(tensors)}, folder / "mae.pth")
    torch.save({"model": facebook(tensors) | {"head.weight": torch.ones(2, 128)}}, folder / "finetuned.pth")
    (folder / "hub").mkdir()
    save_file(tensors, folder / "hub" / "model.safetensors")
    (folder / "hub" / "config.json").write_text(json.dumps({"model_type": "vit_mae", "num_attention_heads": 8}))
    for name, shape in (
        ("vit", EncoderSettings(preset="nano", patch=(4, 2, 2), mlp_ratio=1)),
        ("unetr", EncoderSettings(preset="tiny", patch=(16, 16, 16), mlp_ratio=0.5, class_token=False)),
    ):
        about = Description(
            kind="encoder",
            modality="mri",
            channels=("T1w",),
            mean=(4.0,),
            std=(2.0,),
            no_value=int(NO_VALUE),
            crop=shape.patch,
            spacing=(1.0, 1.0, 2.0),
            spacing_unit="mm",
            encoder=shape,
            reader={"kind": "mri"},
            lineage={},
        )
        save_model(folder / name / "model", Encoder(shape, ("T1w",)), about)
    return World(folder)


def test_a_published_checkpoint_becomes_a_run_with_a_model(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(world.words("mae.pth", "run", *INPUTS, "reader.offset=-0.1")) == 0
    out = world.folder / "run"
    folder, version = model_folder(str(out), TrackingSettings(), out)
    encoder, about = load_encoder(folder)
    wanted, _ = import_encoder(recognise(facebook(reference().state_dict())), ("B04", "B03", "B02"))
    assert version is None
    assert all(torch.equal(value, wanted.state_dict()[name]) for name, value in encoder.state_dict().items())
    assert (about.modality, about.channels, about.std, about.crop) == ("sentinel2", ("B04", "B03", "B02"), (0.2, 0.2, 0.3), (16, 16))
    assert (about.spacing, about.spacing_unit) == ((1.0, 1.0), "voxel")
    reader = reader_of(about, {})
    assert (about.reader["offset"], about.reader["channels"]) == (-0.1, ["B04", "B03", "B02"])
    assert reader.kind == "sentinel2"
    result = json.loads((out / "result.json").read_text())
    assert result["figures"]["tensors_by_kind"] == {"permuted": 1, "copied": 52, "computed": 1, "dropped": 32}
    assert result["digests"]["source"] == about.lineage["source_weights"]
    told = capsys.readouterr().out
    for word in ("patch_embed.proj.weight", "blocks.*.attn.qkv.weight", "computed", "fixed sine-cosine codes", "nano encoder with 4 heads"):
        assert word in told, told


def test_a_finished_conversion_is_told_again_and_other_settings_are_refused(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(world.words("mae.pth", "again", *INPUTS)) == 0
    assert main(world.words("mae.pth", "again", *INPUTS)) == 0
    assert "is finished; its result is told again" in capsys.readouterr().out
    assert main(world.words("mae.pth", "again", *INPUTS, "crop=[32]")) == 1
    assert "crop" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "more", "words"),
    [
        ("finetuned.pth", [], ["head.weight is dropped", "allow by name what may be left out"]),
        ("hub", [], ["width 128, 4 blocks and 8 heads, which is no shape of ours"]),
        ("mae.pth", ["crop=[18]"], ["space (18, 18) is not a multiple of patch (4, 4)"]),
        ("mae.pth", ["modality=mri"], ["patches with 2 axes and data of modality mri have 3"]),
        ("mae.pth", ["spacing=[1,2,3]"], ["spacing=[1.0, 2.0, 3.0] gives 3 values and the data have 2 axes"]),
        ("mae.pth", ["reader.nonsense=1"], ["does not fit the adapter sentinel2"]),
        ("vit", [], ["holds no weights; give a file, or a folder with model.safetensors"]),
    ],
)
def test_what_cannot_be_converted_is_refused_with_words(
    world: World, capsys: pytest.CaptureFixture[str], source: str, more: list[str], words: list[str]
) -> None:
    for arguments, code in (((), 1), (("--check",), 2)):
        assert main([*world.words(source, "refused", *INPUTS, *more), *arguments]) == code
        errors = capsys.readouterr().err
        assert not [word for word in words if word not in errors], errors
        assert not (world.folder / "refused").exists()


def test_a_tensor_is_dropped_by_name_and_heads_are_given_over_what_is_stated(world: World) -> None:
    assert main(world.words("finetuned.pth", "allowed", *INPUTS, "allow=[head.*]")) == 0
    assert main(world.words("hub", "heads", *INPUTS, "heads=4")) == 0
    assert (
        load_file(world.folder / "heads/model/model.safetensors").keys()
        == load_file(world.folder / "allowed/model/model.safetensors").keys()
    )


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (INPUTS[:1], ["published weights do not say what they are fed; give mean, std, modality"]),
        ([*INPUTS, "mean=[1]"], ["channels, mean and std have 3, 1 and 3 values"]),
        ([*INPUTS, "std=[1,0,1]"], ["std above 0"]),
        ([*INPUTS, "to=monai_vit"], ["takes an encoder of ours, which knows its inputs; leave out channels, mean, std, modality"]),
        (["to=monai_vit"], ["writes one file", "must end in .safetensors"]),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    world: World, capsys: pytest.CaptureFixture[str], more: list[str], words: list[str]
) -> None:
    assert terravox(["convert", *world.words("mae.pth", "refused", *more)]) == 2
    errors = capsys.readouterr().err
    assert not [word for word in words if word not in errors], errors


@pytest.mark.parametrize(("source", "more"), [("vit", ["crop=[8,4,6]"]), ("unetr", ["crop=[32,16,16]"])])
def test_a_run_becomes_a_file_for_monai(world: World, capsys: pytest.CaptureFixture[str], source: str, more: list[str]) -> None:
    out = world.folder / "out" / f"{source}.safetensors"
    arguments = [*world.words(source, f"out/{source}.safetensors", *more), f"to=monai_{source}"]
    assert main([*arguments, "--check"]) == 0
    assert not out.exists()
    assert main(arguments) == 0
    prefix = "vit." if source == "unetr" else ""
    tensors = load_file(out)
    assert {f"{prefix}norm.weight", f"{prefix}patch_embedding.position_embeddings"} <= set(tensors)
    assert ("cls_token" in tensors) == (source == "vit")
    with safe_open(out, "pt") as file:
        facts: dict[str, Any] = file.metadata()
    assert json.loads(facts["mean"]) == [4.0]
    assert json.loads(facts["arguments"])["img_size"] == ([8, 4, 6] if source == "vit" else [32, 16, 16])
    places = tensors[f"{prefix}patch_embedding.position_embeddings"].shape[1]
    assert places == (2 * 2 * 3 if source == "vit" else 2)
    result = json.loads((out.parent / f"{out.name}.result.json").read_text())
    assert result["arguments"] == json.loads(facts["arguments"])
    told = capsys.readouterr().out
    for word in ("qkv_bias=True", "MONAI never calls it", "eps of 1e-5", "blocks.*.attention.qkv.weight"):
        assert word in told, told
    assert main(arguments) == 1
    assert "exists; choose another file" in capsys.readouterr().err


def test_an_encoder_that_monai_has_no_place_for_is_refused(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*world.words("vit", "no.safetensors"), "to=monai_unetr"]) == 1
    errors = capsys.readouterr().err
    for word in ("a class token", "4 blocks; UNETR has 12", "UNETR's are 16 on each axis"):
        assert word in errors, errors
    assert not list(world.folder.glob("no.*"))


@pytest.mark.skipif(not FOREIGN, reason="needs ../shared/data/weights")
def test_real_weights_of_another_layout_are_refused_with_what_was_found(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    for file in FOREIGN:
        assert main([f"source={file}", f"out={world.folder / 'foreign'}", *INPUTS]) == 1
        assert f"{file.name} is of no layout that is read" in capsys.readouterr().err
