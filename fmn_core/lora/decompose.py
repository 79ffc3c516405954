"""Factors of little rank: the best ones of a full change of weights, and given ones brought to one rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .layers import balanced

Factors = tuple[Tensor, Tensor]  # up [out, r], down [r, in]
LayerFactors = dict[tuple[str, str], Factors]  # by layer and matrix
Name = TypeVar("Name")
MOST_PADDING, ROOM = 8, 1 << 24  # times the numbers, and numbers beside: LoRAs of several ranks come to 2 or 4 times


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


class OneRank(Mapping[Name, Factors]):
    """Factors by name, zero-padded to one rank when they are asked for: together they may be many times as large."""

    def __init__(self, factors: Mapping[Name, Factors]):
        self.factors = factors
        self.rank = max(len(down) for _, down in factors.values())

    def __getitem__(self, name: Name) -> Factors:
        up, down = self.factors[name]
        return F.pad(up, (0, self.rank - len(down))), F.pad(down, (0, 0, 0, self.rank - len(down)))

    def __iter__(self) -> Iterator[Name]:
        return iter(self.factors)

    def __len__(self) -> int:
        return len(self.factors)


def of_one_rank(factors: Mapping[Name, Factors], most: Callable[[Name], int]) -> OneRank[Name]:
    """The same products with one rank throughout, zero-padded; `most` is the rank that a matrix can have at all. Raises
    ValueError where the zeros would be far more than the numbers."""
    fitting = {}
    for name, (up, down) in factors.items():
        if len(down) > most(name):
            up, down = (part.double() for part in balanced(up, down))
            up, down = up[:, : most(name)], down[: most(name)]
        fitting[name] = up, down
    padded = OneRank(fitting)
    own = sum(up.numel() + down.numel() for up, down in fitting.values())
    whole = padded.rank * sum(len(up) + down.shape[1] for up, down in fitting.values())
    if whole > MOST_PADDING * own + ROOM:
        raise ValueError(f"of its {len(padded)} layers few have a rank of {padded.rank}, and a patch has one rank for all")
    return padded
