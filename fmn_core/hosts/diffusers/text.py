"""Prompts in a diffusers pipeline: the tokens of its tokenizer, and vectors in the place of words."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...host import Token


def tokens_of(tokenizer, ids: list[int]) -> tuple[Token, ...]:
    """The columns of a prompt that a tokenizer has made these ids of; below zero those that were added to its own."""
    words = tokenizer.vocab_size
    tokens: list[Token] = []
    for place, (id, piece) in enumerate(zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True)):
        ended = bool(tokens) and tokens[-1].kind in ("end", "padding")
        kind = "start" if place == 0 else "padding" if ended else "end" if id == tokenizer.eos_token_id else "word"
        tokens.append(Token(-1 - id if id >= words else id, piece, kind))
    return tuple(tokens)


def put_into(columns: list[int], vectors: Tensor) -> Callable:
    """A forward hook for an embedding that puts vectors into these columns of its output, from the start again at need."""
    rows = torch.arange(len(columns)) % len(vectors)

    def hook(module, args, output):
        output = output.clone()
        output[:, columns] = vectors[rows].to(output)
        return output

    return hook
