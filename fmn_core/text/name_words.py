"""The words inside a name of several words: they mean something by themselves, which should stay."""

from __future__ import annotations

import string
from collections.abc import Collection, Sequence

import torch.nn.functional as F

from .concept import find_tokens
from .features import Lexicon, Place, plain
from .vocabulary import FUNCTION_WORDS

# Likeness to its name from which a word is not held: on the embedded model names with a word of .84 and less are forgotten
# with the word held, and pictures of those with one of .87 and more are still seen.
ONE_MEANING = 0.85


def single_words(name: str) -> list[str]:
    """The words of a name in lower case, as CLIP reads them, without punctuation around them."""
    return [word for word in (part.strip(string.punctuation) for part in name.lower().split()) if word]


def words_inside(lexicon: Lexicon, names: Sequence[str], type: str) -> dict[str, float]:
    """The words inside a concept's names of several words, function words left out, and without those that the text encoder
    does not know or has learned for the concept; each with its likeness to the name, the cosine that `Lexicon.likeness`
    takes."""
    found: dict[str, float] = {}
    for name in names:
        own = lexicon.tokenize(name)
        several = [word for word in dict.fromkeys(single_words(name)) if word not in FUNCTION_WORDS]
        for word in several if len(several) > 1 else ():
            tokens = lexicon.tokenize(word)
            plain_text = find_tokens(own, tokens) and all(token.id >= 0 for token in tokens)
            if plain_text and lexicon.knows(word, type):
                likeness = F.cosine_similarity(*lexicon.offsets([plain(type, name), plain(type, word)], type), dim=0).item()
                found[word] = max(likeness, found.get(word, -1.0))
    return found


def hold_words(
    lexicon: Lexicon, subjects: dict[str, tuple[str, ...]], type: str, others: Collection[str], along: dict[str, str]
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The words inside each concept's names that are held, the likest to the name first, and those that are not -> the
    concept: those that go `along` already, and those of one meaning with it. `others` are in no such list."""
    inside: dict[str, list[str]] = {}
    for concept, names in subjects.items():
        found = {word: like for word, like in words_inside(lexicon, names, type).items() if word not in others}
        along = along | {word: concept for word, like in found.items() if like >= ONE_MEANING}
        inside[concept] = sorted(found, key=found.get, reverse=True)
    return {concept: [word for word in several if word not in along] for concept, several in inside.items()}, along


def own_place(lexicon: Lexicon, template: str, name: str, kept: Sequence[str]) -> Place | None:
    """The columns of the template with the name in it, less those of its first word where that is kept: a causal text
    encoder reads it before it knows that the name goes on, and gives just what it gives the word alone."""
    place, several = lexicon.place(template, name), single_words(name)
    if place is None or len(several) < 2 or several[0] not in kept:
        return place
    return Place(place.mention[lexicon.length(several[0]) :], place.after)
