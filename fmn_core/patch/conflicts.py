"""Which patches reach into one another when they are simply added, how much, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from .patch import DOWN, UP
from .report import PatchReport
from .statistics import TextStatistics
from .weighted import WeightedPatch, concat_factors, forgotten_names, kept_words, modules_of, reads_text

LARGE_INTERFERENCE = 0.3  # of what a concept's own patch does to its words, done by another's, is worth a warning
MUCH_CHANGE = 1.0  # as much change of what is kept as of the concepts is worth a warning
SHOWN_PAIRS = 10  # pairs in a report


def conflicts(patches: Sequence[WeightedPatch]) -> list[dict]:
    """Pairs {concept, other, interference}: how much the patch of `other` changes the words of `concept`, beside what the
    concept's own does, which is 1; the root mean square over its words, K and V. The largest come first."""
    statistics = [weighted.statistics for weighted in patches]
    acts = [actions(weighted, statistics) for weighted in patches]
    pairs = [
        {"concept": weighted.name, "other": other.name, "interference": acts[j][i] / acts[i][i]}
        for i, weighted in enumerate(patches)
        for j, other in enumerate(patches)
        if i != j and acts[i][i] > 0
    ]
    return sorted(pairs, key=lambda pair: -pair["interference"])


def actions(weighted: WeightedPatch, statistics: Sequence[TextStatistics | None]) -> list[float]:
    """The size of what a patch adds to K and V of each concept's words, 0 for one that nobody knows."""
    squares: list[list[float]] = [[] for _ in statistics]
    for module in filter(reads_text, weighted.patch.modules):
        factors = concat_factors([weighted], module)
        for own, sizes in zip(statistics, squares, strict=True):
            sizes.append(added(*factors, own).square().sum().item() if own else 0.0)
    return [sum(sizes) ** 0.5 for sizes in squares]


def added(up: Tensor, down: Tensor, statistics: TextStatistics) -> Tensor:
    """What factors add to the leading directions of a concept's words: [out, n]."""
    return up.double() @ (down.double() @ statistics.keys.T)


def response_errors(patches: Sequence[WeightedPatch], stacked: Mapping[str, Tensor]) -> list[dict]:
    """By how much the response to each concept's words differs from what its own patch alone does, |dW x - dW_i x| /
    |dW_i x|, where the patches are simply `added`, and `jointly`, by the stacked one."""
    keys = ("alone", "added", "jointly")
    known = [(weighted, own, dict.fromkeys(keys, 0.0)) for weighted in patches if (own := weighted.statistics)]
    for module in filter(reads_text, modules_of(patches)):
        factors, joint = concat_factors(patches, module), (stacked[module + UP].double(), stacked[module + DOWN].double())
        for weighted, own, sizes in known:
            together = added(*factors, own)
            alone = added(*concat_factors([weighted], module), own) if module + UP in weighted.patch else 0 * together
            jointly = added(*joint, own)
            for key, change in zip(keys, (alone, together - alone, jointly - alone), strict=True):
                sizes[key] += change.square().sum().item()
    return [
        {"concept": weighted.name} | {key: (sizes[key] / sizes["alone"]) ** 0.5 for key in ("added", "jointly")}
        for weighted, _, sizes in known
        if sizes["alone"]
    ]


def collateral_change(patches: Sequence[WeightedPatch], stacked: Mapping[str, Tensor]) -> float:
    """How much a stacked patch changes what is to be kept, beside what its parts alone change of their own concepts' words:
    |dW x| / |x| over the one and the other, root mean squares; 0 where no part knows its words."""
    known = [(weighted, weighted.statistics) for weighted in patches if weighted.statistics]
    if not known:
        return 0.0
    own = sum(actions(weighted, [words])[0] ** 2 / words.keys.square().sum().item() for weighted, words in known) / len(
        known
    )
    total = size = 0.0
    for _, words in known:
        size += words.kept.square().sum().item() + words.tail * words.kept.shape[1]
        for module in (key.removesuffix(UP) for key in stacked if key.endswith(UP)):
            if reads_text(module):
                up, down = stacked[module + UP].double(), stacked[module + DOWN].double()
                total += (up @ (down @ words.kept.T)).square().sum().item()
                total += words.tail * (up.T @ up * (down @ down.T)).sum().item()
    return (total / size / own) ** 0.5 if own else 0.0


def conflict_warnings(patches: Sequence[WeightedPatch]) -> list[str]:
    """A sentence, with what to do, for each pair that contradicts one another, forgets the same, or is of two models."""
    found, forgotten = [], [forgotten_names([weighted]) for weighted in patches]
    for at, weighted in enumerate(patches):
        kept: dict[str, list[str]] = {}
        for word in kept_words(weighted.patch):
            kept.setdefault(word.lower(), []).append(word)
        order = {word: place for place, word in enumerate(kept)}
        for other, its in zip(patches, forgotten, strict=True):
            for word in sorted(order.keys() & its, key=order.__getitem__) if other is not weighted else ():
                found += [
                    f"`{spelled}` is kept by the patch of `{weighted.name}` and forgotten by that of `{other.name}`: it is "
                    "forgotten. Leave the latter out to keep it."
                    for spelled in kept[word]
                ]
        for other, its in zip(patches[:at], forgotten, strict=False):
            same = sorted(forgotten[at] & its)
            if same:
                found.append(f"Two patches forget `{same[0]}`, which is more than enough: leave one out.")
            if weighted.patch.info["base"].get("hash") != other.patch.info["base"].get("hash"):
                found.append(
                    f"The patches of `{other.name}` and `{weighted.name}` were made on different models of one "
                    "architecture: each is at its best on its own."
                )
    return list(dict.fromkeys(found))


def conflict_lines(report: PatchReport) -> list[str]:
    """The report of a stacked patch in a few lines: what the patches do to one another, and what the solution leaves."""
    much = [pair for pair in report.interference if pair["interference"] > LARGE_INTERFERENCE]
    lines = [
        f"The patch of `{pair['other']}` changes `{pair['concept']}` by {pair['interference']:.0%} of what its own does."
        for pair in much[:SHOWN_PAIRS]
    ]
    if len(much) > SHOWN_PAIRS:
        lines.append(f"So do {len(much) - SHOWN_PAIRS} more pairs.")
    if (report.collateral_change or 0) > MUCH_CHANGE:
        lines.insert(
            0,
            f"Together the patches change what they should keep {report.collateral_change:.1f} times as much as each its "
            "own concept: stack fewer, or patches of `fast` or `balanced`, which keep the rest.",
        )
    if report.response_errors:
        added, jointly = (max(report.response_errors, key=lambda one: one[key]) for key in ("added", "jointly"))
        lines.append(
            f"Simply added, the patches change what each does alone by up to {added['added']:.0%} (`{added['concept']}`), "
            f"jointly by up to {jointly['jointly']:.0%} (`{jointly['concept']}`)."
        )
    return lines
