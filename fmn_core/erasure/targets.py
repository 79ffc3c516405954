"""What a text encoder makes of a plan: the embeddings that move, what each should become, and what must not move."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ForgetError
from ..patch.statistics import TextStatistics
from ..text.features import TokenSpan, VocabularyIndex, pair_spans
from ..text.name_words import own_span
from ..text.templates import KEEP_TEMPLATES, NEAR_TEMPLATES, fill
from ..text.tokens import find_tokens
from .plan import ErasurePlan
from .solve import second_moment

KEPT, NEAR, INSIDE, PRESERVE, EMPTY, RIDGE = 100.0, 10.0, 10.0, 100.0, 100.0, 1e-3  # weights; the concept's is 1


@dataclass(frozen=True)
class PlanFeatures:
    """What the text encoder makes of a plan: of each concept embeddings [N, D] and their targets [N, D]; embeddings of near
    words, of those that the user preserves, and of those inside names that stay or cannot; the empty prompt's; E[x x^T] of
    all that should stay, at its weight; and the statistics that a patch remembers."""

    concepts: dict[str, tuple[Tensor, Tensor]]
    near: dict[str, Tensor]
    preserved: dict[str, Tensor]
    inside: dict[str, Tensor]
    freed: dict[str, Tensor]
    empty: Tensor
    kept: Tensor
    statistics: TextStatistics

    @classmethod
    def of(cls, vocabulary: VocabularyIndex, plan: ErasurePlan) -> PlanFeatures:
        vocabulary.read(plan.texts())
        near = {word: vocabulary.embeds(NEAR_TEMPLATES[plan.type], word) for word in plan.neighbours}
        preserved, inside, freed = (
            {word: vocabulary.embeds(KEEP_TEMPLATES[plan.type], word) for word in words}
            for words in (plan.preserve, plan.parts, plan.freed)
        )
        empty = vocabulary.host.encode_prefix([""], len(vocabulary.tokenize("")))[0].cpu().double()
        kept = kept_moment(vocabulary.kept(plan.forgotten), near, preserved, empty, inside)
        attended = reduce(torch.add, (attended_moment(vocabulary, plan, name, len(empty)) for name in plan.names))
        return cls(
            concepts={name: concept_targets(vocabulary, plan, name, plan.templates) for name in plan.names},
            near=near,
            preserved=preserved,
            inside=inside,
            freed=freed,
            empty=empty,
            kept=kept,
            statistics=TextStatistics.of(attended, kept, len(plan.names)),
        )


def concept_targets(
    vocabulary: VocabularyIndex, plan: ErasurePlan, name: str, templates: tuple[str, ...]
) -> tuple[Tensor, Tensor]:
    """Embeddings [N, D] of prompts with the concept's names, and their targets [N, D].

    remove: the mean of neutral words at the same tokens; replace: the target; correct: the name's own embeddings without
    what they share with the dominant concept, so that another of its meanings comes through. Raises ForgetError where no
    prompt keeps the name whole.
    """
    phrases = [vocabulary.tokenize(other) for other in plan.names[name]]
    found = []
    for template in templates:
        bare = vocabulary.tokenize(template.replace("{}", ""))
        middle = vocabulary.middle(template, plan.type, plan.neutral)
        theirs = vocabulary.span(template, plan.target) if plan.target else middle
        if not (theirs and middle) or any(find_tokens(bare, phrase) for phrase in phrases):
            continue  # the template itself names the concept
        ours = [own_span(vocabulary, template, other, plan.parts) for other in plan.names[name]]
        found += [
            correction(own, theirs, middle) if plan.mode == "correct" else pair_spans(own, theirs) for own in ours if own
        ]
    if not found:
        raise ForgetError(
            f"No prompt with `{name}`, or with what should take its place, keeps it whole: the tokenizer joins it to a "
            "neighbour, drops it or cuts it off."
        )
    return torch.cat([x for x, _ in found]), torch.cat([y for _, y in found])


def correction(word: TokenSpan, dominant: TokenSpan, middle: TokenSpan) -> tuple[Tensor, Tensor]:
    """A word's embeddings, and the same less their component along what sets the dominant meaning apart."""
    x, towards = pair_spans(word, dominant)
    _, neutral = pair_spans(word, middle)
    n = min(len(x), len(neutral))
    direction = F.normalize(towards[:n] - neutral[:n], dim=1)
    return x[:n], x[:n] - direction * ((x[:n] - neutral[:n]) * direction).sum(1, keepdim=True)


def attended_moment(vocabulary: VocabularyIndex, plan: ErasurePlan, name: str, length: int) -> Tensor:
    """E[x x^T] [D, D] of a concept's prompts of this length from the name on, which is what pictures attend to: mostly
    padding, and of that the last token read stands for all further ones."""
    moment: Tensor | float = 0.0
    count: Tensor | float = 0.0
    for template, other in ((t, n) for t in (*plan.prompts, *plan.templates[:1]) for n in plan.names[name]):
        span = vocabulary.span(template, other)
        if span:
            before = len(vocabulary.read([fill(template, other)])[0].token_embeds) - len(span.token_embeds)
            weights = torch.ones(len(span.token_embeds)).double()
            weights[-1] += max(length - before - len(weights), 0)
            moment = moment + (span.token_embeds.T * weights) @ span.token_embeds
            count = count + weights.sum()
    if isinstance(moment, float):
        raise ForgetError(f"No prompt with `{name}` keeps it whole: the tokenizer joins it to a neighbour or drops it.")
    return moment / count


def kept_moment(
    common: Tensor,
    near: dict[str, Tensor],
    preserved: dict[str, Tensor],
    empty: Tensor,
    inside: dict[str, Tensor] | None = None,
) -> Tensor:
    """E[x x^T] [D, D] of all that should stay, each kind at its weight."""
    kept = KEPT * second_moment(common) + EMPTY * second_moment(empty)
    for weight, words in ((NEAR, near), (INSIDE, inside), (PRESERVE, preserved)):
        if words:
            kept = kept + weight * second_moment(torch.cat(list(words.values())))
    return kept + RIDGE * kept.diagonal().mean() * torch.eye(len(kept), dtype=kept.dtype)
