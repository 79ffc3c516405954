"""Sheets of pictures with captions, and a colour bar beside them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from einops import repeat
from PIL import Image, ImageDraw
from torch import Tensor

from .canvas import FAINT, INK, PAPER, as_image, as_tensor, font, write
from .colormaps import colorize, percent

CAPTION, BAR, EDGE, GAP = 22, 92, 14, 6  # pixels: a tile's caption, the colour bar with its numbers, margin and distance
TOP = EDGE + 26  # a sheet's title


@dataclass(frozen=True)
class Tile:
    """A picture [H, W, 3] in 0..1 with the words under it."""

    caption: str
    picture: Tensor


def sheet_size(tiles: int, height: int, width: int, columns: int = 0) -> tuple[int, int]:
    """Width and height of a sheet of so many tiles of this size."""
    columns = columns or columns_of_sheet(tiles)
    rows = -(-tiles // columns)
    return 2 * EDGE + columns * (width + GAP) + BAR, TOP + rows * (height + CAPTION + GAP) + EDGE


def columns_of_sheet(tiles: int) -> int:
    """How many tiles are side by side where nobody says it."""
    return min(tiles, math.ceil(math.sqrt(1.5 * tiles)))


def sheet(title: str, tiles: list[Tile], maximum: float, color_map: str, columns: int = 0) -> Tensor:
    """Tiles with their captions in rows under a title, a colour bar beside them: [H, W, 3] in 0..1."""
    columns = columns or columns_of_sheet(len(tiles))
    height, width = tiles[0].picture.shape[:2]
    size, top = sheet_size(len(tiles), height, width, columns), TOP
    canvas = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(canvas)
    write(pen, (EDGE, EDGE - 4), title, size[0] - 2 * EDGE, 18)
    for i, tile in enumerate(tiles):
        x, y = EDGE + i % columns * (width + GAP), top + i // columns * (height + CAPTION + GAP)
        canvas.paste(as_image(tile.picture), (x, y))
        write(pen, (x, y + height + 3), tile.caption, width, 13)
    x, tall = EDGE + columns * (width + GAP) + 4, min(height, 240)
    draw_bar(canvas, pen, (x, top), tall, colorize(torch.linspace(1, 0, tall), color_map), ticks=(maximum, maximum / 2, 0.0))
    return as_tensor(canvas)


def draw_bar(
    canvas: Image.Image,
    pen: ImageDraw.ImageDraw,
    at: tuple[int, int],
    tall: int,
    colors: Tensor,
    *,
    ticks: tuple[float, ...],
    signed: bool = False,
) -> None:
    """A colour bar of colours [tall, 3] from its top, with the shares of attention that it runs through."""
    x, y = at
    canvas.paste(as_image(repeat(colors, "h c -> h w c", w=16)), (x, y))
    pen.rectangle((x, y, x + 15, y + tall - 1), outline=FAINT)
    for i, tick in enumerate(ticks):
        place = y + i * (tall - 1) / (len(ticks) - 1)
        pen.line((x + 15, place, x + 20, place), fill=INK)
        pen.text((x + 24, place), percent(tick, signed), INK, font(12), anchor="lm")
    pen.text((x, y + tall + 10), "of attention", FAINT, font(11))
