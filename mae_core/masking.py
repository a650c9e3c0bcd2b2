"""Which tokens are hidden: a pure function of (seed, epoch, tile, repeat), never of worker, rank or batch order.

Random numbers come from a counter: a 64-bit hash of the numbers that name the sample (finaliser of SplitMix64, Steele
et al. 2014). The same integers give the same bits on every device, so nothing has to be stored to resume.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Int
from pydantic import Field
from torch import Tensor

from mae_core.settings import Settings

STREAM_ORDER, STREAM_CROP, STREAM_FLIP, STREAM_HIDE = range(1, 5)
"""First counter of each use, so that no two uses share their numbers."""

_GOLDEN = -7046029254386353131
_MULTIPLY = (-4658895280553007687, -7723592293110705685)


class RandomHiding(Settings):
    """Hides a random set of tokens, all sets equally likely (He et al. 2021, section 3; the paper's best)."""

    kind: Literal["random"] = "random"
    mask_ratio: float = Field(0.75, gt=0, lt=1, description="Share of the valid tokens that the encoder does not see")


@dataclass(frozen=True)
class HidingPlan:
    """Which tokens are shown and which are hidden, in shapes that do not depend on the data.

    A sample with fewer valid tokens than the rest uses fewer of its slots; a slot that is not used holds some token
    number and is to be ignored.

    Attributes:
        visible: Token numbers that the encoder sees, `(batch, num_visible_slots)`.
        visible_used: Which of these slots are real.
        hidden: Token numbers to be predicted, `(batch, num_hidden_slots)`.
        hidden_used: Which of these slots are real.
        full: Every slot of every sample is used, so that attention needs no exclusion.
    """

    visible: Int[Tensor, "batch visible"]
    visible_used: Bool[Tensor, "batch visible"]
    hidden: Int[Tensor, "batch hidden"]
    hidden_used: Bool[Tensor, "batch hidden"]
    full: bool


def counter_bits(seed: int, *words: Tensor | int) -> Tensor:
    """63 random bits (int64, not negative) for each combination of the broadcast `words`."""
    state = torch.as_tensor(seed, dtype=torch.int64)
    for word in words:
        step = word if isinstance(word, Tensor) else int(word)
        state = _finalise((state.to(step.device) if isinstance(step, Tensor) else state) * _GOLDEN + step + 1)
    return state & 0x7FFFFFFFFFFFFFFF


def counter_below(limit: Tensor, seed: int, *words: Tensor | int) -> Tensor:
    """Random whole numbers from 0 to `limit - 1` (int64; the bias of the remainder is below 2⁻⁴⁰ for our limits)."""
    return counter_bits(seed, *words) % limit


def num_kept(num_tokens: int, mask_ratio: float) -> int:
    """Tokens that stay visible: `num_tokens * (1 - mask_ratio)` rounded half up, at least 1, leaving at least 1 hidden."""
    kept = math.floor(num_tokens * (1 - mask_ratio) + 0.5 + 1e-9)
    return max(min(kept, num_tokens - 1), min(1, num_tokens))


def hide(valid: Bool[Tensor, "batch length"], settings: RandomHiding, seed: int, epoch: Tensor, tile: Tensor, repeat: Tensor) -> HidingPlan:
    """A plan for each sample of a batch; `epoch`, `tile` and `repeat` are `(batch,)` and name the sample."""
    length = valid.shape[1]
    token = torch.arange(length, device=valid.device)
    names = (part.to(valid.device)[:, None] for part in (epoch, tile, repeat))
    keys = counter_bits(seed, STREAM_HIDE, *names, token)
    return _plan(keys, valid, settings.mask_ratio)


def plan_from_hidden(hidden: Bool[Tensor, "batch length"], valid: Bool[Tensor, "batch length"] | None = None) -> HidingPlan:
    """The plan of a hidden set that is handed in, with as many slots as the sample that needs most."""
    valid = torch.ones_like(hidden) if valid is None else valid
    shown = (~hidden & valid).sum(dim=1)
    missing = (hidden & valid).sum(dim=1)
    order = torch.argsort((hidden.long() + 2 * (~valid).long()), dim=1, stable=True)
    return _slots(order, shown, missing, int(shown.max()), int(missing.max()))


def _plan(keys: Int[Tensor, "batch length"], valid: Bool[Tensor, "batch length"], mask_ratio: float) -> HidingPlan:
    length = valid.shape[1]
    last = torch.iinfo(torch.int64).max
    order = torch.argsort(torch.where(valid, keys, last), dim=1, stable=True)
    table = torch.tensor([num_kept(count, mask_ratio) for count in range(length + 1)], device=valid.device)
    num_valid = valid.sum(dim=1)
    shown = table[num_valid]
    kept = num_kept(length, mask_ratio)
    return _slots(order, shown, num_valid - shown, kept, length - kept)


def _slots(order: Tensor, shown: Tensor, missing: Tensor, num_visible: int, num_hidden: int) -> HidingPlan:
    length = order.shape[1]
    slot = torch.arange(length, device=order.device)
    behind = (shown[:, None] + slot[None, :num_hidden]).clamp(max=length - 1)
    visible_used = slot[None, :num_visible] < shown[:, None]
    hidden_used = slot[None, :num_hidden] < missing[:, None]
    return HidingPlan(
        visible=order[:, :num_visible],
        visible_used=visible_used,
        hidden=torch.gather(order, 1, behind),
        hidden_used=hidden_used,
        full=bool(visible_used.all()) and bool(hidden_used.all()),
    )


def _finalise(state: Tensor) -> Tensor:
    state = (state ^ _shift(state, 30)) * _MULTIPLY[0]
    state = (state ^ _shift(state, 27)) * _MULTIPLY[1]
    return state ^ _shift(state, 31)


def _shift(state: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; torch shifts int64 arithmetically."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)
