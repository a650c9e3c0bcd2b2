"""Where a verb may write that reads patients' files: outside of their archive; and the crosswalk that its user asks for."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from pydantic import Field

from mae_core.tracking import TrackingSettings, artifact_folder
from modalities.catalogue import Catalogue
from modalities.crosswalk import refuse_place, write_crosswalk
from modalities.patients import of_patients
from modalities.scene import SceneError
from pipelines.progress import console

CrosswalkPath = Annotated[
    Path | None,
    Field(
        description="CSV file to write for your eyes alone (mode 0600): what each pseudonym of a patient, scan or file stands for. "
        "Outside of runs, stores and MLflow; an earlier one keeps its rows"
    ),
]


def refuse_inside(data: Path | None, kind: str, **written: Path | None) -> None:
    """Stops, before anything is read, where something would be written among patients' files, to be handed on with them or read as one.

    Args:
        data: Folder of the files; where it is a single file, nobody can tell what the archive is.
        kind: Of the files.
        written: Files and folders by the name of their setting.

    Raises:
        SceneError: One lies there; the message names no path.
    """
    if data is None or not of_patients(kind) or not data.is_dir():
        return
    for name, place in written.items():
        if place is not None and place.resolve().is_relative_to(data.resolve()):
            raise SceneError(
                f"--{name} lies in --data, where patients' files are, which are read and never written to; choose a place outside of it"
            )


def refuse_crosswalk(path: Path | None, kind: str, out: Path, tracking: TrackingSettings, stores: Iterable[Path] = ()) -> None:
    """Stops, before anything is read, where a crosswalk could not be written or would hold nothing.

    Raises:
        SceneError: See the message.
    """
    if path is None:
        return
    if not of_patients(kind):
        raise SceneError(f"--crosswalk is for patients, whose names are replaced; a run of {kind} tells its files by name, so leave it out")
    refuse_place(path, _handed_on(out, tracking, stores))


def tell_crosswalk(path: Path | None, catalogue: Catalogue, out: Path, tracking: TrackingSettings, stores: Iterable[Path] = ()) -> None:
    """Write the crosswalk of a catalogue where one is asked for.

    Raises:
        SceneError: It cannot be written there.
    """
    if path is None:
        return
    refuse_crosswalk(path, catalogue.kind, out, tracking)
    count = write_crosswalk(path, catalogue.names, _handed_on(out, tracking, stores))
    console.print(f"crosswalk: {count} pseudonyms and what they stand for, which only you can read; it is to stay in the archive")


def _handed_on(out: Path, tracking: TrackingSettings, stores: Iterable[Path]) -> list[Path]:
    """Folders that others get to see: of the run, of stores beside it, of MLflow."""
    beside = out.resolve().parent / "stores"
    artifacts = artifact_folder(tracking, out)
    return [out, beside, *stores, *([] if artifacts is None else [artifacts])]
