"""Heat maps of a generation's words, as pictures for its gallery."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from fmn_core.attention import AttentionRecording
from fmn_core.errors import ForgetError
from fmn_core.heatmap import overlay, word_heat_maps, words_of
from fmn_core.report_picture import font

from .webui import picture_of

LABEL, GAP = 28, 8  # pixels of a word's strip and between tiles


def phrases_of(recording: AttentionRecording, words: str) -> list[str]:
    """The phrases to show, between commas or lines; all the prompt's words where none are given. Raises ForgetError where
    there are none."""
    asked = [phrase.strip() for phrase in re.split(r"[,\n]", words) if phrase.strip()]
    found = asked or list(dict.fromkeys(word for word, _ in words_of(recording.tokens)))
    if not found:
        raise ForgetError("The prompt has no words to show.")
    return found


def heat_pictures(
    recording: AttentionRecording, images: Tensor, words: str, layout: str, opacity: float, colours: str
) -> list[list[tuple[str, Image.Image]]]:
    """For every picture of [B, H, W, 3] in 0..1 its heat maps, each with its words: one a phrase, or one `grid` of all.

    All of them have one scale. Raises ForgetError where nothing was recorded and for words that the prompt does not have.
    """
    if not recording.maps:
        raise ForgetError("No attention was recorded: heat maps need SD1.x, SD2.x or SDXL, and a sampler that ran.")
    phrases = phrases_of(recording, words)
    heat = word_heat_maps(recording, phrases, *images.shape[1:3]).nan_to_num()
    if heat.shape[1] != len(images):
        raise ForgetError(f"The recording is of {heat.shape[1]} pictures, and {len(images)} came out.")
    heat = heat / heat.max().clamp(min=1e-12)
    found = []
    for row, image in enumerate(images.float().cpu()):
        tiles = [(phrase, picture_of(overlay(image, heat[i, row], opacity, colours))) for i, phrase in enumerate(phrases)]
        if layout == "grid":
            tiles = [(", ".join(phrases), grid([("picture", picture_of(image)), *tiles]))]
        found.append(tiles)
    return found


def grid(tiles: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Pictures of one size side by side, about as wide as high, each over its word."""
    width, height = tiles[0][1].size
    columns = math.ceil(math.sqrt(len(tiles)))
    rows = math.ceil(len(tiles) / columns)
    canvas = Image.new("RGB", (columns * (width + GAP) - GAP, rows * (height + LABEL + GAP) - GAP), "white")
    pen = ImageDraw.Draw(canvas)
    for number, (word, picture) in enumerate(tiles):
        x, y = number % columns * (width + GAP), number // columns * (height + LABEL + GAP)
        canvas.paste(picture, (x, y))
        pen.text((x + 4, y + height + 4), word, "black", font(16))
    return canvas


def to_images(batch: Tensor) -> Tensor:
    """The host's [B, 3, H, W] as [B, H, W, 3]."""
    return torch.movedim(batch.detach(), 1, -1)
