"""An encoder's bands are changed by the verb: what is common survives ten to six to twelve bands, and the description fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mae_core.band_transfer import band_rows
from mae_core.encoders import AnyEncoder, build_encoder
from mae_core.export import Description, load_encoder, save_model
from mae_core.histogram import PERCENTS
from mae_core.vit import EncoderSettings, all_tokens
from modalities.landsat import INSTRUMENTS
from modalities.quality import NO_VALUE
from pipelines.bands import model_bands
from pipelines.convert import main
from pipelines.run_folder import reader_of
from pipelines.terravox import main as terravox
from tests.synthetic_batches import generator
from tests.tiny_runs import quick, wide

__all__ = ["quick", "wide"]

TEN = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
SIX = ("B04", "B02", "B03", "B8A", "B12", "B11")
TWELVE = ("B12", "B11", "B09", "B8A", "B08", "B07", "B06", "B05", "B04", "B03", "B02", "B01")
SHAPE = EncoderSettings(preset="nano", patch=(6, 6), mlp_ratio=1)


def run_of(folder: Path, shape: EncoderSettings = SHAPE, channels: tuple[str, ...] = TEN) -> Path:
    """A run with an encoder of Sentinel-2 bands whose statistics tell them apart."""
    about = Description(
        kind="encoder",
        modality="sentinel2",
        channels=channels,
        mean=tuple(0.1 + 0.01 * number for number in range(len(channels))),
        std=tuple(0.05 + 0.001 * number for number in range(len(channels))),
        no_value=int(NO_VALUE),
        crop=(12, 12),
        spacing=(10.0, 10.0),
        spacing_unit="m",
        encoder=shape,
        units=("reflectance",) * len(channels),
        levels=(("L2A",),) * len(channels),
        wavelengths_nm=tuple(INSTRUMENTS[name].wavelength_nm for name in channels),
        percentiles=tuple((float(number),) * len(PERCENTS) for number in range(len(channels))),
        reader={"kind": "sentinel2", "channels": list(channels)},
        lineage={"data": "abc"},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_model(folder / "model", build_encoder(shape, channels), about)
    return folder


def change(source: Path, out: Path, channels: tuple[str, ...], *more: str) -> tuple[AnyEncoder, Description]:
    assert main([f"source={source}", f"out={out}", "to=bands", f"channels=[{','.join(channels)}]", *more]) == 0
    return load_encoder(out / "model")


def kernel(encoder: AnyEncoder, name: str) -> Tensor:
    tensor, row = band_rows(encoder)[name]
    return encoder.state_dict()[tensor][row]


@torch.no_grad()
def features(encoder: AnyEncoder) -> Tensor:
    """Of the six bands alone."""
    every = all_tokens(encoder.layout((12, 12)), torch.zeros(2, len(encoder.channels), 12, 12))
    patches = torch.randn(2, 4, 6, 36, generator=generator(0))
    return encoder(patches, every.ids, every.layout.grid, channels=SIX)


@pytest.mark.parametrize("policy", ["nearest", "mean", "zero", "random"])
def test_ten_to_six_to_twelve_bands_keeps_what_is_common(tmp_path: Path, policy: str) -> None:
    source = run_of(tmp_path / "ten")
    ten, before = load_encoder(source / "model")
    six, fewer = change(source, tmp_path / "six", SIX)
    twelve, after = change(tmp_path / "six", tmp_path / "twelve", TWELVE, f"new.weights={policy}")
    assert (fewer.channels, after.channels) == (SIX, TWELVE)
    for name in SIX:
        assert torch.equal(kernel(six, name), kernel(ten, name))
        assert torch.equal(kernel(twelve, name), kernel(ten, name))
        for key in ("mean", "std", "wavelengths_nm", "percentiles", "units", "levels"):
            own = getattr(before, key)[TEN.index(name)]
            assert getattr(fewer, key)[SIX.index(name)] == own
            assert getattr(after, key)[TWELVE.index(name)] == own
    assert torch.equal(features(six), features(ten))
    assert torch.equal(features(twelve), features(ten))
    assert (kernel(twelve, "B01") == 0).all() == (policy == "zero")
    reader = reader_of(after, {})
    assert reader.kind == "sentinel2"
    assert reader.channels == TWELVE


def test_new_bands_take_statistics_of_the_nearest_and_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = run_of(tmp_path / "six", channels=SIX)
    _, about = change(source, tmp_path / "run", (*SIX, "B01", "B09"), "new.statistics.B09=[0.3,0.2]")
    place = SIX.index("B02")
    assert (about.mean[6], about.std[6]) == (0.1 + 0.01 * place, 0.05 + 0.001 * place)
    assert (about.mean[7], about.std[7]) == (0.3, 0.2)
    assert about.percentiles[6:] == ((None,) * len(PERCENTS),) * 2
    assert about.units == ("reflectance",) * 8
    assert about.wavelengths_nm[6:] == (442.7, 945.1)
    assert about.lineage["data"] == "abc"
    assert about.lineage["source_channels"] == ",".join(SIX)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert ["borrowed", "embed.weight[B02]", "embed.weight[B01]", "1", "nearest wavelength, divided by 2"] in result["transfer"]
    assert [row[:2] for row in result["bands"]][-2:] == [["B01", "B02, nearest wavelength"], ["B09", "given"]]
    told = capsys.readouterr().out
    for word in ("6 → 8 bands", "6 with their own weights", "nearest wavelength, divided by 2", "embed.weight[B09]"):
        assert word in told, told


def test_bands_of_another_sensor_are_the_same_ones_by_wavelength_where_that_is_asked_for(tmp_path: Path) -> None:
    source = run_of(tmp_path / "ten")
    landsat = ("OLI_B2", "OLI_B3", "OLI_B4", "OLI_B5", "OLI_B6", "OLI_B7")
    found, about = change(source, tmp_path / "oli", landsat, "new.match.match=wavelength", "reader.kind=landsat")
    ten, _ = load_encoder(source / "model")
    for name, other in zip(landsat, ("B02", "B03", "B04", "B8A", "B11", "B12"), strict=True):
        assert torch.equal(kernel(found, name), kernel(ten, other))
        assert about.mean[about.channels.index(name)] == 0.1 + 0.01 * TEN.index(other)
    assert about.wavelengths_nm[0] == 482.04, "its own"
    assert (about.modality, reader_of(about, {}).kind) == ("landsat", "landsat")


def test_native_channels_and_groups_go_along(tmp_path: Path) -> None:
    groups = (("B02", "B03", "B04", "B08"), ("B05", "B06", "B07", "B8A", "B11", "B12"))
    coarse = SHAPE.model_copy(update={"footprints": dict.fromkeys(groups[1], 2), "groups": groups})
    source = run_of(tmp_path / "ten", coarse)
    more = ("new.footprints.B01=6", "new.statistics.VV=[-12,4]", "reader.kind=satellite")
    found, about = change(source, tmp_path / "run", ("B12", "B02", "B01", "VV"), *more)
    assert isinstance(about.encoder, EncoderSettings)
    assert about.encoder.footprints == {"B12": 2, "B01": 6}
    assert about.encoder.groups == (("B02",), ("B12",), ("B01",), ("VV",))
    assert [band.footprint for band in model_bands(about)] == [2, 1, 6, 1]
    assert torch.equal(kernel(found, "B12"), kernel(load_encoder(source / "model")[0], "B12"))
    assert (about.units, about.wavelengths_nm[3]) == (("reflectance",) * 3 + ("",), None)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["channels=[B02,XX]"], ["nothing is known of band XX", "new.wavelengths_nm.XX=NM", "new.statistics.XX=[MEAN,STD]"]),
        (["channels=[XX]", "new.statistics.XX=[1,1]"], ["none in common"]),
        (["channels=[B02]", "new.statistics.B02=[1,1]"], ["new.statistics names ['B02']", "keep their own"]),
        (["channels=[B02,B01]", "new.statistics.B01=[1,0]"], ["standard deviation that is not above 0"]),
        (["channels=[B02,B01]", "new.footprints.B01=4"], ["does not hold whole measurements"]),
        (["channels=[B02]", "reader.nonsense=1"], ["does not fit the adapter sentinel2"]),
        (["channels=[B02,VV]", "new.statistics.VV=[-12,4]"], ["no Sentinel-2 band: VV"]),
    ],
)
def test_what_cannot_be_known_is_refused_with_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], words: list[str]
) -> None:
    source = run_of(tmp_path / "ten")
    for arguments, code in (((), 1), (("--check",), 2)):
        assert main([f"source={source}", f"out={tmp_path / 'out'}", "to=bands", *more, *arguments]) == code
        errors = capsys.readouterr().err
        assert not [word for word in words if word not in errors], errors
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ([], "give channels"),
        (["channels=[B02]", "mean=[1]"], "leave out mean"),
        (["channels=[B02,B02]"], "names one twice"),
        (["to=terravox", "new.weights=zero"], "leave it out"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(capsys: pytest.CaptureFixture[str], more: list[str], word: str) -> None:
    words: list[Any] = ["source=a", "out=b", "to=bands", *more]
    assert terravox(["convert", *words]) == 2
    assert word in capsys.readouterr().err
