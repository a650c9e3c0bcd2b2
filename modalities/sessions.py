"""Volumes of one session become scenes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from modalities.grid import Grid
from modalities.pseudonyms import Pseudonyms
from modalities.volume import VolumeScene
from modalities.volume_checks import Volume


def make_scene(volumes: Sequence[Volume], names: Pseudonyms) -> VolumeScene:
    """The scene of volumes on one lattice."""
    first = volumes[0]
    header, respacing = first.found.source.header, first.respacing
    return VolumeScene(
        name=names.of("scan", *(volume.found.place for volume in volumes)),
        group=names.of("subject", first.found.patient),
        sources=tuple(volume.found.source for volume in volumes),
        grid=Grid.from_matrix(respacing.target, header.canonical.matrix @ respacing.matrix, "RAS+", "mm"),
        channels=tuple(volume.channel for volume in volumes),
        voxel_digests=tuple(volume.voxel_digest for volume in volumes),
        dtype=np.result_type(*(volume.dtype for volume in volumes)),
        respacing=respacing,
        flags=tuple(dict.fromkeys(flag for volume in volumes for flag in volume.flags)),
        num_not_finite=sum(volume.num_not_finite for volume in volumes),
        foreground_fraction=first.foreground_fraction,
    )
