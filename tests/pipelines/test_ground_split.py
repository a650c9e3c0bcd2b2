"""What lies together on the ground is on one side, across zones, frames and dates, and the other side keeps its distance."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from rasterio.transform import Affine
from rasterio.warp import transform

import pipelines.preparation_report
from mae_core.store import TileStore
from modalities.ground import Footprints, footprints, from_earth_centre, on_globe
from modalities.raster import RasterScene
from pipelines.ground_check import nearest
from pipelines.ground_split import SHARED_SLACK, block_names, region_names, too_near
from pipelines.preparation import PreparationError, PrepareSettings, prepare
from tests.synthetic_rasters import north_up, scene_of, write_world
from tests.synthetic_scenes import Scenes, make_scene

ZONES = ("EPSG:32632", "EPSG:32633", "EPSG:4326", "EPSG:3035")
"""Both sides of 12° east, degrees, and an equal-area projection that is turned by some degrees there."""


def tiles_at(
    rng: np.random.Generator, number: int, spread_m: float, latitude: float, zones: tuple[str, ...], longitude: float = 12.0
) -> Footprints:
    """Tiles of 8×12 pixels of about 100 m around a place, each in a frame of its own."""
    frames, affines = [], []
    for frame in rng.choice(zones, number):
        (x,), (y,) = transform("EPSG:4326", str(frame), [longitude], [latitude])
        step, per_metre = (0.001, 1e-5) if frame == "EPSG:4326" else (100.0, 1.0)
        x, y = x + rng.uniform(-spread_m, spread_m) * per_metre, y + rng.uniform(-spread_m, spread_m) * per_metre
        frames.append(str(frame))
        affines.append([0, step, x, -step, 0, y, 0, 0, 1])
    return footprints(frames, affines, [[8, 12]] * number)


def painted(prints: Footprints, row: int, per_side: int = 25) -> np.ndarray:
    """Points all over a footprint, from its corners alone."""
    across, down = np.meshgrid(*[np.linspace(0, 1, per_side)] * 2)
    a, b, c, d = prints.corners[row]
    weights = [(1 - across) * (1 - down), across * (1 - down), across * down, (1 - across) * down]
    return sum(w.reshape(-1, 1) * corner for w, corner in zip(weights, (a, b, c, d), strict=True))


def naive(ours: Footprints, theirs: Footprints) -> np.ndarray:
    """Distance of every pair, in metres, as the nearest two of many points: too long by at most the way between points."""
    spots = [[painted(prints, row) for row in range(len(prints.voxel_m))] for prints in (ours, theirs)]
    far = np.full((len(spots[0]), len(spots[1])), np.inf)
    for i, one in enumerate(spots[0]):
        for j, other in enumerate(spots[1]):
            far[i, j] = np.sqrt(((one[:, None] - other[None]) ** 2).sum(axis=2).min())
    return far


@pytest.mark.parametrize("buffer_m", [0.0, 500.0])
@pytest.mark.parametrize("latitude", [0.01, 47.0, -79.9])
def test_who_is_too_near_is_found_as_by_painting_the_ground(buffer_m: float, latitude: float) -> None:
    rng = np.random.default_rng(int(buffer_m + latitude) % 7)
    zones = ZONES[:3] if latitude < 20 else ZONES
    ours, theirs = (tiles_at(rng, 10, 2500.0 + 6 * buffer_m, latitude, zones) for _ in range(2))
    far, grain = naive(ours, theirs), 100.0
    hit = too_near(ours, theirs, buffer_m, SHARED_SLACK)
    assert 0 < hit.sum() < len(hit)
    if buffer_m:
        assert hit[(far < buffer_m).any(axis=1)].all(), "none is missed"
        assert not hit[(far > buffer_m * np.sqrt(2) + grain).all(axis=1)].any(), "none is dropped that is far enough"
    else:
        assert hit[(far < 1e-3).any(axis=1)].all() or not (far < 1e-3).any()
        assert not hit[(far > grain).all(axis=1)].any()
    found = nearest(ours.rows(~hit), theirs, buffer_m, SHARED_SLACK)
    assert found is None, "the check, which measures otherwise, agrees"
    seen = nearest(ours, theirs, 20_000.0)
    assert seen is not None
    assert far.min() - grain < seen.distance_m <= far.min() + 1e-3
    assert seen.distance_m == pytest.approx(far[seen.ours, seen.theirs], abs=grain)


@pytest.mark.parametrize(("size", "other"), [(1.0, 1.0), (1.0, 60.0), (0.001, 30.0)])
def test_tiles_of_all_sizes_are_compared(size: float, other: float) -> None:
    """A grid of small tiles around a large one: those in it are hit, and those about it within the buffer."""
    x, y = (part.ravel() * 10_000.0 * other / 60 + 400_000 for part in np.meshgrid(np.arange(-10, 11), np.arange(-10, 11)))
    affines = [[0, 10 * size, east, -10 * size, 0, north + 5e6, 0, 0, 1] for east, north in zip(x, y, strict=True)]
    small = footprints(["EPSG:32632"] * len(x), affines, [[8, 8]] * len(x))
    side = 1000.0 * other
    large = footprints(["EPSG:32632"], [[0, side / 8, 400_000 - side * 7 / 16, -side / 8, 0, 5.4e6 + side * 7 / 16, 0, 0, 1]], [[8, 8]])
    away = np.maximum(np.abs(x + 35 * size - 400_000), np.abs(y - 35 * size - 400_000)) - side / 2 - 40 * size
    clear = np.abs(away - 2000) > 60 + 0.002 * side
    hit = too_near(small, large, 2000.0, 0.0)
    np.testing.assert_array_equal(hit[clear], (away < 2000)[clear])
    np.testing.assert_array_equal(too_near(large, small, 2000.0, 0.0), [True])


def test_a_place_has_one_block_in_every_frame_and_blocks_are_as_large_as_they_say() -> None:
    rng = np.random.default_rng(0)
    latitude, longitude = rng.uniform(-80, 80, 4000), rng.uniform(-180, 180, 4000)
    for block_km in (1.0, 10.0, 300.0):
        names = block_names(latitude, longitude, block_km)
        nearby = rng.uniform(-0.4, 0.4, (2, 4000)) * block_km / 111.2
        moved = block_names(latitude + nearby[0], longitude + nearby[1] / np.cos(np.radians(latitude)), block_km)
        assert 0.25 < np.mean([one == other for one, other in zip(names, moved, strict=True)]) < 0.75
        far = block_names(latitude + 1.2 * block_km / 111.2, longitude, block_km)
        assert not any(one == other for one, other in zip(names, far, strict=True))
    area = Counter(block_names(np.degrees(np.arcsin(rng.uniform(-1, 1, 200_000))), rng.uniform(-180, 180, 200_000), 2000.0))
    assert len(area) == pytest.approx(510e6 / 2000**2, rel=0.1), "blocks of 4 million km² on 510 million km²"
    (east,), (north,) = transform("EPSG:4326", "EPSG:32632", [12.0], [47.3])
    (other_east,), (other_north,) = transform("EPSG:4326", "EPSG:32633", [12.0], [47.3])
    places = [
        on_globe("EPSG:32632", [east], [north]),
        on_globe("EPSG:32633", [other_east], [other_north]),
        on_globe("EPSG:4326", [12.0], [47.3]),
    ]
    assert len({block_names(*place, 1.0)[0] for place in places}) == 1


def test_rows_close_at_the_date_line_and_poles_lie_in_a_row() -> None:
    assert block_names(np.array([10.0, 10.0]), np.array([-180.0, 180.0]), 10.0) == block_names(
        np.array([10.0] * 2), np.array([180.0, -180.0]), 10.0
    )
    poles = block_names(np.array([90.0, -90.0, 90.0]), np.array([0.0, 0.0, 1.0]), 10.0)
    assert poles[0] == poles[2] != poles[1]
    assert block_names(np.array([np.nan]), np.array([np.nan]), 10.0) == [""]


def test_tiles_are_near_across_the_date_line_and_over_the_pole() -> None:
    line = [[0, 1e-3, east, -1e-3, 0, 10.0, 0, 0, 1] for east in (179.991, -179.9995, -179.98)]
    prints = footprints(["EPSG:4326"] * 3, line, [[8, 8]] * 3)
    assert too_near(prints.rows(np.array([1, 2])), prints.rows(np.array([0])), 300.0, 0).tolist() == [True, False]
    pole = [[0, 100.0, east, -100.0, 0, 2_000_000.0, 0, 0, 1] for east in (1_999_000.0, 2_000_100.0)]  # the pole lies at (2e6, 2e6)
    prints = footprints(["EPSG:32661"] * 2, pole, [[8, 8]] * 2)
    assert prints.latitude[:, 4].min() > 89.98
    assert too_near(prints.rows(np.array([0])), prints.rows(np.array([1])), 400.0, 0).all()
    assert not too_near(prints.rows(np.array([0])), prints.rows(np.array([1])), 200.0, 0).any()


def test_boxes_of_degrees_hold_what_reaches_into_them() -> None:
    east = [-180.0, -179.0, 0.0, 10.0, 11.0, 179.9]
    prints = footprints(["EPSG:4326"] * 6, [[0, 0.1, x, -0.1, 0, 0.0, 0, 0, 1] for x in east], [[4, 4]] * 6)

    def named(box: tuple[float, ...], *names: str) -> list[int]:
        return [i for i, name in enumerate(region_names(names or list("abcdef"), prints, {"here": box})) if name]

    assert named((9.0, -1.0, 10.0, 1.0)) == [3], "its western pixels"
    assert named((10.2, -1.0, 11.5, 1.0)) == [3, 4]
    assert named((179.0, -1.0, -179.5, 1.0)) == [0, 5], "over the date line"
    assert named((-180.0, -1.0, 180.0, 1.0)) == [0, 1, 2, 3, 4, 5]
    assert named((9.0, 0.2, 10.0, 1.0)) == []
    assert region_names(["bo/1", "bo/2", "x"], prints.rows(np.arange(3)), {"b": ("bo/*",), "all": ("*",)}) == ["b", "b", "all"]


TILE = {"tile": (8, 8), "tiles_per_shard": 16, "num_workers": 0, "min_valid_fraction": 0.0}


def settings(**split: Any) -> PrepareSettings:
    return PrepareSettings(**TILE, split={"unit": "ground", "block_km": 3.0, "val_fraction": 0.3, **split})


def placed(
    folder: Path, name: str, crs: str, west: float, north: float, space: tuple[int, int] = (40, 48), pixel: float = 100.0
) -> RasterScene:
    """A scene whose first pixel lies at a place in degrees."""
    (x,), (y,) = transform("EPSG:4326", crs, [west], [north])
    return scene_of(write_world(folder / f"{name}.tif", space, affine=Affine(pixel, 0, x, 0, -pixel, y), crs=crs))


def two_zones(folder: Path) -> list[RasterScene]:
    """The same ground at 12° east in both zones, on two dates, a neighbour, and degrees over it."""
    first = placed(folder, "z32", "EPSG:32632", 11.98, 47.3)
    return [
        first,
        replace(placed(folder, "z32-later", "EPSG:32632", 11.98, 47.3), times=("2021-06-01",)),
        placed(folder, "z33", "EPSG:32633", 11.98, 47.3),
        placed(folder, "degrees", "EPSG:4326", 11.99, 47.29, (30, 30), 0.001),
        placed(folder, "away", "EPSG:32633", 12.3, 47.3),
    ]


def prints_of(store: TileStore) -> Footprints:
    return footprints(store.index.frame, store.index.affine, store.index.extent)


def check_apart(store: TileStore, buffer_m: float) -> None:
    """By painting the ground, for every pair of sides."""
    prints = prints_of(store)
    for side, others in (("val", ("train",)), ("test", ("train", "val"))):
        held = np.flatnonzero(store.index.split == side)
        rest = np.flatnonzero(np.isin(store.index.split.astype(str), others))
        if not len(held) or not len(rest):
            continue
        inner = prints.corners + (prints.centre[:, None] - prints.corners) * 0.02  # sides may touch
        points = from_earth_centre(prints.latitude[:, :4], prints.longitude[:, :4])
        np.testing.assert_allclose(points, prints.corners)
        shrunk = Footprints(prints.latitude, prints.longitude, inner, prints.centre, prints.voxel_m) if not buffer_m else prints
        near = np.linalg.norm(prints.centre[held][:, None] - prints.centre[rest], axis=2) < buffer_m + 2500
        for i, j in np.argwhere(near):
            one, other = painted(shrunk, held[i], 9), painted(shrunk, rest[j], 9)
            distance = np.sqrt(((one[:, None] - other) ** 2).sum(axis=2).min())
            assert distance >= max(buffer_m, 1.0), f"{store.index.scene[held[i]]} and {store.index.scene[rest[j]]}"


@pytest.mark.parametrize("buffer_m", [0.0, 700.0])
def test_every_date_and_zone_of_a_place_is_on_one_side(tmp_path: Path, buffer_m: float) -> None:
    scenes = Scenes(tuple(two_zones(tmp_path)))  # type: ignore[arg-type]
    report = prepare(scenes, tmp_path / "out", settings(buffer_m=buffer_m))
    store = TileStore.open(report.path)
    check_apart(store, buffer_m)
    reason = f"nearer than {buffer_m:g} m to a held-out tile" if buffer_m else "overlaps a held-out tile"
    assert set(report.discarded) == {reason}
    assert report.accepted + report.discarded[reason] == report.found
    assert min(report.tiles["train"], report.tiles["val"]) > 10
    names = block_names(store.index.latitude, store.index.longitude, 3.0)
    assert store.index.group.tolist() == names
    sides = {(group, side) for group, side in zip(names, store.index.split, strict=True)}
    assert len(sides) == len(set(names)), "a block is on one side"
    again = prepare(scenes, tmp_path / "again", settings(buffer_m=buffer_m))
    assert again.digest == report.digest
    other = TileStore.open(prepare(scenes, tmp_path / "other", settings(buffer_m=buffer_m, seed=2)).path)
    assert set(zip(other.index.group, other.index.split, strict=True)) != sides


def test_a_store_that_grows_keeps_its_sides_and_drops_what_comes_too_near(tmp_path: Path) -> None:
    first, later, *others = two_zones(tmp_path)
    chosen = settings(buffer_m=400.0)
    before = TileStore.open(prepare(Scenes((first, others[-1])), tmp_path / "out", chosen).path)  # type: ignore[arg-type]
    report = prepare(Scenes((first, later, *others)), tmp_path / "out", chosen)  # type: ignore[arg-type]
    store = TileStore.open(report.path)
    assert store.index.split[: len(before)].tolist() == before.index.split.tolist()
    check_apart(store, 400.0)
    assert report.discarded["would be held out, but overlaps an earlier training tile"] > 0
    assert report.discarded["nearer than 400 m to a held-out tile"] > 0
    date = {scene: Counter(store.index.split[store.index.scene == scene].tolist()) for scene in ("z32", "z32-later")}
    assert date["z32"] == date["z32-later"], "the same ground on another date falls as it fell"


def test_named_regions_are_a_side_of_their_own(tmp_path: Path) -> None:
    box = (12.3, 47.2, 12.33, 47.28)
    regions: dict[str, Any] = {"away": box, "coarse": ("deg*",)}
    report = prepare(Scenes(tuple(two_zones(tmp_path))), tmp_path / "out", settings(buffer_m=300.0, regions=regions))  # type: ignore[arg-type]
    store = TileStore.open(report.path)
    check_apart(store, 300.0)
    test = store.rows("test")
    assert report.tiles["test"] == len(test) > 0
    assert report.groups["test"] == 2
    assert set(store.index.group[test]) == {"region away", "region coarse"}
    assert set(store.index.split[store.index.scene == "degrees"]) == {"test"}
    reaches = np.array(region_names(store.index.scene.tolist(), prints_of(store), {"away": box}), dtype=str) != ""
    assert set(store.index.split[reaches]) == {"test"}
    assert "test: " in report.summary()
    train = store.rows("train")
    voxels = store.index.extent[train].prod(axis=1).sum()
    assert store.statistics.count[0] <= voxels, "nothing of a region is in the statistics"
    with pytest.raises(PreparationError, match=r"prepare.split.regions.nowhere holds no tile"):
        prepare(Scenes((two_zones(tmp_path)[0],)), tmp_path / "more", settings(regions={"nowhere": (0, 0, 1, 1)}))  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="south below north"):
        settings(regions={"upside down": (0, 2, 1, 1)})


def test_a_split_that_leaks_writes_no_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines.preparation_report, "leaks", lambda new, *_: (np.zeros(len(new.sides), bool),) * 2)
    with pytest.raises(PreparationError, match=r"a train tile lies \d+\.\d m from a val tile at latitude 47\.\d+.*the split leaks"):
        prepare(Scenes(tuple(two_zones(tmp_path))), tmp_path / "out", settings(buffer_m=300.0))  # type: ignore[arg-type]
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(("rows", "dropped", "told"), [(0, 0, 0), (1, 0, 1), (2, 4, 0)])
def test_scenes_held_out_whole_may_share_an_edge_of_one_voxel(tmp_path: Path, rows: int, dropped: int, told: int) -> None:
    pair = [
        scene_of(write_world(tmp_path / f"{name}.tif", (32, 32), affine=north_up(10.0, 500_000, north)))
        for name, north in (("a", 5e6), ("b", 5e6 - 320 + 10 * rows))
    ]
    report = prepare(Scenes(tuple(pair)), tmp_path / "out", settings(unit="scene"))  # type: ignore[arg-type]
    assert dict(report.discarded) == ({"overlaps a held-out tile": dropped} if dropped else {})
    assert sum("share an edge of up to one voxel" in note for note in report.notes) == told
    strict = prepare(Scenes(tuple(pair)), tmp_path / "strict", settings(unit="scene", buffer_m=50.0))  # type: ignore[arg-type]
    assert dict(strict.discarded) == {"nearer than 50 m to a held-out tile": 4}


def test_scenes_that_lie_nowhere_are_held_out_whole_and_one_block_cannot_be(tmp_path: Path) -> None:
    scenes = Scenes(tuple(make_scene(tmp_path, name, (16, 16)) for name in "abcd"))
    report = prepare(scenes, tmp_path / "out", settings())
    assert report.groups == {"train": 2, "val": 2}
    assert any("4 scenes lie nowhere on the globe and are held out or trained on whole: a, b, c, d" in note for note in report.notes)
    with pytest.raises(PreparationError, match=r"one group \(ground 50 km .*block_km smaller than 50"):
        prepare(Scenes((two_zones(tmp_path)[0],)), tmp_path / "one", settings(block_km=50.0))  # type: ignore[arg-type]
