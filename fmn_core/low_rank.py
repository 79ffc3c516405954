"""Factors of little rank: the best ones of a full change of weights, and given ones brought to one rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from .lora import balanced

Factors = tuple[Tensor, Tensor]  # up [out, r], down [r, in]


def spectrum(delta: Tensor) -> Tensor:
    """Squared singular values of a matrix, falling."""
    return torch.linalg.eigvalsh(gram(delta)).flip(0).clamp(min=0)


def truncated(delta: Tensor, rank: int) -> Factors:
    """up [out, r], down [r, in] in double, r <= rank: the nearest matrix of that rank in the Frobenius norm (Eckart and
    Young, 1936), by the eigenvectors of the smaller Gram matrix, which is several times quicker than the SVD."""
    vectors = torch.linalg.eigh(gram(delta))[1].flip(1)[:, :rank]
    return (vectors, vectors.T @ delta) if len(delta) <= delta.shape[1] else (delta @ vectors, vectors.T)


def gram(delta: Tensor) -> Tensor:
    """delta delta^T or delta^T delta, whichever is smaller."""
    return delta @ delta.T if len(delta) <= delta.shape[1] else delta.T @ delta


def least_rank(spectra: Iterable[Tensor], energy: float) -> int:
    """The least rank at which truncating every matrix to it keeps this share of the sum of all squared singular values."""
    kept = torch.nn.utils.rnn.pad_sequence([*spectra]).sum(1).cumsum(0)
    return min(int((kept < energy * kept[-1]).sum()) + 1, len(kept))


def of_one_rank(factors: dict, most: Callable[[object], int]) -> dict:
    """The same products with one rank throughout, zero-padded; `most` is the rank that a matrix can have at all."""
    fitting = {}
    for name, (up, down) in factors.items():
        if len(down) > most(name):
            up, down = (part.double() for part in balanced(up, down))
            up, down = up[:, : most(name)], down[: most(name)]
        fitting[name] = up, down
    rank = max(len(down) for _, down in fitting.values())
    return {
        name: (F.pad(up, (0, rank - len(down))), F.pad(down, (0, 0, 0, rank - len(down))))
        for name, (up, down) in fitting.items()
    }
