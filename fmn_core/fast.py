"""The preset `fast`: a concept forgotten in closed form, from the text encoder and the weights of K and V alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .closed_form import Erasure, leading_directions, second_moment, solve
from .concept import Concept, find_tokens, split_names
from .errors import ForgetError
from .hosts.base import DiffusionHost
from .paraphrases import KEEP_TEMPLATES, NEAR_TEMPLATES, PROBES, TEMPLATES, Lexicon, Place, mean_place, pair
from .patch import Patch, make_patch
from .settings import ForgetSettings

NEUTRAL_WORDS = 16  # whose mean stands where a removed concept stood
NEIGHBOURS = 32
EXACT = 0.02  # of the largest singular value of the start and empty columns: directions above it do not move at all
KEPT, NEAR, KEEP, EMPTY, RIDGE = 100.0, 10.0, 100.0, 100.0, 1e-3  # weights beside the concept's, which is 1
ERASED = 0.85  # how much of the way from the concept to its target an edit is scaled to go
MOST_SCALE = 2.0
LITTLE, MUCH = 0.5, 0.3  # less of the way for the concept, or more of it for a neighbour, is worth a warning


@dataclass(frozen=True)
class Edit:
    """x -> x + up (down x) on the context, and its measures."""

    up: Tensor
    down: Tensor
    report: dict

    def __call__(self, x: Tensor) -> Tensor:
        """What is added to columns [..., D]."""
        return x @ self.down.T @ self.up.T


def forget_fast(host: DiffusionHost, concepts: tuple[Concept, ...], settings: ForgetSettings) -> tuple[Patch, list[float]]:
    """A patch in closed form: every K and V reads the edited context, W (x + M x) = W x + (W up) (down x).

    Beside it, how far the concepts are from forgotten before and after, in place of a loss.
    """
    edit = make_edit(host, concepts, settings)
    if settings.strict and edit.report["warnings"]:
        raise ForgetError(" ".join(edit.report["warnings"]))
    factors = {
        (layer, matrix): (host.weight(layer, matrix).detach().cpu().double() @ edit.up, edit.down)
        for layer in host.cross_attentions()
        for matrix in settings.projections
        if matrix in ("to_k", "to_v")
    }
    left = min(1 - min(edit.report["erased"].values()), 0.9999)  # the host's plot divides by the fall
    return make_patch(host, factors, concepts, asdict(settings), edit.report), [1.0, left]


def make_edit(host: DiffusionHost, concepts: tuple[Concept, ...], settings: ForgetSettings) -> Edit:
    """The edit of the context that forgets all concepts at once and leaves the rest; raises ForgetError where the
    settings contradict one another."""
    keep = [name for line in settings.keep.splitlines() for name in split_names(line)]
    type = "object" if settings.concept_type == "custom" else settings.concept_type
    subjects = find_subjects(concepts, settings, keep)
    lexicon, replacement = Lexicon(host), settings.replacement.strip()
    stay = {name.lower() for name in keep}
    if settings.mode == "correct":  # there the concept stays, and the word that it overshadows moves
        keep += [name for name in concepts[0].names if name not in keep]
    elif settings.mode == "replace":
        stay |= lexicon.same(lexicon.likeness([replacement], type))
    likeness = {name: lexicon.likeness(names, type) for name, names in subjects.items()}
    also = {name: sorted(lexicon.same(like) - stay - known(subjects)) for name, like in likeness.items()}
    names = {name: (*subjects[name], *also[name]) for name in subjects}
    forgotten = [name for several in names.values() for name in several]
    share = max(2, NEIGHBOURS // len(subjects))  # of many concepts, each gets a smaller one
    neighbours = dict.fromkeys(word for like in likeness.values() for word in lexicon.neighbours(like, share))
    neighbours = [word for word in neighbours if word not in {*forgotten, *stay}]
    neutral = lexicon.neutral(torch.stack(list(likeness.values())).max(0).values, type, NEUTRAL_WORDS)
    own = concepts[0].templates if settings.concept_type == "custom" else TEMPLATES[type]
    few = max(4, 2 * len(own) // len(subjects))

    def pairs(name: str, templates: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        sought = [host.tokenize(other) for other in names[name]]
        bare = {template: host.tokenize(template.replace("{}", "")) for template in templates}
        templates = [template for template in templates if not any(find_tokens(bare[template], name) for name in sought)]
        dominant = concepts[0].name if settings.mode == "correct" else ""
        found = list(concept_pairs(lexicon, names[name], templates, neutral, settings.mode, replacement, dominant))
        if not found:
            raise ForgetError(
                f"No prompt with `{name}`, or with what should stand in its place, keeps it whole: the tokenizer joins it "
                "to a neighbour, drops it or cuts it off."
            )
        return torch.cat([x for x, _ in found]), torch.cat([y for _, y in found])

    columns = {name: pairs(name, own[:few]) for name in subjects}
    erasure, *more = (Erasure.of(x, y) for x, y in columns.values())
    near = {word: lexicon.columns(NEAR_TEMPLATES[type], word) for word in neighbours}
    held = {word: lexicon.columns(KEEP_TEMPLATES[type], word) for word in keep}
    empty = host.contexts([""], len(host.tokenize("")))[0].cpu().double()
    kept = KEPT * second_moment(lexicon.kept(forgotten)) + EMPTY * second_moment(empty)
    for weight, several in ((NEAR, near), (KEEP, held)):
        if several:
            kept = kept + weight * second_moment(torch.cat(list(several.values())))
    kept = kept + RIDGE * kept.diagonal().mean() * torch.eye(len(kept), dtype=kept.dtype)
    fixed = leading_directions(torch.cat([empty[:1] * len(empty), empty]), EXACT)
    up, down = solve(sum(more, erasure), kept, fixed, min(settings.rank * len(subjects), len(kept) - fixed.shape[1]))
    edit = Edit(up, down, {"also": [word for several in also.values() for word in several]})
    done = sum(progress(edit, x, y) for x, y in columns.values()) / len(columns)
    edit = replace(edit, up=up * min(ERASED / done, MOST_SCALE)) if done > 0 else edit
    return measured(edit, {name: pairs(name, PROBES[type][:few]) for name in subjects}, near | held, empty)


def find_subjects(concepts: tuple[Concept, ...], settings: ForgetSettings, keep: list[str]) -> dict[str, tuple[str, ...]]:
    """What has to move, name -> all its names: the concepts or, in the mode `correct`, the word one overshadows.

    Raises ForgetError where it is also to be kept, or a mode lacks what it needs.
    """
    replacement = " ".join(settings.replacement.split())
    if settings.mode != "remove" and not replacement:
        what = "what takes the concept's place" if settings.mode == "replace" else "the word whose other meaning should show"
        raise ForgetError(f"The mode `{settings.mode}` needs a `replacement`: type {what}.")
    subjects = {concept.name: concept.names for concept in concepts}
    if settings.mode == "correct":
        if len(concepts) > 1:
            raise ForgetError("The mode `correct` takes one concept, the one that overshadows the replacement: name one.")
        subjects = {replacement: (replacement,)}
    for word in keep:
        if word.lower() in known(subjects):
            raise ForgetError(f"`{word}` is to be forgotten and to be kept: take it off one of the two lists.")
    return subjects


def known(subjects: dict[str, tuple[str, ...]]) -> set[str]:
    """All the names, in lower case, as CLIP reads them."""
    return {name.lower() for names in subjects.values() for name in names}


def progress(edit: Edit, x: Tensor, y: Tensor) -> float:
    """How far an edit brings columns x [N, D] on the way to their targets y: 0 not at all, 1 there."""
    way = y - x
    return ((edit(x) * way).sum() / way.square().sum().clamp(min=1e-12)).item()


def measured(edit: Edit, probes: dict[str, tuple[Tensor, Tensor]], near: dict[str, Tensor], empty: Tensor) -> Edit:
    """The edit with its report: how far it brings each concept, and how far it moves what is near, on one scale, on
    prompts that it was neither made nor scaled from."""
    scale = torch.stack([(y - x).square().sum(1).mean().sqrt() for x, y in probes.values()]).mean().clamp(min=1e-12)
    drift = {word: (edit(columns).square().sum(1).mean().sqrt() / scale).item() for word, columns in near.items()}
    report = edit.report | {
        "erased": {name: round(progress(edit, x, y), 4) for name, (x, y) in probes.items()},
        "drift": {word: round(value, 4) for word, value in sorted(drift.items(), key=lambda item: -item[1])},
        "empty prompt": round((edit(empty).square().sum(1).mean().sqrt() / scale).item(), 6),
    }
    return replace(edit, report=report | {"warnings": warnings(report)})


def warnings(report: dict) -> list[str]:
    """A sentence for each figure of a report that says the patch does nothing, or harms."""
    little = [
        f"Little effect: prompts of `{name}` go {way:.0%} of the way to what stands in its place. Take off `keep` what is "
        "nearly the same."
        for name, way in report["erased"].items()
        if way < LITTLE
    ]
    much = [
        f"`{word}` suffers: it moves by {way:.0%} of the way that the concept goes. Put it in `keep`, or give it more room: "
        "forget fewer concepts at once."
        for word, way in report["drift"].items()
        if way > MUCH
    ]
    return little + much


def concept_pairs(lexicon, names, templates, neutral, mode, replacement, dominant):
    """Yields columns [N, D] of prompts with one of the names, and their targets [N, D].

    remove: the mean of neutral words at the same places; replace: the replacement; correct: the name's own columns
    without what they share with the dominant concept, so that another of its meanings comes through.
    """
    neutrals = zip(*(lexicon.places(templates, word) for word in neutral), strict=True)
    middles = [mean_place([place for place in several if place]) if any(several) else None for several in neutrals]
    others = {"remove": None, "replace": replacement, "correct": dominant}[mode]
    for name in names:
        theirs = middles if others is None else lexicon.places(templates, others)
        for our, their, middle in zip(lexicon.places(templates, name), theirs, middles, strict=True):
            if our and their and middle:
                yield correction(our, their, middle) if mode == "correct" else pair(our, their)


def correction(word: Place, dominant: Place, middle: Place) -> tuple[Tensor, Tensor]:
    """A word's columns, and the same less their component along what sets the dominant meaning apart."""
    x, towards = pair(word, dominant)
    _, neutral = pair(word, middle)
    n = min(len(x), len(neutral))
    direction = F.normalize(towards[:n] - neutral[:n], dim=1)
    return x[:n], x[:n] - direction * ((x[:n] - neutral[:n]) * direction).sum(1, keepdim=True)
