"""A model folder that stands by itself: weights, and everything that is needed to feed and to read them. No pickle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from mae_core.bands import BandSettings
from mae_core.encoders import AnyEncoder, EncoderChoice, build_encoder
from mae_core.heads import HeadSettings, Segmenter
from mae_core.sealed import advice, seal, sha256, verify
from mae_core.settings import Settings

WEIGHTS, DESCRIPTION, CARD = "model.safetensors", "model.json", "README.md"


class ModelError(ValueError):
    """A model folder is damaged, not of the kind that is wanted, or cannot be written."""


class Description(Settings):
    """What a model is and how it is fed; stored as `model.json` beside the weights.

    Attributes:
        format: Version of this layout.
        kind: `encoder` gives features, `segmenter` class scores.
        modality: Kind of the adapter that the data came through.
        channels: Names in the order of the encoder's weights.
        mean, std: Of physical values per channel, over valid training voxels.
        no_value: Quality bits under which a voxel is fed as zero.
        crop: Voxels per axis that the model was trained on.
        spacing: Size of a voxel along each axis, with `spacing_unit`; the first training tile's.
        encoder: Shape of the encoder.
        head: Shape of the head of a segmenter.
        classes: Class number in label maps and its name, in the order of the scores.
        colours: Red, green and blue (0 to 255) of each class, in the same order; empty where none were given.
        units: Of the physical values per channel; empty strings where nobody said.
        levels: Processing levels that the training data of each channel had, such as `L2A`; empty where nobody said.
        wavelengths_nm: Centre wavelength of each channel, None where it has none; empty where nobody said.
        percentiles: Of physical values per channel, at the percents of `mae_core.histogram.PERCENTS`, None where nobody counted; may be
            empty.
        bands: How the channels of a segmenter's training data were found among the encoder's.
        reader: Settings of the adapter, as it read the training data.
        lineage: Where it came from: digests of data and weights, runs, parent model.
        intended_use: What it may be used for, as its README says too; empty where there is nothing to say.
        facts: What its README says beside that, a line each: licences, the compute of its training.
    """

    format: Literal[1] = 1
    kind: Literal["encoder", "segmenter"]
    modality: str
    channels: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    no_value: int
    crop: tuple[int, ...]
    spacing: tuple[float, ...]
    spacing_unit: str
    encoder: EncoderChoice
    head: HeadSettings | None = None
    classes: tuple[tuple[int, str], ...] = ()
    colours: tuple[tuple[int, int, int], ...] = ()
    units: tuple[str, ...] = ()
    levels: tuple[tuple[str, ...], ...] = ()
    wavelengths_nm: tuple[float | None, ...] = ()
    percentiles: tuple[tuple[float | None, ...], ...] = ()
    bands: BandSettings = BandSettings()
    reader: dict[str, Any]
    lineage: dict[str, str]
    intended_use: str = ""
    facts: dict[str, str] = Field(default_factory=dict)


def save_model(folder: Path, model: nn.Module, description: Description, beside: Mapping[str, bytes] | None = None) -> str:
    """Write a model folder, whole or not at all; SHA-256 of the weights. `beside`: other files by name, sealed with it.

    Raises:
        ModelError: The disk is full or not writable.
    """
    aside = folder.with_name(folder.name + ".tmp")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}, aside / WEIGHTS)
        (aside / DESCRIPTION).write_text(json.dumps(description.model_dump(mode="json"), indent=1, sort_keys=True))
        for name, data in (beside or {}).items():
            (aside / name).write_bytes(data)
        if description.intended_use or description.facts:
            (aside / CARD).write_text(_card(description))
        seal(aside)
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise ModelError(f"the model could not be written to {folder}: {error}; {advice(error)} and run again") from error
    return sha256(folder / WEIGHTS)


def _card(description: Description) -> str:
    use = [description.intended_use, ""] if description.intended_use else []
    return (
        "\n".join(
            [f"# {description.modality} {description.kind}", "", *use, *(f"- {name}: {said}" for name, said in description.facts.items())]
        )
        + "\n"
    )


def load_description(folder: Path, kind: Literal["encoder", "segmenter"]) -> Description:
    """The description of a sound model folder of the wanted kind.

    Raises:
        ModelError: There is no model, it is damaged, of a later format or of the other kind.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        raise ModelError(f"{folder} holds no model ({DESCRIPTION} is missing); give a finished run or models:/NAME@ALIAS")
    problem = verify(folder)
    if problem:
        raise ModelError(f"the model in {folder} is damaged: {problem}")
    try:
        description = Description.model_validate_json(path.read_text())
    except ValidationError as error:
        raise ModelError(f"{path} is not a model description that this version reads: {error}") from error
    if description.kind != kind:
        hint = "fine-tune it first" if kind == "segmenter" else "give the run of a pretraining"
        names = {"encoder": "an encoder", "segmenter": "a segmenter"}
        raise ModelError(f"{folder} holds {names[description.kind]}, {names[kind]} is wanted; {hint}")
    return description


def load_encoder(folder: Path) -> tuple[AnyEncoder, Description]:
    """The encoder in a model folder, in evaluation mode. Every tensor is accounted for."""
    description = load_description(folder, "encoder")
    encoder = build_encoder(description.encoder, description.channels)
    _fill(encoder, folder)
    return encoder.eval(), description


def load_segmenter(folder: Path) -> tuple[Segmenter, Description]:
    """The segmenter in a model folder, in evaluation mode. Every tensor is accounted for."""
    description = load_description(folder, "segmenter")
    encoder = build_encoder(description.encoder, description.channels)
    model = Segmenter(encoder, description.head or HeadSettings(), len(description.classes))
    _fill(model, folder)
    return model.eval(), description


def _fill(model: nn.Module, folder: Path) -> None:
    try:
        model.load_state_dict(load_file(folder / WEIGHTS), strict=True)
    except RuntimeError as error:
        raise ModelError(f"the weights in {folder} do not fit the model that is described beside them: {error}") from error
    for weight in model.parameters():
        if not torch.isfinite(weight).all():
            raise ModelError(f"the weights in {folder} hold values that are not finite")
