"""Stores are joined by one command, copied nowhere, and never so that ground held out in one is trained on in another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mae_core.store import TileStore
from pipelines.store import main
from tests.synthetic_stores import small_store


def told(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    return " ".join((out + err).split())


def test_the_command_joins_and_the_view_is_verified_like_a_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stores = [str(small_store(tmp_path / name, name, east=1000.0 * number).path) for number, name in enumerate(("a", "b", "c"))]
    assert main(["merge", *stores, "--out", str(tmp_path / "view"), "--check"]) == 0
    assert not (tmp_path / "view").exists()
    assert main(["merge", *stores, "--out", str(tmp_path / "view")]) == 0
    assert "a view of 3 stores, 18 tiles (9 train, 9 val), channels A, B; digest" in told(capsys)
    view = TileStore.open(tmp_path / "view")
    assert len(view) == 18
    assert main(["verify", str(tmp_path / "view")]) == 0
    capsys.readouterr()
    assert main(["info", str(tmp_path / "view"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["stores"], found["tiles"], found["digest"]) == (3, {"all": 18, "train": 9, "val": 9}, view.digest)


def test_ground_that_is_held_out_in_one_and_trained_on_in_another_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = small_store(tmp_path / "first", "a", east=0.0)  # trains on tiles at 0, 10 and 30 m, holds out those at 40, 50 and 60 m
    second = small_store(tmp_path / "second", "b", east=40.0)
    assert main(["merge", str(first.path), str(second.path), f"out={tmp_path / 'view'}"]) == 1
    words = told(capsys)
    assert f"2 training tiles of {second.label} lie on ground that is held out in {first.label}" in words
    assert "the first: tile 0 of scene scene b 0" in words
    assert not (tmp_path / "view").exists()
    apart = small_store(tmp_path / "apart", "c", east=100.0)
    assert main(["merge", str(first.path), str(apart.path), f"out={tmp_path / 'view'}"]) == 0


def test_the_same_ground_in_another_crs_is_refused_and_other_ground_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the southern zone the equator is at 10 000 km, in the northern one at 0."""
    first = small_store(tmp_path / "first", "a", east=0.0)  # trains on tiles at 0, 10 and 30 m, holds out those at 40, 50 and 60 m
    second = small_store(tmp_path / "second", "b", east=1e7 + 40.0, frame="EPSG:32732")
    assert main(["merge", str(first.path), str(second.path), f"out={tmp_path / 'view'}"]) == 1
    words = told(capsys)
    assert f"training tiles of {second.label} lie on ground that is held out in {first.label} in another CRS: tile" in words
    assert "(EPSG:32732)" in words
    assert "(EPSG:32632)" in words
    assert not (tmp_path / "view").exists()
    apart = small_store(tmp_path / "apart", "c", east=1e7 + 100.0, frame="EPSG:32732")
    assert main(["merge", str(first.path), str(apart.path), f"out={tmp_path / 'view'}"]) == 0
    nowhere = small_store(tmp_path / "nowhere", "d", frame="")
    assert main(["merge", str(first.path), str(nowhere.path), f"out={tmp_path / 'other'}"]) == 0


def test_one_store_a_view_and_a_damaged_store_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stores = [str(small_store(tmp_path / name, name, east=1000.0 * number).path) for number, name in enumerate(("a", "b"))]
    assert main(["merge", stores[0], f"out={tmp_path / 'view'}"]) == 2
    assert "stores" in told(capsys)
    assert main(["merge", *stores, f"out={tmp_path / 'view'}"]) == 0
    assert main(["merge", stores[0], str(tmp_path / "view"), f"out={tmp_path / 'more'}"]) == 1
    assert "is a view itself; name the stores that it joins" in told(capsys)
    (tmp_path / "b" / "pixels/c/0/0/0/0").unlink()
    for check in (["--check"], []):
        assert main(["merge", *stores, f"out={tmp_path / 'more'}", *check]) != 0
        assert "pixels shard c/0/0/0/0 (tiles 0–2) is missing" in told(capsys)
