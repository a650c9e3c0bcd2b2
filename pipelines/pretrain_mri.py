"""A folder of MRI volumes becomes a registered encoder, in one command."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from modalities.medical import MriSettings
from pipelines.command_line import run
from pipelines.crosswalk_option import CrosswalkPath
from pipelines.from_archive import EXPECTED_ERRORS, ArchiveRecipe, check_archive, pretrain_archive
from pipelines.preparation import PrepareSettings

DESCRIPTION = "a folder of MRI volumes becomes a pretrained, registered encoder; a second call resumes, and prepares nothing twice"
DEFAULTS = {"prepare.tile": [64, 64, 64]}


class PretrainMriSettings(ArchiveRecipe):
    """Settings of `pretrain_mri`."""

    reader: MriSettings = MriSettings()
    prepare: PrepareSettings
    crosswalk: CrosswalkPath = None


def work(settings: PretrainMriSettings) -> int:
    """Do it."""
    return pretrain_archive(settings, settings.reader, settings.prepare, "pretrain_mri")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb; its exit code."""
    return run(
        "pretrain_mri",
        PretrainMriSettings,
        work,
        check=check_archive,
        description=DESCRIPTION,
        defaults=DEFAULTS,
        expected=EXPECTED_ERRORS,
        argv=argv,
    )


if __name__ == "__main__":
    sys.exit(main())
