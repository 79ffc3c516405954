"""What a text encoder makes of prompts: the embeddings of a name in them, what each should become, and what must not
move."""

from __future__ import annotations

import hashlib
from collections import ChainMap
from collections.abc import Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ForgetError
from ..host import DiffusionHost, Token
from .feature_store import load_embeds, save_embeds
from .recent import Recent
from .templates import CAPTIONS, NEAR_TEMPLATES, NEUTRAL, NONSENSE, WORDS, fill, nonsense, plain_prompt, with_article
from .tokens import find_tokens

PADDING = 3  # tokens read after the end token; the further ones say the same again
SAME_MEANING = 0.8  # likeness from which a word is another name of the concept
FAR = 0.5  # and below which it says nothing of it
MOST_NAMES = 8
MOST_MIDDLES = 256  # templates in which neutral words are remembered: more than an edit has


@dataclass(frozen=True)
class PromptFeatures:
    """What a text encoder makes of a prompt, up to PADDING tokens after the end: n tokens and their embeddings [n, D]."""

    tokens: tuple[Token, ...]
    token_embeds: Tensor

    @property
    def end(self) -> Tensor:
        """The end token's embedding [D], which sums the prompt up."""
        return self.token_embeds[[token.kind for token in self.tokens].index("end")].double()


@dataclass(frozen=True)
class TokenSpan:
    """The embeddings of a name's tokens in a prompt [m, D], and of all tokens after them [n, D]."""

    name: Tensor
    suffix: Tensor

    @property
    def token_embeds(self) -> Tensor:
        """All of them, [m + n, D]."""
        return torch.cat([self.name, self.suffix])


def mean_span(spans: Sequence[TokenSpan]) -> TokenSpan:
    """What several names have in common in one prompt."""
    shortest = min(len(span.suffix) for span in spans)
    name = torch.stack([span.name.mean(0) for span in spans]).mean(0, keepdim=True)
    return TokenSpan(name, torch.stack([span.suffix[:shortest] for span in spans]).mean(0))


def pair_spans(ours: TokenSpan, theirs: TokenSpan) -> tuple[Tensor, Tensor]:
    """Embeddings [N, D] and their targets [N, D]: those of the same tokens where the prompt names the other."""
    shortest = min(len(ours.suffix), len(theirs.suffix))
    target = theirs.name.mean(0, keepdim=True).expand(len(ours.name), -1)
    return torch.cat([ours.name, ours.suffix[:shortest]]), torch.cat([target, theirs.suffix[:shortest]])


class TextFeatureExtractor:
    """Prompts as a host's text encoder sees them, each read once; prompts of one length are read together."""

    def __init__(self, host: DiffusionHost, cache: MutableMapping[str, PromptFeatures]):
        self.host, self.cache = host, cache
        self.tokens: dict[str, tuple[Token, ...]] = {}

    def tokenize(self, text: str) -> tuple[Token, ...]:
        """The host's tokens of a text, asked for once."""
        if text not in self.tokens:
            self.host.check_interrupt()
            self.tokens[text] = self.host.tokenize(text)
        return self.tokens[text]

    def read(self, texts: Iterable[str]) -> list[PromptFeatures]:
        """The features of each prompt."""
        texts = list(texts)
        lengths: dict[int, dict[str, tuple[Token, ...]]] = {}
        for text in dict.fromkeys(texts):
            if text not in self.cache:
                tokens = self.tokenize(text)
                end = [token.kind for token in tokens].index("end")
                tokens = tokens[: end + 1 + PADDING]
                lengths.setdefault(len(tokens), {})[text] = tokens
        with self.host.reading(sum(map(len, lengths.values()))):
            for length, tokens_of in sorted(lengths.items()):
                prefixes = self.host.encode_prefix(list(tokens_of), length).cpu()
                for (text, tokens), embeds in zip(tokens_of.items(), prefixes, strict=True):
                    self.cache[text] = PromptFeatures(tokens[: len(embeds)], embeds)
        return [self.cache[text] for text in texts]

    def span(self, template: str, name: str) -> TokenSpan | None:
        """The name's embeddings in the template; None where the tokenizer does not keep the name whole."""
        phrase, (features,) = self.tokenize(name), self.read([fill(template, name)])
        before = template.rsplit("{}", 1)[0].replace("{}", name)  # where the name may stand as well
        number = len(find_tokens(self.tokenize(before), phrase))
        mentions = find_tokens(features.tokens, phrase)
        if number >= len(mentions):
            return None
        embeds, indices = features.token_embeds.double(), mentions[number]
        return TokenSpan(embeds[indices], embeds[indices[-1] + 1 :])

    def embeds(self, templates: Sequence[str], name: str) -> Tensor:
        """The embeddings [N, D] in all templates, from the name on; raises ForgetError where there are none."""
        spans = [self.span(template, name) for template in templates]
        if not any(spans):
            raise ForgetError(
                f"`{name}` cannot be preserved: the tokenizer drops it or cuts it off. Use a shorter name in words."
            )
        return torch.cat([span.token_embeds for span in spans if span])


class FeatureCache(NamedTuple):
    """What one text encoder has made of the prompts that every edit needs."""

    encoder: str  # its hash
    features: dict[str, PromptFeatures]
    neutral: Recent[tuple[tuple[str, ...], str], dict[str, TokenSpan | None]]  # (words, template) -> word -> its span


_cache: dict[str, FeatureCache] = {}  # of the last text encoder


def cached_features(host: DiffusionHost) -> FeatureCache:
    """What is known of a host's text encoder, which is recognised by what it makes of a prompt."""
    (first,) = TextFeatureExtractor(host, {}).read([CAPTIONS[0]])
    encoder = hashlib.sha256(first.token_embeds.numpy().tobytes()).hexdigest()
    if encoder not in _cache:
        _cache.clear()
    return _cache.setdefault(encoder, FeatureCache(encoder, {}, Recent(MOST_MIDDLES)))


class VocabularyIndex(TextFeatureExtractor):
    """Common words as a text encoder sees them: what an edit leaves alone, who is near whom, what is neutral."""

    def __init__(self, host: DiffusionHost):
        self.common = cached_features(host)
        super().__init__(host, ChainMap({}, self.common.features))
        self.types = [kind for kind, words in WORDS.items() for _ in words]
        self.words = [word for words in WORDS.values() for word in words]
        prompts = [plain_prompt(kind, word) for kind, word in zip(self.types, self.words, strict=True)]
        self.features = self.read_common([*prompts, *CAPTIONS])
        self.meanings = torch.stack([features.end for features in self.features[: len(prompts)]])

    def read_common(self, texts: list[str]) -> list[PromptFeatures]:
        """The features of the common prompts: as they were read before, in this process or an earlier one, or else now."""
        folder, encoder, cache = self.host.cache_folder(), self.common.encoder, self.common.features
        missing = [text for text in texts if text not in cache]
        stored = load_embeds(folder, encoder, texts) if folder and missing else None
        if stored:
            cache |= {text: self.features_of(text, embeds) for text, embeds in zip(texts, stored, strict=True)}
        found = TextFeatureExtractor(self.host, cache).read(texts)
        if folder and missing and not stored:
            save_embeds(folder, encoder, texts, [features.token_embeds for features in found])
        return found

    def features_of(self, text: str, embeds: Tensor) -> PromptFeatures:
        """The features of a prompt whose embeddings [n, D] are known."""
        return PromptFeatures(self.tokenize(text)[: len(embeds)], embeds)

    def likeness(self, names: Sequence[str], kind: str) -> Tensor:
        """How like each word is to the nearest of the names: the cosine of their end tokens, less what all words of
        the kind have in common; -1 for words of other types."""
        own = self.offsets([plain_prompt(kind, name) for name in names], kind)
        own = own[torch.tensor([self.knows(name, kind) for name in names])]
        if not len(own):
            return self.meanings.new_full((len(self.words),), -1.0)
        centre, mine = self.centre(kind), torch.tensor([other == kind for other in self.types])
        likeness = F.cosine_similarity(own[:, None], (self.meanings - centre)[None], dim=-1).max(0).values
        return torch.where(mine, likeness, -1.0)

    def centre(self, kind: str) -> Tensor:
        """What the end tokens [D] of all words of a kind have in common."""
        return self.meanings[torch.tensor([other == kind for other in self.types])].mean(0)

    def offsets(self, prompts: Sequence[str], kind: str) -> Tensor:
        """The end tokens' embeddings [n, D] of prompts, less what all words of the kind have in common."""
        return torch.stack([features.end for features in self.read(prompts)]) - self.centre(kind)

    def knows(self, name: str, kind: str) -> bool:
        """Whether the text encoder tells a name from nonsense of about as many tokens: it does not where most of that would
        be another name of it."""
        count = self.length(name)
        template = with_article(NEAR_TEMPLATES[kind][0], name)
        own = self.offsets([template.replace("{}", name)], kind)
        for alphabet in NONSENSE:
            others = nonsense(alphabet, max(1, round(count / self.length(alphabet[0]))))
            prompts = [template.replace("{}", other) for other in others if other != name.lower()]
            TextFeatureExtractor(self.host, self.common.features).read(prompts)
            if F.cosine_similarity(own, self.offsets(prompts, kind), dim=-1).median() >= SAME_MEANING:
                return False
        return True

    def length(self, name: str) -> int:
        """How many tokens a name has, at least one."""
        return max(1, sum(token.kind == "word" for token in self.tokenize(name)))

    def synonyms(self, names: Sequence[str], kind: str) -> set[str]:
        """The words that are other names of a concept; none where they are many, since then the text encoder does not know
        the name and takes many words for one."""
        likeness = self.likeness(names, kind)
        same = {word for word, like in zip(self.words, likeness, strict=True) if like >= SAME_MEANING}
        return same if len(same) <= MOST_NAMES else set()

    def neighbours(self, likeness: Tensor, most: int) -> list[str]:
        """The words of its kind most like a concept that are not its other names."""
        likeness = likeness.masked_fill(likeness >= SAME_MEANING, -1)
        return [self.words[i] for i in likeness.argsort(descending=True)[:most] if likeness[i] > -1]

    def neutral(self, likeness: Tensor, kind: str) -> list[str]:
        """The words of NEUTRAL[kind] that say nothing of a concept; all of them where none is."""
        words = NEUTRAL[kind]
        return [word for word in words if likeness[self.words.index(word)] < FAR] or list(words)

    def middle(self, template: str, kind: str, neutral: Sequence[str]) -> TokenSpan | None:
        """What some words of NEUTRAL[kind] have in common in a template; None where the tokenizer keeps none whole."""
        words = NEUTRAL[kind]
        if (words, template) not in self.common.neutral:
            extractor = TextFeatureExtractor(self.host, {})
            extractor.read([fill(template, word) for word in words])
            self.common.neutral[words, template] = {word: extractor.span(template, word) for word in words}
        spans = self.common.neutral[words, template]
        whole = [span for word in neutral if (span := spans[word])]
        return mean_span(whole) if whole else None

    def kept(self, names: Sequence[str]) -> Tensor:
        """The embeddings [N, D] of all common prompts in which none of the names occurs."""
        phrases = [self.tokenize(name) for name in names]
        kept = [f.token_embeds for f in self.features if not any(find_tokens(f.tokens, phrase) for phrase in phrases)]
        return torch.cat(kept).double()
