"""What a patch is measured on: prompts of the concept, of what is near, of what is to be kept, and unrelated ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..errors import ForgetError
from ..host import DiffusionHost, Prompts
from ..patch.patch import Patch
from ..patch.weighted import kept_words, moved_concepts
from ..text import vocabulary as words
from ..text.concept import split_names
from ..text.features import VocabularyIndex
from ..text.name_words import words_inside
from ..text.templates import CHECK_PROMPTS, NEAR_TEMPLATES, WORDS, fill, plain_prompt
from ..text.tokens import concept_masks, find_tokens

GROUPS = ("concept", "near", "kept", "unrelated", "empty")


@dataclass(frozen=True)
class Probe:
    """A prompt, the group it stands for, the word in it with all its names, and what kind of word that is."""

    group: str
    prompt: str
    word: str = ""
    names: tuple[str, ...] = ()
    kind: str = ""


@dataclass(frozen=True)
class Subjects:
    """What a patch forgets: name -> all its names, and what it was made to preserve; `kind` and `templates` of prompts."""

    names: dict[str, tuple[str, ...]]
    preserve: tuple[str, ...]
    kind: str
    templates: tuple[str, ...]

    @property
    def every(self) -> tuple[str, ...]:
        return tuple(name for several in self.names.values() for name in several)


def subjects_of(patch: Patch, preserve: str = "") -> Subjects:
    """What a patch says that it forgets and keeps, with more to preserve, one a line or between commas.

    Raises ForgetError where the patch does not say it.
    """
    try:
        concepts, kept = moved_concepts(patch), kept_words(patch)
        names = {concept["names"][0]: tuple(concept["names"]) for concept in concepts}
        kind, templates = concepts[0]["type"], tuple(concepts[0]["templates"])
    except (KeyError, IndexError, TypeError):
        raise ForgetError("The patch does not say what it forgets: forget the concept again, and evaluate that.") from None
    more = [name for line in preserve.splitlines() for name in split_names(line)]
    forgotten = {name.lower() for several in names.values() for name in several}
    for word in more:
        if word.lower() in forgotten:
            raise ForgetError(f"`{word}` is what the patch forgets: take it off `preserve`.")
    known = CHECK_PROMPTS.get(kind)
    own = (NEAR_TEMPLATES[kind][0], *known) if known else templates
    return Subjects(names, tuple(dict.fromkeys(kept + more)), kind if known else "object", own)


def find_probes(
    host: DiffusionHost, vocabulary: VocabularyIndex, patch: Patch, subjects: Subjects, most: int
) -> list[Probe]:
    """The prompts, `most` of the concept, of near words, those inside names first, and of unrelated ones, all of the kept
    words, and the empty one.

    The concept's are the plain prompt and those that `fast` checks itself on, and not those that it is made from.
    """
    likeness = vocabulary.likeness(subjects.every, subjects.kind)
    known = {*subjects.every, *subjects.preserve, *patch.info["report"].get("synonyms", ())}
    near = [*words_inside(vocabulary, subjects.every, subjects.kind), *vocabulary.neighbours(likeness, most + len(known))]
    near = [word for word in dict.fromkeys(near) if word not in known][:most]
    sought = [host.tokenize(name) for name in subjects.every]
    captions = [caption for caption in words.SCENES if not mentions(host, caption, sought)]
    probes = []
    share = -(-most // len(subjects.names))
    for name, names in subjects.names.items():
        several = [
            Probe("concept", fill(template, other), name, names, subjects.kind)
            for turn, other in enumerate(names)
            for template in (subjects.templates if turn == 0 else subjects.templates[:1])
        ]
        # The plain prompt of every name first, then the first name's others.
        several.sort(key=lambda probe: probe.prompt not in [fill(subjects.templates[0], other) for other in names])
        probes += several[:share]
    for group, of_group in (("near", near), ("kept", [*subjects.preserve])):
        for word in of_group:
            kind = kind_of(word, subjects.kind)
            probes.append(Probe(group, plain_prompt(kind, word), word, (word,), kind))
    probes += [Probe("unrelated", caption) for caption in captions[:: max(1, len(captions) // most)][:most]]
    return [*probes, Probe("empty", "")]


def kind_of(word: str, otherwise: str) -> str:
    """The kind that the word lists give a word."""
    return next((kind for kind, several in WORDS.items() if word.lower() in several), otherwise)


def mentions(host: DiffusionHost, text: str, sought: Sequence) -> bool:
    """Whether one of the tokenized names is in a text."""
    tokens = host.tokenize(text)
    return any(find_tokens(tokens, name) for name in sought)


def probe_masks(host: DiffusionHost, probes: Sequence[Probe], prompts: Prompts) -> dict[str, Tensor]:
    """Boolean masks [B, T] of the concept's own tokens in each prompt, and of every token from there on."""

    def name_in(probe: Probe) -> str:
        return next(name for name in sorted(probe.names, key=len, reverse=True) if name in probe.prompt)

    rows = [(name_in(probe), probe.prompt) for probe in probes]
    kinds = {"own_tokens": "concept", "from_there_on": "concept_onward"}
    return {kind: concept_masks(host, rows, tokens, prompts) for kind, tokens in kinds.items()}


def probe_embeds(vocabulary: VocabularyIndex, probes: Sequence[Probe], subjects: Subjects) -> dict[str, dict[str, Tensor]]:
    """The text encoder's embeddings [N, D], group -> word -> from the word on in several prompts; of the captions all but
    the start token, and of the empty prompt all."""
    found: dict[str, dict[str, Tensor]] = {group: {} for group in GROUPS}
    for probe in probes:
        if probe.group == "concept":
            found["concept"][probe.word] = vocabulary.embeds(subjects.templates, probe.word)
        elif probe.word:
            found[probe.group][probe.word] = vocabulary.embeds(NEAR_TEMPLATES[probe.kind], probe.word)
    unrelated = [probe.prompt for probe in probes if probe.group == "unrelated"]
    for caption, features in zip(unrelated, vocabulary.read(unrelated), strict=True):
        found["unrelated"][caption] = features.token_embeds[1:].double()
    found["empty"][""] = vocabulary.host.encode_prefix([""], len(vocabulary.host.tokenize("")))[0].cpu().double()
    return found
