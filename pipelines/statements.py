"""What is said of data and weights beside their numbers: under which licence, and whether faces were taken away before."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from mae_core.settings import Settings
from mae_core.store import TileStore
from modalities.catalogue import Catalogue
from modalities.licences import NOT_STATED
from modalities.patients import of_patients
from modalities.volume import VolumeScene

Licence = Annotated[str, Field(pattern=r"^$|^[A-Za-z0-9][A-Za-z0-9.+-]*( (AND|OR|WITH) [A-Za-z0-9][A-Za-z0-9.+-]*)*$", max_length=100)]
"""An SPDX expression, in which no name has a place; empty where nothing is said."""

Defaced = Literal["yes", "no", "unknown"]
STATEMENTS = "statements"
"""Attribute of a store."""


class StatementSettings(Settings):
    """What nobody can read off the files of a data set."""

    licence: Licence = Field(
        "",
        description="Licence of the data as an SPDX name (CC-BY-4.0, LicenseRef-ours); empty: what the dataset_description.json of BIDS "
        "datasets states, if that is one of the usual ones",
    )
    defaced: Defaced = Field("unknown", description="Scans only: whether faces were taken away from all of the data before")


class Statements(Settings):
    """What a store or several say of their data.

    Attributes:
        licences: SPDX names, or that none is stated; sorted.
        defaced: Whether faces were taken away from all of them; `unknown` where they differ.
        num_marked, num_scenes: Scenes in which a file marks the face, which is then in no statistic and no loss, of how many.
    """

    licences: tuple[str, ...] = (NOT_STATED,)
    defaced: Defaced = "unknown"
    num_marked: int = 0
    num_scenes: int = 0

    @property
    def words(self) -> dict[str, str]:
        """For people: by what it is."""
        marked = f"; marked, and left out of training, in {self.num_marked} of {self.num_scenes} scenes" if self.num_marked else ""
        return {"Licence of the data": ", ".join(self.licences), "Faces taken away before": f"{self.defaced}{marked}"}


def stated(catalogue: Catalogue, settings: StatementSettings) -> dict[str, Any]:
    """The attribute of a store of these data; empty of what shows no patients and has nothing to say."""
    licences = (settings.licence,) if settings.licence else catalogue.licences or (NOT_STATED,)
    if not of_patients(catalogue.kind) and licences == (NOT_STATED,):
        return {}
    marked = [isinstance(scene, VolumeScene) and any(reading.defaced for reading in scene.readings) for scene in catalogue.scenes]
    found = Statements(licences=licences, defaced=settings.defaced, num_marked=sum(marked), num_scenes=len(marked))
    return {STATEMENTS: found.model_dump(mode="json")}


def statements_of(store: TileStore) -> Statements:
    """What a store says of its data, or all parts of a view of several together."""
    return together(Statements.model_validate(folder.attributes.get(STATEMENTS, {})) for folder in store.folders)


def together(parts: Iterable[Statements]) -> Statements:
    """What several say, as one."""
    every = tuple(parts)
    defaced = {part.defaced for part in every}
    return Statements(
        licences=tuple(sorted({licence for part in every for licence in part.licences})) or (NOT_STATED,),
        defaced=defaced.pop() if len(defaced) == 1 else "unknown",
        num_marked=sum(part.num_marked for part in every),
        num_scenes=sum(part.num_scenes for part in every),
    )


def grown(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The attribute of a store that takes in more data than before."""
    if STATEMENTS not in before and STATEMENTS not in now:
        return {}
    parts = [Statements.model_validate(attributes.get(STATEMENTS, {})) for attributes in (before, now)]
    both = together(parts)  # the catalogue of now holds what was there before, too
    return {STATEMENTS: both.model_copy(update=parts[1].model_dump(include={"num_marked", "num_scenes"})).model_dump(mode="json")}


def card_lines(data: Statements, weights_licence: str, compute: str, *, is_patients: bool) -> dict[str, str]:
    """What the README of a model says beside its use."""
    words = data.words if is_patients else {"Licence of the data": data.words["Licence of the data"]}
    return {**words, "Licence of the weights": weights_licence or NOT_STATED, "Compute": compute}
