from __future__ import annotations

import stat
import struct
import zipfile
from pathlib import Path

import pytest

from modalities import archive
from modalities.raster_file import inspect, opened
from modalities.scene import SceneError
from tests.synthetic_rasters import write_world


def packed(path: Path, entries: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as target:
        for name, content in entries.items():
            target.writestr(name, content)
    return path


def test_a_member_is_read_like_the_file(tmp_path: Path) -> None:
    image = write_world(tmp_path / "B02.tif", (20, 30), dtype="uint16")
    path = packed(tmp_path / "strange name [1] é.zip", {"deep/er/B02.tif": image.read_bytes(), "a.txt": b"words"})
    members = archive.members(path)
    assert members == [path / "deep/er/B02.tif", path / "a.txt"]
    header, own = inspect(members[0], "x"), inspect(image, "x")
    assert (header.grid, header.dtypes, header.block) == (own.grid, own.dtypes, own.block)
    with opened(members[0]) as one, opened(image) as other:
        assert (one.read() == other.read()).all()
    with archive.stream(members[1]) as stream:
        assert stream.read() == b"words"
    assert (archive.size(members[1]), archive.on_disk(members[1]), archive.on_disk(image)) == (5, path, image)
    for missing in (path / "deep" / "B03.tif", path / ".." / "B02.tif", path / "deep/er/B02.tif/.."):
        with pytest.raises((OSError, SceneError)):
            inspect(missing, "x")
    with pytest.raises(SceneError, match="begins with b'word'"):
        inspect(members[1], "x")


def test_only_a_path_through_a_zip_reaches_the_virtual_file_systems(tmp_path: Path) -> None:
    image = write_world(tmp_path / "B02.tif", (8, 8), dtype="uint16")
    path = packed(tmp_path / "a.zip", {"B02.tif": image.read_bytes()})
    for wrong in (f"/vsizip/{path}/B02.tif", f"/vsizip/{{{path}}}/B02.tif", f"/vsicurl/{path}"):
        with pytest.raises(OSError, match="is not a path of the file system"), opened(Path(wrong)):
            pass
    braces = packed(tmp_path / "a}b.zip", {"B02.tif": image.read_bytes()})
    with pytest.raises(OSError, match="has a character that GDAL cannot be told"):
        archive.gdal_name(braces / "B02.tif")


@pytest.mark.parametrize("name", ["/etc/B02.tif", "../B02.tif", "a/../../B02.tif", "C:/B02.tif", "a\\..\\B02.tif", "a{b}/B02.tif", "a\nb"])
def test_names_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    path = packed(tmp_path / "a.zip", {"good.tif": b"", name: b"x"})
    with pytest.raises(
        SceneError, match="leads out of it or has a name that no file should have; a product has no such thing, nothing of it"
    ):
        archive.members(path)


def test_links_bombs_twins_ciphers_and_strange_packing_are_refused(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("B02.tif")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as target:
        target.writestr(link, "/etc/passwd")
    with (
        zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as target,
        target.open("B02.tif", "w", force_zip64=True) as member,
    ):
        for _ in range(5):
            member.write(bytes(1 << 26))
    with zipfile.ZipFile(tmp_path / "twice.zip", "w") as target:
        target.writestr("a", "1")
        with pytest.warns(UserWarning, match="Duplicate name"):
            target.writestr("a", "2")
    packed(tmp_path / "bzip.zip", {"a": b"x"}, zipfile.ZIP_BZIP2)
    content = bytearray(packed(tmp_path / "cipher.zip", {"a": b"x"}).read_bytes())
    place = content.index(b"PK\x01\x02") + 8
    content[place : place + 2] = struct.pack("<H", 1)
    (tmp_path / "cipher.zip").write_bytes(content)
    (tmp_path / "torn.zip").write_bytes(bytes(content[:30]))
    for name, reason in (
        ("link", "is a link"),
        ("bomb", "says that it unpacks to 335544320 bytes from"),
        ("twice", "is there twice"),
        ("bzip", r"is packed in a way \(number 12\) that is not read here"),
        ("cipher", "is encrypted"),
        ("torn", "it is no readable zip"),
    ):
        with pytest.raises(SceneError, match=reason):
            archive.members(tmp_path / f"{name}.zip")


def test_many_members_that_unpack_to_more_than_a_product_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = packed(tmp_path / "a.zip", {f"{i}": bytes(1 << 16) for i in range(20)})
    assert len(archive.members(path)) == 20
    monkeypatch.setattr(archive, "MIN_BOMB_BYTES", 1 << 18)
    archive._listing.cache_clear()
    with pytest.raises(SceneError, match=r"it says that it unpacks to 0\.0 GiB, more than 200 times its size"):
        archive.members(path)
    monkeypatch.setattr(archive, "MAX_MEMBERS", 19)
    archive._listing.cache_clear()
    with pytest.raises(SceneError, match="it has 20 members, more than 19"):
        archive.members(path)
    archive._listing.cache_clear()
