"""The change of a layer in LyCORIS' decompositions (Yeh et al., 2023), multiplied out."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOHA, LOKR = ({f"{kind}_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")} for kind in ("hada", "lokr"))
LOKR |= {"lokr_w1", "lokr_w2"}
Parts = dict[str, Tensor]  # by their names in LOHA or LOKR


def loha(parts: Parts, shape: tuple[int, ...]) -> tuple[Tensor, int]:
    """Hadamard product of two matrices, of a layer's shape, and their rank. Raises KeyError where a part is missing, and
    ValueError where the parts do not fit."""
    one, other = (product(parts, f"hada_w{number}", shape) for number in (1, 2))
    require(one.numel() == other.numel() == math.prod(shape))
    return one.reshape(shape) * other.reshape(shape), len(parts["hada_w1_b"])


def lokr(parts: Parts, shape: tuple[int, ...]) -> tuple[Tensor, int]:
    """Kronecker product of two matrices, of a layer's shape, and the rank of what they are made of, 0 where both are whole.
    Raises as `loha` does."""
    one, other = (product(parts, f"lokr_w{number}", shape) for number in (1, 2))
    require(one.ndim == 2 and len(one) * len(other) == shape[0] and one.numel() * other.numel() == math.prod(shape))
    ranks = [len(parts[f"lokr_w{number}_b"]) for number in (2, 1) if f"lokr_w{number}" not in parts]
    return torch.kron(one.reshape(*one.shape, *[1] * (other.ndim - 2)), other).reshape(shape), (*ranks, 0)[0]


def product(parts: Parts, name: str, shape: tuple[int, ...]) -> Tensor:
    """One matrix: whole, or a [out, r] times b [r, in], or, by CP decomposition, these, a transposed, around a core
    [r, r, *window]."""
    if name in parts:
        return parts[name]
    a, b, core = parts[f"{name}_a"], parts[f"{name}_b"], parts.get(name.replace("_w", "_t"))
    require(a.ndim == b.ndim == 2)
    if core is None:
        require(a.shape[1] == len(b) and len(a) * b.shape[1] <= math.prod(shape))
        return a @ b
    # No rank is above the sides of what it makes; without this bound a small file could ask for any memory.
    require(core.shape == (len(a), len(b), *shape[2:]) and len(a) <= shape[0] and len(b) <= shape[0])
    require(a.shape[1] * b.shape[1] <= shape[0] * shape[1])
    return torch.einsum("i j ..., i p, j r -> p r ...", core, a, b).contiguous()  # as torch.kron wants it


def require(fits: bool) -> None:
    if not fits:
        raise ValueError("the parts do not fit each other or the layer")
