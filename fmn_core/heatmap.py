"""Heat maps as pictures."""

from __future__ import annotations

import re

import torch
from einops import rearrange, repeat
from torch import Tensor

from .attention import AttentionRecording
from .errors import ForgetError
from .hosts.base import Token

# Matplotlib's perceptually uniform colour maps, sampled at nine points: they read in grey and to the colour-blind.
COLOR_MAPS = {
    "viridis": "440154 482878 3e4989 31688e 26828e 1f9e89 35b779 6ece58 fde725",
    "inferno": "000004 1f0c48 550f6d 88226a ba3655 e35933 f98c0a f9c932 fcffa4",
    "magma": "000004 1d1147 51127c 832681 b73779 e75263 fc8961 fec488 fcfdbf",
}

# The vocabulary writes bytes without a printable character as those from 256 on (Radford et al., 2019, GPT-2's encoder).
PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
BYTE_OF = {chr(b): b for b in PRINTABLE} | {chr(256 + i): b for i, b in enumerate(sorted({*range(256)} - {*PRINTABLE}))}


def colorize(heat: Tensor, color_map: str = "inferno") -> Tensor:
    """Colours [..., 3] in 0..1 of values [...] in 0..1."""
    stops = torch.tensor([[int(c[i : i + 2], 16) / 255 for i in (0, 2, 4)] for c in COLOR_MAPS[color_map].split()])
    place = heat.clamp(0, 1) * (len(stops) - 1)
    low = place.floor().long().clamp(max=len(stops) - 2)
    return stops[low].lerp(stops[low + 1], (place - low)[..., None])


def overlay(picture: Tensor, heat: Tensor, opacity: float, color_map: str = "inferno") -> Tensor:
    """A heat map [..., H, W] in 0..1 laid over a picture [..., H, W, 3] in 0..1: none of it shows at opacity 0."""
    return picture.lerp(colorize(heat, color_map), opacity)


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


def find_phrase(tokens: tuple[Token, ...], phrase: str) -> list[int]:
    """Columns of every mention of a phrase; raises ForgetError with the prompt's words where there is none."""
    words = words_of(tokens)
    sought = re.sub(r"\s+", "", phrase.lower())
    columns = []
    for start in range(len(words)):
        text, found = "", []
        for word, word_columns in words[start:]:
            text += word
            found += word_columns
            if text == sought:
                columns += found
            if len(text) >= len(sought):
                break
    if not columns:
        there = ", ".join(dict.fromkeys(word for word, _ in words))
        raise ForgetError(f"`{phrase}` is not in the recorded prompt: its words are {there or 'none'}.")
    return columns


def word_heat_maps(recording: AttentionRecording, phrases: list[str], height: int, width: int) -> Tensor:
    """DAAM's word heat maps [W, B, height, width]: the mean of the global heat map over a phrase's columns.

    Raises ForgetError for a phrase that is not in the prompt and for a recording with nothing in it.
    """
    if not recording.maps:
        raise ForgetError(
            f"Nothing was recorded of the prompt `{recording.text}`: connect the MODEL output of Record Token Attention to "
            "the sampler whose picture this is, and give it the same text and CLIP as the sampler's positive prompt."
        )
    if len(recording.samplers) > 1:
        raise ForgetError(
            "Several samplers ran on one recording, and it holds the last one's attention: use a Record Token Attention "
            "of its own for each sampler."
        )
    columns = [find_phrase(recording.tokens, phrase) for phrase in phrases]
    return torch.stack([recording.heat_maps(c, height, width).mean(1) for c in columns])


def visualize(
    recording: AttentionRecording, image: Tensor, words: str, maximum: float, opacity: float, color_map: str
) -> tuple[Tensor, Tensor, float]:
    """Heat maps over pictures [W * B, H, W, 3], as masks [W * B, H, W] in 0..1, and the share that is brightest.

    `image` [B, H, W, 3] is what was sampled; `words` are phrases separated by commas or lines, empty for all; the
    brightest colour stands for `maximum`, or where that is 0 for the highest share found.
    """
    phrases = [phrase.strip() for phrase in re.split(r"[,\n]", words) if phrase.strip()]
    phrases = phrases or list(dict.fromkeys(word for word, _ in words_of(recording.tokens)))
    if not phrases:
        raise ForgetError("The recorded prompt has no words: wire the prompt's text to Record Token Attention.")
    heat = word_heat_maps(recording, phrases, *image.shape[1:3])
    if heat.shape[1] != len(image):
        raise ForgetError(
            f"The recording is of {heat.shape[1]} pictures and the image input has {len(image)}: "
            "connect the pictures of the sampler that recorded."
        )
    heat = heat.nan_to_num()  # a model that overflows in fp16 attends to nothing in particular
    maximum = maximum or heat.max().item()
    masks = rearrange(heat / max(maximum, 1e-12), "w b y x -> (w b) y x").clamp(0, 1)
    pictures = repeat(image[..., :3].float().cpu(), "b y x c -> (w b) y x c", w=len(phrases))
    return overlay(pictures, masks, opacity, color_map), masks, maximum
