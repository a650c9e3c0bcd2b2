"""Attention among tokens: the one call that every block makes."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F


def attend(
    query: Float[Tensor, "batch query width"],
    key: Float[Tensor, "batch key width"],
    value: Float[Tensor, "batch key width"],
    heads: int,
    used: Bool[Tensor, "batch key"] | None,
) -> Float[Tensor, "batch query width"]:
    """Multi-head attention through torch's fused kernel; keys that are not `used` are seen by no query.

    In a sample without any used key the result is not a number: see `attended`.
    """
    query, key, value = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in (query, key, value))
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=None if used is None else used[:, None, None, :])
    return mixed.transpose(1, 2).flatten(2)


def attended(used: Bool[Tensor, "batch token"], num_prefix: int) -> Bool[Tensor, "batch prefix_and_token"]:
    """The tokens that may be looked at, behind a prefix that always may; all where there is none, since nothing gives no mean."""
    if num_prefix:
        return F.pad(used, (num_prefix, 0), value=True)
    return used | ~used.any(dim=1, keepdim=True)


def check_heads(width: int, heads: int) -> None:
    """Refuse a width that heads do not divide.

    Raises:
        ValueError: They do not.
    """
    if width % heads:
        raise ValueError(f"width {width} cannot be divided among {heads} heads")
