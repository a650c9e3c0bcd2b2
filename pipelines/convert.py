"""Weights in and out: a published masked autoencoder becomes a model folder of ours, an encoder of ours a file for MONAI or one of
ours with other bands.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from operator import mul
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from mae_core.export import WEIGHTS, Description, ModelError, load_encoder, save_model
from mae_core.monai_export import LAYER_NORM_EPS, to_monai
from mae_core.nd import per_axis, token_grid
from mae_core.published import Published, import_encoder, recognise
from mae_core.sealed import sha256
from mae_core.settings import Settings, to_plain
from mae_core.tracking import TrackingError, TrackingSettings
from mae_core.vit import Encoder
from mae_core.weights import Transfer, WeightsError, read_tensors, weights_file, write_tensors
from modalities.patients import of_patients
from modalities.quality import NO_VALUE
from pipelines.command_line import run
from pipelines.contamination import files_of, load_training_data
from pipelines.convert_bands import NewBandSettings, rebanded
from pipelines.prepare import TILES
from pipelines.progress import console, table
from pipelines.run_folder import RESULT, RunError, begin, finish, model_folder, model_problems, reader_of, without_patterns

DESCRIPTION = (
    "a published masked autoencoder becomes a model folder of ours; an encoder of ours one with other bands, or a file of weights for MONAI"
)
EXPECTED = (WeightsError, ModelError, RunError, TrackingError)
MAY_DIFFER = ("source", "out", "tracking")
NEEDED = ("channels", "mean", "std", "modality")
"""What a published checkpoint does not say of its inputs."""


class ConvertSettings(Settings):
    """Settings of `convert`."""

    source: str = Field(
        description="File or folder of published weights; for MONAI and other bands a run of a pretraining or models:/NAME@ALIAS"
    )
    out: Path = Field(description="Folder that becomes a run with a model; for MONAI a file that ends in .safetensors")
    to: Literal["terravox", "bands", "monai_vit", "monai_unetr"] = Field(
        "terravox", description="Whose weights are written; bands: an encoder of ours again, with the bands that channels names"
    )
    modality: Literal["sentinel2", "raster", "mri"] | None = Field(None, description="Adapter that will read data for a published model")
    channels: tuple[str, ...] = Field(
        (), description="Names of the published model's input channels, in its order; with to=bands those that the encoder is to have"
    )
    new: NewBandSettings = NewBandSettings()
    mean: tuple[float, ...] = Field((), description="What was taken off each channel in its pretraining, in the units of the reader")
    std: tuple[float, ...] = Field((), description="What each channel was then divided by, in the same units")
    reader: dict[str, Any] = Field({}, description="Settings of the adapter, such as scale and offset, that give values in these units")
    heads: int | None = Field(None, ge=1, description="Attention heads of the published encoder, which must be those of our preset")
    grid: tuple[int, ...] = Field((), max_length=3, description="Tokens per axis of the published positions, where axes differ")
    crop: tuple[int, ...] = Field((), max_length=3, description="Voxels per axis of an input (default: that of its pretraining)")
    spacing: tuple[float, ...] = Field(
        (), max_length=3, description="Metres or millimetres between voxels (default: not known, or the run's)"
    )
    allow: tuple[str, ...] = Field((), description="Names or globs of tensors that may be dropped, such as [head.*]")
    tracking: TrackingSettings = TrackingSettings(system_metrics=False)

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if len(set(self.channels)) < len(self.channels):
            raise ValueError(f"channels={list(self.channels)} names one twice")
        if self.to != "bands" and self.new != NewBandSettings():
            raise ValueError(f"new says what bands begin with that an encoder of ours does not have; to={self.to} has none, leave it out")
        if self.to == "bands":
            given = [name for name in (*NEEDED[1:], "heads", "grid", "crop", "spacing", "allow") if getattr(self, name)]
            if given or not self.channels:
                raise ValueError(
                    "to=bands takes an encoder of ours and the names of its new bands; "
                    + (f"leave out {', '.join(given)}" if given else "give channels")
                )
            return self
        if self.to != "terravox":
            given = [name for name in (*NEEDED, "reader", "heads", "grid", "allow") if getattr(self, name)]
            if given:
                raise ValueError(f"to={self.to} takes an encoder of ours, which knows its inputs; leave out {', '.join(given)}")
            if self.out.suffix != ".safetensors":
                raise ValueError(f"to={self.to} writes one file; out = {self.out} must end in .safetensors")
            return self
        missing = [name for name in NEEDED if not getattr(self, name)]
        if missing:
            raise ValueError(f"published weights do not say what they are fed; give {', '.join(missing)}")
        counts = [len(values) for values in (self.channels, self.mean, self.std)]
        if len(set(counts)) > 1 or min(self.std) <= 0:
            raise ValueError(
                f"channels, mean and std have {counts[0]}, {counts[1]} and {counts[2]} values; give one of each per channel, std above 0"
            )
        return self


def work(settings: ConvertSettings) -> int:
    """Do it."""
    match settings.to:
        case "terravox":
            convert_in(settings)
        case "bands":
            convert_bands(settings)
        case _:
            convert_out(settings)
    return 0


def convert_in(settings: ConvertSettings) -> dict[str, Any]:
    """A published checkpoint as a run folder with a model; the result."""
    encoder, transfer, description = read_published(settings)
    config = _recorded(settings) | {"source_weights": description.lineage["source_weights"]}
    done = begin(settings.out, "convert", config, MAY_DIFFER)
    if done is not None:
        console.print(f"run {settings.out} is finished; its result is told again")
    else:
        weights = save_model(settings.out / "model", encoder, description)
        digests = {"source": description.lineage["source_weights"], "weights": weights}
        done = finish(settings.out, "convert", config, {"digests": digests, **account(transfer)})
    tell(transfer, f"{Path(settings.source).name}, laid out as {description.lineage['layout']}")
    shape = encoder.settings
    console.print(
        f"[bold]{shape.preset}[/] encoder with {shape.heads} heads, channels {', '.join(description.channels)}, "
        f"crop {'×'.join(map(str, description.crop))}, positions {shape.positions.kind}: {settings.out}"
    )
    console.print(f"use it: python pipelines/finetune_segmentation.py --encoder {settings.out} --data DIR --labels DIR --out DIR")
    return done


def read_published(settings: ConvertSettings) -> tuple[Encoder, Transfer, Description]:
    """The encoder of a published checkpoint, what became of every tensor, and how it is fed. Its decoder is dropped: nothing here needs it.

    Raises:
        WeightsError: It is no checkpoint that can be ours, or holds tensors that are neither known nor allowed to be dropped.
        RunError: Adapter, crop or spacing do not fit it.
    """
    file = weights_file(Path(settings.source))
    published = recognise(read_tensors(file), file.name, settings.grid)
    encoder, transfer = import_encoder(published, settings.channels, settings.heads or stated_heads(file))
    transfer.complete((*published.layout.decoder_names, *settings.allow))
    return encoder, transfer, describe(settings, published, encoder, sha256(file))


def describe(settings: ConvertSettings, published: Published, encoder: Encoder, digest: str) -> Description:
    """How the encoder is fed. Without a spacing, the distance between voxels is told as one voxel: it is not known.

    Raises:
        RunError: Adapter, crop or spacing do not fit the encoder.
    """
    patch, modality, where = encoder.settings.patch, str(settings.modality), published.where
    if len(TILES[modality]) != len(patch):
        raise RunError(
            f"{where} has patches with {len(patch)} axes and data of modality {modality} have {len(TILES[modality])}; set another"
        )
    if len(settings.spacing) not in (0, 1, len(patch)):
        raise RunError(f"spacing={list(settings.spacing)} gives {len(settings.spacing)} values and the data have {len(patch)} axes")
    spacing = settings.spacing * len(patch) if len(settings.spacing) == 1 else settings.spacing
    grid = published.table(published.layout.encoder["positions"])[2]
    try:
        crop = per_axis(settings.crop, len(patch), "crop") if settings.crop else tuple(map(mul, grid, patch))
        token_grid(crop, patch)
    except ValueError as error:
        raise RunError(str(error)) from error
    own = {"channels": list(settings.channels)} if modality == "sentinel2" else {}
    about = Description(
        kind="encoder",
        modality=modality,
        channels=settings.channels,
        mean=settings.mean,
        std=settings.std,
        no_value=int(NO_VALUE),
        crop=crop,
        spacing=spacing or (1.0,) * len(patch),
        spacing_unit=("mm" if modality == "mri" else "m") if spacing else "voxel",
        encoder=encoder.settings,
        reader={"kind": modality, **own},
        lineage={"layout": published.layout.title, "source_weights": digest},
    )
    reader = to_plain(reader_of(about, settings.reader))
    return about.model_copy(update={"reader": without_patterns(reader) if of_patients(modality) else reader})


def _recorded(settings: ConvertSettings) -> dict[str, Any]:
    """Settings as they are kept with the result: without patterns of files, which can name a patient."""
    return {**to_plain(settings), "reader": without_patterns(settings.reader)}


def stated_heads(file: Path) -> int | None:
    """Attention heads that a ViTMAE's `config.json` beside its weights states; None where there is none."""
    try:
        stated = json.loads((file.parent / "config.json").read_text())
    except (OSError, ValueError):
        return None
    heads = stated.get("num_attention_heads") if isinstance(stated, dict) and stated.get("model_type") == "vit_mae" else None
    return heads if isinstance(heads, int) else None


def convert_bands(settings: ConvertSettings) -> dict[str, Any]:
    """An encoder of ours as one with other bands, in a run folder; the result.

    Raises:
        RunError, WeightsError: A band or the adapter does not fit.
    """
    folder, _ = model_folder(settings.source, settings.tracking, settings.out)
    encoder, about = load_encoder(folder)
    found = rebanded(encoder, about, settings.channels, settings.new, settings.reader)
    source = sha256(folder / WEIGHTS)
    config = _recorded(settings) | {"source_weights": source}
    done = begin(settings.out, "convert", config, MAY_DIFFER)
    if done is not None:
        console.print(f"run {settings.out} is finished; its result is told again")
    else:
        beside = files_of(load_training_data(folder))
        lineage = about.lineage | {"source_weights": source, "source_channels": ",".join(about.channels)}
        weights = save_model(settings.out / "model", found.encoder, found.about.model_copy(update={"lineage": lineage}), beside)
        facts = {"digests": {"source": source, "weights": weights}, "bands": found.rows(), **account(found.transfer)}
        done = finish(settings.out, "convert", config, facts)
    tell(found.transfer, settings.source)
    table("bands", ["band", "mean and std of", "mean", "std", "unit"], found.rows())
    console.print(
        f"[bold]{len(about.channels)} → {len(found.about.channels)} bands[/], {len(found.matching.pairs)} with their own weights: "
        f"{settings.out}"
    )
    return done


def convert_out(settings: ConvertSettings) -> dict[str, Any]:
    """An encoder of ours as a file for MONAI, and what MONAI's network has to be built with; the result.

    Raises:
        WeightsError: The encoder has what MONAI's network has no place for.
        RunError: Crop or spacing do not fit it, or the file is there.
    """
    if settings.out.exists():
        raise RunError(f"--out {settings.out} exists; choose another file")
    folder, _ = model_folder(settings.source, settings.tracking, settings.out)
    encoder, about = load_encoder(folder)
    if not isinstance(encoder, Encoder):
        raise RunError(f"{settings.source} holds an encoder of kind {about.encoder.kind}, MONAI's ViT and UNETR take kind vit")
    try:
        crop = per_axis(settings.crop, len(about.crop), "crop") if settings.crop else about.crop
    except ValueError as error:
        raise RunError(str(error)) from error
    found = to_monai(encoder, crop, "unetr" if settings.to == "monai_unetr" else "vit", settings.spacing or about.spacing)
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    facts = {"arguments": json.dumps(found.arguments), "layer_norm_eps": str(LAYER_NORM_EPS)}
    inputs = {"channels": list(about.channels), "mean": list(about.mean), "std": list(about.std)}
    write_tensors(settings.out, found.tensors, facts | {name: json.dumps(value) for name, value in inputs.items()})
    digests = {"source": sha256(folder / WEIGHTS), "weights": sha256(settings.out)}
    facts_told = {"digests": digests, "arguments": found.arguments, "inputs": inputs, **account(found.transfer)}
    done = finish(settings.out.parent, "convert", _recorded(settings), facts_told, f"{settings.out.name}.{RESULT}")
    tell(found.transfer, settings.source)
    network = "UNETR" if settings.to == "monai_unetr" else "ViT"
    console.print(
        f"[bold]{settings.out}[/] for monai.networks.nets.{network}({', '.join(f'{k}={v!r}' for k, v in found.arguments.items())})"
    )
    console.print(
        f"load it with load_state_dict(..., strict=False): what is missing then is MONAI's own head or decoder. Its LayerNorms have "
        f"an eps of 1e-5 and ours {LAYER_NORM_EPS:g}; set it for equal features. Inputs are (value - mean) / std, channels in our order."
    )
    return done


def account(transfer: Transfer) -> dict[str, Any]:
    """What `result.json` tells of a transfer."""
    kinds = dict(Counter(move.kind for move in transfer.moves))
    return {"figures": {"tensors_by_kind": kinds}, "transfer": [list(row) for row in transfer.table()]}


def tell(transfer: Transfer, source: str) -> None:
    """Print the table of a transfer."""
    rows = [(names, target or "none", kind, number, note) for kind, names, target, number, note in transfer.table()]
    table(f"tensors of {source}", ["from", "to", "", "tensors", ""], [(names or "none", *rest) for names, *rest in rows])


def check(settings: ConvertSettings) -> list[str]:
    """Problems that only the disk can tell."""
    try:
        if settings.to == "terravox":
            read_published(settings)
            return []
        problems = model_problems(settings.source, settings.tracking, settings.out, load_encoder)
        if settings.to == "bands" and not problems:
            encoder, about = load_encoder(model_folder(settings.source, settings.tracking, settings.out)[0])
            rebanded(encoder, about, settings.channels, settings.new, settings.reader)
    except (WeightsError, RunError) as error:
        return [str(error)]
    return problems


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb; its exit code."""
    return run("convert", ConvertSettings, work, check=check, description=DESCRIPTION, expected=EXPECTED, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
