"""What a pretraining begins with beside its store: statistics, the weights of another encoder, a frozen one that judges."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from mae_core.augment import AugmentSettings, Normaliser
from mae_core.band_transfer import NewBands, transfer_bands
from mae_core.bands import BandSettings, bands_of
from mae_core.encoders import AnyEncoder
from mae_core.evaluate import PerceptualLoss
from mae_core.export import WEIGHTS, Description, load_encoder
from mae_core.loader import spacings
from mae_core.native import common_footprint
from mae_core.nd import token_grid
from mae_core.perceptual import PerceptualTerm
from mae_core.sealed import sha256
from mae_core.settings import Settings
from mae_core.store import TileStore
from mae_core.tracking import TrackingSettings
from mae_core.weights import Transfer, WeightsError
from pipelines.bands import model_bands, store_matching
from pipelines.contamination import TrainingData, load_training_data
from pipelines.progress import table
from pipelines.run_folder import RunError, model_folder


class PerceptualSettings(Settings):
    """A frozen encoder whose features judge reconstructions beside the target."""

    encoder: str = Field("", description="Run of a pretraining, models:/NAME@ALIAS or models:/NAME/VERSION; empty for no such term")
    weight: float = Field(0.1, gt=0, description="Of the term beside the error on the target")


class InitSettings(Settings):
    """An encoder whose weights a pretraining begins with, whatever its bands are."""

    encoder: str = Field("", description="Run of a pretraining, models:/NAME@ALIAS or models:/NAME/VERSION; empty: random weights")
    new_bands: NewBands = Field(
        "nearest",
        description="Weights of bands that it does not have: of the nearest wavelength (divided among all bands that carry them), the mean "
        "over its bands, zeros, or random; copy: of its only channel, divided among all",
    )
    bands: BandSettings = BandSettings()


@dataclass(frozen=True)
class Begun:
    """An encoder that a pretraining begins with.

    Attributes:
        encoder, about: As it was saved.
        same: Channel of the store to channel of the encoder, for those that are one.
        digest: Of its weights.
        name: How it was given.
        training_data: What it was trained on, if it says so.
    """

    encoder: AnyEncoder
    about: Description
    same: dict[str, str]
    digest: str
    name: str
    training_data: TrainingData | None = None

    def fill(self, target: AnyEncoder, store: TileStore, new: NewBands) -> Transfer:
        """Give its weights to an encoder for the store's channels; what became of every tensor.

        Raises:
            RunError: The encoders have another shape.
        """
        try:
            bands = model_bands(self.about), bands_of(store.attributes["channels"])
            return transfer_bands(self.encoder, target, self.same, bands, new)
        except WeightsError as error:
            raise RunError(f"init.encoder {self.name}: {error}") from error


def begun_from(settings: InitSettings, store: TileStore, tracking: TrackingSettings, out: Path) -> Begun | None:
    """The encoder that is to be begun with, if any, the store's values being those that it was trained on.

    Raises:
        RunError, ModelError, TrackingError: There is none, or the store's channels are not what it knows under their names.
    """
    if not settings.encoder:
        return None
    folder, _ = model_folder(settings.encoder, tracking, out)
    encoder, about = load_encoder(folder)
    matching = store_matching(about, store, settings.bands)
    same = {data.name: model.name for model, data in matching.pairs}
    return Begun(encoder, about, same, sha256(folder / WEIGHTS), settings.encoder, load_training_data(folder))


def tell_transfer(transfer: Transfer, name: str) -> None:
    """Print what became of every tensor of the encoder that a pretraining begins with."""
    rows = [(source or "none", target or "none", kind, number, note) for kind, source, target, number, note in transfer.table()]
    table(f"weights of {name}", ["from", "to", "", "tensors", ""], rows)


def footprints_of(store: TileStore) -> dict[str, int]:
    """Channels whose measurements fill several voxels along an axis, with how many."""
    channels = store.attributes["channels"]
    return {channel["name"]: int(channel["footprint"]) for channel in channels if channel.get("footprint", 1) > 1}


def perceptual_loss(
    settings: PerceptualSettings, store: TileStore, normaliser: Normaliser, tracking: TrackingSettings, out: Path, device: torch.device
) -> PerceptualLoss | None:
    """The perceptual term that is set, fed in the frozen encoder's own units.

    Raises:
        RunError, ModelError, TrackingError: There is no such encoder, or it does not know our channels or patches.
    """
    if not settings.encoder:
        return None
    folder, _ = model_folder(settings.encoder, tracking, out)
    encoder, about = load_encoder(folder)
    unknown = [name for name in store.channels if name not in about.channels]
    if unknown:
        raise RunError(f"perceptual.encoder {folder} does not know channels {unknown}; it knows {list(about.channels)}")
    if about.encoder.step != about.encoder.patch or len(encoder.groups) > 1 or max(encoder.footprints) > 1:
        raise RunError(f"perceptual.encoder {folder} has overlapping patches or several channel groups; give a plain one")
    try:
        token_grid(normaliser.crop, about.encoder.step)
    except ValueError as error:
        raise RunError(f"perceptual.encoder {folder} cannot see crops of {list(normaliser.crop)}: {error}") from error
    places = [about.channels.index(name) for name in store.channels]
    there = [(about.mean[place], about.std[place]) for place in places]
    here = list(zip(normaliser.mean, normaliser.std, strict=True))
    gain = tuple(own[1] / other[1] for own, other in zip(here, there, strict=True))
    shift = tuple((own[0] - other[0]) / other[1] for own, other in zip(here, there, strict=True))
    return PerceptualLoss(PerceptualTerm(encoder).to(device), settings.weight, store.channels, gain, shift)


def make_normaliser(
    store: TileStore, crop: tuple[int, ...], seed: int, augment: AugmentSettings | None, begun: Begun | None = None
) -> Normaliser:
    """Crops of a store, normalised by its own statistics; channels that an encoder brings along, by those that it was trained with."""
    mean, std = store.statistics.mean.tolist(), store.statistics.std.tolist()
    flat = [name for name, value in zip(store.channels, std, strict=True) if not value > 0]
    if flat:
        raise RunError(
            f"channels {flat} are constant over all training voxels of {store.label}; leave them out with reader.channels and prepare again"
        )
    if begun is not None:
        for name, other in begun.same.items():
            row, place = store.channels.index(name), begun.about.channels.index(other)
            mean[row], std[row] = begun.about.mean[place], begun.about.std[place]
    footprint = common_footprint([1, *footprints_of(store).values()])
    one_way = int(store_in_time(store))
    return Normaliser(crop, tuple(mean), tuple(std), store.no_value, seed, augment, footprint, one_way)


def store_in_time(store: TileStore) -> bool:
    """True for a store of series, whose first axis is time: all dates are cropped, and a single patch size is one of space."""
    return tuple(store.attributes.get("axes", ()))[:1] == ("time",)


def spacing(store: TileStore) -> NDArray[np.float64]:
    """Distance between voxels along each axis of the first tile: in mm for volumes, else in metres."""
    steps: NDArray[np.float64] = spacings(store, np.zeros(1, np.int64))[0].astype(np.float64)
    return steps
