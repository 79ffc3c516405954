"""What forgetting has to do, in the words of a text encoder: whose embeddings move, where to, and what near them stays."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..errors import ForgetError
from ..text.concept import Concept, split_names
from ..text.features import VocabularyIndex
from ..text.name_words import hold_words
from ..text.templates import CHECK_PROMPTS, KEEP_TEMPLATES, NEAR_TEMPLATES, TEMPLATES, fill
from .config import ForgetConfig

NEIGHBOURS = 16
TEMPLATES_IN_ALL = 160  # every prompt has to be read: of many concepts each gets fewer


@dataclass(frozen=True)
class ErasurePlan:
    """What an edit has to do: whose embeddings move, where to, and what near them stays."""

    type: str
    mode: str
    templates: tuple[str, ...]
    probes: tuple[str, ...]  # prompts that an edit is checked on, and not made from
    prompts: tuple[str, ...]  # the few templates that are trained with
    names: dict[str, tuple[str, ...]]  # of each concept: what the user calls it, and words that mean the same
    synonyms: list[str]  # the latter
    unknown: list[str]  # names that the text encoder does not know
    inside: dict[str, list[str]]  # of each concept: words inside its names that stay, the likest to the name first
    freed: dict[str, str]  # words inside a name that cannot stay if it is to be forgotten -> that name
    target: str  # what replaces the concept, or what overshadows it
    neutral: list[str]  # words that say nothing of any concept: what they have in common is what a removed one becomes
    neighbours: list[str]
    preserve: list[str]

    @property
    def forgotten(self) -> list[str]:
        """Every name that is forgotten."""
        return [name for names in self.names.values() for name in names]

    @property
    def parts(self) -> list[str]:
        """The words inside names that stay, each once."""
        return list(dict.fromkeys(word for words in self.inside.values() for word in words))

    @property
    def near(self) -> list[str]:
        """The words that stay, those inside names first."""
        return [*self.parts, *self.neighbours, *self.preserve]

    def texts(self) -> Iterable[str]:
        """Every prompt that has to be read for it."""
        moved = [*self.forgotten, *([self.target] if self.target else [])]
        for templates, names in (
            ((*self.templates, *self.probes, *self.prompts), moved),
            (NEAR_TEMPLATES[self.type], self.neighbours),
            (KEEP_TEMPLATES[self.type], [*self.preserve, *self.parts, *self.freed]),
        ):
            yield from (fill(template, name) for name in names for template in templates)


def find_subjects(concepts: tuple[Concept, ...], mode: str, target: str, preserve: list[str]) -> dict[str, tuple[str, ...]]:
    """What has to move, name -> all its names: the concepts or, in the mode `correct`, the word one overshadows.

    Raises ForgetError where it is also to be preserved, or a mode lacks what it needs.
    """
    if mode != "remove" and not target:
        what = "what takes the concept's place" if mode == "replace" else "the word whose other meaning should show"
        raise ForgetError(f"The mode `{mode}` needs a `target`: type {what}.")
    subjects = {concept.name: concept.names for concept in concepts}
    if mode == "correct":
        if len(concepts) > 1:
            raise ForgetError("The mode `correct` takes one concept, the one that overshadows the target: name one.")
        subjects = {target: (target,)}
    for word in preserve:
        if word.lower() in all_names(subjects):
            raise ForgetError(f"`{word}` is to be forgotten and to be preserved: take it off one of the two lists.")
    return subjects


def all_names(subjects: dict[str, tuple[str, ...]]) -> set[str]:
    """All the names, in lower case, as CLIP reads them."""
    return {name.lower() for names in subjects.values() for name in names}


def plan_erasure(
    vocabulary: VocabularyIndex, concepts: tuple[Concept, ...], config: ForgetConfig, freed: dict[str, str] | None = None
) -> ErasurePlan:
    """What to do, in the words of the text encoder; `freed`: words inside names that are not held -> the name.

    Raises ForgetError where the settings contradict one another.
    """
    preserve = [name for line in config.preserve.splitlines() for name in split_names(line)]
    target = " ".join(config.target.split())
    subjects = find_subjects(concepts, config.mode, target, preserve)
    other = {"remove": "", "replace": target, "correct": concepts[0].name}[config.mode]
    custom = config.concept_type == "custom"
    kind = "object" if custom else config.concept_type
    stay = {name.lower() for name in preserve}
    if config.mode == "correct":  # there the concept stays, and the word that it overshadows moves
        preserve += [name for name in concepts[0].names if name not in preserve]
    elif config.mode == "replace":
        stay |= vocabulary.synonyms([target], kind)
    likeness = {name: vocabulary.likeness(names, kind) for name, names in subjects.items()}
    inside, freed = hold_words(vocabulary, subjects, kind, stay | all_names(subjects), freed or {})
    parts = {*freed, *(word for words in inside.values() for word in words)}
    spared = set().union(*(vocabulary.synonyms([word], kind) for word in parts - {*freed}))
    alike = {n: set().union(*(vocabulary.synonyms([other], kind) for other in subjects[n])) for n in subjects}
    synonyms = {name: sorted(words - stay - parts - spared - all_names(subjects)) for name, words in alike.items()}
    names = {name: (*own, *synonyms[name]) for name, own in subjects.items()}
    neighbours = (w for like in likeness.values() for w in vocabulary.neighbours(like, max(2, NEIGHBOURS // len(names))))
    given = (*(name for own in subjects.values() for name in own), other)
    moving = {*stay, *parts, *(name for own in names.values() for name in own)}
    templates = concepts[0].templates if custom else TEMPLATES[kind]
    share = max(4, TEMPLATES_IN_ALL // len(names))
    return ErasurePlan(
        type=kind,
        mode=config.mode,
        templates=templates[:share],
        probes=CHECK_PROMPTS[kind][: share // 2],
        prompts=templates if custom else NEAR_TEMPLATES[kind],
        names=names,
        synonyms=[word for words in synonyms.values() for word in words],
        unknown=[name for name in given if name and not vocabulary.knows(name, kind)],
        inside=inside,
        freed=freed,
        target=other,
        neutral=vocabulary.neutral(torch.stack(list(likeness.values())).max(0).values, kind),
        neighbours=[word for word in dict.fromkeys(neighbours) if word not in moving],
        preserve=preserve,
    )
