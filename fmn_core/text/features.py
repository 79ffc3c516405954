"""A concept as a distribution: its columns in many prompts, what each should become, and what must not move."""

from __future__ import annotations

import hashlib
import re
from collections import ChainMap
from collections.abc import Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ForgetError
from ..host import DiffusionHost, Token
from . import vocabulary as words
from .concept import find_tokens
from .recent import Recent

PADDING = 3  # columns read after the end token; the further ones say the same again
SAME_MEANING = 0.8  # likeness from which a word is another name of the concept
MOST_NAMES = 8
MOST_MIDDLES = 256  # templates in which neutral words are remembered: more than an edit has
FAR = 0.5  # and below which it says nothing of it
# Letters, and syllables of a script that text encoders do not learn: in a row they mean nothing.
NONSENSE = ("qzxvjkwf", "ꀀꆈꌠꁱꂷꃀꄉꇁ")

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
NEAR_TEMPLATES = {  # for what is near and has to stay; the first is the plainest
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
WORDS = {"object": words.NOUNS + words.PHRASES, "identity": words.NAMES, "style": words.STYLES}
NEUTRAL = {type: several[5 :: len(several) // 12] for type, several in WORDS.items()}  # spread over the list
# Every noun beside another and in a style too, since an edit that keeps each word apart may still harm them together.
CAPTIONS = (
    words.CAPTIONS
    + tuple(f"a {word} picture" for word in words.COLOURS + words.ADJECTIVES)
    + tuple(
        f"a {words.STYLES[7 * i % len(words.STYLES)]} {noun} and a {other}"
        for i, (noun, other) in enumerate(zip(words.NOUNS[::2], words.NOUNS[1::2], strict=True))
    )
)


def with_article(template: str, name: str) -> str:
    """The template with `an` for an `a` before the name if that begins with a vowel."""
    article = r"\1n {}" if name[:1].lower() in "aeiou" else r"\1 {}"
    return re.sub(r"\b([Aa]) \{\}", article, template)


def fill(template: str, name: str) -> str:
    """The template with the name in it, behind the right article."""
    return with_article(template, name).replace("{}", name)


def plain(type: str, name: str) -> str:
    """The plainest prompt for a name."""
    return fill(NEAR_TEMPLATES[type][0], name)


def nonsense(alphabet: str, length: int) -> list[str]:
    """Strings of so many signs with spaces between, one that begins with each sign of an alphabet."""
    return [" ".join(alphabet[(start + 3 * i) % len(alphabet)] for i in range(length)) for start in range(len(alphabet))]


@dataclass(frozen=True)
class Reading:
    """What a text encoder makes of a prompt, up to PADDING columns after the end token: n tokens, columns [n, D]."""

    tokens: tuple[Token, ...]
    columns: Tensor

    @property
    def end(self) -> Tensor:
        """The end token's column [D], which sums the prompt up."""
        return self.columns[[token.kind for token in self.tokens].index("end")].double()


@dataclass(frozen=True)
class Place:
    """A prompt's columns as they stand to a name: its own tokens' [m, D], and all that come after [n, D]."""

    mention: Tensor
    after: Tensor

    @property
    def columns(self) -> Tensor:
        return torch.cat([self.mention, self.after])


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


class Reader:
    """Prompts as a host's text encoder sees them, each read once; prompts of one length are read together."""

    def __init__(self, host: DiffusionHost, known: MutableMapping[str, Reading]):
        self.host, self.known = host, known
        self.tokens: dict[str, tuple[Token, ...]] = {}

    def tokenize(self, text: str) -> tuple[Token, ...]:
        """The host's tokens of a text, asked for once."""
        if text not in self.tokens:
            self.tokens[text] = self.host.tokenize(text)
        return self.tokens[text]

    def read(self, texts: Iterable[str]) -> list[Reading]:
        """The reading of each prompt."""
        texts = list(texts)
        lengths: dict[int, dict[str, tuple[Token, ...]]] = {}
        for text in dict.fromkeys(texts):
            self.host.check_interrupt()
            if text not in self.known:
                tokens = self.tokenize(text)
                end = [token.kind for token in tokens].index("end")
                tokens = tokens[: end + 1 + PADDING]
                lengths.setdefault(len(tokens), {})[text] = tokens
        with self.host.reading(sum(map(len, lengths.values()))):
            for length, several in sorted(lengths.items()):
                contexts = self.host.contexts(list(several), length).cpu()
                for (text, tokens), columns in zip(several.items(), contexts, strict=True):
                    self.known[text] = Reading(tokens[: len(columns)], columns)
        return [self.known[text] for text in texts]

    def place(self, template: str, name: str) -> Place | None:
        """The columns of the template with the name in it; None where the tokenizer does not keep the name whole."""
        sought, (reading,) = self.tokenize(name), self.read([fill(template, name)])
        before = template.rsplit("{}", 1)[0].replace("{}", name)  # where the name may stand as well
        index = len(find_tokens(self.tokenize(before), sought))
        mentions = find_tokens(reading.tokens, sought)
        if index >= len(mentions):
            return None
        columns, mention = reading.columns.double(), mentions[index]
        return Place(columns[mention], columns[mention[-1] + 1 :])

    def columns(self, templates: Sequence[str], name: str) -> Tensor:
        """The name's columns [N, D] in all templates, from the name on; raises ForgetError where there are none."""
        places = [self.place(template, name) for template in templates]
        if not any(places):
            raise ForgetError(
                f"`{name}` cannot be kept: the tokenizer drops it or cuts it off. Use a shorter name in words."
            )
        return torch.cat([place.columns for place in places if place])


class Common(NamedTuple):
    """What one text encoder has made of the prompts that every edit needs."""

    readings: dict[str, Reading]
    neutral: Recent[tuple[tuple[str, ...], str], dict[str, Place | None]]  # (words, template) -> word -> its place


_common: dict[str, Common] = {}  # of the last text encoder


def recall(host: DiffusionHost) -> Common:
    """What is known of a host's text encoder, which is recognised by what it makes of a prompt."""
    (first,) = Reader(host, {}).read([CAPTIONS[0]])
    encoder = hashlib.sha256(first.columns.numpy().tobytes()).hexdigest()
    if encoder not in _common:
        _common.clear()
    return _common.setdefault(encoder, Common({}, Recent(MOST_MIDDLES)))


class Lexicon(Reader):
    """Common words as a text encoder sees them: what an edit leaves alone, who is near whom, what is neutral."""

    def __init__(self, host: DiffusionHost):
        self.common = recall(host)
        super().__init__(host, ChainMap({}, self.common.readings))
        self.types = [type for type, several in WORDS.items() for _ in several]
        self.words = [word for several in WORDS.values() for word in several]
        prompts = [plain(type, word) for type, word in zip(self.types, self.words, strict=True)]
        self.readings = Reader(host, self.common.readings).read([*prompts, *CAPTIONS])
        self.meanings = torch.stack([reading.end for reading in self.readings[: len(prompts)]])

    def likeness(self, names: Sequence[str], type: str) -> Tensor:
        """How like each word is to the nearest of the names: the cosine of their end tokens, less what all words of
        the type have in common; -1 for words of other types."""
        own = self.offsets([plain(type, name) for name in names], type)
        own = own[torch.tensor([self.knows(name, type) for name in names])]
        if not len(own):
            return self.meanings.new_full((len(self.words),), -1.0)
        centre, mine = self.centre(type), torch.tensor([other == type for other in self.types])
        likeness = F.cosine_similarity(own[:, None], (self.meanings - centre)[None], dim=-1).max(0).values
        return torch.where(mine, likeness, -1.0)

    def centre(self, type: str) -> Tensor:
        """What the end tokens [D] of all words of a type have in common."""
        return self.meanings[torch.tensor([other == type for other in self.types])].mean(0)

    def offsets(self, prompts: Sequence[str], type: str) -> Tensor:
        """The end tokens' columns [n, D] of prompts, less what all words of the type have in common."""
        return torch.stack([reading.end for reading in self.read(prompts)]) - self.centre(type)

    def knows(self, name: str, type: str) -> bool:
        """Whether the text encoder tells a name from nonsense of about as many tokens: it does not where most of that would
        be another name of it."""
        count = self.length(name)
        template = with_article(NEAR_TEMPLATES[type][0], name)
        own = self.offsets([template.replace("{}", name)], type)
        for alphabet in NONSENSE:
            several = nonsense(alphabet, max(1, round(count / self.length(alphabet[0]))))
            prompts = [template.replace("{}", other) for other in several if other != name.lower()]
            Reader(self.host, self.common.readings).read(prompts)
            if F.cosine_similarity(own, self.offsets(prompts, type), dim=-1).median() >= SAME_MEANING:
                return False
        return True

    def length(self, name: str) -> int:
        """How many tokens a name has, at least one."""
        return max(1, sum(token.kind == "word" for token in self.tokenize(name)))

    def same(self, likeness: Tensor) -> set[str]:
        """The words that are other names of a concept; none where they are many, since then the text encoder does not know
        the name and takes many words for one."""
        same = {word for word, like in zip(self.words, likeness, strict=True) if like >= SAME_MEANING}
        return same if len(same) <= MOST_NAMES else set()

    def neighbours(self, likeness: Tensor, most: int) -> list[str]:
        """The words of its type most like a concept that are not its other names."""
        likeness = likeness.masked_fill(likeness >= SAME_MEANING, -1)
        return [self.words[i] for i in likeness.argsort(descending=True)[:most] if likeness[i] > -1]

    def neutral(self, likeness: Tensor, type: str) -> list[str]:
        """The words of NEUTRAL[type] that say nothing of a concept; all of them where none is."""
        words = NEUTRAL[type]
        return [word for word in words if likeness[self.words.index(word)] < FAR] or list(words)

    def middle(self, template: str, type: str, neutral: Sequence[str]) -> Place | None:
        """What some words of NEUTRAL[type] have in common in a template; None where the tokenizer keeps none whole."""
        words = NEUTRAL[type]
        if (words, template) not in self.common.neutral:
            reader = Reader(self.host, {})
            reader.read([fill(template, word) for word in words])
            self.common.neutral[words, template] = {word: reader.place(template, word) for word in words}
        places = self.common.neutral[words, template]
        whole = [places[word] for word in neutral if places[word]]
        return mean_place(whole) if whole else None

    def kept(self, names: Sequence[str]) -> Tensor:
        """The columns [N, D] of all common prompts in which none of the names occurs."""
        sought = [self.tokenize(name) for name in names]
        kept = [r.columns for r in self.readings if not any(find_tokens(r.tokens, name) for name in sought)]
        return torch.cat(kept).double()
