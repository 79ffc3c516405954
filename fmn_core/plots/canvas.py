"""Ink, letters and lines of text of the pack's pictures."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

INK, FAINT, PAPER = "#1c2833", "#808b96", "#ffffff"
MOST_LINE_LETTERS = 200  # of a line that is cut
MOST_MEASURED = 1000  # letters that can stand in a line: the narrowest are 2 pixels wide


# Fonts with more letters than Pillow's own has, as Linux, Windows and macOS have them.
WIDE_FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "arial.ttf", "Arial Unicode.ttf", "Arial.ttf")


@cache
def font(size: int, wide: bool = False):
    """Pillow's own font, which has one size before Pillow 10.1; a wide one where the system has one, for other letters."""
    for name in WIDE_FONTS if wide else ():
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            pass
    try:
        return ImageFont.load_default(size)
    except TypeError:
        return ImageFont.load_default()


def write(
    pen: ImageDraw.ImageDraw, at: tuple[float, float], text: str, width: float, size: int, *, color: str = INK
) -> None:
    """Writes a line, cut where it is wider than this, in letters that the font has."""
    chosen = font(size, not text.isascii())
    if isinstance(chosen, ImageFont.ImageFont):  # Pillow's own before 10.1 has Latin letters alone
        text = text.encode("latin-1", "replace").decode("latin-1")
    pen.text(at, shortened(pen, text, width, size), color, chosen)


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
    chosen = font(size, not text.isascii())
    if len(text) <= MOST_MEASURED and pen.textlength(text, chosen) <= width:
        return text
    text = text[:MOST_LINE_LETTERS]
    while text and pen.textlength(text + "...", chosen) > width:
        text = text[:-1]
    return text and text + "..."


def as_image(picture: Tensor) -> Image.Image:
    """A picture [H, W, 3] in 0..1 as Pillow's."""
    return Image.fromarray((picture.clamp(0, 1) * 255).round().byte().cpu().numpy())


def as_tensor(canvas: Image.Image) -> Tensor:
    """Pillow's picture as [H, W, 3] in 0..1."""
    return torch.from_numpy(np.asarray(canvas).copy()).float() / 255
