"""A folder of Sentinel-2 images becomes a registered encoder, in one command."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from modalities.sentinel2 import Sentinel2Settings
from pipelines.command_line import run
from pipelines.from_archive import EXPECTED_ERRORS, ArchiveRecipe, check_archive, pretrain_archive
from pipelines.preparation import PrepareSettings

DESCRIPTION = "a folder of Sentinel-2 images becomes a pretrained, registered encoder; a second call resumes, and prepares nothing twice"
DEFAULTS = {"prepare.tile": [128, 128], "augment.quarter_turns": True}


class PretrainSentinelSettings(ArchiveRecipe):
    """Settings of `pretrain_sentinel`."""

    reader: Sentinel2Settings = Sentinel2Settings()
    prepare: PrepareSettings


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
