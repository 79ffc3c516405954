"""What stacking has to know of the text encoder: second moments of a concept's columns and of what a patch keeps, small
enough for the patch's file."""

from __future__ import annotations

import base64
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import ForgetError
from .bounds import MOST_SIDE

KEYS, MOST_KEYS = 16, 64  # leading directions of a concept's columns, and of those of many: 98 % of what they are
SMALLEST, LARGEST = 1e-12, 1e12  # that a scale or the tail may be
MOST_ROWS = 2 * MOST_KEYS  # that are read
KEPT_DIRECTIONS = 16  # leading directions of what is kept; the others count as alike


@dataclass(frozen=True)
class TextStatistics:
    """E[x x^T] of the concept's columns as keys^T keys, keys [n, D], and that of what is kept, at its weight beside the
    concept's, as kept^T kept + tail I, kept [m, D]."""

    keys: Tensor
    kept: Tensor
    tail: float

    @classmethod
    def of(cls, concept: Tensor, kept: Tensor, count: int) -> TextStatistics:
        """From second moments [D, D] of so many concepts, and of what is kept."""
        keys, _ = leading(concept, min(KEYS * count, MOST_KEYS))
        kept, tail = leading(kept, KEPT_DIRECTIONS)
        return cls(keys, kept, max(tail, 2 * SMALLEST))

    def encoded(self) -> dict:
        """For JSON."""
        return {"keys": encode(self.keys), "kept": encode(self.kept), "tail": self.tail}

    @classmethod
    def decoded(cls, stored: object) -> TextStatistics:
        """The inverse of `encoded`; raises ForgetError for anything else."""
        try:
            if not isinstance(stored, dict):
                raise TypeError(stored)
            keys, kept, tail = decode(stored["keys"]), decode(stored["kept"]), float(stored["tail"])
        except (TypeError, KeyError, ValueError, ArithmeticError, AttributeError):
            raise ForgetError("What the patch knows of its concept's words cannot be read: the file is damaged.") from None
        if keys.shape[1] != kept.shape[1] or not SMALLEST < tail < LARGEST:
            raise ForgetError("What the patch knows of its concept's words contradicts itself: the file is damaged.")
        return cls(keys, kept, tail)


def leading(moment: Tensor, count: int) -> tuple[Tensor, float]:
    """The leading eigenvectors of a symmetric [D, D], as rows [count, D] as long as the roots of their eigenvalues, less
    the mean of the other eigenvalues; and that mean."""
    values, vectors = torch.linalg.eigh(moment.double())
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    tail = values[count:].mean().item() if count < len(values) else 0.0
    return ((values[:count] - tail).clamp(min=0).sqrt() * vectors[:, :count]).T, tail


def encode(rows: Tensor) -> dict:
    """Rows [n, D] as base64 of fp16, little-endian, and what they were divided by to fit it."""
    scale = rows.abs().max().clamp(min=2 * SMALLEST).item()
    data = (rows / scale).cpu().numpy().astype("<f2").tobytes()
    return {"shape": list(rows.shape), "scale": scale, "fp16": base64.b64encode(data).decode()}


def decode(stored: dict) -> Tensor:
    """The inverse of `encode`, in double; raises ValueError, TypeError or KeyError for anything else."""
    rows, columns = stored["shape"]
    if not (1 <= rows <= MOST_ROWS and 1 <= columns <= MOST_SIDE) or len(stored["fp16"]) > 3 * rows * columns + 4:
        raise ValueError(stored["shape"])
    if not SMALLEST < float(stored["scale"]) < LARGEST:
        raise ValueError(stored["scale"])
    values = np.frombuffer(base64.b64decode(stored["fp16"], validate=True), "<f2").astype(np.float64) * float(
        stored["scale"]
    )
    if values.size != rows * columns or not np.isfinite(values).all():
        raise ValueError(stored["shape"])
    return torch.from_numpy(values).reshape(rows, columns)
