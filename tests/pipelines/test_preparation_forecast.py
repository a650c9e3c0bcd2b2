"""What is said before a preparation starts is what it then does; what is tried for it leaves nothing behind."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

import pipelines.preparation_forecast
import pipelines.progress
import pipelines.region_plan
from pipelines.preparation import PrepareSettings, num_processes, prepare
from pipelines.preparation_forecast import Forecast
from pipelines.progress import counting
from pipelines.slurm_jobs import SlurmCluster
from tests.synthetic_scenes import Scenes, make_scene, three_places, tree

HERE = PrepareSettings(tile=(8, 8), tiles_per_shard=1, num_workers=0)


def forecasts(scenes: Scenes, out: Path, settings: PrepareSettings = HERE) -> list[Forecast]:
    said: list[Forecast] = []
    prepare(scenes, out, settings, announce=said.append)
    return said


def test_it_counts_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = three_places(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5 << 30))
    (said,) = forecasts(scenes, tmp_path / "out")
    voxels = 6 * 64 + 6 * 64 + 30
    assert (said.num_scenes, said.num_tiles, said.num_bytes, said.tile_bytes) == (3, 13, voxels * 5, 64 * 5)
    assert (said.free_bytes, said.amplification, said.num_workers) == (5 << 30, 1.0, 1)
    assert said.summary().startswith("to do: 13 tiles of 3 scenes, 0.0 MiB uncompressed; 5.0 GiB free")
    assert forecasts(scenes, tmp_path / "out") == [], "there is nothing to do"
    (more,) = forecasts(Scenes((*scenes.scenes, make_scene(tmp_path, "d", (9, 8)))), tmp_path / "out")
    assert (more.num_scenes, more.num_tiles) == (1, 2)


def test_the_time_is_that_of_a_trial_scaled_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four seconds to read the four tiles of the middle scene and a second to write one; 40 tiles of three sizes."""
    monkeypatch.setattr(pipelines.preparation_forecast, "SAMPLED_TILES", 1)
    sizes = {"a": (8, 8), "b": (8, 8), "c": (8, 32), "d": (16, 32), "e": (8, 208)}
    scenes = Scenes(tuple(make_scene(tmp_path, name, size) for name, size in sizes.items()))
    ticks: Iterator[float] = iter((0.0, 4.0, 5.0))
    monkeypatch.setattr(pipelines.preparation_forecast, "monotonic", lambda: next(ticks))
    monkeypatch.setattr(pipelines.preparation_forecast, "MIN_TASKS", 5)
    (said,) = forecasts(scenes, tmp_path / "out")
    assert said.num_tiles == 40
    assert (said.sampled, said.work_seconds) == ("c", 40 + 40)
    assert "about 80 s with 1 processes (80 s of work for one process), from reading one region of c" in said.summary()
    assert "27 min" in replace(said, work_seconds=1600.0).summary()
    assert "2.0 h of work for one process, from" in replace(said, work_seconds=7200.0, num_workers=None).summary()


def test_a_trial_leaves_nothing_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines.preparation_forecast, "MIN_TASKS", 1)
    scenes = three_places(tmp_path)
    whole = tree(prepare(scenes, tmp_path / "whole", HERE).path)
    left: list[Any] = []
    prepare(scenes, tmp_path / "out", HERE, announce=lambda _: left.extend((tmp_path / "out").rglob("c")))
    assert left == []
    assert tree(tmp_path / "out") == whole


def test_a_scene_that_cannot_be_read_gives_no_time_and_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines.preparation_forecast, "MIN_TASKS", 1)
    good = tuple(make_scene(tmp_path, name, (8, 8)) for name in "abde")
    bad = make_scene(tmp_path, "c", (8, 8), damaged=3)
    (said,) = forecasts(Scenes((*good, bad)), tmp_path / "out", PrepareSettings(**{**HERE.model_dump(), "max_rejected_fraction": 0.5}))
    assert (said.sampled, said.work_seconds) == ("c", None)
    assert "process" not in said.summary()


def test_blocks_larger_than_a_region_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines.region_plan, "READ_BYTES", 64 * 7)
    scene = replace(make_scene(tmp_path, "a", (32, 8)), blocks_of=(32, 8))
    other = make_scene(tmp_path, "b", (8, 8))
    (said,) = forecasts(Scenes((scene, other)), tmp_path / "out")
    assert said.amplification == pytest.approx((2 + 64) / (1 + 64)), "two regions unpack the one block of a"
    (said,) = forecasts(Scenes((scene, replace(other, blocks_of=(8, 8)))), tmp_path / "again")
    assert "unpacked 1.5 times each" in said.summary()


def test_who_shares_the_work() -> None:
    assert num_processes(HERE) == 1
    assert num_processes(PrepareSettings(num_workers=3)) == 3
    assert num_processes(PrepareSettings(scheduler="tcp://there:8786")) is None
    assert num_processes(PrepareSettings(cluster=SlurmCluster(kind="slurm", num_jobs=4, cores=2))) == 8


def test_tiles_and_bytes_a_second_are_told_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = io.StringIO()
    monkeypatch.setattr(pipelines.progress, "console", Console(file=text, width=200, highlight=False))
    ticks: Iterator[float] = iter((0.0, 100.0, 110.0, 120.0, 121.0))
    monkeypatch.setattr(pipelines.progress, "monotonic", lambda: next(ticks))
    with counting("preparing", "tiles") as progress:
        progress.unit_bytes = 3_000_000
        for done in (50, 90, 130, 140):
            progress(done, 200)
    lines = [line.rstrip() for line in text.getvalue().splitlines() if line.strip()]
    assert lines == ["preparing  130/200 tiles  4 tiles/s  12 MB/s  18 s left"], "80 tiles in 20 s; ten seconds after it there is no line"
