"""What is said of data and weights: licences from a closed list, whether faces were taken away, and the time that trainings took."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mae_core.parallel import Parallel
from mae_core.store import TileStore
from modalities.catalogue import scan
from modalities.licences import NOT_STATED, OTHER, known_licence
from modalities.medical import MriSettings
from pipelines import compute_time
from pipelines.compute_time import COMPUTE, ComputeTime, compute_of, compute_words
from pipelines.preparation import PrepareSettings
from pipelines.prepare import prepare_store
from pipelines.pretrain_mri import main as pretrain
from pipelines.run_folder import recall
from pipelines.statements import Statements, StatementSettings, statements_of, together
from pipelines.tiling_plan import PreparationError
from tests.synthetic_volumes import head, save_volume
from tests.tiny_runs import ALONE, quick, shared_tracking, wide

__all__ = ["quick", "wide"]

SIZE = 14
TINY = [
    *("reader.spacing_mm=null", f"prepare.tile=[{SIZE},{SIZE},{SIZE}]", "prepare.num_workers=0", "train.steps=1", "train.log_steps=1"),
    *(
        "train.eval_steps=1",
        "train.device=cpu",
        "loader.global_batch_size=2",
        "tracking.system_metrics=false",
        "prepare.split.val_fraction=0",
    ),
    *("model.encoder.preset=nano", "model.encoder.patch=[4]", "model.decoder.width=16", "model.decoder.depth=1", "model.decoder.heads=2"),
]


def dataset(root: Path, licence: object, numbers: range) -> Path:
    for number in numbers:
        save_volume(root / f"sub-{number}" / "anat" / f"sub-{number}_T1w.nii.gz", head(SIZE, number))
    (root / "dataset_description.json").write_text(json.dumps({"Name": f"{numbers}", "License": licence}))
    return root


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("CC0", "CC0-1.0"),
        (" cc by-nc-sa 4.0", "CC-BY-NC-SA-4.0"),
        ("CC-BY", "CC-BY, version not stated"),
        ("PDDL", "PDDL-1.0"),
        ("", NOT_STATED),
        ("ask Dr Quixpatrick", OTHER),
        ("CC0 by Dr Quixpatrick", OTHER),
    ],
)
def test_a_licence_is_named_out_of_a_closed_list(text: str, name: str) -> None:
    assert known_licence(text) == name


def test_a_store_says_what_its_data_sets_state_and_takes_in_what_more_of_them_do(tmp_path: Path) -> None:
    reader, settings = MriSettings(spacing_mm=None), PrepareSettings(tile=(SIZE,) * 3, num_workers=0)
    for name, licence, numbers in (("a", "CC0", range(6)), ("b", ["no text"], range(6, 9)), ("c", "of Dr Quixpatrick", range(9, 10))):
        dataset(tmp_path / "data" / name, licence, numbers)
        prepare_store(scan(tmp_path / "data", reader), tmp_path / "store", reader, settings)
    said = statements_of(TileStore.open(tmp_path / "store"))
    assert said == Statements(licences=("CC0-1.0", NOT_STATED, OTHER), num_scenes=10)
    assert b"Quixpatrick" not in b"".join(file.read_bytes() for file in (tmp_path / "store").rglob("*") if file.is_file())
    stating = settings.model_copy(update={"states": StatementSettings(licence="CC-BY-4.0", defaced="yes")})
    with pytest.raises(PreparationError, match=r"by another plan[\s\S]*states"):
        prepare_store(scan(tmp_path / "data", reader), tmp_path / "store", reader, stating)
    prepare_store(scan(tmp_path / "data", reader), tmp_path / "other", reader, stating)
    told = statements_of(TileStore.open(tmp_path / "other"))
    assert (told.licences, told.defaced) == (("CC-BY-4.0",), "yes")
    assert together([said, told]).defaced == "unknown", "of one of them nobody knows"


def test_a_licence_is_no_free_text() -> None:
    assert StatementSettings(licence="CC-BY-4.0 AND LicenseRef-ours").licence
    with pytest.raises(ValueError, match="licence"):
        StatementSettings(licence="ask Dr Quixpatrick")


def test_result_model_and_its_readme_say_licences_faces_and_compute(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    data = dataset(tmp_path / "data", "CC0", range(3))
    words = [f"tracking.uri={shared_tracking(tmp_path_factory)}", "prepare.states.defaced=no", "weights_licence=CC-BY-NC-4.0"]
    assert pretrain(["--data", str(data), "--out", str(tmp_path / "run"), *TINY, *words]) == 0
    compute = recall(tmp_path / "run")["compute"]
    assert (compute["attempts"], compute["gpu_hours"], compute["devices"]) == (1, 0, ["1 × CPU"])
    assert compute["cpu_thread_hours"] == compute["hours"] > 0
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    for line in (
        "For research use only; not a medical device",
        "- Licence of the data: CC0-1.0\n",
        "- Faces taken away before: no\n",
        "- Licence of the weights: CC-BY-NC-4.0\n",
        f"- Compute: {compute_words(compute)}\n",
    ):
        assert line in card
    (source,) = recall(tmp_path / "run" / "model", "training_data.json")["sources"]
    assert (source["licences"], source["defaced"]) == (["CC0-1.0"], "no")


def test_time_adds_up_over_attempts_and_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(compute_time.time, "monotonic", lambda: now[0])
    for seconds, parallel in ((1800, ALONE), (3600, Parallel(0, 4, torch.device("cpu")))):
        clock = ComputeTime(tmp_path, parallel)
        for _ in range(2):
            now[0] += seconds / 2
            clock.note()
    found = compute_of(tmp_path, tmp_path / "none")
    assert (found["attempts"], found["hours"], found["cpu_thread_hours"], found["gpu_hours"]) == (2, 1.5, 4.5, 0)
    assert compute_words(found) == "4.5 hours of CPU threads on 1 × CPU, 4 × CPU, in 2 attempts"
    attempts = json.loads((tmp_path / COMPUTE).read_text())["attempts"]
    attempts.append({"device": "NVIDIA X", "is_gpu": True, "count": 2, "seconds": 900})
    (tmp_path / COMPUTE).write_text(json.dumps({"attempts": attempts}))
    assert (compute_of(tmp_path)["gpu_hours"], compute_of(tmp_path)["cpu_thread_hours"]) == (0.5, 4.5)
    assert compute_words(compute_of()) == "not recorded"
