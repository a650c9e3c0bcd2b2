"""Attention is its formula, and is never over nothing."""

from __future__ import annotations

import torch

from mae_core.attention import attended
from tests.synthetic_batches import one_thread

__all__ = ["one_thread"]


def test_a_prefix_is_always_looked_at_and_without_one_all_are_where_none_is() -> None:
    used = torch.tensor([[True, False, True], [False, False, False]])
    assert attended(used, 2).tolist() == [[True, True, True, False, True], [True, True, False, False, False]]
    assert attended(used, 0).tolist() == [[True, False, True], [True, True, True]]
