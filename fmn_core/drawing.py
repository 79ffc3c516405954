"""Ink, letters and lines of text of the pack's pictures."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

INK, FAINT, PAPER = "#1c2833", "#808b96", "#ffffff"
MOST_LETTERS = 200  # of a line that is cut


def font(size: int):
    """Pillow's own font, which has one size before Pillow 10.1."""
    try:
        return ImageFont.load_default(size)
    except TypeError:
        return ImageFont.load_default()


def wrapped(pen: ImageDraw.ImageDraw, text: str, width: int, size: int = 14) -> list[str]:
    """The lines of a text that is to be this wide, in letters of this size."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if pen.textlength(longer, font(size)) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def shortened(pen: ImageDraw.ImageDraw, text: str, width: float, size: int) -> str:
    """The text, cut where it is wider than this."""
    if pen.textlength(text, font(size)) <= width:
        return text
    text = text[:MOST_LETTERS]
    while text and pen.textlength(text + "...", font(size)) > width:
        text = text[:-1]
    return text and text + "..."


def as_image(picture: Tensor) -> Image.Image:
    """A picture [H, W, 3] in 0..1 as Pillow's."""
    return Image.fromarray((picture.clamp(0, 1) * 255).round().byte().cpu().numpy())


def as_tensor(canvas: Image.Image) -> Tensor:
    """Pillow's picture as [H, W, 3] in 0..1."""
    return torch.from_numpy(np.asarray(canvas).copy()).float() / 255
