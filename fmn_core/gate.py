"""Whether a prompt calls for what a patch forgets."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import ForgetError
from .members import Member
from .patch import Patch

OPEN = 0.6  # prompts that name the concept come to .85 and more, others to less than .4


def gate(patch: Patch, columns: Tensor) -> float:
    """How strongly a prompt's columns [T, D] call for a patch's concept: about 1 where it is named, near 0 elsewhere.

    The strongest column along the directions in which the concept's words stand out from what is kept, one for each
    concept (Fisher's linear discriminant, by second moments), beside the root mean square of the concept's own words.
    Of a stacked patch that of the part which is called for most. Raises ForgetError for a patch that knows nothing of its
    words, and for columns of another width.
    """
    if "members" in patch.info:
        return max(gate(Patch({}, part["info"]), columns) for part in patch.info["members"])
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
    directions = discriminants(moments.concept(), moments.rest(), max(1, len(patch.info.get("concepts") or [])))
    own = (moments.keys @ directions.T).square().sum()
    return ((columns.cpu().double() @ directions.T).square().sum(1) / own).sqrt().max().item()


def discriminants(concept: Tensor, rest: Tensor, count: int) -> Tensor:
    """The directions w [count, D] with the largest w^T concept w / w^T rest w, with w^T rest w = 1."""
    root = torch.linalg.inv(torch.linalg.cholesky(rest))
    vectors = torch.linalg.eigh(root @ concept @ root.T)[1].flip(1)[:, :count]
    return vectors.T @ root
