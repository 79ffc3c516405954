"""Sums of tensors."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def total(tensors: Iterable[Tensor]) -> Tensor:
    """The sum of some tensors, of which there is at least one."""
    found = sum(tensors)
    assert isinstance(found, Tensor)
    return found
