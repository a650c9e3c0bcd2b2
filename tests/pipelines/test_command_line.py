"""The grammar of all verbs: order of precedence, every error at once, exit codes, and what is printed."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, PositiveInt, model_validator

from mae_core.settings import Settings, differences, digest, to_plain
from pipelines import terravox
from pipelines.command_line import run, settings_to_yaml
from pipelines.settings_words import redacted, table

ROOT = Path(__file__).resolve().parents[2]


class Optical(Settings):
    kind: Literal["sentinel2"] = "sentinel2"
    bands: tuple[str, ...] = Field(("B02", "B03"), min_length=1, description="Bands to read.")


class Train(Settings):
    steps: int = Field(100, ge=1, le=1000, description="Optimizer steps.")
    lr: float = Field(1e-3, gt=0)
    precision: Literal["bf16", "fp32"] = "bf16"
    warmup_steps: int = 0

    @model_validator(mode="after")
    def _warmup_fits(self) -> Train:
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} exceeds steps {self.steps}; lower it")
        return self


class Prepare(Settings):
    tile: tuple[PositiveInt, PositiveInt] = (64, 64)
    workers: int | None = None


class Volume(Settings):
    """Volumes.

    Attributes:
        spacing_mm: Wanted size of a voxel,
            or the file's own.
    """

    kind: Literal["mri"] = "mri"
    spacing_mm: tuple[float, float, float] | None = None


class Whole(Settings):
    data: Path = Field(description="Folder of files.")
    name: str | None = None
    tracking: str = "sqlite:///runs.db"
    train: Train = Train(steps=50)
    prepare: Prepare = Prepare()
    reader: Annotated[Optical | Volume, Field(discriminator="kind")] = Field(default_factory=Optical, description="Reads files.")
    tracker: Prepare | None = None
    classes: dict[int, str] = Field(default_factory=dict)


class TroubleError(Exception):
    """An error that speaks to the user."""


class Verb:
    """A small verb that keeps the settings it was run with."""

    def __init__(self, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        self.capsys, self.folder = capsys, folder
        self.settings: Whole | None = None
        self.out = self.err = ""

    def __call__(self, *argv: str, **options: Any) -> int:
        self.settings = None
        options = {"main": self.keep, "description": "Does it.", "expected": (TroubleError,), "argv": argv} | options
        code = run("small", Whole, **options)
        self.out, self.err = self.capsys.readouterr()
        return code

    def keep(self, settings: Whole) -> None:
        self.settings = settings

    def file(self, text: str, name: str = "a.yaml") -> str:
        (self.folder / name).write_text(text, encoding="utf-8")
        return str(self.folder / name)

    def got(self, *argv: str, **options: Any) -> Whole:
        assert self(*argv, **options) == 0, self.err
        assert self.settings is not None
        return self.settings

    def lines(self, *argv: str, **options: Any) -> list[str]:
        assert self(*argv, **options) == 2
        assert self.settings is None
        assert self.out == ""
        assert "Traceback" not in self.err
        first, *rest = self.err.splitlines()
        assert re.fullmatch(rf"terravox small: {len(rest)} problems? with the settings; nothing was done", first)
        return [line.removeprefix("  ") for line in rest]


@pytest.fixture
def verb(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Verb:
    return Verb(capsys, tmp_path)


@pytest.mark.parametrize("arguments", [["train.steps=7"], ["--train.steps", "7"], ["--train.steps=7"]])
def test_three_spellings_say_the_same(verb: Verb, arguments: list[str]) -> None:
    assert verb.got("--data", "x", *arguments).train.steps == 7


def test_the_command_line_wins_over_files_and_a_later_file_over_an_earlier_whatever_the_order_of_arguments(verb: Verb) -> None:
    first = verb.file("train: {steps: 1, lr: 1e-5, warmup_steps: 1}\nprepare: {tile: [8, 8]}\n", "a.yaml")
    second = verb.file("train.steps: 2\ntrain: {lr: 2e-5}\n", "b.yaml")
    for argv in (
        ["train.steps=3", "--config", first, "data=x", "--config", second],
        ["--config", first, f"--config={second}", "data=x", "train.steps=3"],
    ):
        settings = verb.got(*argv, defaults={"train": {"steps": 4}, "prepare.workers": 5})
        assert settings.train == Train(steps=3, lr=2e-5, warmup_steps=1)
        assert settings.prepare == Prepare(tile=(8, 8), workers=5)


def test_one_value_of_a_section_leaves_the_defaults_of_its_others_as_declared(verb: Verb) -> None:
    assert verb.got("data=x", "train.lr=1").train.steps == 50


def test_values_are_typed_by_yaml_and_stay_text_where_text_is_wanted(verb: Verb) -> None:
    settings = verb.got(
        "data=2024",
        "name=1e3",
        "train.lr=1e-4",
        "prepare.tile=[16,32]",
        "prepare.workers=null",
        "classes.3=water",
        "--tracker.tile",
        "[1,2]",
    )
    assert settings.data == Path("2024")
    assert settings.name == "1e3"
    assert settings.train.lr == 1e-4
    assert settings.prepare.tile == (16, 32)
    assert settings.classes == {3: "water"}
    assert settings.tracker == Prepare(tile=(1, 2))
    assert verb.got("data=*.tif").data == Path("*.tif")
    assert verb.got("--data", "a=b: c").data == Path("a=b: c")
    assert verb.got("data=x", "--train.lr", "1").train.lr == 1


def test_another_choice_of_a_union_leaves_the_defaults_of_the_first_behind(verb: Verb) -> None:
    defaults = {"reader": {"kind": "sentinel2", "bands": ["B08"]}}
    assert verb.got("data=x", defaults=defaults).reader == Optical(bands=("B08",))
    assert verb.got("data=x", "reader.kind=mri", "reader.spacing_mm=[1,1,1]", defaults=defaults).reader == Volume(spacing_mm=(1, 1, 1))


def test_all_errors_come_at_once_each_with_key_value_origin_and_what_is_allowed(verb: Verb) -> None:
    file = verb.file("train:\n  precision: bf17\n  lr: -1\nname: 5\nextra:\n  deep: 1\n")
    argv = ["--config", file, "train.stepz=100", "--train.steps=0", "prepare.tile=[64,-1]", "reader.kind=mrj", "steps=3", "stray", "--name"]
    assert sorted(verb.lines(*argv)) == sorted(
        [
            "stray: not an argument; write section.key=value, --key VALUE or --config FILE",
            "--name: a value is missing; write --name VALUE",
            "data: missing; give --data PATH",
            f"train.precision = bf17 ({file}:2): must be one of bf16, fp32; did you mean bf16?",
            f"train.lr = -1 ({file}:3): must be a number > 0",
            f"name = 5 ({file}:4): must be text or null; put it in quotes",
            f"extra.deep = 1 ({file}:6): unknown setting; --help lists all of them",
            "train.stepz = 100 (command line): unknown setting; did you mean train.steps?",
            "train.steps = 0 (command line): must be a whole number >= 1 and <= 1000",
            "prepare.tile = [64, -1] (command line): must be a list of 2 whole numbers > 0",
            "reader.kind = mrj (command line): must be one of sentinel2, mri; did you mean mri?",
            "steps = 3 (command line): unknown setting; did you mean train.steps?",
        ]
    )


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("train.warmup_steps=60", "train (command line): warmup_steps 60 exceeds steps 50; lower it"),
        ("train=3", "train = 3 (command line): must be a section with settings of its own"),
        ("train.steps.x=3", 'train.steps = {"x": 3} (command line): must be a whole number >= 1 and <= 1000'),
        ("reader.spacing_mm=1", "reader.spacing_mm = 1 (command line): unknown setting here; it belongs to reader.kind=mri"),
        ("reader.bands=[]", "reader.bands = [] (command line): must be a list of texts, length >= 1"),
        ("reader.band=[B02]", 'reader.band = ["B02"] (command line): unknown setting; did you mean reader.bands?'),
        ("trian.steps=3", "trian.steps = 3 (command line): unknown setting; did you mean train.steps?"),
        ("train.steps=1.5", "train.steps = 1.5 (command line): must be a whole number >= 1 and <= 1000"),
        ("train.lr=.inf", "train.lr = Infinity (command line): must be a number > 0 (input should be a finite number)"),
        ("classes.0=[1]", 'classes = {"0": [1]} (command line): must be a section of whole number: text'),
        ("data=", "data = null (command line): must be a path"),
        ("name=${oc.env:HOME}", "name = ${oc.env:HOME} (command line): ${...} is not replaced in settings; write the value itself"),
        ("-x", "-x: not an argument; write section.key=value, --key VALUE or --config FILE"),
    ],
)
def test_an_error_says_what_is_allowed(verb: Verb, argument: str, line: str) -> None:
    argv = [argument] if argument.startswith("data=") else ["data=x", argument]
    assert verb.lines(*argv) == [line]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1\nb: [1\n", "{file}:3: not YAML: expected ',' or ']', but got '<stream end>' while parsing a flow sequence"),
        ("data: x\ndata: y\n", "{file}:2: not YAML: found duplicate key data while constructing a mapping"),
        ("- 1\n", "{file}: the top level must be a mapping of settings, such as `train:`; it is a list"),
        ("text\n", "{file}: the top level must be a mapping of settings, such as `train:`; it is a single value"),
        ("train:\n  lr: ${oc.env:HOME}\n", "{file}:2: train.lr: ${...} is not replaced in settings; write the value itself"),
        ("name: ${bad\n", "{file}: name: ${...} is not replaced in settings; write the value itself"),
        ("name: &x [*x]\n", "{file}:1: not YAML: YAML recursive aliases are not supported."),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_its_line_and_nothing_seems_missing(verb: Verb, text: str, line: str) -> None:
    file = verb.file(text)
    assert verb.lines("--config", file) == [line.replace("{file}", file)]


def test_missing_folders_and_binary_files_are_no_configs(verb: Verb, tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    lines = verb.lines("--config", "gone.yaml", "--config", str(tmp_path), "--config", str(tmp_path / "binary"))
    assert lines[0].startswith("gone.yaml: no such config file (looked for ")
    assert lines[1] == f"{tmp_path}: cannot be read as a config file: Is a directory"
    assert lines[2] == f"{tmp_path / 'binary'}: not a text file in UTF-8, so no config file"


def test_a_config_of_another_verb_is_told_from_a_typing_error(verb: Verb) -> None:
    text = "# Something.\n#   python pipelines/other.py --config a.yaml\nfolds: 3\n"
    file = verb.file(text)
    assert verb.lines("--config", file, "data=x")[-1] == f"{file} is written for `python pipelines/other.py`, this is small"
    own = verb.file(text.replace("other", "small"))
    assert len(verb.lines("--config", own, "data=x")) == 1


def test_an_empty_file_and_what_is_left_open_count_as_not_given(verb: Verb) -> None:
    assert verb.got("--config", verb.file("# nothing\n"), "data=x").train.steps == 50
    assert verb.lines("--config", verb.file("data: ???\n")) == ["data: missing; give --data PATH"]


def test_the_printed_config_tells_origins_and_gives_the_same_settings_again(verb: Verb) -> None:
    file = verb.file("train:\n  # slow\n  steps: 9\n")
    argv = ["--config", file, "name=1e3", "classes={0: 'null', 1: a b}", "reader.kind=mri", "--data=/a/b c"]
    assert verb(*argv, "--print-config") == 0
    assert verb.settings is None
    assert f"train:\n  steps: 9  # {file}:3\n  lr: 0.001  # default\n" in verb.out
    assert 'name: "1e3"  # command line\n' in verb.out
    assert "  kind: mri  # command line\n" in verb.out
    printed = verb.file(verb.out, "printed.yaml")
    assert "/a/b c" not in verb.out, "where patients' files lie"
    assert verb.got("--config", printed, "--data=/a/b c") == verb.got(*argv)
    assert verb("reader.kind=sentinel2", "--data=/a/b c", "--print-config") == 0
    assert 'data: "/a/b c"  # command line\n' in verb.out


@settings(deadline=None, max_examples=50)
@given(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(
        lambda text: "${" not in text and "://" not in text and text != "???"
    ),
    st.floats(1e-30, 1e30),
)
def test_settings_written_as_yaml_come_back(tmp_path_factory: pytest.TempPathFactory, text: str, lr: float) -> None:
    settings = Whole(data=Path("x"), name=text, train=Train(lr=lr), reader=Optical(bands=(text, "1")))
    file = tmp_path_factory.getbasetemp() / "written.yaml"
    file.write_bytes(settings_to_yaml(settings).encode())
    kept: list[Whole] = []
    assert run("small", Whole, kept.append, description="", argv=["--config", str(file)]) == 0
    assert kept == [settings]


def test_passwords_of_addresses_are_never_printed(verb: Verb) -> None:
    for address in ("http://me:p/ss@w0rd@host:5000/x", "postgresql://me:w0rd@host/db", "https://w0rd@host"):
        assert verb("data=x", f"tracking={address}", "--print-config") == 0
        assert "w0rd" not in verb.out
        assert "://***@host" in verb.out
        assert "w0rd" not in "".join(verb.lines("data=x", f"train.lr={address}", f"nonsense={address}", address))
        assert verb.got("data=x", f"tracking={address}").tracking == address
    assert redacted("http://host:5000/x and s3://bucket/key") == "http://host:5000/x and s3://bucket/key"


def test_help_lists_every_setting_with_type_default_and_meaning(verb: Verb) -> None:
    assert verb("--help", "nonsense=1", defaults={"train.steps": 77}) == 0
    words = " ".join(verb.out.split())
    for text in (
        "terravox small: Does it.",
        "usage: python pipelines/small.py --data PATH [--config FILE]...",
        "data path; required Folder of files.",
        "train.steps whole number >= 1 and <= 1000; default 77 Optimizer steps.",
        "train.precision bf16 | fp32; default bf16",
        "prepare.tile list of 2 whole numbers > 0; default [64, 64]",
        "reader.kind sentinel2 | mri; default sentinel2 Reads files.",
        "if reader.kind=sentinel2: reader.bands list of texts, length >= 1; default [B02, B03] Bands to read.",
        "if reader.kind=mri: reader.spacing_mm list of 3 numbers or null; default null Wanted size of a voxel, or the file's own.",
        "tracker section or null; default null if tracker is given: tracker.tile",
        "classes section of whole number: text; default {}",
    ):
        assert text in words


def test_a_docstring_describes_what_has_no_description() -> None:
    class Reader(Settings):
        """Reads.

        Attributes:
            low, high: Window,
                in HU.
            parts: What else.

        Not: this.
        """

        low: float = 0
        high: float = Field(1, description="Own words")
        parts: tuple[Prepare, ...] = ()
        silent: int = 0

    found = {setting.key: setting for setting in table(Reader, {})}
    assert [setting.description for setting in found.values()] == ["Window, in HU.", "Own words", "What else.", ""]
    assert found["parts"].words == "list of {tile, workers}"


def test_check_lists_problems_and_does_nothing(verb: Verb) -> None:
    assert verb("data=x", "--check", check=lambda settings: [f"{settings.data}: no such folder", "no space"]) == 2
    assert verb.err == "terravox small: 2 problems with the settings; nothing was done\n  x: no such folder\n  no space\n"
    assert verb("data=x", "--check", check=lambda _: []) == 0
    assert verb.out == "terravox small: the settings are valid, nothing was done\n"
    assert verb("data=x", "--check") == 0
    assert verb.settings is None
    assert verb.lines("--check") == ["data: missing; give --data PATH"]


WORDS = [
    "--config",
    "--data",
    "data",
    "train",
    "reader",
    "steps",
    "kind",
    "mri",
    "classes",
    "tile",
    "tracker",
    "=",
    ".",
    "--",
    "1",
    "null",
    "[",
    "{a: 1}",
    "${",
    "???",
    "*",
]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.sampled_from(WORDS) | st.text(max_size=3), max_size=5).map("".join), max_size=4))
def test_no_command_line_whatever_ends_in_a_traceback(argv: list[str]) -> None:
    kept: list[Whole] = []
    assert run("small", Whole, kept.append, description="", argv=["--name=x", *argv]) in (0, 2)


def failing(error: BaseException) -> Any:
    def main(_: Whole) -> None:
        raise error

    return main


def test_expected_errors_speak_and_others_keep_their_traceback(verb: Verb) -> None:
    assert verb("data=x", main=failing(TroubleError("the file is damaged"))) == 1
    assert verb.err == "terravox small: error: the file is damaged\n"
    assert verb("data=x", main=failing(KeyboardInterrupt())) == 130
    assert verb("data=x", main=failing(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/out/a"))) == 1
    assert verb.err == "terravox small: error: /out/a: no space left on the device\n"
    assert verb("data=x", main=failing(PermissionError(errno.EACCES, "no", "/out/a"))) == 1
    assert verb.err == "terravox small: error: /out/a: permission denied\n"
    assert verb("data=x", main=lambda _: 3) == 3
    with pytest.raises(ZeroDivisionError):
        verb("data=x", main=failing(ZeroDivisionError()))
    with pytest.raises(FileNotFoundError):
        verb("data=x", main=failing(FileNotFoundError(errno.ENOENT, "no", "a")))


def test_a_digest_ignores_what_it_is_told_to_and_nothing_else() -> None:
    one, two = Whole(data=Path("a")), Whole(data=Path("b"), train=Train(steps=51))
    assert digest(one) == digest(Whole.model_validate(to_plain(one)))
    assert digest(one) != digest(two)
    assert digest(one, ["data"]) != digest(two, ["data"])
    assert digest(one, ["data", "train"]) == digest(two, ["data", "train"])
    assert digest(one, ["data", "train.steps"]) == digest(two, ["train.steps", "data"])
    assert digest(one, ["data", "train.step"]) != digest(two, ["data", "train.step"])


def test_a_digest_is_sha256_of_the_sorted_dotted_keys() -> None:
    assert digest(Prepare()) == hashlib.sha256(b'[["tile",[64,64]],["workers",null]]').hexdigest()


def test_differences_are_told_by_dotted_key() -> None:
    old, new = to_plain(Whole(data=Path("a"))), to_plain(Whole(data=Path("b"), train=Train(steps=51), reader=Volume()))
    assert differences(old, new, ["data"]) == [
        'reader.bands: ["B02", "B03"] -> absent',
        'reader.kind: "sentinel2" -> "mri"',
        "reader.spacing_mm: absent -> null",
        "train.steps: 50 -> 51",
    ]
    assert differences(old, old) == []


def test_terravox_lists_its_verbs_and_knows_near_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert terravox.main(["--help"]) == 0
    assert all(f"  {name} " in capsys.readouterr().out for name, _ in terravox.VERBS[:1])
    assert terravox.main(["pretrain-mri-"]) == 2
    assert capsys.readouterr().err == "terravox: unknown verb pretrain-mri-; did you mean pretrain_mri?\n"
    assert terravox.main(["xyz"]) == 2
    assert "verbs are catalogue, prepare, store, " in capsys.readouterr().err
    assert terravox.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("terravox ")


def test_every_verb_of_terravox_has_a_main() -> None:
    assert [name for name, _ in terravox.VERBS if not callable(terravox.verb(name))] == []
    with pytest.raises(ValueError, match="xyz is no verb"):
        terravox.verb("xyz")


def test_the_grammar_imports_no_heavy_library() -> None:
    code = (
        "import sys, pipelines.command_line, pipelines.terravox; print(*({'torch', 'numpy', 'mlflow', 'dask', 'monai'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout == "\n"
