"""Weights are read without running anything that a file holds, and no tensor is left out of the account."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mae_core.weights import Move, Transfer, WeightsError, read_tensors, write_tensors

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)}


@pytest.mark.parametrize("content", [TENSORS, {"model": TENSORS, "epoch": 3}, {"state_dict": TENSORS}], ids=["bare", "model", "state_dict"])
@pytest.mark.parametrize("name", ["weights.pth", "pytorch_model.bin"])
def test_files_of_torch_save_are_read(tmp_path: Path, content: dict[str, Any], name: str) -> None:
    torch.save(content, tmp_path / name)
    found = read_tensors(tmp_path if name.endswith(".bin") else tmp_path / name)
    assert list(found) == list(TENSORS)
    assert all(torch.equal(found[key], value) for key, value in TENSORS.items())


def test_safetensors_are_read_and_preferred(tmp_path: Path) -> None:
    torch.save({"other": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    save_file(TENSORS, tmp_path / "model.safetensors")
    assert set(read_tensors(tmp_path)) == set(TENSORS)


def test_pickled_objects_are_refused_by_name(tmp_path: Path) -> None:
    torch.save({"model": TENSORS, "args": argparse.Namespace(lr=1)}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"a\.pth holds pickled objects beside tensors \(argparse\.Namespace\).*save_file"):
        read_tensors(tmp_path / "a.pth")


class Trap:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    torch.save({"model": TENSORS, "x": Trap(tmp_path / "ran")}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="which can run code"):
        read_tensors(tmp_path / "a.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", r"a\.pth cannot be read as weights \(EOFError\); is it a whole checkpoint"),
        (b"hello world, this is no checkpoint", "cannot be read as weights"),
        ({"model": {"lr": 1}}, "holds no tensors by name, neither at the top nor under model or state_dict"),
        ([torch.ones(1)], "holds no tensors by name"),
        (None, r"a\.pth holds no weights; give a file, or a folder with model\.safetensors"),
    ],
)
def test_what_is_no_checkpoint_is_refused_with_words(tmp_path: Path, content: Any, words: str) -> None:
    file = tmp_path / "a.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    with pytest.raises(WeightsError, match=words):
        read_tensors(file)


def test_a_damaged_safetensors_file_is_refused_with_words(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-8])
    with pytest.raises(WeightsError, match=r"a\.safetensors cannot be read as weights"):
        read_tensors(tmp_path / "a.safetensors")


def test_tensors_are_written_with_their_facts(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(3, 2).t()}, {"eps": "1e-6"})
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"eps": "1e-6"}
        assert file.get_tensor("a").shape == (2, 3)
    with pytest.raises(WeightsError, match="could not be written"):
        write_tensors(tmp_path / "absent" / "a.safetensors", TENSORS, {})


WHOLE = (Move("copied", ("a",), "x"), Move("folded", ("b", "c"), "y"), Move("computed", ("d",)), Move("computed", (), "z"))


def test_a_transfer_in_which_everything_is_told_is_complete() -> None:
    Transfer(WHOLE, ("a", "b", "c", "d"), ("x", "y", "z")).complete()


@pytest.mark.parametrize(
    ("moves", "words"),
    [
        (WHOLE[1:], ["a of the source is not accounted for", "x of the target is filled 0 times"]),
        ((*WHOLE, Move("copied", ("a",), "z")), ["z of the target is filled 2 times"]),
        ((*WHOLE, Move("copied", ("e",), "w")), ["e is told of and is not in the source", "w is told of and is not in the target"]),
        ((*WHOLE[1:], Move("dropped", ("a",)), Move("new", (), "x")), ["  a is dropped", "  x is new"]),
    ],
)
def test_what_is_left_out_is_named(moves: tuple[Move, ...], words: list[str]) -> None:
    with pytest.raises(WeightsError) as found:
        Transfer(moves, ("a", "b", "c", "d"), ("x", "y", "z")).complete()
    assert all(word in str(found.value) for word in words)
    assert str(found.value).count("\n") == len(words)


def test_what_is_allowed_by_name_may_be_new_or_dropped() -> None:
    moves = (Move("dropped", ("head.weight",)), Move("dropped", ("head.bias",)), Move("new", (), "x"))
    transfer = Transfer(moves, ("head.weight", "head.bias"), ("x",))
    transfer.complete(("head.*", "x"))
    with pytest.raises(WeightsError, match=r"head\.bias is dropped"):
        transfer.complete(("head.weight", "x"))


def test_tensors_of_all_blocks_share_a_row() -> None:
    moves = tuple(Move("copied", (f"layer.{number}.fc.weight",), f"blocks.{number}.mlp.0.weight") for number in range(12))
    rows = Transfer((*moves, Move("new", (), "x", "why")), (), ()).table()
    assert rows == [("copied", "layer.*.fc.weight", "blocks.*.mlp.0.weight", "12", ""), ("new", "", "x", "1", "why")]
