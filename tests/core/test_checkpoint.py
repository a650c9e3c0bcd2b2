"""A checkpoint comes back bit for bit or is refused by name; the one before it is then taken, and nothing is said in silence."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mae_core import checkpoint
from mae_core.checkpoint import FORMAT, CheckpointError, newest, peek, problem, restore, restore_weights, steps
from mae_core.sealed import seal
from tests.tiny_states import DAMAGES, FILES, bits, flip, fresh, go_on, same, save, three

FORMAT_1 = Path(__file__).parents[1] / "golden" / "checkpoint_format_1"
"""Written by the code of commit 1f7b798, which numbered formats not yet, after three updates of a model as `fresh()` gives it."""


@pytest.fixture(autouse=True)
def unflushed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here is about power cuts, and flushing costs seconds where a disk is shared."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def rewritten(path: Path, **changes: object) -> Path:
    """A checkpoint whose record says something else, sealed again."""
    record = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**record, **changes}))
    seal(path)
    return path


def test_it_comes_back_bit_for_bit_and_goes_on_the_same(tmp_path: Path) -> None:
    state = fresh()
    go_on(state, 3)
    state.run_id, state.window = "abc", [(0.1, 2 / 3)]
    save(state, tmp_path, {"train": {"steps": 9}, "store_digest": "d"})
    saved = bits(state)
    go_on(state, 2)
    later = fresh(seed=5)
    record = restore(later, tmp_path, pytest.fail)
    assert record is not None
    assert record["settings"] == {"train": {"steps": 9}, "store_digest": "d"}
    assert (later.step, later.run_id, later.window) == (3, "abc", [(0.1, 2 / 3)])
    assert same(bits(later), saved)
    go_on(later, 2)
    assert same(bits(later), bits(state))


def test_what_is_restored_does_not_hang_on_the_files(tmp_path: Path) -> None:
    path = three(tmp_path)[-1]
    state = fresh()
    restore(state, tmp_path, pytest.fail)
    known = bits(state)
    for file in FILES:
        with (path / file).open("r+b") as stream:
            stream.write(b"\xff" * (path / file).stat().st_size)
    assert same(bits(state), known)


def test_the_record_tells_where_it_comes_from(tmp_path: Path) -> None:
    state = fresh()
    known = json.loads((save(state, tmp_path / "a", {"a": 1, "store_digest": "d"}) / "state.json").read_text())
    assert (known["format"], known["step"], known["world_size"], known["store_digest"]) == (FORMAT, 0, 1, "d")
    assert known["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"python", "numpy", "safetensors"} < known["versions"].keys()
    turned = json.loads((save(state, tmp_path / "b", {"store_digest": "d", "a": 1}) / "state.json").read_text())
    other = json.loads((save(state, tmp_path / "c", {"store_digest": "d", "a": 2}) / "state.json").read_text())
    assert known["settings_sha256"] == turned["settings_sha256"] != other["settings_sha256"]


def test_others_read_it_with_safetensors_and_json(tmp_path: Path) -> None:
    state = fresh()
    go_on(state)
    path = save(state, tmp_path)
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)
    known = state.model.state_dict()
    read = load_file(path / "model.safetensors")
    assert same(read, known)
    optimiser = load_file(path / "optimiser.safetensors")
    entries = {f"{name}/{entry}" for name in known for entry in ("step", "exp_avg", "exp_avg_sq")}
    assert optimiser.keys() == entries | {"rng/torch"}
    assert torch.equal(optimiser["2.weight/exp_avg"], state.optimiser.state[state.model.get_parameter("2.weight")]["exp_avg"])
    assert not [file for file in path.iterdir() if file.read_bytes()[:2] in (b"PK", b"\x80\x02")]


def test_without_a_checkpoint_nothing_is_restored(tmp_path: Path) -> None:
    state = fresh()
    before = bits(state)
    assert restore(state, tmp_path / "not there", pytest.fail) is None
    assert peek(tmp_path) is None
    assert same(bits(state), before)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(tmp_path: Path, file: str, name: str) -> None:
    DAMAGES[name](three(tmp_path)[-1] / file)
    said: list[str] = []
    state = fresh()
    restore(state, tmp_path, said.append)
    assert state.step == 2
    assert len(said) == 1
    assert "step-00000003 is damaged" in said[0]
    assert file in said[0]
    found = peek(tmp_path)
    assert found is not None
    assert found["step"] == 2
    assert restore_weights(fresh().model, tmp_path, said.append) == 2
    assert said[1] == said[0]


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"model.safetensors": 3}', '{"model.safetensors": {"bytes": 1}}', "null"])
def test_a_manifest_that_vouches_for_nothing_is_no_manifest(tmp_path: Path, content: str) -> None:
    path = three(tmp_path)[-1]
    (path / "manifest.json").write_text(content)
    assert problem(path) is not None
    state = fresh()
    restore(state, tmp_path, lambda _: None)
    assert state.step == 2


def test_a_manifest_vouches_for_all_files_and_for_none_elsewhere(tmp_path: Path) -> None:
    path = three(tmp_path)[-1]
    whole = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({key: value for key, value in whole.items() if key != "optimiser.safetensors"}))
    assert problem(path) == "manifest.json does not list optimiser.safetensors"
    (path / "manifest.json").write_text(json.dumps({**whole, "../step-00000002/state.json": whole["state.json"]}))
    assert problem(path) == "manifest.json names '../step-00000002/state.json', which is no file of this folder"


def test_where_none_is_sound_the_run_does_not_start_over_in_silence(tmp_path: Path) -> None:
    for path in three(tmp_path):
        flip(path / "optimiser.safetensors")
    said: list[str] = []
    with pytest.raises(CheckpointError, match=r"none of the 3 checkpoints in .* is sound; start again with another --out"):
        restore(fresh(), tmp_path, said.append)
    assert [line.split()[1] for line in said] == ["step-00000003", "step-00000002", "step-00000001"]


def test_the_pointer_names_the_newest_and_is_followed(tmp_path: Path) -> None:
    paths = three(tmp_path)
    assert (tmp_path / "latest").read_text() == "step-00000003\n"
    assert newest(tmp_path) == paths[-1]
    (tmp_path / "latest").write_text("step-00000002\n")
    state = fresh()
    restore(state, tmp_path, pytest.fail)
    assert state.step == 2, "what the pointer was not moved to is not vouched for"
    flip(paths[1] / "state.json")
    flip(paths[0] / "state.json")
    said: list[str] = []
    restore(state, tmp_path, said.append)
    assert state.step == 3, "better than none"
    assert len(said) == 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"../../elsewhere\n", "cannot be read"),
        (b"step-00000009\n", "names step-00000009, which is not there"),
        (None, ""),
    ],
)
def test_a_pointer_that_is_no_help_is_no_obstacle(tmp_path: Path, content: bytes | None, words: str) -> None:
    three(tmp_path)
    (tmp_path / "latest").unlink()
    if content is not None:
        (tmp_path / "latest").write_bytes(content)
    said: list[str] = []
    state = fresh()
    restore(state, tmp_path, said.append)
    assert state.step == 3
    assert [words in line for line in said] == [True] * (content is not None)


def test_weights_of_another_model_are_refused_by_name(tmp_path: Path) -> None:
    path = three(tmp_path)[-1]
    with pytest.raises(CheckpointError, match=rf"(?s){path} holds another model than the settings describe: .*size mismatch for 0\.weight"):
        restore(fresh(width=4), tmp_path, pytest.fail)


def test_the_state_of_another_optimiser_is_refused_by_name(tmp_path: Path) -> None:
    path = three(tmp_path)[-1]
    state = fresh()
    state.optimiser = torch.optim.AdamW([state.model.get_parameter("0.weight")])
    with pytest.raises(CheckpointError, match=rf"{path} holds the state of another optimiser .* is not trained here"):
        restore(state, tmp_path, pytest.fail)


def test_a_checkpoint_of_format_1_is_brought_to_today_by_a_named_migration(tmp_path: Path) -> None:
    shutil.copytree(FORMAT_1, tmp_path / "old")
    state = fresh(seed=7)
    said: list[str] = []
    record = restore(state, tmp_path / "old", said.append)
    assert said == ["checkpoint step-00000003 is of format 1; migration parameters_by_name brings it to format 2"]
    assert record is not None
    assert (state.step, state.run_id, state.window, record["settings"]["store_digest"]) == (3, "abc", [(0.5, 0.25)], "d")
    file = load_file(FORMAT_1 / "step-00000003" / "optimiser.safetensors")
    assert torch.equal(torch.get_rng_state(), file["rng/torch"])
    numbers = {"0.bias": 0, "1.weight": 1, "1.bias": 2, "2.bias": 3, "0.weight": 4, "2.weight": 5}
    for name, number in numbers.items():
        for entry, value in state.optimiser.state[state.model.get_parameter(name)].items():
            assert torch.equal(value, file[f"{number}/{entry}"]), (name, entry)
    again = fresh()
    save(state, tmp_path / "new")
    restore(again, tmp_path / "new", pytest.fail)
    assert same(bits(again), bits(state))
    assert restore_weights(fresh(seed=3).model, FORMAT_1, pytest.fail) == 3


def test_a_later_format_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = rewritten(three(tmp_path)[-1], format=9, versions={"terravox": "7.1"})
    words = rf"{path} is of format 9, written by terravox 7.1; this terravox reads formats 1 to {FORMAT}. Go on with the version"
    for load in (lambda: restore(fresh(), tmp_path, pytest.fail), lambda: restore_weights(fresh().model, tmp_path, pytest.fail)):
        with pytest.raises(CheckpointError, match=words):
            load()


@pytest.mark.parametrize("place", ["", "step-00000003", "step-00000003/model.safetensors"])
@pytest.mark.parametrize("bit", [0o020, 0o002])
def test_what_others_may_have_altered_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, bit: int) -> None:
    three(tmp_path)
    for path in (tmp_path, *tmp_path.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    (tmp_path / place).chmod(0o755 | bit)
    restore(fresh(), tmp_path, pytest.fail)
    owner = os.geteuid()
    monkeypatch.setattr(checkpoint.os, "geteuid", lambda: owner + 1)
    with pytest.raises(CheckpointError, match=rf"belongs to another user \(uid {owner}\) and more than its owner may write"):
        restore(fresh(), tmp_path, pytest.fail)
    (tmp_path / place).chmod(0o755)
    restore(fresh(), tmp_path, pytest.fail)


def test_names_beyond_eight_digits_are_in_order(tmp_path: Path) -> None:
    state = fresh()
    for step in (99_999_999, 100_000_000):
        state.step = step
        save(state, tmp_path)
    assert [path.name for path in steps(tmp_path)] == ["step-99999999", "step-100000000"]
