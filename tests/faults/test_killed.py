"""Processes that are killed wherever they are, and run again: what comes out is what a quiet run gives, bit for bit."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path

import pytest
from mlflow import MlflowClient

from mae_core.checkpoint import step_of, steps
from mae_core.store import TileStore
from pipelines.pretrain import main
from tests.faults.day import distance
from tests.faults.strikes import Strike, rows_of, run_verb, tensors_of
from tests.tiny_runs import arguments, one_thread, quick, shared_store, shared_tracking

__all__ = ["quick"]

SEEDS, QUICK_SEEDS = 20, 1
STEPS = 8
MODEL = "killed-now-and-then"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TileStore:
    return shared_store(tmp_path_factory)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return shared_tracking(tmp_path_factory)


@pytest.fixture(scope="module")
def undisturbed(store: TileStore, uri: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "undisturbed"
    with one_thread():
        assert main(command(store, out, uri)) == 0
    return out


def command(store: TileStore, out: Path, uri: str, threads: int = 2, prefetch: int = 4) -> list[str]:
    more = {"tracking__register_as": MODEL, "loader__num_threads": threads, "loader__prefetch": prefetch}
    return arguments(store, out, uri, train__steps=STEPS, **more)


def same(out: Path, undisturbed: Path, uri: str) -> None:
    """Weights, optimiser, random state and metric rows are those of the undisturbed run, in one finished tracked run."""
    assert tensors_of(out) == tensors_of(undisturbed)
    statuses, rows = rows_of(uri, out.name)
    assert statuses == ["FINISHED"]
    assert rows == rows_of(uri, undisturbed.name)[1]
    assert [path.name for path in steps(out / "checkpoints")] == [path.name for path in steps(undisturbed / "checkpoints")]


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=() if seed < QUICK_SEEDS else pytest.mark.fault) for seed in range(SEEDS)])
def test_killed_at_a_random_step_it_ends_in_the_bits_of_the_undisturbed_run(
    seed: int, store: TileStore, undisturbed: Path, uri: str, tmp_path: Path
) -> None:
    draw = random.Random(seed)
    out = tmp_path / f"killed-{seed}"
    strike = Strike(signal.SIGKILL, draw.randrange(STEPS), draw.random() * 0.05)
    ended = run_verb(command(store, out, uri, draw.randint(1, 4), draw.randint(1, 6)), strike)
    assert ended.code == -signal.SIGKILL, ended.text
    assert not (out / "result.json").exists()
    assert main(command(store, out, uri, draw.randint(1, 4), draw.randint(1, 6))) == 0
    same(out, undisturbed, uri)


@pytest.mark.fault
def test_from_one_process_to_two_and_back_it_is_the_same_curve(store: TileStore, undisturbed: Path, uri: str, tmp_path: Path) -> None:
    out = tmp_path / "elastic"
    for ranks, threads, step in ((1, 1, 3), (2, 3, 6)):
        ended = run_verb(command(store, out, uri, threads), Strike(signal.SIGTERM, step, 0.0), ranks=ranks)
        assert ended.code != 0, ended.text
        assert ended.step is not None, ended.text
        assert (out / "checkpoints" / f"step-{ended.step:08d}").is_dir(), ended.text
    assert main(command(store, out, uri, 4)) == 0
    statuses, rows = rows_of(uri, out.name)
    known = rows_of(uri, undisturbed.name)[1]
    assert statuses == ["FINISHED"]
    assert {key: [step for step, _ in points] for key, points in rows.items()} == {
        key: [step for step, _ in points] for key, points in known.items()
    }
    assert [value for _, value in rows["train/loss"]] == pytest.approx([value for _, value in known["train/loss"]], rel=1e-5)
    assert distance(out, undisturbed) < 1e-3


@pytest.mark.fault
def test_a_clock_that_jumps_back_and_another_time_zone_change_nothing(
    store: TileStore, undisturbed: Path, uri: str, tmp_path: Path
) -> None:
    """A day back at step 4, so that later checkpoints and rows are older; killed at step 7 and gone on with by the true clock."""
    out = tmp_path / "clock"
    every = [*command(store, out, uri), "train.checkpoint_steps=1"]
    ended = run_verb(every, Strike(signal.SIGKILL, 7, 0.0), clock="4")
    assert ended.code == -signal.SIGKILL, ended.text
    newest = step_of(steps(out / "checkpoints")[-1])
    assert newest > 4, "saved after the jump; that of the step before the kill may have been on its way"
    again = run_verb(command(store, out, uri), clock=str(newest))
    assert (again.code, again.began) == (0, newest), again.text
    same(out, undisturbed, uri)


def test_killed_before_the_alias_moves_it_names_the_old_version_and_the_next_attempt_completes(
    store: TileStore, undisturbed: Path, uri: str, tmp_path: Path
) -> None:
    client = MlflowClient(uri)
    old = client.get_model_version_by_alias(MODEL, "candidate").version
    out = tmp_path / "alias"
    ended = run_verb(command(store, out, uri), verb="pretrain!")
    assert ended.code == -signal.SIGKILL, ended.text
    versions = [item.version for item in client.search_model_versions(f"name = '{MODEL}'")]
    assert client.get_model_version_by_alias(MODEL, "candidate").version == old
    assert main(command(store, out, uri)) == 0
    new = client.get_model_version_by_alias(MODEL, "candidate").version
    assert new not in (old, None)
    assert new in versions
    assert [item.version for item in client.search_model_versions(f"name = '{MODEL}'")] == versions, "the version is made once"
    same(out, undisturbed, uri)


def test_a_run_tells_its_speed_its_memory_and_what_checkpoints_took(undisturbed: Path, uri: str) -> None:
    client = MlflowClient(uri)
    run = client.get_run(json.loads((undisturbed / "result.json").read_text())["mlflow"]["run_id"])
    speed = {"speed/samples_per_second", "speed/tokens_per_second", "speed/mfu", "speed/data_wait_fraction"}
    memory = {"memory/process_peak_gib", "memory/process_gib"}
    saved = {"checkpoint/wait_s", "checkpoint/save_s", "checkpoint/bytes"}
    assert speed | memory | saved <= run.data.metrics.keys()
    assert 0 < run.data.metrics["speed/mfu"] < 1
    assert [point.step for point in client.get_metric_history(run.info.run_id, "checkpoint/wait_s")] == [4, 7]


def test_another_step_is_other_bits(undisturbed: Path) -> None:
    """What these tests compare can differ at all."""
    first, last = steps(undisturbed / "checkpoints")[0], steps(undisturbed / "checkpoints")[-1]
    assert (first / "model.safetensors").read_bytes() != (last / "model.safetensors").read_bytes()
