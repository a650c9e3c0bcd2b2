"""A folder of satellite products, of one sensor or of several, becomes a registered encoder, in one command."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, model_validator

from modalities.catalogue import ImageSettings
from modalities.satellite import SatelliteSettings
from modalities.sentinel2 import Sentinel2Settings
from pipelines.command_line import run
from pipelines.from_archive import EXPECTED_ERRORS, ArchiveRecipe, check_archive, pretrain_archive
from pipelines.preparation import PrepareSettings
from pipelines.prepare import usual_tile

DESCRIPTION = "a folder of satellite products becomes a pretrained, registered encoder; a second call resumes, and prepares nothing twice"
DEFAULTS = {
    "reader.kind": "satellite",
    "augment.quarter_turns": True,
    # neighbouring products overlap by their edges: held out whole, they would be one group or keep each other from either side
    "prepare.split.unit": "ground",
    "prepare.split.buffer_m": 500,
}


class PretrainSentinelSettings(ArchiveRecipe):
    """Settings of `pretrain_sentinel`."""

    reader: Annotated[ImageSettings, Field(discriminator="kind")] = Field(
        description="Which adapter reads the files. satellite recognises each; with settings that only sentinel2 has, it is that one"
    )
    prepare: PrepareSettings

    @model_validator(mode="before")
    @classmethod
    def _reader_by_its_keys_and_tile_by_reader(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Settings such as `reader.channels` have meant Sentinel-2 before there was a reader of mixed products, and still do."""
        reader = dict(values.get("reader") or {})
        mixed, one = SatelliteSettings.model_fields.keys(), Sentinel2Settings.model_fields.keys()
        if reader.get("kind") == "satellite" and not reader.keys() <= mixed and reader.keys() <= one:
            reader["kind"] = "sentinel2"
        prepare = dict(values.get("prepare") or {})
        prepare["tile"] = prepare.get("tile") or usual_tile(reader.get("kind"), reader)
        return {**values, "reader": reader, "prepare": prepare}


def work(settings: PretrainSentinelSettings) -> int:
    """Do it."""
    return pretrain_archive(settings, settings.reader, settings.prepare, "pretrain_sentinel")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb; its exit code."""
    return run(
        "pretrain_sentinel",
        PretrainSentinelSettings,
        work,
        check=check_archive,
        description=DESCRIPTION,
        defaults=DEFAULTS,
        expected=EXPECTED_ERRORS,
        argv=argv,
    )


if __name__ == "__main__":
    sys.exit(main())
