"""The sheet shows the right tiles, the right numbers and the right places, and the same ones for the same seed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from mae_core import store_sheet as module
from mae_core.store import TileStore
from mae_core.store_sheet import NOTHING, _picture, _sample, frame_name, sheet_figure, sheet_to, store_sheet, tile_outlines
from mae_core.tracking import Tracker
from modalities.grid import Grid
from modalities.quality import NO_VALUE, Quality
from pipelines.preparation import PrepareSettings, prepare
from tests.synthetic_scenes import Scenes, SyntheticScene, make_scene

WKT = 'PROJCRS["A projection of somebody",BASEGEOGCRS["WGS 84"]]'
OPTICAL = tuple(f"B{number:02}" for number in range(1, 14))


def placed(scene: SyntheticScene, frame: str, x: float = 500_000.0) -> SyntheticScene:
    matrix = np.array([[0.0, 10, x], [-10, 0, 5_000_000], [0, 0, 1]])
    return replace(scene, grid=Grid.from_matrix(scene.grid.space, matrix, frame, "m" if frame else "index"))


def store_of(folder: Path, scenes: list[SyntheticScene], tile: tuple[int, ...], val_fraction: float = 0.3, least: float = 0.5) -> TileStore:
    settings = PrepareSettings(tile=tile, num_workers=0, min_valid_fraction=least, split={"val_fraction": val_fraction})  # type: ignore[arg-type]
    prepare(Scenes(tuple(scenes)), folder / "store", settings, attributes={"kind": "raster", "no_value": NO_VALUE})
    return TileStore.open(folder / "store")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> TileStore:
    """Six frames and one scene without a place, thirteen channels that half of the scenes lack, a scene of nothing."""
    folder = tmp_path_factory.mktemp("places")
    air = np.random.default_rng(0).choice([0, 1, 128], (20, 30), p=[0.8, 0.1, 0.1]).astype(np.uint8)
    frames = [WKT, WKT, *(f"EPSG:{32630 + number}" for number in range(5)), ""]
    scenes = [
        placed(
            make_scene(
                folder,
                f"place-{number}",
                (20, 30),
                channels=OPTICAL[: 6 + 7 * (number % 2)],
                scale=1e-4,
                offset=-0.1,
                quality=None if number else air,
            ),
            frame,
        )
        for number, frame in enumerate(frames)
    ]
    empty = make_scene(folder, "empty", (20, 30), channels=(*OPTICAL, "nowhere"), quality=np.ones((20, 30), np.uint8))
    return store_of(folder, [*scenes, placed(empty, WKT)], (16, 16))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> TileStore:
    """One channel, one scene, no held-out side: quick to draw."""
    folder = tmp_path_factory.mktemp("small")
    return store_of(folder, [make_scene(folder, "a", (40, 30), channels=("A",))], (8, 8), 0)


def texts(figure: Figure) -> str:
    return "\n".join(item.get_text() for item in figure.findobj(Text))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows that are read."""
    rows: list[int] = []
    read = TileStore.read

    def counting(store: TileStore, row: int) -> object:
        rows.append(row)
        return read(store, row)

    monkeypatch.setattr(TileStore, "read", counting)
    return rows


@pytest.mark.parametrize(
    ("space", "tile", "channels", "val_fraction"),
    [((90,), (32,), ("A",), 0.5), ((9, 10, 8), (6, 6, 6), ("T1w", "T2w"), 0.3), ((6, 7), (8, 8), ("A",), 0)],
)
def test_any_axes_and_a_single_tile(
    tmp_path: Path, space: tuple[int, ...], tile: tuple[int, ...], channels: tuple[str, ...], val_fraction: float
) -> None:
    scenes = [make_scene(tmp_path, f"scene-{number}", space, channels=channels) for number in range(3 if val_fraction else 1)]
    store = store_of(tmp_path, scenes, tile, val_fraction)
    figure = sheet_figure(store)
    shown = texts(figure)
    assert f"{len(store)} tile" in shown
    assert ("no val tiles" in shown) == (val_fraction == 0)
    assert "tiles by scene" in shown
    assert "scene-0" in shown
    picture = module.render(figure)
    assert picture.dtype == np.uint8
    assert picture.shape[1:] == (1300, 3)
    assert len(np.unique(picture)) > 10


def test_a_picture_is_a_function_of_store_and_seed(small: TileStore) -> None:
    first = store_sheet(small, 1)
    assert np.array_equal(first, store_sheet(small, 1))
    other = store_sheet(small, 2)
    assert first.shape == other.shape
    assert not np.array_equal(first, other)


def test_what_is_told_in_words(places: TileStore) -> None:
    shown = texts(sheet_figure(places))
    for wanted in (
        f"raster: {len(places)} tiles of 16×16, 14 channels of uint16, digest {places.digest[:12]}",
        "discarded tiles: 4 too little valid data; scenes that could not be read: 0",
        "2 more frames with 8 tiles, 4 tiles without a place",
        "A projection of somebody: 8 tiles of 2 scenes (m)",
        "no counted voxel",
        "B04/B03/B02",
        f"of {len(places.rows('train'))} of {len(places.rows('train'))} train tiles",
        "drawn with seed 0",
    ):
        assert wanted in shown, wanted


def test_histograms_hold_the_physical_values_of_counted_voxels_of_their_side(places: TileStore) -> None:
    for side in ("train", "val"):
        rows = places.rows(side)  # type: ignore[arg-type]
        sampled = _sample(places, rows, 0)
        assert sorted(sampled.rows) == rows.tolist()
        for number, name in enumerate(places.channels):
            wanted = []
            for row in rows:
                tile = places.read(int(row))
                if tile.present[number]:
                    values = tile.pixels[number].astype(float) * 1e-4 - 0.1
                    wanted.append(values[(tile.quality == 0)])
            flat = np.concatenate(wanted) if wanted else np.empty(0)
            np.testing.assert_allclose(np.sort(sampled.values[number]), np.sort(flat), rtol=1e-6, err_msg=name)
    assert len(sampled.values[places.channels.index("nowhere")]) == 0


def test_a_bounded_number_of_tiles_and_voxels_is_read(places: TileStore, reads: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_READ_TILES", 5)
    monkeypatch.setattr(module, "VOXELS_PER_TILE", 10)
    rows = places.rows("train")
    sampled = _sample(places, rows, 3)
    assert len(reads) == len(sampled.rows) == len(set(reads)) == 5
    assert set(reads) <= set(rows.tolist())
    assert len(sampled.values[0]) == 50
    assert _sample(places, rows, 3).rows == sampled.rows
    assert _sample(places, rows, 4).rows != sampled.rows
    monkeypatch.setattr(module, "MAX_READ_BYTES", 1)
    assert len(_sample(places, rows, 3).rows) == module.MIN_READ_TILES


def test_a_picture_without_padding_and_with_its_holes(tmp_path: Path) -> None:
    quality = np.zeros((6, 7), np.uint8)
    quality[0, :3] = [Quality.CLOUD, Quality.BACKGROUND, Quality.NODATA]
    store = store_of(tmp_path, [make_scene(tmp_path, "a", (6, 7), quality=quality)], (8, 8), 0)
    picture, low, high, names = _picture(store, store.read(0))
    assert picture.shape == (6, 7, 3)
    assert names == "A"
    assert [np.array_equal(picture[0, column], NOTHING) for column in range(4)] == [True, False, True, False]
    seen = store.read(0).pixels[0, :6, :7][quality == 0]
    np.testing.assert_allclose((low, high), np.percentile(seen, [1, 99]))


def test_a_volume_is_shown_where_most_of_it_counts(tmp_path: Path) -> None:
    quality = np.full((6, 5, 8), Quality.BACKGROUND, np.uint8)
    quality[:2, :, 1:7] = 0
    quality[2, 2, 6] = 0
    scene = make_scene(tmp_path, "a", (6, 5, 8), quality=quality, dtype="int16")
    store = store_of(tmp_path, [scene], (8, 8, 8), 0, 0.1)
    assert module._fullest_plane(quality) == slice(6, 7)
    assert module._fullest_plane(quality[:2]) == slice(4, 5), "the middle among equals"
    picture, low, high, _ = _picture(store, store.read(0))
    assert picture.shape == (5, 6, 3)
    seen = store.read(0).pixels[0, :6, :5, 6][quality[..., 6] == 0]
    np.testing.assert_allclose((low, high), np.percentile(seen, [1, 99]))


def test_outlines_by_hand() -> None:
    """Pixel centres lie half a pixel inside the outline; rows run southward."""
    affine = np.array([[0.0, 10, 5], [-20, 0, 90], [0, 0, 1]]).reshape(1, 9)
    outline = tile_outlines(affine, np.array([[3, 4]]))[0]
    assert outline.tolist() == [[0, 100], [40, 100], [40, 40], [0, 40]]


def test_frames_in_few_words() -> None:
    assert (frame_name("EPSG:32633"), frame_name(WKT)) == ("EPSG:32633", "A projection of somebody")
    assert len(frame_name("x" * 99)) == 32


def test_the_tracker_gets_it_unless_pictures_may_not_leave(small: TileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[str, tuple[int, ...], int]] = []
    monkeypatch.setattr(Tracker, "image", lambda _, key, picture, step: logged.append((key, picture.shape, step)))
    tracker = Tracker.__new__(Tracker)
    tracker.images = True
    sheet_to(tracker, small)
    assert [(key, step) for key, _, step in logged] == [("store/sheet", 0)]
    assert logged[0][1][1:] == (1300, 3)

    def forbidden(*_: object) -> None:
        raise AssertionError("a picture is drawn that nobody may see")

    monkeypatch.setattr(module, "store_sheet", forbidden)
    tracker.images = False
    sheet_to(tracker, small)
    assert len(logged) == 1
