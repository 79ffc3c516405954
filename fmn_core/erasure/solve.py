"""Closed-form forgetting: one linear edit of the context that every K and V reads, solved without the UNet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def second_moment(embeds: Tensor) -> Tensor:
    """E[x x^T] of embeddings [N, D]."""
    return embeds.T @ embeds / len(embeds)


def leading_directions(embeds: Tensor, tolerance: float) -> Tensor:
    """An orthonormal basis [D, n] of embeddings [N, D], but for directions whose singular value is below `tolerance` of
    the largest."""
    directions, values, _ = torch.linalg.svd(embeds.T, full_matrices=False)
    return directions[:, values > tolerance * values[0]]


@dataclass(frozen=True)
class EditObjective:
    """What an edit should do to a concept, as second moments [D, D]: E[x x^T] and E[(y - x) x^T] of its embeddings x and
    their targets y, summed over concepts."""

    gram: Tensor
    cross: Tensor

    @classmethod
    def of(cls, concepts: Sequence[tuple[Tensor, Tensor]]) -> EditObjective:
        """Of concepts' embeddings [N, D] and targets [N, D], each concept at the same weight."""
        x = torch.cat([embeds / len(embeds) ** 0.5 for embeds, _ in concepts])
        y = torch.cat([targets / len(targets) ** 0.5 for _, targets in concepts])
        return cls(x.T @ x, (y - x).T @ x)


def solve(objective: EditObjective, kept: Tensor, fixed: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The edit x -> x + M x as factors of M: up [D, r], down [r, D].

    Of all M of this rank it minimises E|x + M x - y|^2 over the concept, plus tr(M A M^T) for `kept` A [D, D], with M
    exactly 0 on the orthonormal `fixed` [D, n]. Without the rank that is M = E[(y - x) x^T] (E[x x^T] + A)^-1 within
    the complement of `fixed` (UCE, Gandikota et al., arXiv 2308.14761, eq. 7; the projection as in SPEED, Li et al.,
    arXiv 2503.07392; here for the context, which all weights read, not for each weight). The best of a rank is its
    projection on the leading directions of what it does (reduced-rank regression, Izenman 1975), so nothing has to be
    cut off afterwards.
    """
    free = torch.linalg.qr(fixed, mode="complete")[0][:, fixed.shape[1] :]  # a basis of the complement
    gram = free.T @ (objective.gram + kept) @ free
    M = torch.linalg.solve(gram, free.T @ objective.cross.T).T  # [D, D - n]
    directions = torch.linalg.eigh(M @ gram @ M.T)[1].flip(1)[:, :rank]
    return directions, directions.T @ M @ free.T
