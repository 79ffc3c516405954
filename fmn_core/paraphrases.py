"""A concept as a distribution: its columns in many prompts, what each should become, and what must not move."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import words
from .concept import find_tokens
from .errors import ForgetError
from .hosts.base import DiffusionHost

PADDING = 3  # columns read after the end token; the further ones say the same again
SAME_MEANING = 0.8  # likeness from which a word is another name of the concept
FAR = 0.5  # and below which it says nothing of it

# {} is the concept, {other} something beside it.
TEMPLATES = {
    "object": (
        "a {}", "{}", "a photo of a {}", "a drawing of a {}", "a {} in pixel art style", "a {} on a white background",
        "two {}", "a red {}", "a small {} in the garden", "a {} and a house", "a dog beside a {}", "the big {}, line art",
        "a watercolor painting of a {}", "a 3d {}", "a black and white picture of a {}", "a neon {} on a black background",
    ),
    "identity": (
        "a portrait of {}", "{}", "a photo of {}", "a drawing of {}", "{} in pixel art style", "{} on a white background",
        "{} smiling", "the face of {}", "{} and mary", "a painting of {} with glasses", "{} on a blue background",
    ),
    "style": (
        "a picture in {} style", "{} style", "a house in {} style", "a {} drawing of a cat", "a {} picture of a flower",
        "a photo of a car in {} style", "a tree, {} style", "a picture of a dog in {} style", "a fish in the style of {}",
        "a portrait of a woman in {} style",
    ),
}  # fmt: skip
NEAR_TEMPLATES = {  # for what is near and has to stay
    "object": ("a {}", "a drawing of a {}", "a {} in pixel art style"),
    "identity": ("a portrait of {}", "a drawing of {}", "{} in pixel art style"),
    "style": ("a picture in {} style", "a {} drawing of a cat", "a {} picture of a flower"),
}
KEEP_TEMPLATES = {  # for what the user lists, which may be of any kind
    type: (*several, "{}", "a {}", "a picture of a {}", "{} style") for type, several in NEAR_TEMPLATES.items()
}
PROBES = {  # prompts that an edit is checked on, and not made from
    "object": (
        "an emoji of a {}", "a {} in woodcut style", "three {} on a table", "a picture of a {} and a tree", "my old {}",
    ),
    "identity": ("an image of {}", "{} in sepia style", "a drawing of {} on a green background", "john and {}"),
    "style": ("a boat in {} style", "a {} image of a tree", "a picture of a bear, {} style"),
}  # fmt: skip
PLAIN = {"object": "a {}", "identity": "a portrait of {}", "style": "a picture in {} style"}
WORDS = {"object": words.NOUNS + words.PHRASES, "identity": words.NAMES, "style": words.STYLES}
# Every noun in a style and a colour too, since an edit that keeps each word apart may still harm them together.
CAPTIONS = (
    words.CAPTIONS
    + tuple(f"a {word} picture" for word in words.COLOURS + words.ADJECTIVES)
    + tuple(f"a {noun} in {words.STYLES[7 * i % len(words.STYLES)]} style" for i, noun in enumerate(words.NOUNS))
)


def fill(template: str, name: str) -> str:
    """The template with the name in it, and `an` for an `a` before the name if it begins with a vowel."""
    article = r"\1n {}" if name[:1].lower() in "aeiou" else r"\1 {}"
    return re.sub(r"\b([Aa]) \{\}", article, template).replace("{}", name)


def read_contexts(host: DiffusionHost, texts: Sequence[str]) -> list[Tensor]:
    """Every prompt's columns [n, D]: its tokens, its end and PADDING more; prompts of one length are read together."""
    lengths = [[token.kind for token in host.tokenize(text)].index("end") + 1 + PADDING for text in texts]
    contexts: list[Tensor] = [torch.empty(0)] * len(texts)
    for length in sorted(set(lengths)):
        host.check_interrupt()
        rows = [row for row, own in enumerate(lengths) if own == length]
        for row, context in zip(rows, host.contexts([texts[row] for row in rows], length), strict=True):
            contexts[row] = context.cpu().double()
    return contexts


@dataclass(frozen=True)
class Place:
    """A prompt's columns as they stand to a name: its own tokens' [m, D], and all that come after [n, D]."""

    mention: Tensor
    after: Tensor


def read_places(host: DiffusionHost, templates: Sequence[str], name: str) -> list[Place | None]:
    """The columns of every template with the name in it; None where the tokenizer does not keep the name whole."""
    sought, texts, places = host.tokenize(name), [fill(template, name) for template in templates], []
    for template, text, context in zip(templates, texts, read_contexts(host, texts), strict=True):
        before = template.rsplit("{}", 1)[0].replace("{}", name)  # where the name may stand as well
        index = len(find_tokens(host.tokenize(before), sought))
        mentions = find_tokens(host.tokenize(text)[: len(context)], sought)
        mention = mentions[index] if index < len(mentions) else None
        places.append(Place(context[mention], context[mention[-1] + 1 :]) if mention else None)
    return places


def mean_place(several: Sequence[Place]) -> Place:
    """What several names have in common in one prompt."""
    shortest = min(len(place.after) for place in several)
    mention = torch.stack([place.mention.mean(0) for place in several]).mean(0, keepdim=True)
    return Place(mention, torch.stack([place.after[:shortest] for place in several]).mean(0))


def pair(ours: Place, theirs: Place) -> tuple[Tensor, Tensor]:
    """Columns [N, D] and their targets [N, D]: what stands at the same place where the prompt names the other."""
    shortest = min(len(ours.after), len(theirs.after))
    target = theirs.mention.mean(0, keepdim=True).expand(len(ours.mention), -1)
    return torch.cat([ours.mention, ours.after[:shortest]]), torch.cat([target, theirs.after[:shortest]])


class Lexicon:
    """Common words as a text encoder sees them: what an edit leaves alone, who is near whom, what is neutral."""

    def __init__(self, host: DiffusionHost):
        self.host = host
        self.types = [type for type, several in WORDS.items() for _ in several]
        self.words = [word for several in WORDS.values() for word in several]
        prompts = [fill(PLAIN[type], word) for type, word in zip(self.types, self.words, strict=True)]
        self.prompts = [*prompts, *CAPTIONS]
        self.tokens = [host.tokenize(prompt) for prompt in self.prompts]
        self.contexts = read_contexts(host, self.prompts)
        self.meanings = torch.stack([context[-1 - PADDING] for context in self.contexts[: len(prompts)]])
        self.read: dict[tuple, list[Place | None]] = {}

    def likeness(self, names: Sequence[str], type: str) -> Tensor:
        """How like each word is to the nearest of the names: the cosine of their end tokens, less what all words of
        the type have in common; -1 for words of other types."""
        own = torch.stack(
            [context[-1 - PADDING] for context in read_contexts(self.host, [fill(PLAIN[type], n) for n in names])]
        )
        mine = torch.tensor([other == type for other in self.types])
        centre = self.meanings[mine].mean(0)
        likeness = F.cosine_similarity((own - centre)[:, None], (self.meanings - centre)[None], dim=-1).max(0).values
        return torch.where(mine, likeness, -1.0)

    def same(self, likeness: Tensor) -> set[str]:
        """The words that are other names of a concept."""
        return {word for word, like in zip(self.words, likeness, strict=True) if like >= SAME_MEANING}

    def neighbours(self, likeness: Tensor, most: int) -> list[str]:
        """The words most like a concept that are not its other names."""
        order = likeness.masked_fill(likeness >= SAME_MEANING, -1).argsort(descending=True)
        return [self.words[i] for i in order[:most]]

    def neutral(self, likeness: Tensor, type: str, most: int) -> list[str]:
        """Words of the type, spread over the list, that say nothing of a concept."""
        own = [(like.item(), word) for word, like, t in zip(self.words, likeness, self.types, strict=True) if t == type]
        far = [word for like, word in own if like < FAR] or [word for _, word in sorted(own)[:most]]
        return far[:: max(1, len(far) // most)][:most]

    def kept(self, names: Sequence[str]) -> Tensor:
        """The columns [N, D] of all prompts in which none of the names occurs."""
        sought = [self.host.tokenize(name) for name in names]
        with_tokens = zip(self.contexts, self.tokens, strict=True)
        return torch.cat([c for c, tokens in with_tokens if not any(find_tokens(tokens, name) for name in sought)])

    def places(self, templates: Sequence[str], name: str) -> list[Place | None]:
        """read_places, once for each name."""
        key = (tuple(templates), name)
        if key not in self.read:
            self.read[key] = read_places(self.host, templates, name)
        return self.read[key]

    def columns(self, templates: Sequence[str], name: str) -> Tensor:
        """The name's columns [N, D] in all templates, from the name on."""
        columns = [c for place in self.places(templates, name) if place for c in (place.mention, place.after)]
        if not columns:
            raise ForgetError(
                f"`{name}` cannot be kept: the tokenizer drops it or cuts it off. Use a shorter name in words."
            )
        return torch.cat(columns)
