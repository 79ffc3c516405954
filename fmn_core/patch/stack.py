"""Several patches as one in which each does what it does alone.

Patches that are simply added reach into one another where their concepts are alike. Here the change dW of a weight is the
one, among those whose rows are in the patches' own, that minimises

    OWN sum_i E_i |dW x - dW_i x|^2 + E_kept |dW x - sum_j dW_j x|^2

over the columns x of each patch's own concept and of what is kept: dW = sum_i dW_i (G_i + A) Z^T (Z (sum_j G_j + A)
Z^T)^-1 Z, with Z the patches' downs, G_i = OWN E_i[x x^T] and A = E_kept[x x^T]. For patches in closed form that is the
joint ridge solution on their rows (UCE, Gandikota et al., arXiv 2308.14761, eq. 7), for trained ones a merge by dual
keys; a patch alone comes out as it went in. The system is as large as the ranks together.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from .. import __version__
from ..errors import ForgetError
from .bounds import MOST_PARTS, MOST_RANK
from .conflicts import collateral_change, conflict_warnings, conflicts, response_errors
from .patch import ALPHA, DOWN, UP, Patch, check_patch, check_strength, shapes_of
from .report import PatchReport
from .schema import SCHEMA
from .statistics import TextStatistics
from .weighted import (
    WeightedPatch,
    concat_factors,
    forgotten_names,
    kept_words,
    modules_of,
    moved_concepts,
    reads_text,
    stored_parts,
)

OWN = 3.0  # more brings each patch's own response nearer, and moves what is kept further
SMALLEST_EIGENVALUE = 1e-10  # of the largest of the system, its rows at one size: what is below is the same row again
MOST_CONDITION = 3e3  # beyond it half precision no longer tells the parts of a stack apart
MOST_WORK = 1 << 38  # cube of the rank, times layers: all of SD1's at the highest rank; a hundred concepts in SDXL have 9e9
ALIKE = "Two of the stacked patches are nearly the same, so that they cannot be told apart"


def stack(patches: Sequence[WeightedPatch]) -> Patch:
    """One patch for several, each at its strength, in any order; one at strength 0 is not there, one that is there twice
    counts once, at the larger strength, and a stacked one counts as those that it was made of.

    K and V are solved jointly; the other projections, which read no text, are added, and so is what is outside the
    cross-attention. Raises ForgetError where there is nothing to stack, for patches of several architectures, and where
    together they are too large for one file.
    """
    patches = in_order(patches)
    statistics, ranks = [weighted.statistics for weighted in patches], [weighted.patch.rank for weighted in patches]
    if sum(ranks) > MOST_RANK:
        raise ForgetError(f"Together the patches have a rank of {sum(ranks)}, and a file can have {MOST_RANK}: stack fewer.")
    if len(patches) > MOST_PARTS:
        raise ForgetError(f"These are {len(patches)} patches, and a file can have {MOST_PARTS}: stack fewer.")
    modules = modules_of(patches)
    require_solvable(sum(ranks), modules)
    tensors, condition = {}, 1.0
    for module in modules:
        up, down = concat_factors(patches, module)
        if reads_text(module):
            mixed = joint_solution(down, ranks, statistics)
            up, condition = up @ mixed, max(condition, condition_number(mixed))
        tensors[module + UP], tensors[module + DOWN] = up.half().contiguous(), down.half().contiguous()
        tensors[module + ALPHA] = torch.tensor(float(sum(ranks)), dtype=torch.float16)
    unet_lora = added_unet_loras(patches)
    if not all(tensor.isfinite().all() for tensor in (*tensors.values(), *unet_lora.values())):
        raise ForgetError("At these strengths the stacked patch does not fit half precision: lower them.")
    report = PatchReport(
        interference=conflicts(patches),
        response_errors=response_errors(patches, tensors),
        collateral_change=collateral_change(patches, tensors),
        warnings=[*conflict_warnings(patches), *([f"{ALIKE}: leave one out."] if condition > MOST_CONDITION else [])],
    )
    return Patch(dict(sorted(tensors.items())), joint_info(patches) | {"report": report.plain()}, unet_lora)


def unstack(patch: Patch) -> list[WeightedPatch]:
    """The patches that a stacked one was made of, and their strengths: `stack` of them is that patch again, to half
    precision. Raises ForgetError for a patch that is no stack, a damaged one, and one of nearly the same patches."""
    stored = stored_parts(patch.info)
    ranks = [part.rank for part in stored]
    if sum(ranks) != patch.rank or any(len(part.modules) != len(patch.modules) for part in stored):
        raise ForgetError("What the stacked patch says of its parts contradicts its tensors: it is damaged; copy it again.")
    parts = [WeightedPatch(Patch({}, part.info), part.strength) for part in stored]
    require_solvable(patch.rank, patch.modules)
    statistics = [part.statistics for part in parts]
    for part, own in zip(parts, statistics, strict=True):
        require_width(part, own, patch)
    for at, module in enumerate(patch.modules):
        up, down = patch[module + UP].double(), patch[module + DOWN].double()
        if reads_text(module):
            mixed = joint_solution(down, ranks, statistics)
            if condition_number(mixed) > MOST_CONDITION:
                raise ForgetError(f"{ALIKE} any more: stack the files that it was made of.")
            up = up @ torch.linalg.pinv(mixed)
        for part, own_up, own_down, said in zip(parts, up.split(ranks, 1), down.split(ranks), stored, strict=True):
            if said.modules[at] == "1":
                part.patch[module + UP] = (own_up / part.strength).half().contiguous()
                part.patch[module + DOWN] = own_down.half().contiguous()
                part.patch[module + ALPHA] = torch.tensor(float(len(own_down)), dtype=torch.float16)
    for part in parts:
        check_patch(part.patch, "A part of the stacked patch")
    return parts


def in_order(patches: Sequence[WeightedPatch]) -> list[WeightedPatch]:
    """The patches that take part, stacked ones taken apart, in an order of their own. Raises ForgetError as `stack`."""
    for weighted in patches:
        check_strength(weighted.strength)
    apart = [
        WeightedPatch(part, strength * own)
        for patch, strength in patches
        for part, own in (unstack(patch) if "patches" in patch.info else [WeightedPatch(patch)])
    ]
    known = [
        (weighted.name, patch_identity(weighted.patch), abs(weighted.strength), weighted.strength, weighted)
        for weighted in apart
    ]
    found: dict[str, WeightedPatch] = {}
    for _, copy_of, _, _, weighted in sorted(known, key=lambda one: one[:-1]):
        if weighted.strength:
            found[copy_of] = weighted  # of the same patch twice the last, which is the strongest
    if not found:
        raise ForgetError("There is no patch to stack: choose one, and a strength other than 0.")
    first, *others = found.values()
    for weighted in others:
        own, its = shapes(first.patch), shapes(weighted.patch)
        if any(own.get(key, value) != value for key, value in its.items()):
            bases = " and ".join("{name} ({family})".format(**each.patch.info["base"]) for each in (first, weighted))
            raise ForgetError(
                f"The patches of `{first.name}` and `{weighted.name}` were made for different models, {bases}: "
                "stack patches that were made for one."
            )
    for weighted in found.values():
        require_width(weighted, weighted.statistics, weighted.patch)
    return list(found.values())


def patch_identity(patch: Patch) -> str:
    """The same for copies of a patch, one from a stack and an evaluated one included: all that it says of how it was made
    and what came of it."""
    report = {key: value for key, value in patch.info["report"].items() if key != "evaluation"}
    return json.dumps(patch.info | {"report": report}, sort_keys=True)


def require_solvable(rank: int, modules: Sequence[str]) -> None:
    """Raises ForgetError where to solve for the patches in all these projections would take hours."""
    if rank**3 * sum(map(reads_text, modules)) > MOST_WORK:
        raise ForgetError(f"With a rank of {rank} in {len(modules)} layers there is too much to solve: stack fewer patches.")


def require_width(weighted: WeightedPatch, statistics: TextStatistics | None, patch: Patch) -> None:
    """Raises ForgetError unless the words that a weighted remembers are as wide as what a patch's K and V read."""
    widths = {patch[module + DOWN].shape[1] for module in patch.modules if reads_text(module)}
    if statistics and widths - {statistics.keys.shape[1]}:
        raise ForgetError(f"The patch of `{weighted.name}` remembers words of another width: it is damaged; copy it again.")


def added_unet_loras(patches: Sequence[WeightedPatch]) -> dict[str, Tensor]:
    """The LoRAs outside the cross-attention side by side, at the patches' strengths."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for patch, strength in patches:
        for key in patch.unet_lora:
            if key.endswith(ALPHA):
                module = key.removesuffix(ALPHA)
                up, down = patch.unet_lora[module + UP].float(), patch.unet_lora[module + DOWN].float()
                scale = strength * patch.unet_lora[key].item() / len(down)
                found.setdefault(module, []).append((up * scale, down))
    unet_lora = {}
    for module, pairs in sorted(found.items()):
        up, down = torch.cat([up for up, _ in pairs], 1), torch.cat([down for _, down in pairs])
        unet_lora[module + UP], unet_lora[module + DOWN] = up.half().contiguous(), down.half().contiguous()
        unet_lora[module + ALPHA] = torch.tensor(float(len(down)), dtype=torch.float16)
    return unet_lora


def shapes(patch: Patch) -> dict[str, object]:
    """Projection -> (out, in), and the family of the model."""
    return shapes_of(patch) | {"family": patch.info["base"]["family"]}


def joint_solution(down: Tensor, ranks: Sequence[int], statistics: Sequence[TextStatistics | None]) -> Tensor:
    """W [R, R], by which the ups side by side have to be multiplied so that with the downs Z [R, D] they solve for all:
    rows Z_i (G_i + A) Z^T, times (Z (sum_j G_j + A) Z^T)^-1. A patch that knows nothing of its words has no G."""
    known = [own for own in statistics if own is not None]
    if not known:
        return torch.eye(len(down), dtype=down.dtype)
    size = down.norm(dim=1)
    size = torch.where(size > 0, size, 1.0)
    Z = down / size[:, None]
    kept = reduce(torch.add, (squares(Z @ own.kept.T) + own.tail * squares(Z) for own in known)) / len(known)
    own = [torch.zeros_like(kept) if each is None else OWN * squares(Z @ each.keys.T) for each in statistics]
    parts = torch.arange(len(Z)).split(list(ranks))
    wanted = torch.cat([(G + kept)[rows] for G, rows in zip(own, parts, strict=True)])
    try:
        solved = torch.linalg.pinv(sum(own) + kept, hermitian=True, rtol=SMALLEST_EIGENVALUE)
    except torch.linalg.LinAlgError:
        raise ForgetError(
            "What the patches remember of their words cannot be solved for together: one of them is damaged; leave it out."
        ) from None
    return wanted @ solved * size[:, None] / size


def squares(x: Tensor) -> Tensor:
    """x x^T."""
    return x @ x.T


def condition_number(mixed: Tensor) -> float:
    """The ratio of the largest singular value to the smallest that is not rounding: what half precision loses, taken
    apart."""
    values = torch.linalg.svdvals(mixed)
    there = values[values > SMALLEST_EIGENVALUE * values[0]]
    return (there[0] / there[-1]).item() if len(there) else 1.0


def joint_info(patches: Sequence[WeightedPatch]) -> dict:
    """What the file of a stacked patch remembers: of the whole what any patch does, and every part's own."""
    every = {
        json.dumps(concept, sort_keys=True): concept for weighted in patches for concept in moved_concepts(weighted.patch)
    }
    kept = dict.fromkeys(word for weighted in patches for word in kept_words(weighted.patch))
    forgotten = forgotten_names(patches)
    return {
        "schema": SCHEMA,
        "version": __version__,
        "concept": ", ".join(dict.fromkeys(weighted.name for weighted in patches)),
        "concepts": copy.deepcopy([*every.values()]),
        "settings": {"preset": "stack", "seed": 0, "preserve": "\n".join(w for w in kept if w.lower() not in forgotten)},
        "base": dict(patches[0].patch.info["base"]),
        "patches": [
            {
                "info": copy.deepcopy(weighted.patch.info),
                "rank": weighted.patch.rank,
                "strength": weighted.strength,
                "modules": "".join(str(int(module + UP in weighted.patch)) for module in modules_of(patches)),
            }
            for weighted in patches
        ],
    }
