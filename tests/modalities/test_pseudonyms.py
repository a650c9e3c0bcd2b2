"""Pseudonyms: the same under one key everywhere, others under another; and a key that is made once, for its owner alone."""

from __future__ import annotations

import multiprocessing
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modalities import pseudonyms as ours
from modalities.pseudonyms import Pseudonyms, key_file, pseudonyms
from modalities.scene import SceneError

KEY = bytes(range(32))


def _fingerprint(path: str, gate: object, answers: object) -> None:
    import os

    os.environ["TERRAVOX_KEY_FILE"] = path
    gate.wait()  # type: ignore[attr-defined]
    answers.put(pseudonyms().fingerprint)  # type: ignore[attr-defined]


def test_a_name_has_one_pseudonym_under_one_key_on_every_machine() -> None:
    assert Pseudonyms(KEY).of("subject", "sub-01") == "subject-42259edc861974fa"


@given(st.lists(st.text(max_size=6), min_size=1, max_size=3), st.lists(st.text(max_size=6), min_size=1, max_size=3))
def test_names_differ_where_any_part_does_wherever_parts_are_cut(one: list[str], other: list[str]) -> None:
    names = Pseudonyms(KEY)
    assert (names.of("scan", *one) == names.of("scan", *other)) is (one == other)
    assert names.of("scan", *one) != names.of("file", *one).replace("file", "scan")
    assert names.of("scan", *one) != Pseudonyms(KEY[::-1]).of("scan", *one)


def test_case_and_every_byte_of_the_key_count() -> None:
    assert Pseudonyms(KEY).of("scan", "a") != Pseudonyms(KEY).of("scan", "A")
    long = bytes(80)
    for place in range(len(long)):
        changed = long[:place] + b"\x01" + long[place + 1 :]
        assert Pseudonyms(changed).fingerprint != Pseudonyms(long).fingerprint, place


def test_no_secret_is_shown() -> None:
    assert "key" not in repr(Pseudonyms(KEY))
    assert Pseudonyms(KEY).fingerprint.startswith("key-")


def test_processes_that_start_at_once_make_one_key_for_its_owner_alone(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    gate, answers = context.Barrier(6), context.Queue()
    path = tmp_path / "new" / "pseudonym.key"
    workers = [context.Process(target=_fingerprint, args=(str(path), gate, answers)) for _ in range(6)]
    for worker in workers:
        worker.start()
    told = {answers.get(timeout=60) for _ in workers}
    for worker in workers:
        worker.join()
    assert len(told) == 1
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert len(path.read_bytes()) == ours.KEY_BYTES
    assert list(path.parent.iterdir()) == [path], "nothing is left beside it"


def test_threads_of_one_process_make_one_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from concurrent.futures import ThreadPoolExecutor

    monkeypatch.setenv("TERRAVOX_KEY_FILE", str(tmp_path / "k" / "pseudonym.key"))
    with ThreadPoolExecutor(8) as threads:
        assert len(set(threads.map(lambda _: pseudonyms().fingerprint, range(8)))) == 1
    assert [file.name for file in (tmp_path / "k").iterdir()] == ["pseudonym.key"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o620])
def test_a_key_that_others_can_use_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int) -> None:
    path = tmp_path / "pseudonym.key"
    path.write_bytes(KEY)
    path.chmod(mode)
    monkeypatch.setenv("TERRAVOX_KEY_FILE", str(path))
    with pytest.raises(SceneError, match="chmod 600") as refused:
        pseudonyms()
    assert refused.value.code == "key"
    path.chmod(0o600)
    assert pseudonyms() == Pseudonyms(KEY)


def test_a_short_key_and_one_that_is_no_file_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pseudonym.key"
    path.touch(mode=0o600)
    path.write_bytes(KEY[:15])
    monkeypatch.setenv("TERRAVOX_KEY_FILE", str(path))
    with pytest.raises(SceneError, match="has 15 bytes; at least 16"):
        pseudonyms()
    (tmp_path / "folder").mkdir(mode=0o700)
    monkeypatch.setenv("TERRAVOX_KEY_FILE", str(tmp_path / "folder"))
    with pytest.raises(SceneError, match="cannot be read or made: Is a directory"):
        pseudonyms()


def test_the_key_lies_in_the_users_configuration_unless_one_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TERRAVOX_KEY_FILE")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert key_file() == tmp_path / "terravox" / "pseudonym.key"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    assert key_file() == Path.home() / ".config" / "terravox" / "pseudonym.key"
