"""What forgetting has to do, in the words of a text encoder: whose columns move, where to, and what near them stays."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import ForgetError
from ..text.concept import Concept
from ..text.features import KEEP_TEMPLATES, NEAR_TEMPLATES, fill


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
    unknown: list[str]  # names that the text encoder does not know
    inside: dict[str, list[str]]  # of each concept: words inside its names that stay, the likest to the name first
    along: dict[str, str]  # words inside a name that cannot stay if it is to be forgotten -> that name
    other: str  # what replaces the concept, or what overshadows it
    neutral: list[str]  # words that say nothing of any concept: what they have in common is what a removed one becomes
    neighbours: list[str]
    keep: list[str]

    @property
    def forgotten(self) -> list[str]:
        return [name for several in self.names.values() for name in several]

    @property
    def parts(self) -> list[str]:
        """The words inside names that stay, each once."""
        return list(dict.fromkeys(word for several in self.inside.values() for word in several))

    @property
    def near(self) -> list[str]:
        """The words that stay, those inside names first."""
        return [*self.parts, *self.neighbours, *self.keep]

    def texts(self) -> Iterable[str]:
        """Every prompt that has to be read for it."""
        moved = [*self.forgotten, *([self.other] if self.other else [])]
        for templates, names in (
            ((*self.templates, *self.probes, *self.asked), moved),
            (NEAR_TEMPLATES[self.type], self.neighbours),
            (KEEP_TEMPLATES[self.type], [*self.keep, *self.parts, *self.along]),
        ):
            yield from (fill(template, name) for name in names for template in templates)


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
