"""Scenes find the labels that belong to each, brought to their grids; what was done to the labels, and what was left out, is told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from modalities.catalogue import Catalogue, every_file
from modalities.grid import Window
from modalities.label_classes import ClassTable, raster_classes
from modalities.label_file import DRIVERS, LabelOptions, VectorFile, number_texts, open_vector, open_vector_labels, summary
from modalities.label_matrix import open_matrix_labels
from modalities.label_raster import NoOverlapError, blocks, open_raster_labels
from modalities.medical import GROUP_PATTERN
from modalities.patients import of_patients
from modalities.pseudonyms import Pseudonyms, pseudonyms
from modalities.raster_file import ENDINGS as RASTERS
from modalities.scene import LabelMap, Rejected, Scene, SceneError
from modalities.series import SeriesLabels, SeriesScene
from modalities.volume import VolumeScene
from modalities.volume_labels import LabelFolder, label_volumes

MATRIX = ".mat"
PICTURE = ".png"
"""Of labels of X-ray pictures alone: beside satellite images, a PNG is a preview."""
ENDINGS = (*RASTERS, MATRIX, ".nii", ".nii.gz", ".gpkg", ".geojson", ".shp")
"""Of label files in a folder. A `.json` is one only where it is given by itself: many others have that ending."""

VOLUME_WORDS = ("files", "rename")
VECTOR_WORDS = ("attribute", "value", "numbers", "order", "all_touched", "radius_m", "background", "crs")
COUNTED_SIDE = 2048


@dataclass(frozen=True)
class Labelling:
    """What was found.

    Attributes:
        pairs: Scenes with the labels of each.
        without: Scenes left without, with the reason.
        notes: What was done to the labels, a line each.
        classes: Names and colours that the files give to the classes that occur.
        pixels: Pixels of each class over all images, -1 for no label; empty for volumes.
        names: Of label files of patients, what each pseudonym stands for; goes nowhere but into a crosswalk that is asked for.
    """

    pairs: list[tuple[Scene, LabelMap]]
    without: list[Rejected]
    notes: list[str] = field(default_factory=list)
    classes: ClassTable = field(default_factory=ClassTable)
    pixels: Mapping[int, int] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Said:
    """How messages call files: of patients by pseudonyms, of others by their names.

    Attributes:
        names: What makes pseudonyms; None for what does not show patients.
        folder: That labels are in.
    """

    names: Pseudonyms | None
    folder: Path = field(repr=False)

    @property
    def option(self) -> str:
        """The folder or file of `--labels`."""
        return "--labels" if self.names else str(self.folder)

    def label(self, file: Path) -> str:
        """A label file."""
        inside = file.relative_to(self.folder).as_posix() if file.is_relative_to(self.folder) else ""
        return self.names.of("label", inside or file.name) if self.names else file.name

    def scene(self, scene: Scene) -> str:
        """The file of a scene."""
        return scene.name if self.names else scene.files[0].name


@dataclass(frozen=True)
class WithoutSome:
    """Labels of which some class numbers are no label."""

    labels: LabelMap
    ignore: tuple[int, ...]

    def read(self, window: Window) -> NDArray[np.int64]:
        """Class numbers; -1 where there is none, or one of these."""
        found = self.labels.read(window)
        return np.where(np.isin(found, self.ignore), -1, found)


def match_labels(
    catalogue: Catalogue,
    labels: Path,
    options: LabelOptions | None = None,
    ignore: Sequence[int] = (),
    group_pattern: str = GROUP_PATTERN,
) -> Labelling:
    """Scenes with the label map that belongs to each, and scenes left without one.

    A label file belongs to a scene when both have the same name up to the first dot (a label's name may go on with
    `_label`, `_labels`, `_seg` or `_mask`); a single file for a whole folder serves every scene that it covers.
    How label volumes find their scans: `LabelFolder.match`. One serves scans of one patient only: patients in a common space have
    equal grids, so nothing else would tell.

    Args:
        catalogue: The scenes.
        labels: Folder of label files, or one file.
        options: How they are read.
        ignore: Class numbers that are no label.
        group_pattern: What names a patient in the path of a label volume, as in `VolumeSettings`.

    Raises:
        SceneError: Nothing matches, a matching file cannot be brought to its scene, or a label volume would serve several patients.
    """
    options = options or LabelOptions()
    said = Said(pseudonyms() if of_patients(catalogue.kind) else None, labels.absolute())
    found, without, shared = _files_of(catalogue, said, options, group_pattern)
    layers = {file: open_vector(file, options) for file in dict.fromkeys(file for _, file in found) if _is_vector(file)}
    numbers = number_texts(layers.values(), options)
    _refuse_unused(options, found[0], said, vectors=bool(layers))
    notes = [summary(layer, options, numbers) for layer in layers.values()]
    if isinstance(found[0][0], VolumeScene):
        notes.append(f"{len(found)} scans are labelled by {len({file for _, file in found})} of the label files")
    pairs: list[tuple[Scene, LabelMap]] = []
    for scene, file in found:
        try:
            with _about(file, said):
                own, note = _open(scene, file, options, layers, numbers)
        except NoOverlapError as error:
            if not shared:
                raise
            without.append(Rejected(said.scene(scene), f"no label of {said.label(file)} lies there"))
            last = error
            continue
        pairs.append((scene, WithoutSome(own, tuple(ignore)) if ignore else own))
        notes += [f"{said.label(file)} for {scene.name}: {note}"] if note else []
    if not pairs:
        raise last
    pixels = _counted(pairs)
    table = _table([file for _, file in found], numbers, said)
    if numbers and any(name != str(value) for name, value in numbers):
        notes.insert(len(layers), "class numbers of the texts: " + ", ".join(f"{value} {name}" for name, value in numbers))
    names = {said.label(file): str(file) for _, file in found} if said.names else {}
    return Labelling(pairs, without, notes, table.only(pixels), pixels, names)


def _files_of(
    catalogue: Catalogue, said: Said, options: LabelOptions, group_pattern: str
) -> tuple[Sequence[tuple[Scene, Path]], list[Rejected], bool]:
    """The label file of each scene, the scenes without one, and whether a single file serves all."""
    files = _candidates(catalogue, said)
    if any(isinstance(scene, VolumeScene) for scene in catalogue.scenes):
        return (*_volume_files(catalogue, said.folder, files, options, group_pattern), False)
    by_stem: dict[str, Path] = {}
    for file in files:
        stem = file.name.split(".")[0]
        for ending in ("_labels", "_label", "_seg", "_mask"):
            stem = stem.removesuffix(ending)
        if stem in by_stem:
            both = f"{said.label(by_stem[stem])} and {said.label(file)}"
            shown = f"the same: {both}" if said.names else f"{stem}: {by_stem[stem]} and {file}"
            raise SceneError(f"two label files are called {shown}; name each scene's once")
        by_stem[stem] = file
    found: list[tuple[Scene, Path]] = []
    without: list[Rejected] = []
    patients: dict[Path, str] = {}
    for scene in catalogue.scenes:
        own = by_stem.get(scene.files[0].name.split(".")[0]) or by_stem.get(scene.name.split("/")[-1].split(".")[0])
        label = files[0] if own is None and len(files) == 1 else own
        if label is None:
            without.append(Rejected(said.scene(scene), "no label file of the same name"))
            continue
        if scene.label_suffix == PICTURE and patients.setdefault(label, scene.group) != scene.group:
            other = f"{said.label(label)} would label scans of several patients, one of them {scene.name}"
            raise SceneError(f"{other}; name each label file like its image")
        found.append((scene, label))
    if not found:
        names = f"{len(by_stem)} label files" if said.names else ", ".join(sorted(by_stem)[:3])
        raise SceneError(
            f"no label in {said.option} belongs to a scene of {catalogue.label}: found {names if by_stem else 'no label file at all'}; "
            "name each label file like its image"
        )
    return found, without, len(files) == 1


def _candidates(catalogue: Catalogue, said: Said) -> list[Path]:
    """Files whose ending is one of labels of these scenes."""
    if not said.folder.exists():
        raise SceneError(f"{said.option} does not exist; --labels wants a folder of label files or one file")
    endings: tuple[str, ...] = (*ENDINGS, ".json") if said.folder.is_file() else ENDINGS
    if any(scene.label_suffix == PICTURE for scene in catalogue.scenes):
        endings = (PICTURE,)
    return [file for file in every_file(said.folder) if file.name.lower().endswith(endings)]


def _volume_files(
    catalogue: Catalogue, labels: Path, files: Sequence[Path], options: LabelOptions, group_pattern: str
) -> tuple[Sequence[tuple[Scene, Path]], list[Rejected]]:
    """The label volume of each scene, and the scenes without one."""
    scenes = [scene for scene in catalogue.scenes if isinstance(scene, VolumeScene)]
    folder = labels if labels.is_dir() else labels.parent
    chosen = label_volumes(files, folder, scenes, options)
    data = catalogue.root if catalogue.root.is_dir() else catalogue.root.parent
    found, without = LabelFolder(folder, chosen, options, group_pattern).match(scenes, data)
    if not found:
        left_out = f" of {len(files)} files there" if options.files else ""
        first = f"; the first without: {without[0].reason}" if without else ""
        raise SceneError(
            f"no label volume belongs to a scan: {len(chosen)} label files{left_out} and {len(scenes)} scans{first}. Name each label file "
            "like its image, say how with label_options.rename, or which are labels with label_options.files"
        )
    return found, without


def _open(
    scene: Scene, file: Path, options: LabelOptions, layers: Mapping[Path, VectorFile], numbers: tuple[tuple[str, int], ...]
) -> tuple[LabelMap, str]:
    """The labels in a file on the scene's grid, and what is to be told of it."""
    if isinstance(scene, SeriesScene):
        flat, note = _open(scene.images[0], file, options, layers, numbers)
        return SeriesLabels(flat, scene.grid), note
    if not _is_image(scene):
        return scene.open_labels(file), ""
    if file in layers:
        return open_vector_labels(layers[file], scene.grid, scene.name, options, numbers)
    if file.name.lower().endswith(MATRIX):
        return open_matrix_labels(file, scene.grid, scene.name, options.layer)
    return open_raster_labels(file, scene.grid, scene.name, reproject=options.reproject)


@contextmanager
def _about(file: Path, said: Said) -> Iterator[None]:
    """Puts the pseudonym of a label file, if it has one, into an error and in the place of its name."""
    try:
        yield
    except NoOverlapError:
        raise
    except SceneError as error:
        if said.names is None:
            raise
        text = str(error).replace(str(file), "it").replace(file.name, "it")
        raise SceneError(f"{said.label(file)}: {text}", error.code) from None


def _is_image(scene: Scene) -> bool:
    return len(scene.grid.space) == 2 and scene.label_suffix != PICTURE


def _is_vector(file: Path) -> bool:
    return file.suffix.lower() in DRIVERS


def _refuse_unused(options: LabelOptions, first: tuple[Scene, Path], said: Said, *, vectors: bool) -> None:
    """Stops at options that would change nothing."""
    given = [name for name in VECTOR_WORDS if getattr(options, name) != LabelOptions.model_fields[name].get_default()]
    if given and not vectors:
        raise SceneError(f"label_options.{given[0]} is for vector files, and the labels are {said.label(first[1])}; leave it out")
    given = [name for name in VOLUME_WORDS if getattr(options, name) != LabelOptions.model_fields[name].get_default()]
    if given and not isinstance(first[0], VolumeScene):
        raise SceneError(f"label_options.{given[0]} is for label volumes, and the labels are {said.label(first[1])}; leave it out")


def _counted(pairs: Sequence[tuple[Scene, LabelMap]]) -> dict[int, int]:
    """Pixels of each class number over all images."""
    counts: Counter[int] = Counter()
    for scene, labels in pairs:
        for part in blocks(scene.grid.full, COUNTED_SIDE) if _is_image(scene) else ():
            values, numbers = np.unique(labels.read(part), return_counts=True)
            counts.update(dict(zip(values.tolist(), numbers.tolist(), strict=True)))
    return dict(sorted(counts.items()))


def _table(files: Sequence[Path], numbers: tuple[tuple[str, int], ...], said: Said) -> ClassTable:
    """Names and colours of all files together.

    Raises:
        SceneError: Two files call the same class by different names.
    """
    names = {value: name for name, value in reversed(numbers) if name != str(value)}
    places = dict.fromkeys(names, "the attribute")
    colours: dict[int, tuple[int, int, int]] = {}
    for file in dict.fromkeys(file for file in files if file.name.lower().endswith(RASTERS)):
        table = raster_classes(file)
        colours = {**table.colours, **colours}
        for value, name in table.names.items():
            if names.setdefault(value, name) != name:
                raise SceneError(
                    f"class {value} is called {names[value]} in {places[value]} and {name} in {said.label(file)}; make them agree"
                )
            places.setdefault(value, said.label(file))
    return ClassTable(names, colours)
