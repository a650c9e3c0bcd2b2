"""Killed anywhere and run again, a preparation ends in the same bytes; what is not its own it leaves alone."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest

import mae_core.store_writer
import pipelines.preparation_workers
from mae_core.store import TileStore
from pipelines.preparation import PreparationError, PrepareSettings, prepare
from pipelines.tiling_plan import SplitSettings
from tests.pipelines.test_preparation_extension import Killed, stopping
from tests.synthetic_scenes import Scenes, SyntheticScene, make_scene, three_places, tree

HERE = PrepareSettings(tile=(8, 8), tiles_per_shard=4, num_workers=0)
ROOT = Path(__file__).resolve().parents[2]


def changed(settings: PrepareSettings = HERE, **values: Any) -> PrepareSettings:
    return PrepareSettings(**{**settings.model_dump(), **values})


@pytest.fixture
def scenes(tmp_path: Path) -> Scenes:
    return three_places(tmp_path)


def fail_after(tiles: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done >= tiles:
            raise KeyboardInterrupt

    return progress


def test_interrupted_after_any_task_it_finishes_the_rest(scenes: Scenes, tmp_path: Path) -> None:
    whole = tree(prepare(scenes, tmp_path / "whole", HERE).path)
    assert "manifest.json" in whole
    assert not any(name.startswith("progress") for name in whole)
    steps = [0, 6, 12, 13]
    for place, tiles in enumerate(steps):
        out = tmp_path / f"broken{tiles}"
        with pytest.raises(KeyboardInterrupt):
            prepare(scenes, out, HERE, progress=fail_after(tiles))
        done: list[int] = []
        prepare(scenes, out, HERE, progress=lambda count, _, done=done: done.append(count))  # type: ignore[misc]
        assert done == steps[place:], "what was finished is not done again"
        assert tree(out) == whole


def test_stopped_at_any_write_it_ends_in_the_same_bytes(scenes: Scenes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before and after each renaming in turn; nothing is tidied up on the way down, as after a kill."""
    whole = tree(prepare(scenes, tmp_path / "whole", HERE).path)
    stop = stopping(monkeypatch)
    steps = 1 + 5 * 3 + 6 + 1 + 6 + 1 + 1
    for at in range(2, 2 * steps + 2):
        out = tmp_path / f"broken{at}"
        stop.update(at=at, count=0)
        with pytest.raises(Killed):
            prepare(scenes, out, HERE)
        stop.update(at=-1)
        prepare(scenes, out, HERE)
        assert tree(out) == whole, f"stopped at {at}"
    stop.update(at=-1, count=0)
    prepare(scenes, tmp_path / "last", HERE)
    assert stop["count"] == steps, "every renaming was a stop once"


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from pipelines.preparation import PrepareSettings, prepare
from tests.pipelines.test_preparation_resume import killed_scenes
if __name__ == "__main__":
    def progress(done, total):
        if done >= 6:
            os.kill(os.getpid(), signal.SIGKILL)
    folder = Path({folder!r})
    prepare(killed_scenes(folder), folder / "out", PrepareSettings(tile=(8, 8), tiles_per_shard=2, num_workers=2), progress=progress)
"""


def killed_scenes(folder: Path) -> Scenes:
    return Scenes(tuple(make_scene(folder, f"s{n}", (17, 9)) for n in range(3)))


def test_killed_with_dask_and_run_again_it_ends_in_the_same_bytes(tmp_path: Path) -> None:
    """SIGKILL with two workers, then two workers to the end; none in this process and one worker give the same store."""
    script = tmp_path / "killed.py"
    script.write_text(KILLED.format(root=str(ROOT), folder=str(tmp_path)))
    result = subprocess.run([sys.executable, "-W", "error", str(script)], capture_output=True, timeout=120, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr.decode()
    assert len(list((tmp_path / "out" / "progress").glob("shard-*.json"))) >= 2
    scenes = killed_scenes(tmp_path)
    settings = changed(tiles_per_shard=2, num_workers=2)
    report = prepare(scenes, tmp_path / "out", settings)
    assert not report.already_done
    whole = tree(tmp_path / "out")
    for workers in (0, 1):
        prepare(scenes, tmp_path / f"with{workers}", changed(settings, num_workers=workers))
        assert tree(tmp_path / f"with{workers}") == whole


def test_no_worker_is_left_behind(tmp_path: Path) -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with pytest.raises(KeyboardInterrupt):
        prepare(killed_scenes(tmp_path), tmp_path / "out", changed(num_workers=1), progress=fail_after(1))
    left = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    assert [child.cmdline() for child in left if "resource_tracker" not in " ".join(child.cmdline())] == []


def test_a_finished_store_is_left_as_it_is(scenes: Scenes, tmp_path: Path) -> None:
    first = prepare(scenes, tmp_path / "out", HERE)
    before = {file: file.stat().st_mtime_ns for file in first.path.rglob("*")}
    again = prepare(Scenes(scenes.scenes[::-1]), tmp_path / "out", changed(num_workers=7, memory_limit="1GiB"))
    assert again.already_done
    assert again.digest == first.digest
    assert (again.accepted, again.tiles, again.num_bytes) == (first.accepted, first.tiles, first.num_bytes)
    assert before == {file: file.stat().st_mtime_ns for file in first.path.rglob("*")}
    assert "already prepared" in again.summary()
    assert first.num_bytes == sum(file.stat().st_size for file in first.path.rglob("*") if file.is_file() and file.name != "manifest.json")


def test_a_finished_store_that_lost_a_shard_is_refused_by_name(scenes: Scenes, tmp_path: Path) -> None:
    prepare(scenes, tmp_path / "out", HERE)
    (tmp_path / "out/quality/c/1/0/0").unlink()
    with pytest.raises(PreparationError, match=r"quality shard c/1/0/0 \(tiles 4–7\) is missing"):
        prepare(scenes, tmp_path / "out", HERE)


def test_a_shard_that_changed_since_is_done_again(scenes: Scenes, tmp_path: Path) -> None:
    whole = tree(prepare(scenes, tmp_path / "whole", HERE).path)
    with pytest.raises(KeyboardInterrupt):
        prepare(scenes, tmp_path / "out", HERE, progress=fail_after(12))
    (tmp_path / "out/pixels/c/1/0/0/0").write_bytes(b"")
    (tmp_path / "out/progress/shard-00002.json").write_text("{")
    done: list[int] = []
    prepare(scenes, tmp_path / "out", HERE, progress=lambda count, _: done.append(count))
    assert done[0] == 4 + 2, "only the broken shards of a region are written anew"
    assert tree(tmp_path / "out") == whole


@pytest.mark.parametrize("finished", [True, False])
def test_another_plan_is_refused_and_says_what_differs(scenes: Scenes, tmp_path: Path, finished: bool) -> None:
    out = tmp_path / "out"
    if finished:
        prepare(scenes, out, HERE)
    else:
        with pytest.raises(KeyboardInterrupt):
            prepare(scenes, out, HERE, progress=fail_after(1))
    before = tree(out)
    with pytest.raises(
        PreparationError, match=r"another plan; choose another --out or delete(?s:.*)settings.tile: \[8, 8\] there, \[4, 8\] now"
    ):
        prepare(scenes, out, changed(tile=(4, 8)))
    with pytest.raises(PreparationError, match=r"settings.split.seed: 0 there, 1 now"):
        prepare(scenes, out, changed(split=SplitSettings(seed=1)))
    if not finished:
        with pytest.raises(PreparationError, match=r"What differs:\n  scene c: there, not now"):
            prepare(Scenes(scenes.scenes[:2]), out, HERE)
    with pytest.raises(PreparationError, match=r"attributes.kind: None there, x now"):
        prepare(scenes, out, HERE, attributes={"kind": "x"})
    assert tree(out) == before
    np.save(scenes.scenes[0].files[1], np.zeros((20, 13), np.uint8))
    with pytest.raises(PreparationError, match=r"\n  a: its files" if finished else r"What differs:\n  scene a: files"):
        prepare(scenes, out, HERE)


def test_a_folder_that_is_not_ours_is_left_alone(scenes: Scenes, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    with pytest.raises(PreparationError, match=r"is not empty and holds no tile store \(thesis.txt, …\)"):
        prepare(scenes, tmp_path / "full", HERE)
    assert tree(tmp_path / "full") == {"thesis.txt": b"years of work"}
    (tmp_path / "full" / "manifest.json").write_text("{}")
    with pytest.raises(PreparationError, match=r"holds a manifest.json that is not of a tile store"):
        prepare(scenes, tmp_path / "full", HERE)
    (tmp_path / "file").write_text("")
    with pytest.raises(PreparationError, match=r"file is a file; --out wants a folder"):
        prepare(scenes, tmp_path / "file", HERE)
    with pytest.raises(PreparationError, match=r"cannot be written: .*Not a directory"):
        prepare(scenes, tmp_path / "file" / "below", HERE)


def test_two_runs_do_not_write_one_folder(scenes: Scenes, tmp_path: Path) -> None:
    def second(done: int, total: int) -> None:
        with pytest.raises(PreparationError, match="another run is preparing"):
            prepare(scenes, tmp_path / "out", HERE)

    prepare(scenes, tmp_path / "out", HERE, progress=second)


def test_a_full_disk_is_said_before_and_during(scenes: Scenes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
        with pytest.raises(PreparationError, match=r"out has 0.0 GiB free, the tiles need up to 0.0 GiB uncompressed"):
            prepare(scenes, tmp_path / "out", HERE)
    commit = mae_core.store_writer._commit

    def full(stream: Any, path: Path) -> None:
        if path.parts[-5:-3] == ("c", "2") or path.name == "index.parquet":
            raise OSError(errno.ENOSPC, "No space left on device")
        commit(stream, path)

    with monkeypatch.context() as patch:
        patch.setattr(mae_core.store_writer, "_commit", full)
        for _ in range(2):
            with pytest.raises(PreparationError, match=r"cannot be written: .*No space left on device. What is finished is kept"):
                prepare(scenes, tmp_path / "out", HERE)
    assert len(list((tmp_path / "out/progress").glob("shard-*"))) >= 2
    assert not list(tmp_path.rglob("*.tmp"))
    prepare(scenes, tmp_path / "out", HERE)
    assert tree(tmp_path / "out") == tree(prepare(scenes, tmp_path / "whole", HERE).path)


def test_a_scheduler_that_does_not_answer_is_named(scenes: Scenes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines.preparation_workers, "CONNECT_TIMEOUT_S", 1)
    with pytest.raises(PreparationError, match=r"no dask scheduler answers at tcp://127.0.0.1:9"):
        prepare(scenes, tmp_path / "out", changed(scheduler="tcp://127.0.0.1:9"))


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_a_running_scheduler_is_used_and_statistics_are_numpys_whatever_the_number_of_workers(tmp_path: Path, workers: int) -> None:
    """Workers of one process, which take the tasks as they come; the store is that of none to the byte."""
    from distributed import LocalCluster

    scenes = Scenes(tuple(make_scene(tmp_path, f"s{n}", (20, 13), scale=0.1 * (n + 1), offset=-n) for n in range(7)))
    with LocalCluster(
        n_workers=workers, threads_per_worker=1, processes=False, protocol="tcp", host="127.0.0.1", dashboard_address=None
    ) as cluster:
        assert len(cluster.workers) == workers
        prepare(scenes, tmp_path / "out", changed(scheduler=cluster.scheduler_address, tiles_per_shard=2, min_valid_fraction=0.0))
    settings = changed(tiles_per_shard=2, min_valid_fraction=0.0)
    assert tree(tmp_path / "out") == tree(prepare(scenes, tmp_path / "whole", settings).path)
    store = TileStore.open(tmp_path / "out")
    train = [scene for scene in scenes.scenes if scene.name in set(store.index.scene[store.rows("train")])]
    read = [(scene, *scene.read(scene.grid.full)) for scene in train]
    for i in range(2):
        values = np.concatenate(
            [pixels[i][quality == 0] * scene.channels[i].scale + scene.channels[i].offset for scene, pixels, quality in read]
        )
        np.testing.assert_allclose([store.statistics.mean[i], store.statistics.std[i]], [values.mean(), values.std()], rtol=1e-6)


@dataclass(frozen=True)
class DeadlyScene(SyntheticScene):
    """Kills the process that reads it, as the kernel does for want of memory."""

    def read(self, window: Any) -> Any:
        os._exit(9)


def test_a_worker_that_dies_is_said_with_its_scenes(scenes: Scenes, tmp_path: Path) -> None:
    import dask

    deadly = Scenes((*scenes.scenes[:2], DeadlyScene(**vars(scenes.scenes[2]))))
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        pytest.raises(
            PreparationError, match=r"the worker that writes shard 4 of .* \(scenes c\) died(?s:.*)2GiB each\): raise prepare.memory_limit"
        ),
    ):
        prepare(deadly, tmp_path / "out", changed(num_workers=1))


@dataclass(frozen=True)
class RestlessScene(SyntheticScene):
    """Writes to its own first file while its last rows are read, in one of several ways."""

    way: str = ""

    def read(self, window: Any) -> Any:
        given = super().read(window)
        if window[0].stop == self.grid.space[0] and not (self.folder / "at rest").exists():
            file = self.files[0]
            if self.way == "gone":
                file.rename(self.folder / "moved.npy")
            elif self.way == "grown":
                file.write_bytes(file.read_bytes() + b"more")
            else:
                os.utime(file, ns=(1, file.stat().st_mtime_ns + 1))
        return given


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("gone", "cannot be looked at any more \\(No such file"),
        ("grown", r"has \d+ bytes, where it had \d+"),
        ("touched", "was written to, though"),
    ],
)
def test_a_source_that_changes_stops_the_run_and_nothing_of_it_is_taken(
    scenes: Scenes, tmp_path: Path, way: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scene in the middle is cut into two regions; the second is read from a file that is changing."""
    monkeypatch.setattr(pipelines.region_plan, "READ_BYTES", 16 * 16 * 7)
    whole = tree(prepare(scenes, tmp_path / "whole", changed(tiles_per_shard=2)).path)
    middle = scenes.scenes[1]
    content = middle.files[0].read_bytes()
    restless = Scenes((scenes.scenes[0], RestlessScene(**vars(middle), way=way), scenes.scenes[2]))
    out = tmp_path / "out"
    with pytest.raises(PreparationError, match=rf"scene b changed while it was prepared: file 1 of 2 {message}(?s:.*)Wait until") as error:
        prepare(restless, out, changed(tiles_per_shard=2))
    assert str(tmp_path) not in str(error.value).replace("--out", ""), "the name of a file may be that of a patient"
    kept = {json.loads(file.read_text())["shard"]: json.loads(file.read_text()) for file in (out / "progress").glob("shard-*")}
    assert {row["scene"] for record in kept.values() for row in record["rows"]} == {"a", "b"}
    assert all(row["origin"][0] + 8 < 17 for record in kept.values() for row in record["rows"] if row["scene"] == "b")
    assert not (out / "manifest.json").exists()
    (tmp_path / "at rest").touch()
    middle.files[0].write_bytes(content)
    done: list[int] = []
    prepare(scenes, out, changed(tiles_per_shard=2), progress=lambda count, _: done.append(count))
    assert done[0] == 6, "what was read of a file of another time is read anew"
    assert tree(out) == whole


def test_a_source_that_changes_between_two_runs_is_read_anew(scenes: Scenes, tmp_path: Path) -> None:
    """Its fingerprint is blind to a change in the middle, its time of change is not."""
    with pytest.raises(KeyboardInterrupt):
        prepare(scenes, tmp_path / "out", HERE, progress=fail_after(12))
    os.utime(scenes.scenes[0].files[0], ns=(1, 1))
    done: list[int] = []
    prepare(scenes, tmp_path / "out", HERE, progress=lambda count, _: done.append(count))
    assert done[0] == 6
