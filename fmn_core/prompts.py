"""Prompts as a host's tokenizer and text encoder make them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Token:
    """One column of the cross-attention map: the tokenizer's piece and its id, below zero for an embedding's."""

    id: int
    text: str
    kind: str  # start, word, end (the first after the words) or padding

    @property
    def ends_word(self) -> bool:
        """CLIP's BPE marks a word's last piece with `</w>`; an embedding's columns are words of their own."""
        return self.text.endswith("</w>") or self.id < 0


@dataclass(frozen=True)
class Prompts:
    """Encoded prompts: embeddings [B, T, D], pooled embeddings [B, P] or None, and T tokens for each prompt."""

    texts: tuple[str, ...]
    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor | None
    tokens: tuple[tuple[Token, ...], ...]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, rows: int | list[int]) -> Prompts:
        """The prompts at these row numbers, repeats allowed."""
        rows = [rows] if isinstance(rows, int) else rows
        return replace(
            self,
            texts=tuple(self.texts[r] for r in rows),
            prompt_embeds=self.prompt_embeds[rows],
            pooled_prompt_embeds=None if self.pooled_prompt_embeds is None else self.pooled_prompt_embeds[rows],
            tokens=tuple(self.tokens[r] for r in rows),
        )

    def expand(self, count: int) -> Prompts:
        """A single prompt, so many times; unlike that of indexing, its gradient is the same from run to run on any number of
        threads."""
        return replace(
            self,
            texts=self.texts * count,
            prompt_embeds=self.prompt_embeds.expand(count, -1, -1),
            pooled_prompt_embeds=None if self.pooled_prompt_embeds is None else self.pooled_prompt_embeds.expand(count, -1),
            tokens=self.tokens * count,
        )

    @classmethod
    def cat(cls, batches: Sequence[Prompts]) -> Prompts:
        """Batches of prompts as one, tiled to a common length where they differ, as hosts do."""
        pooled = [batch.pooled_prompt_embeds for batch in batches if batch.pooled_prompt_embeds is not None]
        length = math.lcm(*(batch.prompt_embeds.shape[1] for batch in batches))
        return cls(
            texts=tuple(text for batch in batches for text in batch.texts),
            prompt_embeds=torch.cat([tile(batch.prompt_embeds, length) for batch in batches]),
            pooled_prompt_embeds=torch.cat(pooled) if pooled else None,
            tokens=tuple(row * (length // len(row)) for batch in batches for row in batch.tokens),
        )

    def mean(self) -> Prompts:
        """What the prompts have in common, as one prompt: the mean of those that are as long as most."""
        ends = [[token.kind for token in tokens].index("end") for tokens in self.tokens]
        common = statistics.mode(ends)
        alike = self[[row for row, end in enumerate(ends) if end == common]]
        pooled = alike.pooled_prompt_embeds
        return replace(
            alike[0],
            prompt_embeds=alike.prompt_embeds.mean(0, keepdim=True),
            pooled_prompt_embeds=None if pooled is None else pooled.mean(0, keepdim=True),
        )


def tile(tokens: Tensor, length: int) -> Tensor:
    """A mask [T] or embeddings [B, T, D] of tokens, repeated to this length."""
    times = length // tokens.shape[-1 if tokens.ndim == 1 else 1]
    return tokens.repeat(times) if tokens.ndim == 1 else tokens.repeat(1, times, 1)
