"""No identifier leaves the archive: planted ones are in nothing that a whole line of verbs writes or says, failures included."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import logging
import sqlite3
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, PngImagePlugin

from mae_core.store import TileStore
from modalities.catalogue import scan
from modalities.volume import Found, VolumeScene
from pipelines import catalogue, compare, finetune_segmentation, predict, prepare, pretrain, pretrain_mri, probe, reconstruct
from pipelines.withheld import discreet
from tests.planted import IDENTIFIERS, WANTED, QuotingScene, digests, fail_over, found_in, named_in, texts_of
from tests.synthetic_dicom import AXIAL, write_series
from tests.synthetic_volumes import broken, save_volume
from tests.tiny_runs import one_thread, quick, shared_tracking

__all__ = ["quick"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType:UserWarning"),
]

TINY = [
    "train.steps=1",
    "train.log_steps=1",
    "train.eval_steps=1",
    "train.device=cpu",
    "loader.global_batch_size=4",
    "tracking.system_metrics=false",
    "prepare.num_workers=0",
    "prepare.tile=[16,16,16]",
    "prepare.split.val_fraction=0.3",
]
DECODER = ["model.decoder.width=16", "model.decoder.depth=1", "model.decoder.heads=2"]
ENCODER = ["model.encoder.preset=nano", "model.encoder.patch=[4]", *DECODER]
READER = ["reader.min_planes=4"]


@dataclass
class World:
    """An archive full of identifiers, and where everything goes that is made of it."""

    archive: Path
    made: Path
    crosswalk: Path
    uri: str

    def run(self, verb: Callable[[list[str]], int], out: str, *words: str, reads: bool = True, tracked: bool = True) -> int:
        given = ["--data", str(self.archive / "images")] if reads else []
        given += [f"tracking.uri={self.uri}"] if tracked else []
        return verb([*given, "--out", str(self.made / out), *words])


def plant(archive: Path) -> None:
    """Six patients as NIfTI with a sidecar and a label file, one as DICOM, one file that is cut off."""
    held = IDENTIFIERS
    folder = archive / "images" / held["folder"] / held["patient name"]
    for number in range(6):
        rng = np.random.default_rng(number)
        classes = np.kron(rng.integers(0, 2, (2, 2, 2)), np.ones((8, 8, 8), int))
        values = (400 * (1 + classes) + rng.normal(0, 10, classes.shape)).astype(np.float32)
        stem = f"sub-{held['patient id']}{number}_ses-{held['birth date']}_desc-{held['file']}_T1w"
        texts = {"descrip": "free text of a header", "db_name": "name of a database", "aux_file": "physician", "intent_name": "comment"}
        path = save_volume(folder / f"{stem}.nii.gz", values, **{key: held[what].encode() for key, what in texts.items()})
        _extend(path, held["extension"].encode())
        path.with_name(f"{stem}.json").write_text(json.dumps({"PatientName": held["patient name"], "OperatorsName": held["sidecar"]}))
        save_volume(archive / held["label file"] / f"{stem}.nii.gz", classes.astype(np.uint8), descrip=held["comment"].encode())
    broken(save_volume(folder / f"cut_{held['file']}_T1w.nii.gz", values), lambda data: data[:-40])
    write_series(
        folder / "series",
        np.random.default_rng(9).integers(100, 900, (16, 16, 8)).astype(np.uint16),
        AXIAL,
        PatientName=f"{held['patient name']}^Anna",
        PatientID=held["patient id"],
        PatientBirthDate=held["birth date"],
        AccessionNumber=held["accession number"],
        StudyInstanceUID=held["study uid"],
        SeriesInstanceUID=held["series uid"],
        InstitutionName=held["institution"],
        ReferringPhysicianName=held["physician"],
        StudyDescription=held["study description"],
        SeriesDescription=f"T1w {held['comment']}",
        ImageComments=held["comment"],
        StudyDate=held["birth date"],
    )


def _extend(path: Path, text: bytes) -> None:
    """Puts an extension with a text behind the header of a gzipped NIfTI file."""
    data = gzip.decompress(path.read_bytes())
    size = -(-(8 + len(text)) // 16) * 16
    header = bytearray(data[:348])
    struct.pack_into("<f", header, 108, 352 + size)
    block = struct.pack("<ii", size, 6) + text.ljust(size - 8, b"\0")
    path.write_bytes(gzip.compress(bytes(header) + b"\1\0\0\0" + block + data[352:], mtime=0))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    base = tmp_path_factory.mktemp("planted")
    made = base / "made"
    made.mkdir()
    archive = base / IDENTIFIERS["archive"]
    plant(archive)
    return World(archive, made, base / "crosswalk.csv", shared_tracking(tmp_path_factory))


def while_read(scene: VolumeScene, window: Any) -> NoReturn:
    del window
    fail_over(scene.files[0])


def while_judged(found: Found, *rest: Any) -> NoReturn:
    del rest
    fail_over(found.source.files[0])


def while_trained(store: TileStore, rows: Any) -> NoReturn:
    del store, rows
    fail_over(Path(IDENTIFIERS["file"]))


def the_whole_line(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every verb with a failure and then as it should be."""
    with monkeypatch.context() as patch:
        patch.setattr("modalities.volume_scan.examine", while_judged)
        assert world.run(catalogue.main, "table", *READER, tracked=False) == 1
    assert world.run(catalogue.main, "table", *READER, f"--crosswalk={world.made / 'table' / 'names.csv'}", tracked=False) == 1
    assert world.run(catalogue.main, "table", *READER, f"--crosswalk={world.crosswalk}", tracked=False) == 0
    stored = ["modality=mri", *TINY[-3:], *READER, f"reader.exclude=[x{IDENTIFIERS['file']}*]"]
    with monkeypatch.context() as patch:
        patch.setattr(VolumeScene, "read", while_read)
        assert world.run(prepare.main, "store", *stored) == 1
    assert world.run(prepare.main, "store", *stored, f"--crosswalk={world.crosswalk}") == 0
    train = ["--store", str(world.made / "store"), *TINY[:6], *ENCODER]
    with monkeypatch.context() as patch:
        patch.setattr(TileStore, "fetch", while_trained)
        assert world.run(pretrain.main, "encoder", *train, reads=False) == 1
    assert world.run(pretrain.main, "encoder", *train, reads=False) == 0
    line = [*TINY, *ENCODER, *READER]
    assert world.run(pretrain_mri.main, "other", *line, f"--dat={world.archive}") == 2
    assert world.run(pretrain_mri.main, "other", *line, "--print-config") == 0
    tune = [*TINY, "init=pretrained", "head.features=4", "overlap=0.1", "--encoder", str(world.made / "encoder")]
    labels = ["--labels", str(world.archive / IDENTIFIERS["label file"])]
    first = min((world.archive / IDENTIFIERS["label file"]).iterdir())
    sound = first.read_bytes()
    broken(first, lambda data: data[:-30])
    assert world.run(finetune_segmentation.main, "segmenter", *tune, *labels) == 1
    first.write_bytes(sound)
    assert world.run(finetune_segmentation.main, "segmenter", *tune, "--labels", str(world.archive / "absent"), "--check") == 2
    assert world.run(finetune_segmentation.main, "segmenter", *tune, *labels) == 0
    label = ["--model", str(world.made / "segmenter"), "overlap=0.1"]
    assert predict.main(["--data", str(world.archive / "absent"), "--out", str(world.made / "found"), *label]) == 1
    with monkeypatch.context() as patch:
        patch.setattr(VolumeScene, "read", while_read)
        assert world.run(predict.main, "found", *label) == 1
    with vanishing("predict"):
        assert world.run(predict.main, "found", *label) == 1
    assert world.run(predict.main, "found", *label) == 0


@contextmanager
def vanishing(verb: str) -> Iterator[None]:
    """A scene's file is gone as soon as a verb has looked at it, and back at the end."""
    places: list[tuple[Path, Path]] = []

    def scanned(*words: Any, **more: Any) -> Any:
        found = scan(*words, **more)
        file = found.scenes[0].files[0]
        places.append((file.rename(file.with_name("gone")), file))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"pipelines.{verb}.scan", scanned)
        yield
    for gone, file in places:
        gone.rename(file)


def nothing_goes_into_the_archive(world: World) -> None:
    """No verb that reads patients' files writes among them."""
    images = world.archive / "images"
    before = sorted(images.rglob("*"))
    out = str(images / IDENTIFIERS["folder"] / "run")
    told = ["--labels", str(world.archive / IDENTIFIERS["label file"]), "--encoder", str(world.made / "encoder")]
    assert world.run(catalogue.main, out, tracked=False) == 1
    assert world.run(catalogue.main, "new", f"--crosswalk={images / 'names.csv'}", tracked=False) == 1
    assert world.run(prepare.main, str(images), "modality=mri") == 1
    assert world.run(pretrain_mri.main, out) == 1
    assert world.run(pretrain_mri.main, "new", f"--store={out}") == 1
    assert world.run(finetune_segmentation.main, out, *told) == 1
    assert world.run(probe.main, out, *told) == 1
    assert world.run(compare.main, out, "modality=mri", *told[:2], tracked=False) == 1
    assert world.run(predict.main, out, "--model", str(world.made / "segmenter")) == 1
    assert world.run(reconstruct.main, out, "--run", str(world.made / "encoder"), tracked=False) == 1
    assert sorted(images.rglob("*")) == before
    assert not (world.made / "new").exists()


def test_a_whole_line_with_failures_writes_and_says_no_identifier(
    world: World, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with one_thread(), caplog.at_level(logging.DEBUG):
        the_whole_line(world, monkeypatch)
        nothing_goes_into_the_archive(world)
    out, errors = capfd.readouterr()
    assert "scan-" in out
    assert errors.count("RuntimeError, message withheld") == 4
    assert errors.count("OSError, message withheld") == 4
    assert errors.count("lies in --data, where patients' files are") == 10
    assert "message is withheld" in caplog.text
    assert "not labelled scan-" in out
    more = digests(texts_of(world.archive))
    for said in (out, errors, caplog.text):
        lines = [line for line in said.splitlines() if named_in(line.encode(), more)]
        assert not lines, "\n".join(lines)
    tracked = Path(world.uri.removeprefix("sqlite:///")).parent
    assert found_in([world.made, tracked], more) == {}
    assert {path.name[:5] for path in (world.made / "found").glob("*.nii.gz")} == {"scan-"}
    assert not [path for path in (*world.made.rglob("*.png"), *tracked.rglob("*.png")) if b"planted" in str(path).encode()]
    assert world.crosswalk.stat().st_mode & 0o777 == 0o600
    names = world.crosswalk.read_text()
    assert str(world.archive) in names
    assert "scan-" in names
    model = json.loads((world.made / "segmenter" / "model" / "model.json").read_text())
    assert "not a medical device" in model["intended_use"]
    assert "not a medical device" in (world.made / "segmenter" / "model" / "README.md").read_text()


def test_workers_and_files_that_vanish_are_told_without_names(
    world: World, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["modality=mri", *TINY[-3:], *READER, "prepare.tiles_per_shard=1"]
    with vanishing("prepare"):
        assert world.run(prepare.main, "vanished", *words) == 1
    assert "a file cannot be read any more: No such file or directory" in capfd.readouterr().err

    def scanned(*rest: Any, **more: Any) -> Any:
        found = scan(*rest, **more)
        return replace(found, scenes=tuple(QuotingScene(**vars(scene)) for scene in found.scenes))

    monkeypatch.setattr("pipelines.prepare.scan", scanned)
    assert world.run(prepare.main, "worker", *words, "prepare.num_workers=1") == 1
    errors = capfd.readouterr().err
    assert "caused by OSError, message withheld" in errors
    assert "nibabel.global: a message is withheld" in errors
    lines = [line for line in errors.splitlines() if named_in(line.encode(), digests(texts_of(world.archive)))]
    assert not lines, "\n".join(lines)
    assert found_in([world.made]) == {}


def test_the_library_that_warns_is_not_quoted(capfd: pytest.CaptureFixture[str]) -> None:
    with discreet(private=True), warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn(IDENTIFIERS["patient name"], UserWarning, stacklevel=1)
        logging.getLogger("pydicom").warning("value %s", IDENTIFIERS["patient id"])
    errors = capfd.readouterr().err
    assert "UserWarning, message withheld" in errors
    assert not named_in(errors.encode())


FORMS: dict[str, Callable[[str], bytes]] = {
    "plain": str.encode,
    "upper": lambda text: text.upper().encode(),
    "utf-16": lambda text: text.encode("utf-16-be"),
    "hex": lambda text: text.encode().hex().encode(),
    "base64": lambda text: base64.b64encode(b"ab" + text.encode() + b"yz"),
    "md5": lambda text: hashlib.md5(text.encode()).hexdigest().encode(),
    "sha1": lambda text: hashlib.sha1(text.encode()).hexdigest()[:20].encode(),
    "sha256": lambda text: hashlib.sha256(text.encode()).hexdigest().upper().encode(),
    "blake2b": lambda text: hashlib.blake2b(text.encode()).hexdigest().encode(),
    "blake2b-256": lambda text: hashlib.blake2b(text.encode(), digest_size=32).hexdigest().encode(),
    "blake2b-64": lambda text: hashlib.blake2b(text.encode(), digest_size=8).hexdigest().encode(),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_search_knows_every_form(form: str) -> None:
    for what, text in IDENTIFIERS.items():
        assert what in named_in(b"\x00\x01" + FORMS[form](text) + b"\xff"), (what, form)
    assert len(WANTED) >= 12


def test_the_search_looks_into_every_container(tmp_path: Path) -> None:
    for what, text in IDENTIFIERS.items():
        folder = tmp_path / what.replace(" ", "_")
        folder.mkdir()
        (folder / "a.gz").write_bytes(gzip.compress(f"x{text}x".encode()))
        with zipfile.ZipFile(folder / "b.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("inside.txt", f"x{text}x")
        about = PngImagePlugin.PngInfo()
        about.add_text("Comment", text, zip=True)
        Image.new("L", (2, 2)).save(folder / "c.png", pnginfo=about)
        pq.write_table(pa.table({"scene": [f"x{text}x"] * 3}), folder / "d.parquet", compression="zstd")
        with sqlite3.connect(folder / "e.db") as base:
            base.execute("create table t (a text)")
            base.execute("insert into t values (?)", (f"x{text}x",))
        base.close()
        (folder / f"f-{text}.txt").write_text("its name alone")
        found = found_in([folder])
        assert len(found) == 6, (what, sorted(found))
        assert all(what in hits for hits in found.values())
