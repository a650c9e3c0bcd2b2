"""A run and an image become three COGs on the image's grid in its own units, the same at every call."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from rio_cogeo import cog_validate

from mae_core.checkpoint import TrainState
from mae_core.export import Description, save_model
from mae_core.mae import MaskedAutoencoder
from mae_core.settings import to_plain
from pipelines import reconstruct
from tests.synthetic_rasters import UTM, north_up, write_raster
from tests.tiny_runs import quick, tiny_recipe
from tests.tiny_states import save

__all__ = ["quick"]

NAMES = ("A", "B")
SPACE = (530, 45)


def make_run(folder: Path, **changes: object) -> Path:
    """What a finished pretraining leaves behind, with random weights, and an older checkpoint beside."""
    recipe = tiny_recipe(crop=[16, 16], model__encoder__patch=[4, 4], **changes)
    torch.manual_seed(0)
    model = MaskedAutoencoder(recipe.model, NAMES)
    (folder / "checkpoints").mkdir(parents=True)
    state = TrainState(model, torch.optim.AdamW(model.parameters()), 4, "run")
    save(state, folder / "checkpoints")
    state.step = 8
    save(state, folder / "checkpoints")
    settings = to_plain(recipe) | {"store_digest": "x"}
    (folder / "config.json").write_text(json.dumps({"verb": "pretrain", "settings": settings}))
    about = Description(
        kind="encoder",
        modality="raster",
        channels=NAMES,
        mean=(0.1, 0.3),
        std=(0.05, 0.1),
        no_value=127,
        crop=(16, 16),
        spacing=(10.0, 10.0),
        spacing_unit="m",
        encoder=recipe.model.encoder,
        reader={"kind": "raster", "radiometry": [{"match": "*", "scale": 1e-4, "offset": -0.1}]},
        lineage={},
    )
    save_model(folder / "model", model.encoder, about)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in `run` and two images in `images`, the second in a folder of its own."""
    folder = tmp_path_factory.mktemp("reconstruct")
    with torch.random.fork_rng():
        make_run(folder / "run")
    for number, name in enumerate(("one.tif", "deep/two.tif")):
        pixels = np.random.default_rng(number).normal([[[2000]], [[4000]]], 700, (2, *SPACE)).clip(1).astype(np.uint16)
        pixels[:, 20:40, 5:22] = 0
        write_raster(folder / "images" / name, pixels, north_up(x=500_000 + 10_000 * number), names=NAMES, nodata=0)
    return folder


def words(folder: Path, out: Path, *more: str, data: str = "images") -> list[str]:
    return ["--run", str(folder / "run"), "--data", str(folder / data), "--out", str(out), "device=cpu", *more]


def read(path: Path) -> np.ndarray:
    with rasterio.open(path) as found:
        values: np.ndarray = found.read()
    return values


def test_three_rasters_lie_on_the_image_in_its_units(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reconstruct.main(words(made, tmp_path)) == 0
    written = sorted(file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*") if file.is_file())
    assert written == sorted(
        ["result.json", *(f"{name}_{part}.tif" for name in ("one", "deep/two") for part in ("input", "predicted", "shown"))]
    )
    with rasterio.open(made / "images" / "one.tif") as file:
        image = file.read().astype(np.float32)
    image[image == 0] = np.nan
    parts = {part: read(tmp_path / f"one_{part}.tif") for part in ("input", "shown", "predicted")}
    for part in parts:
        path = tmp_path / f"one_{part}.tif"
        assert cog_validate(path, strict=True) == (True, [], [])
        with rasterio.open(path) as found:
            assert (found.crs.to_string(), found.transform, found.shape) == (UTM, north_up(), SPACE)
            assert (found.descriptions, found.scales, found.offsets) == (NAMES, (1e-4, 1e-4), (-0.1, -0.1))
            assert np.isnan(found.nodata)
            assert found.tags()["TERRAVOX_PART"].startswith(part)
            assert json.loads(found.tags()["TERRAVOX_HIDING"])["mask_ratio"] == 0.75
    np.testing.assert_array_equal(parts["input"], image)
    shown, hidden = np.isfinite(parts["shown"]), np.isfinite(parts["predicted"])
    np.testing.assert_array_equal(parts["shown"][shown], image[shown])
    assert not (shown & hidden).any()
    assert not (np.isnan(image) & (shown | hidden)).any()
    assert 0.7 < hidden.sum() / np.isfinite(image).sum() < 0.8

    done = json.loads((tmp_path / "result.json").read_text())["figures"]
    assert (done["scenes"], done["step"]) == (2, 8)
    both = [
        (read(tmp_path / f"{name}_input.tif")[1].astype(np.float64), read(tmp_path / f"{name}_predicted.tif")[1].astype(np.float64))
        for name in ("one", "deep/two")
    ]
    true = np.concatenate([one[np.isfinite(two)] for one, two in both]) * 1e-4
    guess = np.concatenate([two[np.isfinite(two)] for _, two in both]) * 1e-4
    assert done["hidden"]["B"]["voxels"] == true.size
    assert done["hidden"]["B"]["rmse"] == pytest.approx(np.sqrt(np.square(guess - true).mean()), rel=1e-5)
    assert done["hidden"]["B"]["std"] == pytest.approx(true.std(), rel=1e-5)
    assert "2 images, three rasters each" in capsys.readouterr().out


def test_nothing_is_written_over_an_image(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What an earlier call left beside the images is an image itself at the next."""
    shutil.copytree(made / "images", tmp_path / "images")
    shutil.copy(tmp_path / "images" / "one.tif", tmp_path / "images" / "one_input.tif")
    before = (tmp_path / "images" / "one_input.tif").read_bytes()
    call = ["--run", str(made / "run"), "--data", str(tmp_path / "images"), "--out", str(tmp_path / "images"), "device=cpu"]
    assert reconstruct.main(call) == 1
    assert "one_input.tif would be written over, which is one of the images; choose another --out" in " ".join(
        capsys.readouterr().err.split()
    )
    assert (tmp_path / "images" / "one_input.tif").read_bytes() == before


def test_the_same_patches_are_hidden_again_and_others_by_another_seed(made: Path, tmp_path: Path) -> None:
    for name, more in (("a", ()), ("b", ()), ("c", ("seed=3", "mask_ratio=0.5"))):
        assert reconstruct.main(words(made, tmp_path / name, *more, data="images/one.tif")) == 0
    one, same, other = (tmp_path / name / "one_shown.tif" for name in "abc")
    assert one.read_bytes() == same.read_bytes()
    assert np.isfinite(read(other)).sum() > 1.8 * np.isfinite(read(one)).sum()


def test_a_damaged_checkpoint_is_told_and_the_one_before_it_taken(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(made / "run", tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step-00000008" / "model.safetensors").write_bytes(b"rubbish")
    shutil.copytree(made / "images", tmp_path / "images")
    assert reconstruct.main(words(tmp_path, tmp_path / "out", data="images/one.tif")) == 0
    assert json.loads((tmp_path / "out" / "result.json").read_text())["figures"]["step"] == 4
    assert "checkpoint step-00000008 is damaged" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    for more, code in (("--check",), 2), ((), 1):
        assert reconstruct.main([*words(tmp_path, tmp_path / "out"), *more]) == code
        assert "holds no sound checkpoint, which the decoder is in" in capsys.readouterr().err


def test_what_cannot_be_reconstructed_is_refused_with_words(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    cases = [
        (["--run", str(tmp_path), "--data", str(made / "images"), "--out", str(tmp_path / "out")], "is no folder of a run"),
        (words(made, tmp_path / "file"), "is a file; give the name of a folder"),
    ]
    make_run(tmp_path / "hog" / "run", model__target__kind="hog")
    cases.append((["--run", str(tmp_path / "hog" / "run"), *words(made, tmp_path / "out")[2:]], "does not lead back to pixels"))
    for line, message in cases:
        assert reconstruct.main(line) == 1
        assert message in " ".join(capsys.readouterr().err.split())


def test_check_does_nothing(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reconstruct.main([*words(made, tmp_path / "out"), "--check"]) == 0
    assert not (tmp_path / "out").exists()
    assert reconstruct.main([*words(made, tmp_path / "out", data="no"), "--check"]) == 2
    assert "does not exist" in capsys.readouterr().err
