"""Kinds of file systems are read from what the kernel says of its mounts."""

from __future__ import annotations

from pathlib import Path

import pytest

from mae_core import file_systems
from mae_core.file_systems import is_network, kind_of, mount_points

MOUNTED = """\
22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
40 27 0:50 / {root} rw,relatime shared:5 - nfs4 server:/export rw
41 40 0:51 / {root}/my\\040scratch rw - lustre 10.0.0.1@tcp:/work rw
42 40 0:52 / {root}/again rw - nfs4 server:/again rw
43 42 0:53 / {root}/again rw master:1 propagate_from:2 - tmpfs tmpfs rw
"""


def test_the_innermost_and_latest_mount_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTED.format(root=tmp_path))
    monkeypatch.setattr(file_systems, "MOUNTS", mounts)
    for name in ("my scratch", "again"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "my scratch")
    expected = {"/": "ext4", "run/not/yet": "nfs4", "my scratch/run": "lustre", "link/run": "lustre", "again/x": "tmpfs"}
    assert {name: kind_of(tmp_path / name) for name in expected} == expected


def test_the_kernel_of_this_machine_is_understood() -> None:
    assert kind_of(Path("/proc/self")) == "proc"
    assert kind_of(Path(__file__)), "every file lies somewhere"
    assert len(mount_points(Path("/proc/self/mountinfo").read_text().splitlines())) > 1


@pytest.mark.parametrize(
    ("kind", "shared"),
    [
        *[(kind, True) for kind in ("nfs", "nfs4", "lustre", "gpfs", "cifs", "fuse.sshfs", "ceph")],
        *[(kind, False) for kind in ("ext4", "xfs", "tmpfs", "overlay", "btrfs", "apfs", "fuse.fuse-overlayfs", "")],
    ],
)
def test_what_several_machines_mount_is_a_network(kind: str, shared: bool) -> None:
    assert is_network(kind) is shared
