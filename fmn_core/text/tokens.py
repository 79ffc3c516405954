"""A prompt's words, and the columns of the cross-attention that they have."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ForgetError
from ..host import DiffusionHost, Prompts, Token, tile

# The vocabulary writes bytes without a printable character as those from 256 on (Radford et al., 2019, GPT-2's encoder).
PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
BYTE_OF = {chr(b): b for b in PRINTABLE} | {chr(256 + i): b for i, b in enumerate(sorted({*range(256)} - {*PRINTABLE}))}
MOST_PHRASES = 1000  # that are looked at together


def words_of(tokens: tuple[Token, ...]) -> list[tuple[str, list[int]]]:
    """The prompt's words in order, each with its columns: pieces of a word are merged."""
    words, pieces, columns = [], "", []
    for column, token in enumerate(tokens):
        if token.kind != "word":
            continue
        pieces += token.text.removesuffix("</w>")
        columns.append(column)
        if token.ends_word:
            words.append((readable(pieces), columns))
            pieces, columns = "", []
    return words


def readable(pieces: str) -> str:
    """Text of byte-level BPE pieces."""
    return bytes(BYTE_OF.get(c, ord("?")) for c in pieces).decode("utf-8", "replace")


def phrases_of(text: str) -> list[str]:
    """The phrases that a user typed, separated by commas or lines; raises ForgetError for more than MOST_PHRASES."""
    phrases = [phrase.strip() for phrase in re.split(r"[,\n]", text) if phrase.strip()]
    if len(phrases) > MOST_PHRASES:
        raise ForgetError(f"`words` names {len(phrases)} words or phrases: name at most {MOST_PHRASES}.")
    return phrases


def distinct_words(tokens: tuple[Token, ...]) -> list[str]:
    """Every word of the prompt once, without punctuation alone."""
    return [word for word in dict.fromkeys(word for word, _ in words_of(tokens)) if re.search(r"\w", word)]


def columns_of(tokens: tuple[Token, ...], phrase: str) -> list[int]:
    """Columns of every mention of a phrase; none where it is not in the prompt."""
    words = words_of(tokens)
    sought = re.sub(r"\s+", "", phrase.lower())
    columns = []
    for start in range(len(words)):
        text, found = "", []
        for word, word_columns in words[start:]:
            text += word
            found += word_columns
            if text == sought:
                columns += [column for column in found if column not in columns]
            if len(text) >= len(sought):
                break
    return columns


def find_phrase(tokens: tuple[Token, ...], phrase: str) -> list[int]:
    """Columns of every mention of a phrase; raises ForgetError with the prompt's words where there is none."""
    columns = columns_of(tokens, phrase)
    if not columns:
        there = ", ".join(dict.fromkeys(word for word, _ in words_of(tokens)))
        raise ForgetError(f"`{phrase}` is not in the recorded prompt: its words are {there or 'none'}.")
    return columns


def find_tokens(tokens: tuple[Token, ...], phrase: tuple[Token, ...]) -> list[list[int]]:
    """The token indices of every mention of `phrase` in `tokens`, a list each; special tokens are passed over.

    Reading on past special tokens finds a phrase that the tokenizer has split between two chunks of 77.
    """
    indices = [index for index, token in enumerate(tokens) if token.kind == "word"]
    ids = [tokens[index].id for index in indices]
    wanted = [token.id for token in phrase if token.kind == "word"]
    starts = range(len(ids) - len(wanted) + 1) if wanted else ()
    return [indices[start : start + len(wanted)] for start in starts if ids[start : start + len(wanted)] == wanted]


def concept_mask(host: DiffusionHost, name: str, prompt: str, tokens: str) -> Tensor:
    """Boolean mask [T] of the tokens of `prompt` that count as a concept's.

    `tokens`: `concept` (the name's own tokens, every mention), `concept_and_end` (and the end token, once) or
    `concept_onward` (every later token too: a causal text encoder leaks the concept into all of them).
    Raises ForgetError where the tokenizer cuts the name off.
    """
    found = host.tokenize(prompt)
    mentions = find_tokens(found, host.tokenize(name))
    if not mentions:
        raise ForgetError(
            f"No token of the prompt `{prompt}` stands for `{name}`: the tokenizer cuts it off, joins it to a neighbour or "
            "drops it. Use a shorter name in words, with spaces around {} in the template."
        )
    mask = torch.zeros(len(found), dtype=torch.bool)
    for mention in mentions:
        mask[mention] = True
    if tokens == "concept_and_end":
        ends = [index for index, token in enumerate(found) if token.kind == "end"]
        mask[next(end for end in ends if end > mentions[-1][-1])] = True
    elif tokens == "concept_onward":
        mask[mentions[0][0] :] = True
        mask &= torch.tensor([token.kind != "start" for token in found])
    elif tokens != "concept":
        raise ForgetError(
            f"`{tokens}` is not a choice of penalized tokens: use `concept`, `concept_and_end` or `concept_onward`."
        )
    return mask


def concept_masks(host: DiffusionHost, rows: Sequence[tuple[str, str]], tokens: str, prompts: Prompts) -> Tensor:
    """As concept_mask, of several (name, prompt): [B, T] on the host's device, each tiled to the length of the encoded
    prompts."""
    length = prompts.prompt_embeds.shape[1]
    return torch.stack([tile(concept_mask(host, name, text, tokens), length) for name, text in rows]).to(host.device)
