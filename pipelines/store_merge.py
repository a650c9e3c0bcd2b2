"""Several stores become a view of all, once it is sure that nothing held out in one is trained on in another."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from pathlib import Path

import numpy as np

from mae_core.shards import StoreError
from mae_core.store import Split, TileStore
from mae_core.store_files import LocalFiles
from mae_core.store_view import VIEW, combine, write_view
from modalities.ground import UNPLACED, footprints
from modalities.patients import PSEUDONYM_KEY
from pipelines.contamination import names_of
from pipelines.frozen_split import joined_patients
from pipelines.ground_check import nearest
from pipelines.ground_split import SHARED_SLACK
from pipelines.tiling_plan import Ground, overlapping


def merge_stores(stores: Sequence[Path], out: Path) -> TileStore:
    """The view of some stores, written to `out`; nothing is copied and no store is changed.

    Raises:
        StoreError: A store is damaged, is itself a view or is named twice, they do not go together, or ground that is held out in one
            is trained on in another; nothing is written then.
    """
    opened = checked(stores, out)
    write_view(out, [store.path for store in opened])
    return TileStore.open(out, verify="sizes")


def checked(stores: Sequence[Path], out: Path) -> list[TileStore]:
    """The stores, opened, if they can be joined; raises as `merge_stores` does."""
    if len(stores) < 2:
        raise StoreError(f"{len(stores)} store is named; a view joins two at least: store merge STORE STORE … --out DIR")
    views = [str(store) for store in stores if (store / VIEW).exists()]
    if views:
        raise StoreError(f"{', '.join(views)}: is a view itself; name the stores that it joins")
    opened = [TileStore.open(store, verify="sizes") for store in stores]
    if len({store.attributes[PSEUDONYM_KEY] for store in opened if PSEUDONYM_KEY in store.attributes}) > 1:
        raise StoreError(
            "the pseudonyms of these stores are made with different keys, so one patient could be trained on and held out under two names; "
            "prepare them again with one key (TERRAVOX_KEY_FILE)"
        )
    combine(LocalFiles(out), [store.folders[0] for store in opened])
    _check_patients(opened)
    for one, other in permutations(opened, 2):
        _check_ground(one, other)
    return opened


def _check_patients(stores: Sequence[TileStore]) -> None:
    """No patient who shares a scan with others is trained on in one store and held out in another, under whichever of the names."""
    side: dict[str, bool] = {}
    for store in stores:
        joined = joined_patients(store)
        for group, is_trained in set(zip(store.index.group.tolist(), (store.index.split == "train").tolist(), strict=True)):
            for name in names_of(group, joined):
                if side.setdefault(name, is_trained) != is_trained:
                    raise StoreError(
                        f"{store.label}: patient {name}, who shares a scan with others, is trained on in one store and held out "
                        "in another; prepare them as one, or with one split (prepare.split.file)"
                    )


def _check_ground(one: TileStore, other: TileStore) -> None:
    """No training tile of one store shares ground with a held-out tile of the other."""
    rows, held = _placed(one, ("train",)), _placed(other, ("val", "test"))
    leaks = rows[overlapping(_ground(one, rows), _ground(other, held))]
    if len(leaks):
        first = f"tile {one.index.tile[leaks[0]]} of scene {one.index.scene[leaks[0]]}"
        raise StoreError(
            f"{len(leaks)} training tiles of {one.label} lie on ground that is held out in {other.label} (the first: {first}); "
            "prepare their scenes into one store, or leave one of them out"
        )
    ours, theirs = (footprints(ground.frames, ground.affines, ground.extents) for ground in (_ground(one, rows), _ground(other, held)))
    found = nearest(ours, theirs, 0.0, SHARED_SLACK)
    if found is not None:
        row, there = rows[found.ours], held[found.theirs]
        raise StoreError(
            f"training tiles of {one.label} lie on ground that is held out in {other.label} in another CRS: tile {one.index.tile[row]} of "
            f"scene {one.index.scene[row]} ({one.index.frame[row]}) and tile {other.index.tile[there]} of scene "
            f"{other.index.scene[there]} ({other.index.frame[there]}); prepare their scenes into one store, or leave one of them out"
        )


def _placed(store: TileStore, sides: Sequence[Split]) -> np.ndarray:
    rows = np.concatenate([store.rows(side) for side in sides])
    return rows[~np.isin(store.index.frame[rows].astype(str), UNPLACED)]


def _ground(store: TileStore, rows: np.ndarray) -> Ground:
    """Where tiles lie; the frame stands for the place, so that all tiles of a frame are compared."""
    frames = store.index.frame[rows].astype(str)
    return Ground(frames, frames, store.index.affine[rows], store.index.extent[rows])
