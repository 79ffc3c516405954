"""The preset `fast`: a concept forgotten in closed form, from the text encoder and the weights of K and V; the UNet is
only asked in the end how unrelated prompts fare."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ForgetError
from ..host import DiffusionHost
from ..log import logger, plain
from ..lora.layers import CrossAttentionLoRA
from ..patch.patch import Patch, make_patch
from ..patch.statistics import Moments
from ..text.concept import Concept, find_tokens, split_names
from ..text.features import KEEP_TEMPLATES, NEAR_TEMPLATES, PROBES, TEMPLATES, Lexicon, Place, fill, pair
from ..text.name_words import hold_words, own_place
from .advice import LITTLE, warnings
from .config import ForgetSettings
from .plan import Task, find_subjects, known
from .solve import Erasure, leading_directions, second_moment, solve
from .unrelated import NotFinite, latents_shape, unrelated_drift, unrelated_prompts, unrelated_warnings

NEIGHBOURS = 16
TEMPLATES_IN_ALL = 160
EXACT = 0.02  # of the largest singular value of the start and empty columns: directions above it do not move at all
KEPT, NEAR, INSIDE, KEEP, EMPTY, RIDGE = 100.0, 10.0, 10.0, 100.0, 100.0, 1e-3  # weights beside the concept's, which is 1
ERASED = 0.8  # how much of the way from the concept to its target an edit is scaled to go
MOST_SCALE = 2.0


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
    report = edit.report | seen_by_unet(host, edit, factors)
    return make_patch(host, factors, concepts, asdict(settings), report, edit.moments), [1.0, left]


def seen_by_unet(host: DiffusionHost, edit: Edit, factors: dict[tuple[str, str], tuple[Tensor, Tensor]]) -> dict:
    """What a look at unrelated prompts adds to the report: nothing where the UNet cannot be asked, without which an edit can
    be made."""
    try:
        others = unrelated_prompts(host, edit.task.forgotten)
        with host.training(latents_shape(host)):
            lora = CrossAttentionLoRA.of(host, factors).requires_grad_(False)
            drift = unrelated_drift(host, others, lora.attached())
    except NotFinite:
        raise
    except (ForgetError, RuntimeError) as error:  # no memory, a UNet elsewhere or in parts: the edit did not need it
        logger.warning("forget.unseen why=%s", plain(str(error)))
        return {}
    return {"unrelated drift": drift, "warnings": edit.report["warnings"] + unrelated_warnings(drift, trained=False)}


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
    settings contradict one another.

    Words inside a name stay, but for those that mean the same, and the likest ones with which it cannot be forgotten.
    """
    lexicon, along = Lexicon(host), {}
    while True:
        edit = solved(lexicon, plan(lexicon, concepts, settings, along), settings)
        erased, inside = edit.report["erased"], edit.task.inside
        freed = {words[0]: name for name, words in inside.items() if words and erased[name] < LITTLE}
        if not freed:
            return edit
        along = along | freed


def solved(lexicon: Lexicon, task: Task, settings: ForgetSettings) -> Edit:
    """The edit that does a task, with its report."""
    words = Words.of(lexicon, task)
    columns, kept, empty = words.columns, words.kept, words.empty
    erasure = Erasure.of(list(columns.values()))
    fixed = leading_directions(torch.cat([empty[:1] * len(empty), empty]), EXACT)
    up, down = solve(erasure, kept, fixed, min(settings.rank * len(columns), len(kept) - fixed.shape[1]))
    edit = Edit(up, down, task, {"also": task.also}, words.moments)
    done = sum(progress(edit, x, y) for x, y in columns.values()) / len(columns)
    edit = replace(edit, up=up * min(ERASED / done, MOST_SCALE)) if done > 0 else edit
    probes = {name: concept_columns(lexicon, task, name, task.probes) for name in task.names}
    return measured(edit, probes, words, settings)


def word_moments(
    host: DiffusionHost, concepts: tuple[Concept, ...], settings: ForgetSettings
) -> tuple[Moments | None, list[str]]:
    """What an edit knows of the concepts' words, for a patch that is made without one; or none, and a sentence that says
    why."""
    lexicon = Lexicon(host)
    try:
        task = plan(lexicon, concepts, replace(settings, keep="", mode="remove", replacement=""))
        return Words.of(lexicon, task).moments, warnings(task, settings, {})
    except ForgetError as error:
        return None, [f"The patch can be applied, and neither gated nor stacked better than added: {error}"]


@dataclass(frozen=True)
class Words:
    """What the text encoder makes of a task: of each concept columns [N, D] and their targets [N, D]; columns of near words,
    of those that the user keeps, and of those inside names that stay or cannot; the empty prompt's; E[x x^T] of all that
    should stay, at its weight; and the moments that a patch remembers."""

    columns: dict[str, tuple[Tensor, Tensor]]
    near: dict[str, Tensor]
    held: dict[str, Tensor]
    inside: dict[str, Tensor]
    along: dict[str, Tensor]
    empty: Tensor
    kept: Tensor
    moments: Moments

    @classmethod
    def of(cls, lexicon: Lexicon, task: Task) -> Words:
        lexicon.read(task.texts())
        near = {word: lexicon.columns(NEAR_TEMPLATES[task.type], word) for word in task.neighbours}
        held, inside, along = (
            {word: lexicon.columns(KEEP_TEMPLATES[task.type], word) for word in several}
            for several in (task.keep, task.parts, task.along)
        )
        empty = lexicon.host.contexts([""], len(lexicon.tokenize("")))[0].cpu().double()
        kept = kept_moment(lexicon.kept(task.forgotten), near, held, empty, inside)
        attended = sum(attended_moment(lexicon, task, name, len(empty)) for name in task.names)
        return cls(
            columns={name: concept_columns(lexicon, task, name, task.templates) for name in task.names},
            near=near,
            held=held,
            inside=inside,
            along=along,
            empty=empty,
            kept=kept,
            moments=Moments.of(attended, kept, len(task.names)),
        )


def plan(
    lexicon: Lexicon, concepts: tuple[Concept, ...], settings: ForgetSettings, along: dict[str, str] | None = None
) -> Task:
    """What to do, in the words of the text encoder; `along`: words inside names that are not held -> the name.

    Raises ForgetError where the settings contradict one another.
    """
    keep = [name for line in settings.keep.splitlines() for name in split_names(line)]
    replacement = " ".join(settings.replacement.split())
    subjects = find_subjects(concepts, settings.mode, replacement, keep)
    other = {"remove": "", "replace": replacement, "correct": concepts[0].name}[settings.mode]
    custom = settings.concept_type == "custom"
    type = "object" if custom else settings.concept_type
    stay = {name.lower() for name in keep}
    if settings.mode == "correct":  # there the concept stays, and the word that it overshadows moves
        keep += [name for name in concepts[0].names if name not in keep]
    elif settings.mode == "replace":
        stay |= lexicon.same(lexicon.likeness([replacement], type))
    likeness = {name: lexicon.likeness(names, type) for name, names in subjects.items()}
    inside, along = hold_words(lexicon, subjects, type, stay | known(subjects), along or {})
    parts = {*along, *(word for several in inside.values() for word in several)}
    spared = set().union(*(lexicon.same(lexicon.likeness([word], type)) for word in parts - {*along}))
    alike = {n: set().union(*(lexicon.same(lexicon.likeness([other], type)) for other in subjects[n])) for n in subjects}
    also = {name: sorted(several - stay - parts - spared - known(subjects)) for name, several in alike.items()}
    names = {name: (*several, *also[name]) for name, several in subjects.items()}
    neighbours = (w for like in likeness.values() for w in lexicon.neighbours(like, max(2, NEIGHBOURS // len(names))))
    called = (*(name for several in subjects.values() for name in several), other)
    moving = {*stay, *parts, *(name for several in names.values() for name in several)}
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
        unknown=[name for name in called if name and not lexicon.knows(name, type)],
        inside=inside,
        along=along,
        other=other,
        neutral=lexicon.neutral(torch.stack(list(likeness.values())).max(0).values, type),
        neighbours=[word for word in dict.fromkeys(neighbours) if word not in moving],
        keep=keep,
    )


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
        ours = [own_place(lexicon, template, other, task.parts) for other in task.names[name]]
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


def kept_moment(
    common: Tensor,
    near: dict[str, Tensor],
    held: dict[str, Tensor],
    empty: Tensor,
    inside: dict[str, Tensor] | None = None,
) -> Tensor:
    """E[x x^T] [D, D] of all that should stay, each kind at its weight."""
    kept = KEPT * second_moment(common) + EMPTY * second_moment(empty)
    for weight, several in ((NEAR, near), (INSIDE, inside), (KEEP, held)):
        if several:
            kept = kept + weight * second_moment(torch.cat(list(several.values())))
    return kept + RIDGE * kept.diagonal().mean() * torch.eye(len(kept), dtype=kept.dtype)


def progress(edit: Edit, x: Tensor, y: Tensor) -> float:
    """How far an edit brings columns x [N, D] on the way to their targets y: 0 not at all, 1 there."""
    way = y - x
    return ((edit(x) * way).sum() / way.square().sum().clamp(min=1e-12)).item()


def measured(edit: Edit, probes: dict[str, tuple[Tensor, Tensor]], words: Words, settings: ForgetSettings) -> Edit:
    """The edit with its report: how far it brings each concept, and how far it moves what is near, on one scale, on
    prompts that it was neither made nor scaled from."""
    near, empty = words.near | words.held | words.inside | words.along, words.empty
    scale = torch.stack([(y - x).square().sum(1).mean().sqrt() for x, y in probes.values()]).mean().clamp(min=1e-12)
    drift = {word: (edit(columns).square().sum(1).mean().sqrt() / scale).item() for word, columns in near.items()}
    report = edit.report | {
        "erased": {name: round(progress(edit, x, y), 4) for name, (x, y) in probes.items()},
        "drift": {word: round(value, 4) for word, value in sorted(drift.items(), key=lambda item: -item[1])},
        "empty prompt": round((edit(empty).square().sum(1).mean().sqrt() / scale).item(), 6),
    }
    return replace(edit, report=report | {"warnings": warnings(edit.task, settings, report)})
