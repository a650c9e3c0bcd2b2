"""Scenes find the label map that belongs to each; those left without one are told."""

from __future__ import annotations

from pathlib import Path

from modalities.catalogue import Catalogue, every_file
from modalities.scene import LabelMap, Rejected, Scene, SceneError


def match_labels(catalogue: Catalogue, labels: Path) -> tuple[list[tuple[Scene, LabelMap]], list[Rejected]]:
    """Scenes with the label map that belongs to each, and scenes left without one.

    A label file belongs to a scene when both have the same name up to the first dot (a label's name may go on with
    `_label`, `_labels`, `_seg` or `_mask`); a single file for a whole folder serves every scene that it covers.
    A label volume serves scans of one patient only: patients in a common space have equal grids, so nothing else would tell.

    Raises:
        SceneError: Nothing matches, a matching file lies on another grid, or a label volume would serve several patients.
    """
    if not labels.exists():
        raise SceneError(f"{labels} does not exist; --labels wants a folder of label files or one file")
    files = [file for file in every_file(labels.absolute()) if file.name.lower().endswith((".tif", ".tiff", ".nii", ".nii.gz"))]
    by_stem: dict[str, Path] = {}
    for file in files:
        stem = file.name.split(".")[0]
        for ending in ("_labels", "_label", "_seg", "_mask"):
            stem = stem.removesuffix(ending)
        if stem in by_stem:
            raise SceneError(f"two label files are called {stem}: {by_stem[stem]} and {file}; name each scene's once")
        by_stem[stem] = file
    pairs: list[tuple[Scene, LabelMap]] = []
    missing: list[Rejected] = []
    patients: dict[Path, str] = {}
    for scene in catalogue.scenes:
        own = by_stem.get(scene.files[0].name.split(".")[0])
        label = files[0] if own is None and len(files) == 1 else own
        if label is None:
            missing.append(Rejected(scene.files[0].name, "no label file of the same name"))
            continue
        if scene.label_suffix == ".nii.gz" and patients.setdefault(label, scene.group) != scene.group:
            other = f"{label} would label scans of several patients, one of them {scene.files[0]}"
            raise SceneError(f"{other}; name each label file like its image")
        pairs.append((scene, scene.open_labels(label)))
    if not pairs:
        names = ", ".join(sorted(by_stem)[:3]) or "no label file at all"
        raise SceneError(f"no label in {labels} belongs to a scene of {catalogue.root}: found {names}; name each label file like its image")
    return pairs, missing
