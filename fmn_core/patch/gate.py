"""Whether a prompt calls for what a patch forgets."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ForgetError
from .patch import Patch
from .statistics import Moments
from .weighted import Member, stored_parts

CLEAR = 1e-9  # of the largest: directions below are rounding
OPEN = 0.6  # prompts that name the concept come to .85 and more, others to less than .4


def gate(patch: Patch, columns: Tensor) -> float:
    """How strongly a prompt's columns [T, D] call for a patch's concept: about 1 where it is named, near 0 elsewhere.

    The strongest column along the directions in which the concept's words stand out from what is kept, one for each
    concept (Fisher's linear discriminant, by second moments), each beside the root mean square of the concept's own words.
    Of a stacked patch that of the part which is called for most. Raises ForgetError for a patch that knows nothing of its
    words, and for columns of another width.
    """
    if "members" in patch.info:
        return max(gate(Patch({}, part.info), columns) for part in stored_parts(patch.info))
    moments = Member(patch).moments
    if moments is None:
        raise ForgetError(
            f"The patch of `{patch.info['concept']}` does not know the words of its concept, so no prompt can be "
            "told to call for it: forget the concept anew, or import the file with its name."
        )
    if columns.shape[-1] != moments.keys.shape[1]:
        raise ForgetError(
            f"The prompt was encoded to a width of {columns.shape[-1]}, and the patch is for one of "
            f"{moments.keys.shape[1]}: connect a prompt of the model that the patch was made for."
        )
    own, directions = discriminants(moments, max(1, len(patch.info.get("concepts") or [])))
    return ((columns.cpu().double() @ directions.T).square() / own).sum(1).sqrt().max().item()


def discriminants(moments: Moments, count: int) -> tuple[Tensor, Tensor]:
    """The directions w [count, D] with the largest g = w^T G w / w^T A w, where G is the concept's second moment and A that
    of what is kept, at w^T A w = 1; and g [count]. In as many dimensions as there are keys, since G has no more."""
    keys, kept, tail = moments.keys, moments.kept, moments.tail
    small = kept @ kept.T + tail * torch.eye(len(kept), dtype=kept.dtype)
    solved = (keys - keys @ kept.T @ torch.linalg.solve(small, kept)) / tail  # keys A^-1 (Woodbury)
    values, vectors = torch.linalg.eigh(solved @ keys.T)
    values, vectors = values.flip(0)[:count], vectors.flip(1)[:, :count]
    there = values > CLEAR * values[0]
    return values[there], (vectors[:, there] / values[there].sqrt()).T @ solved
