"""The verb that runs a black box again: it needs the folder alone, names tile and module, and its exit code tells the outcome."""

from __future__ import annotations

from pathlib import Path

import pytest

from mae_core.black_box import BlackBox
from mae_core.divergence import TrainingError
from mae_core.settings import to_plain
from mae_core.store import TileStore
from pipelines.replay import main
from tests.core.test_divergence import poisoned
from tests.tiny_runs import ALONE, TinyRun, quick, shared_store, shared_tracking, tiny_recipe, tiny_run, wide
from tests.tiny_runs import arguments as of_pretrain

__all__ = ["quick", "wide"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TileStore:
    return shared_store(tmp_path_factory)


def stopped(folder: Path, run: TinyRun) -> Path:
    """The black box of a run that stops."""
    with pytest.raises(TrainingError):
        run.train(black_box=BlackBox(folder, to_plain(run.recipe), "fp32", ALONE, str))
    (found,) = folder.iterdir()
    return found


def test_a_run_that_diverges_leaves_a_box_that_gives_the_same_again(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, store: TileStore, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a user meets it: the verb stops, its last line names the box, and that is run again."""
    from pipelines.pretrain import main as pretrain

    changes = {"optim__base_lr": 1e20, "train__max_skipped_in_row": 1, "tracking__log_images": False}
    assert pretrain(of_pretrain(store, tmp_path / "run", shared_tracking(tmp_path_factory), **changes)) == 1
    out, errors = capsys.readouterr()
    assert "error: step 2: loss nan" in errors
    assert "terravox replay RUN/black_box/step-00000002" in errors
    folder = tmp_path / "run" / "black_box" / "step-00000002"
    assert f"terravox replay {folder}" in out
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    assert main([str(tmp_path / "elsewhere" / "black_box" / "step-00000002")]) == 1
    told = capsys.readouterr().out
    assert "step 2 of 8, 1 processes, fp32 on cpu" in told
    assert "samples that are not finite" in told
    assert "first output that is not finite: encoder.blocks.0" in told
    assert "it is not finite again" in told


def test_what_is_finite_now_ends_with_0(tmp_path: Path, store: TileStore, capsys: pytest.CaptureFixture[str]) -> None:
    """The sample was spoilt by the task, not in the data; another precision can be tried."""
    run, (tile,) = poisoned(tiny_run(store, tiny_recipe(train__max_skipped_in_row=1)), 3)
    folder = stopped(tmp_path, run)
    assert main([str(folder), "precision=bf16", "device=cpu"]) == 0
    told = capsys.readouterr().out
    assert "bf16 on cpu: loss" in told
    assert f"{tile} " in told
    assert "it is finite now" in told


def test_a_folder_that_is_none_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 1
    assert "is no black box (rank-0 is missing)" in capsys.readouterr().err
    assert main([]) == 2
    assert "box" in capsys.readouterr().err
