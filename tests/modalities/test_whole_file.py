"""A file is there whole or as it was, with its mode from the first byte on, and a link is replaced, not followed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from modalities.whole_file import OWN, USUAL, written_whole


@pytest.mark.parametrize("mode", [OWN, USUAL])
def test_what_goes_wrong_leaves_what_was_there_and_nothing_else(tmp_path: Path, mode: int) -> None:
    place, elsewhere = tmp_path / "file", tmp_path / "elsewhere"
    elsewhere.write_bytes(b"mine")
    place.symlink_to(elsewhere)

    def fail() -> None:
        with written_whole(place, mode) as stream:
            stream.write(b"half")
            assert {file.name for file in tmp_path.iterdir()} > {"file", "elsewhere"}
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert place.is_symlink()
    before = os.umask(0o022)
    try:
        with written_whole(place, mode) as stream:
            assert os.fstat(stream.fileno()).st_mode & 0o777 == mode & ~0o022
            stream.write(b"whole")
    finally:
        os.umask(before)
    assert (place.read_bytes(), elsewhere.read_bytes(), place.is_symlink()) == (b"whole", b"mine", False)
    assert place.stat().st_mode & 0o777 == mode & ~0o022
    assert {file.name for file in tmp_path.iterdir()} == {"file", "elsewhere"}
