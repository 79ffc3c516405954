"""The preset `fast`: a concept forgotten in closed form, from the text encoder and the weights of K and V alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .closed_form import Erasure, leading_directions, second_moment, solve
from .concept import Concept, find_tokens, split_names
from .errors import ForgetError
from .hosts.base import DiffusionHost
from .moments import Moments
from .paraphrases import KEEP_TEMPLATES, NEAR_TEMPLATES, PROBES, TEMPLATES, Lexicon, Place, fill, pair
from .patch import Patch, make_patch
from .settings import ForgetSettings

NEIGHBOURS = 16
TEMPLATES_IN_ALL = 160
EXACT = 0.02  # of the largest singular value of the start and empty columns: directions above it do not move at all
KEPT, NEAR, KEEP, EMPTY, RIDGE = 100.0, 10.0, 100.0, 100.0, 1e-3  # weights beside the concept's, which is 1
ERASED = 0.8  # how much of the way from the concept to its target an edit is scaled to go
MOST_SCALE = 2.0
LITTLE, MUCH = 0.5, 0.3  # less of the way for the concept, or more of it for a neighbour, is worth a warning


@dataclass(frozen=True)
class Task:
    """What an edit has to do: whose columns move, where to, and what near them stays."""

    type: str
    mode: str
    templates: tuple[str, ...]
    probes: tuple[str, ...]  # prompts that an edit is checked on, and not made from
    asked: tuple[str, ...]  # the few of them that are trained with
    names: dict[str, tuple[str, ...]]  # of each concept: what the user calls it, and words that mean the same
    also: list[str]  # the latter
    other: str  # what replaces the concept, or what overshadows it
    neutral: list[str]  # words that say nothing of any concept: what they have in common is what a removed one becomes
    neighbours: list[str]
    keep: list[str]

    @property
    def forgotten(self) -> list[str]:
        return [name for several in self.names.values() for name in several]

    def texts(self) -> Iterable[str]:
        """Every prompt that has to be read for it."""
        moved = [*self.forgotten, *([self.other] if self.other else [])]
        for templates, names in (
            ((*self.templates, *self.probes, *self.asked), moved),
            (NEAR_TEMPLATES[self.type], self.neighbours),
            (KEEP_TEMPLATES[self.type], self.keep),
        ):
            yield from (fill(template, name) for name in names for template in templates)


@dataclass(frozen=True)
class Edit:
    """x -> x + up (down x) on the context: up [D, r], down [r, D]; what it was made for, and its own measures."""

    up: Tensor
    down: Tensor
    task: Task
    report: dict
    moments: Moments

    def __call__(self, x: Tensor) -> Tensor:
        """What is added to columns [..., D]."""
        return x @ self.down.T @ self.up.T


def forget_fast(host: DiffusionHost, concepts: tuple[Concept, ...], settings: ForgetSettings) -> tuple[Patch, list[float]]:
    """A patch in closed form; beside it, how far the concepts are from forgotten before and after, in place of a loss."""
    edit = make_edit(host, concepts, settings)
    left = min(1 - min(edit.report["erased"].values()), 0.9999)  # the host's plot divides by the fall
    factors = edit_factors(host, edit, settings)
    return make_patch(host, factors, concepts, asdict(settings), edit.report, edit.moments), [1.0, left]


def edit_factors(host: DiffusionHost, edit: Edit, settings: ForgetSettings) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """(layer, matrix) -> (up [out, r], down [r, D]): every K and V reads the edited context, W (x + M x) = W x + (W up)
    (down x)."""
    return {
        (layer, matrix): (host.weight(layer, matrix).detach().cpu().double() @ edit.up, edit.down)
        for layer in host.cross_attentions()
        for matrix in settings.projections
        if matrix in ("to_k", "to_v")
    }


def make_edit(host: DiffusionHost, concepts: tuple[Concept, ...], settings: ForgetSettings) -> Edit:
    """The edit of the context that forgets all concepts at once and leaves the rest; raises ForgetError where the
    settings contradict one another."""
    lexicon = Lexicon(host)
    task = plan(lexicon, concepts, settings)
    words = Words.of(lexicon, task)
    columns, kept, empty = words.columns, words.kept, words.empty
    erasure = Erasure.of(list(columns.values()))
    fixed = leading_directions(torch.cat([empty[:1] * len(empty), empty]), EXACT)
    up, down = solve(erasure, kept, fixed, min(settings.rank * len(columns), len(kept) - fixed.shape[1]))
    edit = Edit(up, down, task, {"also": task.also}, words.moments)
    done = sum(progress(edit, x, y) for x, y in columns.values()) / len(columns)
    edit = replace(edit, up=up * min(ERASED / done, MOST_SCALE)) if done > 0 else edit
    return measured(edit, {name: concept_columns(lexicon, task, name, task.probes) for name in task.names}, words)


def word_moments(
    host: DiffusionHost, concepts: tuple[Concept, ...], settings: ForgetSettings
) -> tuple[Moments | None, list[str]]:
    """What an edit knows of the concepts' words, for a patch that is made without one; or none, and a sentence that says
    why."""
    lexicon = Lexicon(host)
    try:
        task = plan(lexicon, concepts, replace(settings, keep="", mode="remove", replacement=""))
        return Words.of(lexicon, task).moments, []
    except ForgetError as error:
        return None, [f"The patch can be applied, and neither gated nor stacked better than added: {error}"]


@dataclass(frozen=True)
class Words:
    """What the text encoder makes of a task: of each concept columns [N, D] and their targets [N, D]; columns of near words
    and of those that the user keeps; the empty prompt's; E[x x^T] of all that should stay, at its weight; and the moments
    that a patch remembers."""

    columns: dict[str, tuple[Tensor, Tensor]]
    near: dict[str, Tensor]
    held: dict[str, Tensor]
    empty: Tensor
    kept: Tensor
    moments: Moments

    @classmethod
    def of(cls, lexicon: Lexicon, task: Task) -> Words:
        lexicon.read(task.texts())
        near = {word: lexicon.columns(NEAR_TEMPLATES[task.type], word) for word in task.neighbours}
        held = {word: lexicon.columns(KEEP_TEMPLATES[task.type], word) for word in task.keep}
        empty = lexicon.host.contexts([""], len(lexicon.tokenize("")))[0].cpu().double()
        kept = kept_moment(lexicon.kept(task.forgotten), near, held, empty)
        attended = sum(attended_moment(lexicon, task, name, len(empty)) for name in task.names)
        return cls(
            columns={name: concept_columns(lexicon, task, name, task.templates) for name in task.names},
            near=near,
            held=held,
            empty=empty,
            kept=kept,
            moments=Moments.of(attended, kept, len(task.names)),
        )


def plan(lexicon: Lexicon, concepts: tuple[Concept, ...], settings: ForgetSettings) -> Task:
    """What to do, in the words of the text encoder; raises ForgetError where the settings contradict one another."""
    keep = [name for line in settings.keep.splitlines() for name in split_names(line)]
    replacement = " ".join(settings.replacement.split())
    subjects = find_subjects(concepts, settings.mode, replacement, keep)
    custom = settings.concept_type == "custom"
    type = "object" if custom else settings.concept_type
    stay = {name.lower() for name in keep}
    if settings.mode == "correct":  # there the concept stays, and the word that it overshadows moves
        keep += [name for name in concepts[0].names if name not in keep]
    elif settings.mode == "replace":
        stay |= lexicon.same(lexicon.likeness([replacement], type))
    likeness = {name: lexicon.likeness(names, type) for name, names in subjects.items()}
    alike = {n: set().union(*(lexicon.same(lexicon.likeness([other], type)) for other in subjects[n])) for n in subjects}
    also = {name: sorted(several - stay - known(subjects)) for name, several in alike.items()}
    names = {name: (*several, *also[name]) for name, several in subjects.items()}
    neighbours = (w for like in likeness.values() for w in lexicon.neighbours(like, max(2, NEIGHBOURS // len(names))))
    moving = {*stay, *(name for several in names.values() for name in several)}
    templates = concepts[0].templates if custom else TEMPLATES[type]
    # Every prompt has to be read: of many concepts each gets fewer.
    share = max(4, TEMPLATES_IN_ALL // len(names))
    return Task(
        type=type,
        mode=settings.mode,
        templates=templates[:share],
        probes=PROBES[type][: share // 2],
        asked=templates if custom else NEAR_TEMPLATES[type],
        names=names,
        also=[word for several in also.values() for word in several],
        other={"remove": "", "replace": replacement, "correct": concepts[0].name}[settings.mode],
        neutral=lexicon.neutral(torch.stack(list(likeness.values())).max(0).values, type),
        neighbours=[word for word in dict.fromkeys(neighbours) if word not in moving],
        keep=keep,
    )


def find_subjects(concepts: tuple[Concept, ...], mode: str, replacement: str, keep: list[str]) -> dict[str, tuple[str, ...]]:
    """What has to move, name -> all its names: the concepts or, in the mode `correct`, the word one overshadows.

    Raises ForgetError where it is also to be kept, or a mode lacks what it needs.
    """
    if mode != "remove" and not replacement:
        what = "what takes the concept's place" if mode == "replace" else "the word whose other meaning should show"
        raise ForgetError(f"The mode `{mode}` needs a `replacement`: type {what}.")
    subjects = {concept.name: concept.names for concept in concepts}
    if mode == "correct":
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


def concept_columns(lexicon: Lexicon, task: Task, name: str, templates: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Columns [N, D] of prompts with the concept's names, and their targets [N, D].

    remove: the mean of neutral words at the same places; replace: the replacement; correct: the name's own columns
    without what they share with the dominant concept, so that another of its meanings comes through. Raises
    ForgetError where no prompt keeps the name whole.
    """
    sought = [lexicon.tokenize(other) for other in task.names[name]]
    found = []
    for template in templates:
        bare = lexicon.tokenize(template.replace("{}", ""))
        middle = lexicon.middle(template, task.type, task.neutral)
        theirs = lexicon.place(template, task.other) if task.other else middle
        if not (theirs and middle) or any(find_tokens(bare, name) for name in sought):
            continue  # the template itself names the concept
        ours = [lexicon.place(template, other) for other in task.names[name]]
        found += [correction(o, theirs, middle) if task.mode == "correct" else pair(o, theirs) for o in ours if o]
    if not found:
        raise ForgetError(
            f"No prompt with `{name}`, or with what should stand in its place, keeps it whole: the tokenizer joins it to a "
            "neighbour, drops it or cuts it off."
        )
    return torch.cat([x for x, _ in found]), torch.cat([y for _, y in found])


def correction(word: Place, dominant: Place, middle: Place) -> tuple[Tensor, Tensor]:
    """A word's columns, and the same less their component along what sets the dominant meaning apart."""
    x, towards = pair(word, dominant)
    _, neutral = pair(word, middle)
    n = min(len(x), len(neutral))
    direction = F.normalize(towards[:n] - neutral[:n], dim=1)
    return x[:n], x[:n] - direction * ((x[:n] - neutral[:n]) * direction).sum(1, keepdim=True)


def attended_moment(lexicon: Lexicon, task: Task, name: str, length: int) -> Tensor:
    """E[x x^T] [D, D] of a concept's prompts of this length from the name on, which is what pictures attend to: mostly
    padding, and of that the last column read stands for all further ones."""
    total, count = 0.0, 0.0
    for template, other in ((t, n) for t in (*task.asked, *task.templates[:1]) for n in task.names[name]):
        place = lexicon.place(template, other)
        if place:
            before = len(lexicon.read([fill(template, other)])[0].columns) - len(place.columns)
            weights = torch.ones(len(place.columns)).double()
            weights[-1] += max(length - before - len(weights), 0)
            total, count = total + (place.columns.T * weights) @ place.columns, count + weights.sum()
    if not count:
        raise ForgetError(f"No prompt with `{name}` keeps it whole: the tokenizer joins it to a neighbour or drops it.")
    return total / count


def kept_moment(common: Tensor, near: dict[str, Tensor], held: dict[str, Tensor], empty: Tensor) -> Tensor:
    """E[x x^T] [D, D] of all that should stay, each kind at its weight."""
    kept = KEPT * second_moment(common) + EMPTY * second_moment(empty)
    for weight, several in ((NEAR, near), (KEEP, held)):
        if several:
            kept = kept + weight * second_moment(torch.cat(list(several.values())))
    return kept + RIDGE * kept.diagonal().mean() * torch.eye(len(kept), dtype=kept.dtype)


def progress(edit: Edit, x: Tensor, y: Tensor) -> float:
    """How far an edit brings columns x [N, D] on the way to their targets y: 0 not at all, 1 there."""
    way = y - x
    return ((edit(x) * way).sum() / way.square().sum().clamp(min=1e-12)).item()


def measured(edit: Edit, probes: dict[str, tuple[Tensor, Tensor]], words: Words) -> Edit:
    """The edit with its report: how far it brings each concept, and how far it moves what is near, on one scale, on
    prompts that it was neither made nor scaled from."""
    near, empty = words.near | words.held, words.empty
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
