"""The weights of an encoder go to one with another set of bands, and what became of every tensor of both is told.

A band that both have is copied exactly. Channel embeddings are summed, so a new band that borrows the weights of another one takes
them divided by the number of bands of the new encoder that carry these weights: bands that see the same share the work.

With `copy`, an encoder of one channel becomes one of N: each of the N, the old one included, has its weights divided by N, so N copies of
a scan give the output that the scan gave. Where only k of the N are there, the sum is k/N of it; fine-tune with sequences dropped at
random (`augment.channel_drop_fraction`) to have a model that is used to it. Channels that are groups of their own share no sum, and
each has the weights whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from mae_core.bands import Band
from mae_core.encoders import AnyEncoder
from mae_core.native import MeasurementEmbedding
from mae_core.positions import interpolated
from mae_core.sparse_conv import SparseConvEncoder
from mae_core.weights import Kind, Move, Transfer, WeightsError

NewBands = Literal["nearest", "mean", "zero", "random", "copy"]
SHAPE = ("kind", "preset", "patch", "step", "mlp_ratio")
"""Settings that both encoders must share."""
MAY_CHANGE = ("class_token", "register_token", "places.*", "context.*")
"""Tensors beside those of bands that may be new or left out; each is told of."""


@dataclass
class _Account:
    """The state of the target as it is filled."""

    state: dict[str, Tensor]
    moves: list[Move] = field(default_factory=list)

    def say(self, kind: Kind, source: tuple[str, ...], target: str, note: str = "") -> None:
        self.moves.append(Move(kind, source, target, note))


def transfer_bands(
    source: AnyEncoder, target: AnyEncoder, same: Mapping[str, str], bands: tuple[Sequence[Band], Sequence[Band]], new: NewBands
) -> Transfer:
    """What became of every tensor; `target` is filled with the weights of `source`.

    Args:
        source: Trained.
        target: With new weights, which stay where nothing else is said.
        same: Band of the target to band of the source, for those that are one; their weights are copied exactly.
        bands: Of source and target, for their wavelengths.
        new: What other bands begin with: the weights of the nearest wavelength, the mean over all bands, zeros, or those that they have. A
            band without a wavelength, or where none has as many voxels, keeps its random weights. copy: all bands begin with those of the
            one band of `source`, divided among them.

    Raises:
        WeightsError: The encoders have another shape, a tensor cannot be accounted for, or there are several bands to copy from.
    """
    _check(source, target)
    if new == "copy" and len(source.channels) > 1:
        raise WeightsError(
            f"the encoder to begin with has {len(source.channels)} channels, {', '.join(source.channels)}, and copy is for one of a single "
            "channel; take nearest, mean, zero or random, or make it one of a single channel first (convert, to=bands)"
        )
    there, here = source.state_dict(), target.state_dict()
    account = _Account({name: value.clone() for name, value in here.items()})
    rows = band_rows(source), band_rows(target)
    if new == "copy":
        _copy_band(account, there, rows, target)
    else:
        _move_bands(account, there, rows, same, bands, new)
    groups = _move_groups(account, there, source, target, same)
    embeds = {name for found in rows for name, _ in found.values()}
    for name in here:
        if name not in embeds and name not in groups:
            _move_rest(account, there, name, source, target)
    moved = {name for move in account.moves for name in move.source}
    left = [name for name in _entries(there, rows[0], source) if name not in moved]
    for name in left:
        account.say(
            "dropped",
            (name,),
            "",
            f"the new encoder has no such {'group' if 'group_token' in name else 'band' if name.endswith(']') else 'tensor'}",
        )
    transfer = Transfer(tuple(account.moves), _entries(there, rows[0], source), _entries(here, rows[1], target))
    transfer.complete((*MAY_CHANGE, *(f"{name}[[]*" for name in embeds)))
    target.load_state_dict(account.state)
    return transfer


def band_rows(encoder: AnyEncoder) -> dict[str, tuple[str, int]]:
    """Tensor and row that hold the weights of each channel."""
    if isinstance(encoder, SparseConvEncoder):
        return {name: ("embed.embed.weight", row) for row, name in enumerate(encoder.channels)}
    embed = encoder.embed
    if isinstance(embed, MeasurementEmbedding):
        sizes = dict(zip(embed.channels, embed.footprints, strict=True))
        return {name: (f"embed.weights.f{size}", embed.members(size).index(name)) for name, size in sizes.items()}
    return {name: ("embed.weight", row) for row, name in enumerate(encoder.channels)}


def _check(source: AnyEncoder, target: AnyEncoder) -> None:
    wrong = []
    for key in SHAPE:
        one, two = getattr(source.settings, key), getattr(target.settings, key)
        if one != two:
            named = "stride" if key == "step" else key
            shown = list(one) if isinstance(one, tuple) else one
            wrong.append(f"\n  model.encoder.{named} is {two} here and {one} there; set model.encoder.{named}={shown}")
    if wrong:
        raise WeightsError(f"the encoder to begin with has another shape:{''.join(dict.fromkeys(wrong))}")


def _entries(state: Mapping[str, Tensor], rows: Mapping[str, tuple[str, int]], encoder: AnyEncoder) -> tuple[str, ...]:
    """Names of all tensors, those with a row per band or group once for each row."""
    names: list[str] = []
    for name in state:
        own = [_entry(name, channel) for channel, (tensor, _) in rows.items() if tensor == name]
        if name == "places.group_token":
            own = [_entry(name, _group(encoder, number)) for number in range(len(encoder.groups))]
        names += own or [name]
    return tuple(names)


def _entry(tensor: str, what: str) -> str:
    return f"{tensor}[{what}]"


def _group(encoder: AnyEncoder, number: int) -> str:
    return "+".join(encoder.channels[channel] for channel in encoder.groups[number])


def _move_bands(
    account: _Account,
    there: Mapping[str, Tensor],
    rows: tuple[Mapping[str, tuple[str, int]], Mapping[str, tuple[str, int]]],
    same: Mapping[str, str],
    bands: tuple[Sequence[Band], Sequence[Band]],
    new: NewBands,
) -> None:
    kernels = {name: there[tensor][row] for name, (tensor, row) in rows[0].items()}
    entries = {name: _entry(tensor, name) for name, (tensor, _) in rows[0].items()}
    places = {name: (account.state[tensor][row], _entry(tensor, name)) for name, (tensor, row) in rows[1].items()}
    copied = {name: same[name] for name, (own, _) in places.items() if name in same and kernels[same[name]].shape == own.shape}
    fits = {name: [other for other, kernel in kernels.items() if kernel.shape == places[name][0].shape] for name in places}
    lent = {name: _nearest(name, fits[name], bands) for name in places if name not in copied} if new == "nearest" else {}
    users = Counter([*copied.values(), *(other for other in lent.values() if other)])
    for name, (own, entry) in places.items():
        other = copied.get(name) or lent.get(name)
        if name in copied:
            own.copy_(kernels[copied[name]])
            account.say("copied", (entries[copied[name]],), entry)
        elif other:
            own.copy_(kernels[other] / users[other])
            account.say("borrowed", (entries[other],), entry, f"nearest wavelength, divided by {users[other]}")
        elif new == "mean" and fits[name]:
            own.copy_(torch.stack([kernels[each] for each in fits[name]]).mean(dim=0))
            account.say("borrowed", tuple(entries[each] for each in fits[name]), entry, f"mean of {len(fits[name])} bands")
        elif new == "zero":
            own.zero_()
            account.say("new", (), entry, "zeros")
        else:
            account.say("new", (), entry, "random" if new == "random" else f"random: no band to take its {new} from")


def _copy_band(
    account: _Account,
    there: Mapping[str, Tensor],
    rows: tuple[Mapping[str, tuple[str, int]], Mapping[str, tuple[str, int]]],
    target: AnyEncoder,
) -> None:
    """The one band's weights for every band, divided among those of a channel group, whose embeddings are summed."""
    [(name, (tensor, row))] = rows[0].items()
    sharing = {target.channels[channel]: len(group) for group in target.groups for channel in group}
    for band, (own_tensor, own_row) in rows[1].items():
        entry = _entry(own_tensor, band)
        if account.state[own_tensor][own_row].shape != there[tensor][row].shape:
            account.say("new", (), entry, "random: it has another number of voxels")
            continue
        account.state[own_tensor][own_row].copy_(there[tensor][row] / sharing[band])
        account.say("borrowed", (_entry(tensor, name),), entry, f"copy, divided by {sharing[band]}")


def _nearest(name: str, others: Sequence[str], bands: tuple[Sequence[Band], Sequence[Band]]) -> str | None:
    """The band of the source, among some, whose wavelength is nearest; None where wavelengths are not known."""
    own = next((band.wavelength_nm for band in bands[1] if band.name == name), None)
    known = {band.name: band.wavelength_nm for band in bands[0] if band.wavelength_nm is not None and band.name in others}
    return None if own is None or not known else min(known, key=lambda other: abs(known[other] - own))


def _move_groups(
    account: _Account, there: Mapping[str, Tensor], source: AnyEncoder, target: AnyEncoder, same: Mapping[str, str]
) -> tuple[str, ...]:
    """The code of each channel group comes from the group that it shares most bands with."""
    name = "places.group_token"
    if name not in account.state:
        return ()
    members = [{source.channels[channel] for channel in group} for group in source.groups]
    for number, group in enumerate(target.groups):
        own = {same.get(target.channels[channel], "") for channel in group}
        shared = [len(own & other) for other in members]
        best = shared.index(max(shared))
        entry = _entry(name, _group(target, number))
        if name in there and shared[best]:
            account.state[name][number] = there[name][best]
            account.say("copied", (_entry(name, _group(source, best)),), entry)
        else:
            account.say("new", (), entry, "random: no group with one of its bands")
    return (name,)


def _move_rest(account: _Account, there: Mapping[str, Tensor], name: str, source: AnyEncoder, target: AnyEncoder) -> None:
    value = there.get(name)
    if value is not None and value.shape == account.state[name].shape:
        account.state[name].copy_(value)
        account.say("copied", (name,), name)
    elif value is not None and name == "places.positions.table_token":
        grids = source.settings.positions.grid, target.settings.positions.grid
        account.state[name].copy_(interpolated(value, *grids))
        account.say("interpolated", (name,), name, f"grid {grids[0]} to {grids[1]}")
    elif value is not None:
        account.say("dropped", (name,), "", f"shape {tuple(value.shape)} is not {tuple(account.state[name].shape)}")
        account.say("new", (), name, "random")
    else:
        account.say("new", (), name, "random: the other encoder has none")
