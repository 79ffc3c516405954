"""Patches with their strengths, side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ForgetError
from ..text.concept import split_names
from .bounds import MOST_PARTS
from .patch import DOWN, UP, Patch
from .schema import check_info
from .statistics import TextStatistics


class WeightedPatch(NamedTuple):
    """A patch and its strength."""

    patch: Patch
    strength: float = 1.0

    @property
    def name(self) -> str:
        return self.patch.info["concept"]

    @property
    def statistics(self) -> TextStatistics | None:
        """What the patch knows of its words, or None where it does not say."""
        return TextStatistics.decoded(self.patch.info["statistics"]) if self.patch.info.get("statistics") else None


class Part(NamedTuple):
    """What a stacked patch remembers of one that it was made of; `modules`: a 1 or a 0 for each of its projections, whether
    that one changes it."""

    info: dict
    rank: int
    strength: float
    modules: str


def stored_parts(info: dict) -> list[Part]:
    """What a stacked patch remembers of its parts; raises ForgetError for a patch that is no stack, or a damaged one."""
    if "patches" not in info:
        raise ForgetError("This patch is not a stack of others: there is nothing to take apart.")
    try:
        parts = [Part(dict(p["info"]), int(p["rank"]), float(p["strength"]), str(p["modules"])) for p in info["patches"]]
        sound = len(parts) <= MOST_PARTS and all(
            part.rank > 0 and 0 < abs(part.strength) < math.inf and "patches" not in part.info for part in parts
        )
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError):
        parts, sound = [], False
    if not parts or not sound:
        raise ForgetError("What the stacked patch says of its parts cannot be read: it is damaged; copy it again.")
    for part in parts:
        check_info(part.info, "A part of the stacked patch")
    return parts


def modules_of(patches: Sequence[WeightedPatch]) -> list[str]:
    """The projections that any of the patches changes."""
    return sorted({module for weighted in patches for module in weighted.patch.modules})


def reads_text(module: str) -> bool:
    """Whether a projection reads the text's columns: K and V do."""
    return module.endswith(("_to_k", "_to_v"))


def concat_factors(patches: Sequence[WeightedPatch], module: str) -> tuple[Tensor, Tensor]:
    """up [out, R] at the patches' strengths and down [R, in] of a projection, zeros where a patch leaves it alone."""
    there = next(weighted.patch for weighted in patches if module + UP in weighted.patch)
    out, inner = len(there[module + UP]), there[module + DOWN].shape[1]
    ups, downs = [], []
    for patch, strength in patches:
        has = module + UP in patch
        ups.append(patch[module + UP].double() * strength if has else torch.zeros(out, patch.rank).double())
        downs.append(patch[module + DOWN].double() if has else torch.zeros(patch.rank, inner).double())
    return torch.cat(ups, 1), torch.cat(downs)


def corrects(patch: Patch) -> bool:
    """Whether a patch was made in the mode `correct`, where its concept stays and the word that this overshadows moves."""
    return patch.info["settings"].get("mode") == "correct"


def moved_concepts(patch: Patch) -> list[dict]:
    """What a patch moves, as its file describes concepts; nothing where it does not say."""
    concepts = patch.info.get("concepts") or []
    if not corrects(patch):
        return concepts
    word = " ".join(str(patch.info["settings"].get("target", "")).split())
    return [concept | {"names": [word]} for concept in concepts[:1] if word]


def kept_words(patch: Patch) -> list[str]:
    """What a patch was told to keep, and the names of a concept that it corrects a word by."""
    kept = [name for line in str(patch.info["settings"].get("preserve", "")).splitlines() for name in split_names(line)]
    if corrects(patch):
        kept += (name for concept in patch.info.get("concepts") or [] for name in concept["names"])
    return kept


def forgotten_names(patches: Sequence[WeightedPatch]) -> set[str]:
    """Every name of every concept that is forgotten, in lower case."""
    concepts = (concept for weighted in patches for concept in moved_concepts(weighted.patch))
    return {name.lower() for concept in concepts for name in concept["names"]}
