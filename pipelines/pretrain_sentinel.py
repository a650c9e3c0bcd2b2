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

DESCRIPTION = "a folder of satellite products becomes a pretrained, registered encoder; a second call resumes, and prepares nothing twice"
DEFAULTS = {"reader.kind": "satellite", "prepare.tile": [128, 128], "augment.quarter_turns": True}


class PretrainSentinelSettings(ArchiveRecipe):
    """Settings of `pretrain_sentinel`."""

    reader: Annotated[ImageSettings, Field(discriminator="kind")] = Field(
        description="Which adapter reads the files. satellite recognises each; with settings that only sentinel2 has, it is that one"
    )
    prepare: PrepareSettings

    @model_validator(mode="before")
    @classmethod
    def _one_sensor_by_its_keys(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Settings such as `reader.channels` have meant Sentinel-2 before there was a reader of mixed products, and still do."""
        reader = dict(values.get("reader") or {})
        mixed, one = SatelliteSettings.model_fields.keys(), Sentinel2Settings.model_fields.keys()
        if reader.get("kind") == "satellite" and not reader.keys() <= mixed and reader.keys() <= one:
            reader["kind"] = "sentinel2"
        return {**values, "reader": reader}


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
