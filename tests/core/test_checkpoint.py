"""A checkpoint comes back bit for bit or is refused by name; the one before it is then taken, and never lost meanwhile."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from mae_core import checkpoint
from mae_core.checkpoint import CheckpointError, TrainState, peek, restore, save, steps, verify

FILES = ("model.safetensors", "optimiser.safetensors", "state.json", "manifest.json")


def fresh(width: int = 3, seed: int = 0) -> TrainState:
    """A model with a normalised layer and a bias; nothing was trained."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, width), nn.LayerNorm(width), nn.Linear(width, 1))
    return TrainState(model, torch.optim.AdamW(model.parameters(), lr=0.1))


def go_on(state: TrainState, updates: int = 1) -> None:
    """Updates with random data and random noise, so that they depend on weights, optimiser and random state."""
    for _ in range(updates):
        state.model(torch.randn(5, 2)).square().mean().backward()
        state.optimiser.step()
        state.optimiser.zero_grad()
        state.step += 1


def bits(state: TrainState) -> dict[str, Tensor]:
    """All that an update depends on."""
    tensors = {f"weight {name}": tensor.detach().clone() for name, tensor in state.model.state_dict().items()}
    for number, entries in state.optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser {number} {name}": torch.as_tensor(value).clone() for name, value in entries.items()}
    return tensors | {"rng": torch.get_rng_state()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(left[key].dtype == right[key].dtype and torch.equal(left[key], right[key]) for key in left)


def three(folder: Path) -> list[Path]:
    """Checkpoints of steps 1, 2 and 3."""
    state = fresh()
    paths = []
    for _ in range(3):
        go_on(state)
        paths.append(save(state, folder, {"a": 1}, keep=3))
    return paths


def flip(path: Path) -> None:
    """Another bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x80
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES: list[tuple[str, Callable[[Path], None]]] = [("flip", flip), ("cut", cut), ("gone", Path.unlink)]


def test_it_comes_back_bit_for_bit_and_goes_on_the_same(tmp_path: Path) -> None:
    state = fresh()
    go_on(state, 3)
    state.run_id = "abc"
    save(state, tmp_path, {"train": {"steps": 9}}, keep=1)
    saved = bits(state)
    go_on(state, 2)
    later = fresh(seed=5)
    record = restore(later, tmp_path, pytest.fail)
    assert record is not None
    assert record["settings"] == {"train": {"steps": 9}}
    assert (later.step, later.run_id) == (3, "abc")
    assert same(bits(later), saved)
    go_on(later, 2)
    assert same(bits(later), bits(state))


def test_without_a_checkpoint_nothing_is_restored(tmp_path: Path) -> None:
    state = fresh()
    before = bits(state)
    assert restore(state, tmp_path / "not there", pytest.fail) is None
    assert peek(tmp_path) is None
    assert same(bits(state), before)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    tmp_path: Path, file: str, name: str, damage: Callable[[Path], None]
) -> None:
    damage(three(tmp_path)[-1] / file)
    said: list[str] = []
    state = fresh()
    restore(state, tmp_path, said.append)
    assert state.step == 2
    assert len(said) == 1
    assert "step-00000003 is damaged" in said[0]
    assert file in said[0], name
    found = peek(tmp_path)
    assert found is not None
    assert found["step"] == 2


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"model.safetensors": 3}', '{"model.safetensors": {"bytes": 1}}', "null"])
def test_a_manifest_that_vouches_for_nothing_is_no_manifest(tmp_path: Path, content: str) -> None:
    newest = three(tmp_path)[-1]
    (newest / "manifest.json").write_text(content)
    assert verify(newest) is not None
    state = fresh()
    restore(state, tmp_path, lambda _: None)
    assert state.step == 2


def test_where_none_is_sound_the_run_does_not_start_over_in_silence(tmp_path: Path) -> None:
    for path in three(tmp_path):
        flip(path / "optimiser.safetensors")
    said: list[str] = []
    with pytest.raises(CheckpointError, match=r"none of the 3 checkpoints in .* is sound; start again with another --out"):
        restore(fresh(), tmp_path, said.append)
    assert [line.split()[1] for line in said] == ["step-00000003", "step-00000002", "step-00000001"]


def test_the_newest_stay_and_their_number_is_kept(tmp_path: Path) -> None:
    state = fresh()
    for _ in range(4):
        go_on(state)
        save(state, tmp_path, {}, keep=2)
    assert [path.name for path in steps(tmp_path)] == ["step-00000003", "step-00000004"]


def test_a_damaged_one_of_a_later_step_does_not_push_out_what_is_written_now(tmp_path: Path) -> None:
    flip(three(tmp_path)[-1] / "model.safetensors")
    state = fresh()
    restore(state, tmp_path, lambda _: None)
    state.step = 2
    save(state, tmp_path, {}, keep=1)
    assert [path.name for path in steps(tmp_path)] == ["step-00000002"]
    assert restore(fresh(), tmp_path, pytest.fail)


def test_the_same_step_is_replaced(tmp_path: Path) -> None:
    paths = three(tmp_path)
    state = fresh()
    restore(state, tmp_path, pytest.fail)
    state.run_id = "second"
    assert save(state, tmp_path, {}, keep=3) == paths[-1]
    assert json.loads((paths[-1] / "state.json").read_text())["run_id"] == "second"


def test_what_a_kill_left_is_neither_read_nor_kept(tmp_path: Path) -> None:
    newest = three(tmp_path)[-1]
    shutil.copytree(newest, tmp_path / "step-00000004.tmp")
    (tmp_path / "step-00000009.tmp").mkdir()
    state = fresh()
    restore(state, tmp_path, pytest.fail)
    assert state.step == 3
    go_on(state)
    save(state, tmp_path, {}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_told_and_the_checkpoint_before_is_untouched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    state = fresh()
    go_on(state)
    save(state, tmp_path, {}, keep=1)
    saved = bits(state)
    go_on(state)

    def full(tensors: dict[str, Tensor], path: Path) -> None:
        path.write_bytes(b"the first part")
        raise error

    monkeypatch.setattr("safetensors.torch.save_file", full)
    words = rf"checkpoint of step 2 could not be written to {tmp_path}.*earlier checkpoints are intact, free some space and run again"
    with pytest.raises(CheckpointError, match=words):
        save(state, tmp_path, {}, keep=1)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    later = fresh()
    restore(later, tmp_path, pytest.fail)
    assert same(bits(later), saved)


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"step 0 could not be written.*check the folder"):
        save(fresh(), tmp_path / "file" / "checkpoints", {}, keep=1)


def test_weights_of_another_model_are_refused_by_name(tmp_path: Path) -> None:
    newest = three(tmp_path)[-1]
    with pytest.raises(
        CheckpointError, match=rf"(?s){newest} holds another model than the settings describe: .*size mismatch for 0\.weight"
    ):
        restore(fresh(width=4), tmp_path, pytest.fail)


@pytest.mark.parametrize("moment", ["save_file", "seal", "sync_folder"])
def test_killed_while_it_saves_the_newest_that_is_whole_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """Nothing is tidied up on the way down, as after a kill: KeyboardInterrupt passes every handler of `save`."""
    state = fresh()
    go_on(state)
    save(state, tmp_path, {}, keep=2)
    go_on(state)
    place = safetensors.torch if moment == "save_file" else checkpoint
    original = getattr(place, moment)
    for call in range(3):
        left = [call]

        def killed(*args: object, left: list[int] = left) -> object:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return original(*args)

        monkeypatch.setattr(place, moment, killed)
        try:
            save(state, tmp_path, {}, keep=2)
        except KeyboardInterrupt:
            later = fresh()
            restore(later, tmp_path, pytest.fail)
            assert later.step in (1, 2)
    monkeypatch.undo()
    save(state, tmp_path, {}, keep=2)
    later = fresh()
    restore(later, tmp_path, pytest.fail)
    assert same(bits(later), bits(state))
