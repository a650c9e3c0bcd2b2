"""Images with labels, read and cut as an encoder's pretraining data were, become a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import BaseModel, Field

from mae_core.augment import Normaliser
from mae_core.bands import BandSettings
from mae_core.export import Description
from mae_core.native import common_footprint
from mae_core.nd import per_axis
from mae_core.parallel import Parallel
from mae_core.segmentation import Segmentation
from mae_core.settings import to_plain
from mae_core.store import TileStore
from mae_core.tracking import TrackingSettings
from modalities.catalogue import ReaderSettings, scan
from modalities.label_file import LabelOptions
from modalities.labels import Labelling, match_labels
from modalities.medical import GROUP_PATTERN, VolumeSettings
from modalities.patients import PSEUDONYM_KEY
from modalities.scene import LabelMap, Scene
from pipelines.bands import store_matching, tell_bands
from pipelines.contamination import TrainingData, block_words, names_of, preferred
from pipelines.crosswalk_option import refuse_crosswalk, refuse_inside, tell_crosswalk
from pipelines.frozen_split import Group
from pipelines.preparation import PrepareSettings
from pipelines.preparation_plan import make_plan
from pipelines.prepare import prepare_store, store_attributes, usual_tile
from pipelines.progress import console, table
from pipelines.run_folder import RunError, reader_of
from pipelines.tiling_plan import SplitSettings, plan_tiles, split_group
from pipelines.withheld import kind_of, missing_paths

Colour = Annotated[str, Field(pattern="^#?[0-9A-Fa-f]{6}$")]
MOST_NOTES = 20


class Labelled(Protocol):
    """What is asked of the settings of a verb that reads images with labels."""

    @property
    def data(self) -> Path:
        """Images."""

    @property
    def labels(self) -> Path:
        """Label maps."""

    @property
    def label_options(self) -> LabelOptions:
        """How label files are read."""

    @property
    def out(self) -> Path:
        """Folder of the run; stores lie beside it."""

    @property
    def reader(self) -> dict[str, Any]:
        """Changes to the adapter's settings."""

    @property
    def bands(self) -> BandSettings:
        """How channels are found among the encoder's."""

    @property
    def prepare(self) -> PrepareSettings:
        """How tiles are cut."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes by rising number; may be empty."""

    @property
    def class_colours(self) -> tuple[str, ...]:
        """Colours of the classes by rising number, as `#rrggbb`; may be empty."""

    @property
    def ignore(self) -> tuple[int, ...]:
        """Class numbers that count nowhere."""

    @property
    def crop(self) -> tuple[int, ...]:
        """Voxels per axis; may be empty."""

    @property
    def tracking(self) -> TrackingSettings:
        """Where the run is recorded."""


def missing(settings: BaseModel) -> list[str]:
    """Problems with the places of images and labels, one line each."""
    return missing_paths(kind_of(to_plain(settings)), {name: getattr(settings, name) for name in ("data", "labels")})


@dataclass(frozen=True)
class LabelledData:
    """Images with labels, cut into tiles and whole.

    Attributes:
        store: The tiles.
        pairs: The scenes that they are cut from, each with its labels.
    """

    store: TileStore
    pairs: tuple[tuple[Scene, LabelMap], ...]


def labelled_store(settings: Labelled, about: Description, seen: TrainingData | None = None) -> TileStore:
    """The tile store of `labelled_data`."""
    return labelled_data(settings, about, seen).store


def tell_key(about: Description, store: TileStore) -> None:
    """Warn where pseudonyms cannot be compared with those of the encoder's data."""
    before, now = about.lineage.get(PSEUDONYM_KEY), store.attributes.get(PSEUDONYM_KEY)
    if before and now and before != now:
        console.print(
            "[yellow]the pseudonyms of these data are made with another key than those of the encoder's[/]: nobody can tell by them "
            "whether a held-out patient was among its data; set TERRAVOX_KEY_FILE to the key of then"
        )


def labelled_data(settings: Labelled, about: Description, seen: TrainingData | None = None) -> LabelledData:
    """Images and labels, read as the encoder's data were; their tile store is prepared unless it is already.

    `seen`: what the encoder was trained on, where held-out patients are to be others.
    """
    reader = _without_labels(reader_of(about, settings.reader), settings)
    crosswalk: Path | None = getattr(settings, "crosswalk", None)
    refuse_inside(settings.data, reader.kind, out=settings.out, crosswalk=crosswalk)
    refuse_crosswalk(crosswalk, reader.kind, settings.out, settings.tracking)
    catalogue = scan(settings.data, reader)
    group_pattern = reader.group_pattern if isinstance(reader, VolumeSettings) else GROUP_PATTERN
    labelling = match_labels(catalogue, settings.labels, settings.label_options, settings.ignore, group_pattern)
    tell_crosswalk(crosswalk, replace(catalogue, names={**catalogue.names, **labelling.names}), settings.out, settings.tracking)
    tell_labels(labelling, settings.class_names)
    catalogue = replace(catalogue, scenes=tuple(scene for scene, _ in labelling.pairs))
    labels = {scene.name: found for scene, found in labelling.pairs}
    tile = settings.prepare.tile or usual_tile(reader.kind, to_plain(reader))
    prepare = settings.prepare.model_copy(update={"tile": tile})
    attributes = class_attributes(labelling)
    prepare = prepare.model_copy(update={"split": _unseen(prepare, catalogue.scenes, seen, store_attributes(reader, len(tile)))})
    plan = make_plan(catalogue.scenes, tile, prepare, labels, store_attributes(reader, len(tile)) | attributes)
    path = settings.out.resolve().parent / "stores" / f"{reader.kind}-labelled-{plan.digest[:12]}"
    prepare_store(catalogue, path, reader, prepare, labels, attributes)
    store = TileStore.open(path)
    tell_key(about, store)
    return LabelledData(store, tuple(labelling.pairs))


def _without_labels(reader: ReaderSettings, settings: Labelled) -> ReaderSettings:
    """The reader's settings; label volumes that lie among the scans are left out by the pattern that names them."""
    data, labels, files = settings.data.resolve(), settings.labels.resolve(), settings.label_options.files
    apart = not (labels.is_relative_to(data) or data.is_relative_to(labels))
    if not isinstance(reader, VolumeSettings) or not files or apart:
        return reader
    return reader.model_copy(update={"exclude": (*reader.exclude, files)})


def _unseen(prepare: PrepareSettings, scenes: Sequence[Scene], seen: TrainingData | None, attributes: Mapping[str, Any]) -> SplitSettings:
    """The split, with what the encoder was trained on drawn last."""
    split = prepare.split
    if seen is None or split.file is not None or split.unit == "ground" or split.val_fraction == 0:
        return split
    scenes = sorted(scenes, key=lambda scene: scene.name)
    scans: dict[str, set[str]] = {}
    joined = {scene.group: scene.patients for scene in scenes}
    for tile in plan_tiles(scenes, prepare.tile, split):
        scene = scenes[tile.scene]
        scans.setdefault(split_group(scene.group, tile, split), set()).update(scene.voxel_digests)
    groups = {group: Group(names_of(group, joined), frozenset(digests)) for group, digests in scans.items()}
    blocks = block_words(split.block_tiles, prepare.tile) if split.unit == "block" else ""
    return split.model_copy(update=preferred(seen, str(attributes.get(PSEUDONYM_KEY, "")), blocks, groups))


def class_attributes(labelling: Labelling) -> dict[str, Any]:
    """What a store tells of its classes, by number: `class_names` and `class_colours`, each only where label files say them."""
    found = {"class_names": labelling.classes.names, "class_colours": labelling.classes.colours}
    return {key: {str(value): entry for value, entry in sorted(entries.items())} for key, entries in found.items() if entries}


def tell_labels(labelling: Labelling, class_names: Sequence[str] = ()) -> None:
    """Print what was done to the labels, pixels per class, and which scenes have none."""
    for note in labelling.notes[:MOST_NOTES]:
        console.print(note, markup=False)
    if len(labelling.notes) > MOST_NOTES:
        console.print(f"… and {len(labelling.notes) - MOST_NOTES} more lines on labels")
    if labelling.pixels:
        values = [value for value in labelling.pixels if value >= 0]
        given = dict(zip(values, class_names, strict=True)) if len(class_names) == len(values) else {}
        total, names = sum(labelling.pixels.values()), {-1: "no label", **labelling.classes.names, **given}
        rows = [
            ("" if value < 0 else str(value), names.get(value, ""), str(count), f"{count / total:.1%}")
            for value, count in labelling.pixels.items()
        ]
        table(f"labels of {len(labelling.pairs)} scenes", ("class", "name", "pixels", "share"), rows)
    if labelling.without:
        first = labelling.without[0]
        console.print(f"[yellow]{len(labelling.without)} scenes have no label and are left out[/]; first: {first.file} ({first.reason})")


def labelled_task(settings: Labelled, about: Description, store: TileStore, batch_size: int, parallel: Parallel) -> Segmentation:
    """Classes, channels, crop and normalisation, checked against the encoder; central crops, judged on all held-out tiles.

    Raises:
        RunError: There are fewer than two classes, names do not fit, or the values are in other units.
    """
    found = store.attributes["classes"]
    values = tuple(value for value in found if value not in settings.ignore)
    if len(values) < 2:
        raise RunError(f"the labels hold classes {list(values)} beside {list(settings.ignore)}, which are ignored; two classes are needed")
    for key in ("class_names", "class_colours"):
        given = getattr(settings, key)
        if given and len(given) != len(values):
            raise RunError(f"{key} gives {len(given)} {key[6:]} and the labels hold {len(values)} classes: {list(values)}")
    said: dict[str, str] = store.attributes.get("class_names", {})
    names = settings.class_names or tuple(said.get(str(value), f"class {value}") for value in values)
    if len(set(names)) < len(names):
        raise RunError(f"two classes are called the same: {', '.join(names)}; give class_names, one for each of {list(values)}")
    matching = store_matching(about, store, settings.bands)
    tell_bands(matching)
    known = dict(zip(about.channels, zip(about.mean, about.std, strict=True), strict=True))
    mean, std = zip(*(known.get(name, (0.0, 1.0)) for name in matching.names), strict=True)
    footprint = common_footprint([1, *about.encoder.footprints.values()])
    normaliser = Normaliser(fitting_crop(settings, about, store), mean, std, about.no_value, 0, None, footprint)
    return Segmentation(values, names, matching.columns, normaliser, store, store.rows("val"), batch_size, parallel)


def colours_of(settings: Labelled, store: TileStore, values: tuple[int, ...]) -> tuple[tuple[int, int, int], ...]:
    """Red, green and blue of each class, from the settings or the label files; empty unless all are known."""
    if settings.class_colours:
        red_green_blue = [bytes.fromhex(colour.removeprefix("#")) for colour in settings.class_colours]
        return tuple((colour[0], colour[1], colour[2]) for colour in red_green_blue)
    said = store.attributes.get("class_colours", {})
    found = [said.get(str(value)) for value in values]
    return tuple((colour[0], colour[1], colour[2]) for colour in found) if all(found) else ()


def fitting_crop(settings: Labelled, about: Description, store: TileStore) -> tuple[int, ...]:
    """The crop that is set, or that of pretraining, cut down to whole tokens that fit into the store's tiles."""
    crop = per_axis(settings.crop, len(store.space), "crop") if settings.crop else about.crop
    return tuple(min(size, room // part * part) for size, room, part in zip(crop, store.space, about.encoder.step, strict=True))
