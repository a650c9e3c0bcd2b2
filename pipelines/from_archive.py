"""The whole way from a folder of files to a registered encoder, for the verbs that are made for one modality."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import Field

from mae_core.store import TileStore
from modalities.catalogue import ReaderSettings
from modalities.scene import SceneError
from pipelines.before_training import training_problems
from pipelines.crosswalk_option import refuse_crosswalk, refuse_inside, tell_crosswalk
from pipelines.preparation import PreparationError, PrepareSettings
from pipelines.preparation_plan import make_plan
from pipelines.prepare import prepare_store, scan_told, store_attributes
from pipelines.pretrain import EXPECTED, PretrainRecipe, pretrain
from pipelines.progress import console
from pipelines.withheld import missing_paths

EXPECTED_ERRORS = (*EXPECTED, SceneError, PreparationError)


class ArchiveRecipe(PretrainRecipe):
    """A pretraining that begins with files."""

    data: Path = Field(description="Folder of files, searched to its depth, or one file")
    out: Path = Field(description="Folder of the run")
    store: Path | None = Field(None, description="Folder of the tile store (default: by its content, in `stores` beside the run)")


def pretrain_archive(recipe: ArchiveRecipe, reader: ReaderSettings, settings: PrepareSettings, verb: str) -> int:
    """Scan, prepare what is not yet prepared, pretrain or resume, register.

    The store's default folder is named by the plan of its content, so the same data are prepared once, for any number of runs.
    """
    crosswalk: Path | None = getattr(recipe, "crosswalk", None)
    stores = [] if recipe.store is None else [recipe.store]
    refuse_inside(recipe.data, reader.kind, out=recipe.out, store=recipe.store, crosswalk=crosswalk)
    refuse_crosswalk(crosswalk, reader.kind, recipe.out, recipe.tracking, stores)
    catalogue = scan_told(recipe.data, reader, settings.num_workers)
    tell_crosswalk(crosswalk, catalogue, recipe.out, recipe.tracking, stores)
    plan = make_plan(catalogue.scenes, settings.tile, settings, {}, store_attributes(reader, len(settings.tile)))
    path = recipe.store or recipe.out.resolve().parent / "stores" / f"{reader.kind}-{plan.digest[:12]}"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if not (path / "manifest.json").is_file():
            raise PreparationError(
                f"{path} is not prepared yet; run this verb once with one process up to the training, then under torchrun"
            )
    else:
        prepare_store(catalogue, path, reader, settings)
        console.print(f"store: {path}")
    names = [name for name in PretrainRecipe.model_fields if name in type(recipe).model_fields]
    pretrain(TileStore.open(path), recipe.out, PretrainRecipe.model_validate({name: getattr(recipe, name) for name in names}), verb)
    return 0


def check_archive(recipe: ArchiveRecipe) -> list[str]:
    """Problems that only the disk can tell."""
    reader = getattr(recipe, "reader", None)
    problems = missing_paths(getattr(reader, "kind", None), {"data": recipe.data})
    return problems + training_problems(recipe, 0, console.print)
