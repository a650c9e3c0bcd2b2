"""Help is an outline: what lies inside a member of a closed union is one line, and all of it is told where that is asked for."""

from __future__ import annotations

from typing import Annotated, Literal

import pytest
from pydantic import Field

from mae_core.settings import Settings
from pipelines.command_line import run
from pipelines.pretrain_sentinel import main as pretrain_sentinel


class Dots(Settings):
    kind: Literal["dots"] = "dots"
    size: int = 3
    a_name_that_is_longer_than_any_column: int = 1


class Lines(Settings):
    kind: Literal["lines"] = "lines"
    width: float = Field(0.5, description="Of a line.")


class Ink(Settings):
    colour: str = "black"
    amount: int = 7


class Series(Settings):
    kind: Literal["series"] = "series"
    of: Annotated[Dots | Lines, Field(discriminator="kind")] = Field(default_factory=Dots, description="What it is of.")
    ink: Ink = Ink()
    length: int = 9


class Whole(Settings):
    reader: Annotated[Dots | Series, Field(discriminator="kind")] = Field(default_factory=Dots)
    ink: Ink = Ink()


def told(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, list[str]]:
    code = run("draw", Whole, lambda _: 0, description="Draws.", argv=words)
    out, err = capsys.readouterr()
    return code, [" ".join(line.split()) for line in (out + err).splitlines()]


def test_what_lies_inside_a_member_of_a_union_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = told(capsys, "--help")
    assert code == 0
    assert lines[lines.index("settings (name, type, default, meaning):") + 1 :] == [
        "reader.kind dots | series; default dots",
        "if reader.kind=dots:",
        "reader.size whole number; default 3",
        "reader.a_name_that_is_longer_than_any_column whole number; default 1",
        "if reader.kind=series:",
        "reader.of.kind dots | lines; default dots",
        "What it is of. (4 settings: --help reader.of)",
        "reader.ink section",
        "(2 settings: --help reader.ink)",
        "reader.length whole number; default 9",
        "ink.colour text; default black",
        "ink.amount whole number; default 7",
    ]


@pytest.mark.parametrize(
    ("prefix", "wanted"),
    [
        ("reader.ink", ["if reader.kind=series:", "reader.ink.colour text; default black", "reader.ink.amount whole number; default 7"]),
        ("reader.ink.", ["if reader.kind=series:", "reader.ink.colour text; default black", "reader.ink.amount whole number; default 7"]),
        ("ink.am", ["ink.amount whole number; default 7"]),
        (
            "reader.of",
            [
                "if reader.kind=series:",
                "reader.of.kind dots | lines; default dots",
                "What it is of.",
                "if reader.of.kind=dots:",
                "reader.of.size whole number; default 3",
                "reader.of.a_name_that_is_longer_than_any_column whole number; default 1",
                "if reader.of.kind=lines:",
                "reader.of.width number; default 0.5",
                "Of a line.",
            ],
        ),
    ],
)
def test_all_settings_that_begin_with_a_prefix(capsys: pytest.CaptureFixture[str], prefix: str, wanted: list[str]) -> None:
    assert told(capsys, "--help", prefix) == (0, [f"terravox draw: settings that begin with {prefix.rstrip('.')}", *wanted])


def test_a_prefix_of_nothing_is_told_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = told(capsys, "--help", "reader.inc")
    assert code == 2
    assert "--help reader.inc: no setting begins so; did you mean reader.ink?" in lines


def test_the_help_of_real_verbs_is_readable_and_leads_to_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain_sentinel(["--help"]) == 0
    plain = capsys.readouterr().out
    assert "--help reader.sentinel2)" in plain
    assert "reader.sentinel2.levels" not in plain
    assert pretrain_sentinel(["--help", "reader.sentinel2"]) == 0
    assert "reader.sentinel2.levels" in capsys.readouterr().out
    assert pretrain_sentinel(["--help", "reader"]) == 0
    assert len(plain.splitlines()) < len(capsys.readouterr().out.splitlines())
