"""Every check is seen to find its fault, on machines that are made up; what is well is said to be well."""

from __future__ import annotations

import errno
import http.server
import json
import os
import resource
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from mae_core import file_systems
from pipelines import doctor_disk
from pipelines.doctor import command_findings, key_finding, main, split_words
from pipelines.doctor_disk import Trial, folder_findings, store_finding, try_writing
from pipelines.doctor_machine import cores, driver_version, memory, processor_finding, shared_memory_finding, torch_findings
from pipelines.doctor_process import clock_finding, launch_findings, limit_findings, umask_finding, variable_findings
from pipelines.doctor_software import library_findings, pinned, python_finding
from pipelines.doctor_tracking import tracking_findings
from pipelines.findings import Finding, sentences, size
from tests.tiny_runs import shared_store

GIB = 2**30


def told(findings: list[Finding] | Finding, level: str) -> str:
    """The one finding of a level, as a line."""
    findings = [findings] if isinstance(findings, Finding) else findings
    found = [finding.sentence for finding in findings if finding.level == level]
    assert len(found) == 1, findings
    return found[0]


def well(findings: list[Finding] | Finding) -> str:
    """What is said where all is well."""
    findings = [findings] if isinstance(findings, Finding) else findings
    assert {finding.level for finding in findings} == {"ok"}, findings
    return "\n".join(finding.sentence for finding in findings)


def files(root: Path, **contents: str) -> Path:
    """A made-up machine: files by path, where `__` stands for the slash."""
    for name, text in contents.items():
        file = root / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def test_a_python_and_libraries_out_of_their_ranges_are_told() -> None:
    assert well(python_finding(">=3.11,<3.14", "3.12.1")) == "Python: 3.12.1 (wanted: >=3.11,<3.14)"
    assert "make an environment" in told(python_finding(">=3.11,<3.14", "3.14.0"), "problem")
    there = {"numpy": "2.4.6", "torch": "2.13.0+cu130", "mlflow": "3.17.2", "zarr": "3.1.6"}
    wanted = ["numpy>=1.26", "torch>=2.10", "mlflow>=3.15.2,<3.19", "zarr>=3.1", "tomli>=2; python_version < '3.11'"]
    tested = pinned(["# a comment", "torch==2.13.0  # both builds", "zarr==3.1.6"])
    assert tested == {"torch": "2.13.0", "zarr": "3.1.6"}
    assert well(library_findings(wanted, tested, there.get)) == "libraries: 4 within their ranges, all as tested"
    other = library_findings(wanted, {"numpy": "2.4.5", **tested}, there.get)
    assert well(other).endswith("4 within their ranges; not the tested versions: numpy 2.4.6 (tested: 2.4.5)")
    for name, version, words in (
        ("zarr", None, "zarr: not installed (wanted: >=3.1); pip install 'zarr==3.1.6'"),
        ("numpy", "1.25.0", "numpy: 1.25.0 (wanted: >=1.26); pip install 'numpy>=1.26'"),
        ("mlflow", "3.18.0", "mlflow: 3.18.0: it pins parts that are not served everywhere"),
        ("torch", "2.9.1+cpu", "torch: 2.9.1+cpu (wanted: >=2.10)"),
    ):
        assert told(library_findings(wanted, tested, {**there, name: version}.get), "problem").startswith(words)


@pytest.mark.parametrize(
    "group",
    [
        {
            "proc__self__cgroup": "0::/job/step\n",
            "sys__fs__cgroup__job__cpu.max": "150000 100000\n",
            "sys__fs__cgroup__cpu.max": "max 100000\n",
        },
        {
            "proc__self__cgroup": "3:cpu,cpuacct:/job\n",
            "sys__fs__cgroup__cpu,cpuacct__cpu.cfs_quota_us": "150000\n",
            "sys__fs__cgroup__cpu,cpuacct__cpu.cfs_period_us": "100000\n",
        },
    ],
)
def test_cores_are_those_of_the_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: dict[str, str]) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert cores(tmp_path) == 8, "no group tells anything"
    root = files(tmp_path, **group)
    assert cores(root) == 1.5
    assert well(processor_finding(1, {}, root)).startswith("processor: 1.5 usable of ")
    assert "export OMP_NUM_THREADS=1" in told(processor_finding(8, {}, root), "warning")
    assert "in each of 4 processes" in told(processor_finding(1, {"LOCAL_WORLD_SIZE": "4"}, root), "warning")


def test_memory_is_that_of_the_group_and_its_cache_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * GIB, available=60 * GIB))
    assert memory(tmp_path) == (64 * GIB, 60 * GIB)
    group = {"memory.max": str(8 * GIB), "memory.current": str(7 * GIB), "memory.stat": f"anon 1\ninactive_file {2 * GIB}\n"}
    root = files(tmp_path, proc__self__cgroup="0::/job\n", **{f"sys__fs__cgroup__job__{name}": text for name, text in group.items()})
    assert memory(root) == (8 * GIB, 3 * GIB)
    files(root, proc__self__cgroup="5:memory:/job\n", **{"sys__fs__cgroup__memory__job__memory.limit_in_bytes": str(2**63 - 4096)})
    assert memory(root) == (64 * GIB, 60 * GIB), "a limit that is none"


def fake_torch(*, cuda: str | None = "13.0", gpus: int = 0, nccl: bool = True, free: int = 70 * GIB, **more: Any) -> Any:
    """A torch with so many GPUs of made-up kind."""

    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old\nUpdate it.")

    on_gpu = {
        "is_available": lambda: gpus > 0,
        "device_count": lambda: gpus,
        "get_device_capability": lambda _: (9, 0),
        "mem_get_info": lambda _: (free, 80 * GIB),
        "get_device_name": lambda _: "H100",
        "get_arch_list": lambda: ["sm_80", "sm_90"],
        "init": init,
    }
    group = SimpleNamespace(is_available=lambda: True, is_gloo_available=lambda: True, is_nccl_available=lambda: nccl)
    return SimpleNamespace(
        __version__="2.13.0",
        version=SimpleNamespace(cuda=cuda),
        get_num_threads=lambda: 1,
        cuda=SimpleNamespace(**{**on_gpu, **more}),
        distributed=group,
    )


def test_a_torch_that_does_not_fit_the_machine_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.getaddrinfo", lambda *_: [])
    plain = files(tmp_path / "plain")
    root = files(tmp_path, proc__driver__nvidia__version="NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue\n")
    assert driver_version(root) == "550.54.15"
    assert "GPU: none: training runs on the processor" in well(torch_findings("auto", {}, plain, fake_torch(cuda=None)))
    assert "sm_90, bf16, 70.0 GiB free of 80.0 GiB, driver 550.54.15" in well(torch_findings("cuda", {}, root, fake_torch(gpus=2)))
    for device, environment, torch, words in (
        ("auto", {}, fake_torch(cuda=None), "for processors only, and there is an NVIDIA driver (550.54.15); install torch for CUDA"),
        ("auto", {}, fake_torch(), "driver 550.54.15, and torch cannot use it: The NVIDIA driver on your system is too old; fit"),
        ("cuda", {"CUDA_VISIBLE_DEVICES": ""}, fake_torch(), "none that torch can use, and device=cuda: hidden by CUDA_VISIBLE_DEVICES=;"),
        ("auto", {}, fake_torch(gpus=1, get_arch_list=lambda: ["sm_50", "sm_100"]), "this torch has no kernels for it (sm_50, sm_100)"),
        ("auto", {}, fake_torch(gpus=2, nccl=False), "backends: gloo; 2 GPUs need nccl"),
    ):
        assert words in told(torch_findings(device, environment, root, torch), "problem")  # type: ignore[arg-type]
    assert well(torch_findings("cpu", {}, root, fake_torch(cuda=None)))
    assert well(torch_findings("auto", {}, root, fake_torch(gpus=1, get_arch_list=lambda: ["compute_80"])))
    assert "another process uses it" in told(torch_findings("auto", {}, root, fake_torch(gpus=1, free=GIB)), "warning")
    monkeypatch.setattr("importlib.import_module", lambda name: (_ for _ in ()).throw(ImportError("libcudart.so: no such file")))
    assert "torch: cannot be imported: libcudart.so: no such file" in told(torch_findings("auto", {}, root), "problem")


def test_a_machine_whose_name_has_no_address_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object) -> None:
        raise OSError(errno.ENOENT, "Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", unknown)
    assert "enter the name into /etc/hosts" in told(torch_findings("cpu", {}, tmp_path, fake_torch()), "warning")


def test_little_shared_memory_is_told_where_gpus_need_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2**26, total=2**26))
    assert "--shm-size" in told(shared_memory_finding(2, tmp_path), "warning")
    assert "64.0 MiB free" in well(shared_memory_finding(1, tmp_path))
    assert shared_memory_finding(2, tmp_path / "none") == []


def test_half_a_launch_and_variables_that_leak_are_told() -> None:
    whole = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert well(launch_findings({})) == "launch: one process"
    assert well(launch_findings(whole)) == "launch: rank 1 of 2 processes, by torchrun"
    assert "MASTER_ADDR is missing" in told(launch_findings({"RANK": "1", "WORLD_SIZE": "2"}), "problem")
    assert "WORLD_SIZE" in told(launch_findings({"RANK": "0"}), "problem")
    assert "RANK=2" in told(launch_findings({**whole, "RANK": "2"}), "problem")
    assert well(variable_findings({"MLFLOW_TRACKING_URI": "http://a", "CUDA_LAUNCH_BLOCKING": "0"}))
    assert "MLFLOW_RUN_ID is set; whatever calls MLflow" in told(variable_findings({"MLFLOW_RUN_ID": "secret"}), "warning")
    assert "may then run code" in told(variable_findings({"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "True"}), "warning")


def test_narrow_limits_and_a_wide_umask_are_told() -> None:
    def limits(**own: int) -> Any:
        return lambda kind: (own.get({resource.RLIMIT_NOFILE: "files", resource.RLIMIT_FSIZE: "size"}.get(kind, "room"), -1), -1)

    assert well(limit_findings(0, limits())) == "limits: any number of open files, files of any size"
    assert "ulimit -n 1024" in told(limit_findings(0, limits(files=256)), "warning")
    assert "files of at most 1.0 MiB" in told(limit_findings(0, limits(size=2**20)), "warning")
    assert "a checkpoint may not fit" in told(limit_findings(2**21, limits(size=2**20)), "problem")
    assert "address space" in told(limit_findings(0, limits(room=GIB)), "warning")
    before = os.umask(0o022)
    try:
        assert well(umask_finding(patients=False)) == "umask: 022"
        assert "umask 077" in told(umask_finding(patients=True), "warning")
        for mask, words in ((0o000, "everybody may change"), (0o002, "the group may change")):
            os.umask(mask)
            assert words in told(umask_finding(patients=False), "warning")
        os.umask(0o077)
        assert well(umask_finding(patients=True)) == "umask: 077"
    finally:
        os.umask(before)


def test_clocks_that_disagree_or_go_backwards_are_told() -> None:
    assert "time zone" in well(clock_finding(0.5))
    assert "3600 s ahead of the file system's; steps, retention and leases do not mind" in told(clock_finding(3600.0), "warning")
    assert "3600 s behind the file system's" in told(clock_finding(-3600.0), "warning")
    assert "long ago" in told(clock_finding(None, now=lambda: 0.0), "warning")
    ticks = iter([*range(50), 3.0, *range(50, 99)])
    assert "goes backwards" in told(clock_finding(None, lambda: next(ticks)), "problem")


def test_a_folder_that_can_be_made_is_fine_whatever_its_letters(tmp_path: Path) -> None:
    out = tmp_path / "a run" / "Läufe ∅"
    assert f"{out} can be made in {tmp_path}" in well(folder_findings("out", out, trial=try_writing(out)))
    assert list(tmp_path.iterdir()) == [], "the trial leaves nothing"
    assert f"{tmp_path} can be written to" in well(folder_findings("out", tmp_path))


def statvfs(monkeypatch: pytest.MonkeyPatch, **changes: int) -> None:
    real = {name: getattr(os.statvfs("/"), name) for name in dir(os.statvfs_result) if name.startswith("f_")}
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(**{**real, **changes}))


@pytest.mark.parametrize("name", ["x" * 256, "ü" * 128, "/".join(["x" * 250] * 17)])
def test_a_name_that_is_too_long_is_told(tmp_path: Path, name: str) -> None:
    assert "are possible" in told(folder_findings("out", tmp_path / name), "problem")


def test_a_folder_that_cannot_be_written_to_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    assert f"{tmp_path / 'file'} is no folder" in told(folder_findings("out", tmp_path / "file" / "run"), "problem")
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)  # as a server answers that squashes root
        assert f"{tmp_path} may not be written to" in told(folder_findings("out", tmp_path / "run"), "problem")
    with monkeypatch.context() as patch:
        statvfs(patch, f_flag=os.ST_RDONLY)
        assert "read-only" in told(folder_findings("out", tmp_path / "run"), "problem")

    def full(**_: object) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "NamedTemporaryFile", full)
        found = folder_findings("out", tmp_path / "run", trial=try_writing(tmp_path / "run"))
        assert f"{tmp_path}: Disk quota exceeded; free some space" in told(found, "problem")


def test_little_room_and_few_files_left_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2**20, total=GIB))
    assert "out: room: 1.0 MiB free, 2.0 MiB needed; free some" in told(folder_findings("out", tmp_path, 2**21), "problem")
    assert "out: room: 1.0 MiB free; free some" in told(folder_findings("out", tmp_path), "warning")
    monkeypatch.undo()
    statvfs(monkeypatch, f_files=1000, f_favail=3)
    assert "3 more files are possible" in told(folder_findings("out", tmp_path), "warning")
    statvfs(monkeypatch, f_files=0, f_favail=0)
    well(folder_findings("out", tmp_path))


def mounted(monkeypatch: pytest.MonkeyPatch, folder: Path, place: Path, kind: str) -> None:
    """Make it seem that a file system of a kind is mounted at a place."""
    table = folder / "mountinfo"
    table.write_text(f"1 0 8:1 / / rw - ext4 /dev/sda rw\n2 1 0:50 / {place} rw - {kind} server:/export rw\n")
    monkeypatch.setattr(file_systems, "MOUNTS", table)


def test_kinds_of_file_systems_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "shared"
    out.mkdir()
    mounted(monkeypatch, tmp_path, out, "nfs4")
    assert "nfs4, shared over a network: good for checkpoints, not for a database" in well(folder_findings("out", out))
    assert "without locks" in told(folder_findings("out", out, trial=Trial(locks=False)), "warning")
    words = told(tracking_findings(f"sqlite:///{out / 'mlflow.db'}", {}), "problem")
    assert "an SQLite database on a network file system (nfs4); locks cannot be trusted there" in words
    assert "will be made" in well(tracking_findings(f"sqlite:///{tmp_path / 'mlflow.db'}", {}))
    mounted(monkeypatch, tmp_path, out, "tmpfs")
    assert "gone at the next boot" in told(folder_findings("out", out), "warning")


def test_a_folder_that_others_may_change_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o770)
    assert "may be changed by its group; checkpoints are loaded from there: chmod go-w" in told(folder_findings("out", tmp_path), "warning")
    tmp_path.chmod(0o707)
    assert "may be changed by everybody" in told(folder_findings("out", tmp_path), "warning")


def test_locks_that_do_not_work_are_found_by_trying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert try_writing(tmp_path).locks

    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(doctor_disk.fcntl, "flock", flock)
    assert not try_writing(tmp_path).locks


def test_a_store_that_is_not_whole_is_told(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert "store: 18 tiles, 2 channels" in well(store_finding(str(shared_store(tmp_path_factory).path)))
    assert "prepare it again" in told(store_finding(str(tmp_path)), "problem")


def test_a_database_that_is_none_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mlflow.db"
    uri = f"sqlite:///{file}"
    with sqlite3.connect(file) as database:
        for table in ("alembic_version", "experiments", "metrics", "runs"):
            database.execute(f"CREATE TABLE {table} (x)")
        database.execute("INSERT INTO runs VALUES (1)")
    database.close()
    assert well(tracking_findings(uri, {})) == f"tracking: {file}, 1 runs"
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: Path(path) != file)
        assert "may not be read and written" in told(tracking_findings(uri, {}), "problem")
        patch.setattr(os, "access", lambda *_: False)
        assert f"{tmp_path} may not be written to; SQLite writes beside its database" in told(tracking_findings(uri, {}), "problem")
    with sqlite3.connect(file) as database:
        database.execute("DROP TABLE runs")
    database.close()
    assert "is no database of MLflow" in told(tracking_findings(uri, {}), "problem")
    file.write_bytes(b"no database at all" * 100)
    assert "cannot be read: file is not a database" in told(tracking_findings(uri, {}), "problem")
    assert "is a folder" in told(tracking_findings(f"sqlite:///{tmp_path}", {}), "problem")
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]


@contextmanager
def server(answers: dict[str, tuple[int, str]], heard: list[str | None] | None = None) -> Iterator[str]:
    """A server on this machine that answers so."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if heard is not None:
                heard.append(self.headers["Authorization"])
            status, text = answers.get(self.path, (404, ""))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{running.server_port}"
        finally:
            running.shutdown()
            thread.join()


def test_a_server_is_asked_how_it_is_and_how_old(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str | None] = []
    with server({"/at/health": (200, "OK"), "/at/version": (200, "3.17.2")}, heard) as uri:
        found = tracking_findings(uri.replace("://", "://jane:s%40cret@") + "/at", {})
        assert well(found) == f"tracking: {uri}, MLflow 3.17.2"
        assert heard == ["Basic amFuZTpzQGNyZXQ="] * 2
        assert "/health answers 404" in told(tracking_findings(uri, {}), "problem")
    for answers, level, words in (
        (
            {"/health": (200, "OK"), "/version": (200, "3.9.0")},
            "problem",
            "is MLflow 3.9.0; earlier ones than 3.15 let strangers read files",
        ),
        ({"/health": (200, "OK")}, "warning", "does not say its version"),
        ({"/health": (403, ""), "/version": (403, "")}, "problem", "list its name in its --allowed-hosts"),
        ({"/health": (200, ""), "/version": (401, "")}, "problem", "set MLFLOW_TRACKING_USERNAME"),
        ({"/health": (500, "")}, "problem", "/health answers 500"),
    ):
        with server(answers) as uri:
            assert words in told(tracking_findings(uri, {}), level)
    assert "cannot be reached: [Errno 111]" in told(tracking_findings(uri, {}), "problem")
    monkeypatch.setattr("pipelines.doctor_tracking._get", lambda _, path, *__: (200, "3.17.2"))
    assert "http://mlflow.example without TLS" in told(tracking_findings("http://mlflow.example", {}), "warning")
    well(tracking_findings("https://mlflow.example", {}))
    assert "it is not looked at here" in told(tracking_findings("databricks://x", {}), "warning")


def test_the_key_is_looked_at_and_never_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = tmp_path / "k" / "pseudonym.key"
    assert "none yet" in well(key_finding(key))
    key.parent.mkdir()
    key.write_bytes(b"0123456789abcdef")
    key.chmod(0o600)
    assert well(key_finding(key)) == "key of pseudonyms: there, mode 0600"
    key.chmod(0o640)
    assert "mode 0640: others can read it; chmod 600 it" in told(key_finding(key), "problem")
    key.unlink()
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "cannot be made" in told(key_finding(key), "problem")


def test_words_before_a_verb_are_the_doctors() -> None:
    assert split_words(["--json", "pretrain", "out=a"]) == (["--json"], ["pretrain", "out=a"])
    assert split_words(["--out", "pretrain", "device=cpu"]) == (["--out", "pretrain", "device=cpu"], [])
    assert split_words(["--out=x", "pretrain_mri"]) == (["--out=x"], ["pretrain_mri"])


def test_the_verb_tells_people_and_machines(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    words = [f"out={tmp_path / 'run'}", "device=cpu"]
    assert main(words) == 0
    assert f"{tmp_path / 'run'} can be made in {tmp_path}" in capsys.readouterr().out
    (tmp_path / "store").mkdir()
    command = ["pretrain", f"store={tmp_path / 'store'}", *words[:1], "train.device=cpu", "train.steps=0"]
    assert main(["--json", *command]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["problem"] == 2
    wrong = {entry["subject"]: entry["found"] for entry in found["findings"] if entry["level"] == "problem"}
    assert wrong["settings of pretrain"] == "train.steps = 0 (command line): must be a whole number >= 1"
    assert wrong["store"].startswith(str(tmp_path / "store"))
    assert list(tmp_path.iterdir()) == [tmp_path / "store"]


def test_a_commands_warnings_are_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def checked(_: object) -> int:
        print("warning: out: room: little\nwould resume at step 3")
        return 0

    monkeypatch.setattr("pipelines.doctor.main_of", lambda _: checked)
    found = command_findings("pretrain", [])
    assert sentences(found, "warning") == ["settings of pretrain: out: room: little; see the settings"]
    assert sentences(found, "ok") == ["settings of pretrain: valid"]


def test_sizes_are_told_in_units_that_fit() -> None:
    assert [size(value) for value in (1, 2**20, 3 * 2**29, 2**41)] == ["1 B", "1.0 MiB", "1.5 GiB", "2.0 TiB"]
