"""Whether a prompt calls for what a patch forgets."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ForgetError
from .patch import Patch
from .statistics import TextStatistics
from .weighted import WeightedPatch, stored_parts

SMALLEST_DIRECTION = 1e-9  # of the largest: directions below are rounding
OPEN = 0.6  # prompts that name the concept come to .85 and more, others to less than .4


def gate(patch: Patch, token_embeds: Tensor) -> float:
    """How strongly a prompt's embeddings [T, D] call for a patch's concept: about 1 where it is named, near 0 elsewhere.

    The strongest token along the directions in which the concept's words stand out from what is kept, one for each
    concept (Fisher's linear discriminant, by second moments), each beside the root mean square of the concept's own words.
    Of a stacked patch that of the part which is called for most. Raises ForgetError for a patch that knows nothing of its
    words, and for embeddings of another width.
    """
    if "patches" in patch.info:
        return max(gate(Patch({}, part.info), token_embeds) for part in stored_parts(patch.info))
    statistics = WeightedPatch(patch).statistics
    if statistics is None:
        raise ForgetError(
            f"The patch of `{patch.info['concept']}` does not know the words of its concept, so no prompt can be "
            "told to call for it: forget the concept again, or import the file with its name."
        )
    if token_embeds.shape[-1] != statistics.keys.shape[1]:
        raise ForgetError(
            f"The prompt was encoded to a width of {token_embeds.shape[-1]}, and the patch is for one of "
            f"{statistics.keys.shape[1]}: connect a prompt of the model that the patch was made for."
        )
    own, directions = discriminants(statistics, max(1, len(patch.info.get("concepts") or [])))
    return ((token_embeds.cpu().double() @ directions.T).square() / own).sum(1).sqrt().max().item()


def discriminants(statistics: TextStatistics, count: int) -> tuple[Tensor, Tensor]:
    """The directions w [count, D] with the largest g = w^T G w / w^T A w, where G is the concept's second moment and A that
    of what is kept, at w^T A w = 1; and g [count]. In as many dimensions as there are keys, since G has no more."""
    keys, kept, tail = statistics.keys, statistics.kept, statistics.tail
    small = kept @ kept.T + tail * torch.eye(len(kept), dtype=kept.dtype)
    solved = (keys - keys @ kept.T @ torch.linalg.solve(small, kept)) / tail  # keys A^-1 (Woodbury)
    values, vectors = torch.linalg.eigh(solved @ keys.T)
    values, vectors = values.flip(0)[:count], vectors.flip(1)[:, :count]
    there = values > SMALLEST_DIRECTION * values[0]
    return values[there], (vectors[:, there] / values[there].sqrt()).T @ solved
