"""The words inside a name of several words: they mean something by themselves, which should stay."""

from __future__ import annotations

import string
from collections.abc import Collection, Sequence

import torch.nn.functional as F

from .features import TokenSpan, VocabularyIndex
from .templates import plain_prompt
from .tokens import find_tokens
from .vocabulary import FUNCTION_WORDS

# Likeness to its name from which a word is not held: on the demo model names with a word of .84 and less are forgotten
# with the word held, and pictures of those with one of .87 and more are still seen.
ONE_MEANING = 0.85


def single_words(name: str) -> list[str]:
    """The words of a name in lower case, as CLIP reads them, without punctuation around them."""
    return [word for word in (part.strip(string.punctuation) for part in name.lower().split()) if word]


def words_inside(vocabulary: VocabularyIndex, names: Sequence[str], kind: str) -> dict[str, float]:
    """The words inside a concept's names of several words, function words left out, and without those that the text encoder
    does not know or has learned for the concept; each with its likeness to the name, the cosine that
    `VocabularyIndex.likeness` takes."""
    found: dict[str, float] = {}
    for name in names:
        own = vocabulary.tokenize(name)
        parts = [word for word in dict.fromkeys(single_words(name)) if word not in FUNCTION_WORDS]
        for word in parts if len(parts) > 1 else ():
            tokens = vocabulary.tokenize(word)
            plain_text = find_tokens(own, tokens) and all(token.id >= 0 for token in tokens)
            if plain_text and vocabulary.knows(word, kind):
                whole, part = vocabulary.offsets([plain_prompt(kind, name), plain_prompt(kind, word)], kind)
                likeness = F.cosine_similarity(whole, part, dim=0).item()
                found[word] = max(likeness, found.get(word, -1.0))
    return found


def hold_words(
    vocabulary: VocabularyIndex,
    subjects: dict[str, tuple[str, ...]],
    kind: str,
    others: Collection[str],
    freed: dict[str, str],
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The words inside each concept's names that are held, the likest to the name first, and those that are not -> the
    concept: those that are `freed` already, and those of one meaning with it. `others` are in no such list."""
    inside: dict[str, list[str]] = {}
    for concept, names in subjects.items():
        found = {word: like for word, like in words_inside(vocabulary, names, kind).items() if word not in others}
        freed = freed | {word: concept for word, like in found.items() if like >= ONE_MEANING}
        inside[concept] = sorted(found, key=found.__getitem__, reverse=True)
    return {concept: [word for word in words if word not in freed] for concept, words in inside.items()}, freed


def own_span(vocabulary: VocabularyIndex, template: str, name: str, kept: Sequence[str]) -> TokenSpan | None:
    """The name's embeddings in the template, less those of its first word where that is kept: a causal text
    encoder reads it before it knows that the name goes on, and gives just what it gives the word alone."""
    span, parts = vocabulary.span(template, name), single_words(name)
    if span is None or len(parts) < 2 or parts[0] not in kept:
        return span
    return TokenSpan(span.name[vocabulary.length(parts[0]) :], span.suffix)
