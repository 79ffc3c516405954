"""Which patches reach into one another when they are simply added, how much, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from .patch import DOWN, UP
from .statistics import Moments
from .weighted import Member, kept_words, modules_of, reads_text, side_by_side, spoken

MUCH = 0.3  # of what a concept's own patch does to its words, done by another's, is worth a warning
SPILL = 1.0  # as much change of what is kept as of the concepts is worth a warning
SHOWN = 10  # pairs in a report


def conflicts(members: Sequence[Member]) -> list[dict]:
    """Pairs {concept, other, share}: how much the patch of `other` changes the words of `concept`, beside what the
    concept's own does, which is 1; the root mean square over its words, K and V. The largest come first."""
    moments = [member.moments for member in members]
    acts = [actions(member, moments) for member in members]
    pairs = [
        {"concept": member.name, "other": other.name, "share": acts[j][i] / acts[i][i]}
        for i, member in enumerate(members)
        for j, other in enumerate(members)
        if i != j and acts[i][i] > 0
    ]
    return sorted(pairs, key=lambda pair: -pair["share"])


def actions(member: Member, moments: Sequence[Moments | None]) -> list[float]:
    """The size of what a patch adds to K and V of each concept's words, 0 for one that nobody knows."""
    squares: list[list[float]] = [[] for _ in moments]
    for module in filter(reads_text, member.patch.modules):
        factors = side_by_side([member], module)
        for own, several in zip(moments, squares, strict=True):
            several.append(added(*factors, own).square().sum().item() if own else 0.0)
    return [sum(several) ** 0.5 for several in squares]


def added(up: Tensor, down: Tensor, moments: Moments) -> Tensor:
    """What factors add to the leading directions of a concept's words: [out, n]."""
    return up.double() @ (down.double() @ moments.keys.T)


def responses(members: Sequence[Member], stacked: Mapping[str, Tensor]) -> list[dict]:
    """By how much the response to each concept's words differs from what its own patch alone does, |dW x - dW_i x| /
    |dW_i x|, where the patches are simply `added`, and `jointly`, by the stacked one."""
    keys = ("alone", "added", "jointly")
    known = [(member, own, dict.fromkeys(keys, 0.0)) for member in members if (own := member.moments)]
    for module in filter(reads_text, modules_of(members)):
        factors, joint = side_by_side(members, module), (stacked[module + UP].double(), stacked[module + DOWN].double())
        for member, own, sizes in known:
            together = added(*factors, own)
            alone = added(*side_by_side([member], module), own) if module + UP in member.patch else 0 * together
            jointly = added(*joint, own)
            for key, change in zip(keys, (alone, together - alone, jointly - alone), strict=True):
                sizes[key] += change.square().sum().item()
    return [
        {"concept": member.name} | {key: (sizes[key] / sizes["alone"]) ** 0.5 for key in ("added", "jointly")}
        for member, _, sizes in known
        if sizes["alone"]
    ]


def spill(members: Sequence[Member], stacked: Mapping[str, Tensor]) -> float:
    """How much a stacked patch changes what is to be kept, beside what its parts alone change of their own concepts' words:
    |dW x| / |x| over the one and the other, root mean squares; 0 where no part knows its words."""
    known = [(member, member.moments) for member in members if member.moments]
    if not known:
        return 0.0
    own = sum(actions(member, [words])[0] ** 2 / words.keys.square().sum().item() for member, words in known) / len(known)
    total = size = 0.0
    for _, words in known:
        size += words.kept.square().sum().item() + words.tail * words.kept.shape[1]
        for module in (key.removesuffix(UP) for key in stacked if key.endswith(UP)):
            if reads_text(module):
                up, down = stacked[module + UP].double(), stacked[module + DOWN].double()
                total += (up @ (down @ words.kept.T)).square().sum().item()
                total += words.tail * (up.T @ up * (down @ down.T)).sum().item()
    return (total / size / own) ** 0.5 if own else 0.0


def warnings(members: Sequence[Member]) -> list[str]:
    """A sentence, with what to do, for each pair that contradicts one another, forgets the same, or is of two models."""
    found, forgotten = [], [spoken([member]) for member in members]
    for at, member in enumerate(members):
        kept: dict[str, list[str]] = {}
        for word in kept_words(member.patch):
            kept.setdefault(word.lower(), []).append(word)
        order = {word: place for place, word in enumerate(kept)}
        for other, its in zip(members, forgotten, strict=True):
            for word in sorted(order.keys() & its, key=order.__getitem__) if other is not member else ():
                found += [
                    f"`{spelled}` is kept by the patch of `{member.name}` and forgotten by that of `{other.name}`: it is "
                    "forgotten. Leave the latter out to keep it."
                    for spelled in kept[word]
                ]
        for other, its in zip(members[:at], forgotten, strict=False):
            same = sorted(forgotten[at] & its)
            if same:
                found.append(f"Two patches forget `{same[0]}`, which is more than enough: leave one out.")
            if member.patch.info["base"].get("hash") != other.patch.info["base"].get("hash"):
                found.append(
                    f"The patches of `{other.name}` and `{member.name}` were made on different models of one architecture: "
                    "each is at its best on its own."
                )
    return list(dict.fromkeys(found))


def conflict_lines(report: dict) -> list[str]:
    """The report of a stacked patch in a few lines: what the patches do to one another, and what the solution leaves."""
    much = [pair for pair in report["conflicts"] if pair["share"] > MUCH]
    lines = [
        f"The patch of `{pair['other']}` changes `{pair['concept']}` by {pair['share']:.0%} of what its own does."
        for pair in much[:SHOWN]
    ]
    if len(much) > SHOWN:
        lines.append(f"And so do {len(much) - SHOWN} more pairs.")
    if report.get("spill", 0) > SPILL:
        lines.insert(
            0,
            f"Together the patches change what they should keep {report['spill']:.1f} times as much as each its own "
            "concept: stack fewer, or patches of `fast` or `balanced`, which keep the rest.",
        )
    if report.get("responses"):
        added, jointly = (max(report["responses"], key=lambda one: one[key]) for key in ("added", "jointly"))
        lines.append(
            f"Simply added, the patches change what each does alone by up to {added['added']:.0%} (`{added['concept']}`), "
            f"jointly by up to {jointly['jointly']:.0%} (`{jointly['concept']}`)."
        )
    return lines
