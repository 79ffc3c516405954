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

from collections.abc import Sequence

import torch
from torch import Tensor

from . import __version__
from .conflicts import conflicts, responses, warnings
from .errors import ForgetError
from .members import Member, kept_words, modules_of, reads_text, side_by_side, spoken
from .moments import Moments
from .patch import ALPHA, DOWN, SCHEMA, UP, Patch, check_patch, require_finite, tensor_hash

OWN = 3.0  # more brings each patch's own response nearer, and moves what is kept further
CLEAR = 1e-10  # of the largest eigenvalue of the system, its rows at one size: what is below is the same row again


def stack(members: Sequence[Member]) -> Patch:
    """One patch for several, each at its strength, in any order; one at strength 0 is not there, one that is there twice
    counts once, and a stacked one counts as those that it was made of.

    K and V are solved jointly; the other projections, which read no text, are added. Raises ForgetError where there is
    nothing to stack, and for patches of several architectures.
    """
    members = in_order(members)
    moments, ranks = [member.moments for member in members], [member.patch.rank for member in members]
    tensors = {}
    for module in modules_of(members):
        up, down = side_by_side(members, module)
        if reads_text(module):
            up = up @ mixture(down, ranks, moments)
        tensors[module + UP], tensors[module + DOWN] = up.half().contiguous(), down.half().contiguous()
        tensors[module + ALPHA] = torch.tensor(float(sum(ranks)), dtype=torch.float16)
    require_finite(*tensors.values())
    report = {"conflicts": conflicts(members), "responses": responses(members, tensors)}
    report["warnings"] = warnings(members, report["conflicts"])
    return Patch(dict(sorted(tensors.items())), joint_info(members, moments) | {"report": report})


def unstack(patch: Patch) -> list[Member]:
    """The patches that a stacked one was made of, and their strengths: `stack` of them is that patch again, to half
    precision. Raises ForgetError for a patch that is no stack, or a damaged one."""
    try:
        stored = [(dict(m["info"]), int(m["rank"]), float(m["strength"])) for m in patch.info["members"]]
        has = [str(m["has"]) for m in patch.info["members"]]
    except (KeyError, TypeError, ValueError):
        raise ForgetError("This patch is not stacked of others: there is nothing to take apart.") from None
    ranks = [rank for _, rank, _ in stored]
    sound = all(
        rank > 0 and strength and len(each) == len(patch.modules)
        for (_, rank, strength), each in zip(stored, has, strict=True)
    )
    if not sound or sum(ranks) != patch.rank:
        raise ForgetError("What the stacked patch says of its parts contradicts its tensors: it is damaged; copy it anew.")
    parts = [Member(Patch({}, info), strength) for info, _, strength in stored]
    moments = [part.moments for part in parts]
    for at, module in enumerate(patch.modules):
        up, down = patch[module + UP].double(), patch[module + DOWN].double()
        if reads_text(module):
            up = up @ torch.linalg.pinv(mixture(down, ranks, moments))
        for part, own_up, own_down, each in zip(parts, up.split(ranks, 1), down.split(ranks), has, strict=True):
            if each[at] == "1":
                part.patch[module + UP] = (own_up / part.strength).half().contiguous()
                part.patch[module + DOWN] = own_down.half().contiguous()
                part.patch[module + ALPHA] = torch.tensor(float(len(own_down)), dtype=torch.float16)
    for part in parts:
        check_patch(part.patch, "A part of the stacked patch")
    return parts


def in_order(members: Sequence[Member]) -> list[Member]:
    """The patches that take part, stacked ones taken apart, in an order of their own. Raises ForgetError as `stack`."""
    apart = [
        Member(part, strength * own)
        for patch, strength in members
        for part, own in (unstack(patch) if "members" in patch.info else [Member(patch)])
    ]
    strongest: dict[str, Member] = {}  # of the same patch twice
    for member in apart:
        digest = tensor_hash(member.patch)
        strongest[digest] = max(member, strongest.get(digest, member), key=lambda one: abs(one.strength))
    taking_part = [member for member in strongest.values() if member.strength]
    if not taking_part:
        raise ForgetError("There is no patch to stack: choose one, and a strength other than 0.")
    first, *others = taking_part
    for member in others:
        own, its = shapes(first.patch), shapes(member.patch)
        if any(own.get(key, value) != value for key, value in its.items()):
            bases = " and ".join(each.patch.info["base"]["name"] for each in (first, member))
            raise ForgetError(
                f"The patches of `{first.name}` and `{member.name}` were made for models of different shapes ({bases}): "
                "stack patches that were made for one."
            )
    return sorted(taking_part, key=lambda member: (member.name, tensor_hash(member.patch)))


def shapes(patch: Patch) -> dict[str, object]:
    """Projection -> (out, in), and the family of the model."""
    own = {module: (len(patch[module + UP]), patch[module + DOWN].shape[1]) for module in patch.modules}
    return own | {"family": patch.info["base"]["family"]}


def mixture(down: Tensor, ranks: Sequence[int], moments: Sequence[Moments | None]) -> Tensor:
    """W [R, R], by which the ups side by side have to be multiplied so that with the downs Z [R, D] they solve for all:
    rows Z_i (G_i + A) Z^T, times (Z (sum_j G_j + A) Z^T)^-1. A patch that knows nothing of its words has no G."""
    known = [own for own in moments if own is not None]
    if not known:
        return torch.eye(len(down), dtype=down.dtype)
    size = down.norm(dim=1)
    size = torch.where(size > 0, size, 1.0)
    Z = down / size[:, None]
    kept = sum(squares(Z @ own.kept.T) + own.tail * squares(Z) for own in known) / len(known)
    own = [torch.zeros_like(kept) if each is None else OWN * squares(Z @ each.keys.T) for each in moments]
    parts = torch.arange(len(Z)).split(list(ranks))
    wanted = torch.cat([(G + kept)[rows] for G, rows in zip(own, parts, strict=True)])
    return wanted @ torch.linalg.pinv(sum(own) + kept, hermitian=True, rtol=CLEAR) * size[:, None] / size


def squares(x: Tensor) -> Tensor:
    """x x^T."""
    return x @ x.T


def joint_info(members: Sequence[Member], moments: Sequence[Moments | None]) -> dict:
    """What the file of a stacked patch remembers: of the whole what any patch does, and every part's own."""
    first, known = members[0].patch.info, [own for own in moments if own is not None]
    names = [concept for member in members for concept in member.patch.info.get("concepts") or []]
    keep = dict.fromkeys(word for member in members for word in kept_words(member.patch))
    info = {
        "schema": SCHEMA,
        "version": __version__,
        "concept": ", ".join(dict.fromkeys(member.name for member in members)),
        "concepts": [concept for at, concept in enumerate(names) if concept not in names[:at]],
        "settings": {"preset": "stack", "seed": 0, "keep": "\n".join(w for w in keep if w.lower() not in spoken(members))},
        "base": first["base"],
        "members": [
            {
                "info": member.patch.info,
                "rank": member.patch.rank,
                "strength": member.strength,
                "has": "".join(str(int(module + UP in member.patch)) for module in modules_of(members)),
            }
            for member in members
        ],
    }
    if known:
        rest = sum(own.rest() for own in known) / len(known)
        info["moments"] = Moments.of(sum(own.concept() for own in known), rest, len(known)).encoded()
    return info
