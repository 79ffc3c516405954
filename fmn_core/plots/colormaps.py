"""Colours of heat maps, and shares as text."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Matplotlib's perceptually uniform colour maps, sampled at nine points: they read in grey and to the colour-blind.
COLOR_MAPS = {
    "viridis": "440154 482878 3e4989 31688e 26828e 1f9e89 35b779 6ece58 fde725",
    "inferno": "000004 1f0c48 550f6d 88226a ba3655 e35933 f98c0a f9c932 fcffa4",
    "magma": "000004 1d1147 51127c 832681 b73779 e75263 fc8961 fec488 fcfdbf",
    "cividis": "00224e 123570 3b496c 575d6d 707173 8a8678 a59c74 c3b369 fee838",
}
# ColorBrewer's diverging blue to red, which the colour-blind tell apart: less, the same, more.
DIFFERENCES = "053061 2166ac 4393c3 92c5de f7f7f7 f4a582 d6604d b2182b 67001f"


def colorize(heat: Tensor, color_map: str = "inferno") -> Tensor:
    """Colours [..., 3] in 0..1 of values [...] in 0..1."""
    return between(heat, COLOR_MAPS[color_map])


def colorize_difference(difference: Tensor) -> Tensor:
    """Colours [..., 3] in 0..1 of values [...] in -1..1: blue below zero, white at it, red above."""
    return between(difference / 2 + 0.5, DIFFERENCES)


def between(values: Tensor, colors: str) -> Tensor:
    """Colours [..., 3] at values [...] in 0..1, between colours at equal distances."""
    stops = torch.tensor([[int(c[i : i + 2], 16) / 255 for i in (0, 2, 4)] for c in colors.split()])
    place = values.clamp(0, 1) * (len(stops) - 1)
    low = place.floor().long().clamp(max=len(stops) - 2)
    return stops[low].lerp(stops[low + 1], (place - low)[..., None])


def overlay(picture: Tensor, heat: Tensor, opacity: float, color_map: str = "inferno") -> Tensor:
    """A heat map [..., H, W] in 0..1 laid over a picture [..., H, W, 3] in 0..1: none of it shows at opacity 0."""
    return picture.lerp(colorize(heat, color_map), opacity)


def percent(share: float, signed: bool = False) -> str:
    """A share with as many digits as it takes to read it."""
    digits = 0 if share == 0 else min(max(1 - math.floor(math.log10(abs(100 * share))), 0), 5)
    return f"{100 * share:{'+' if signed and share else ''}.{digits}f} %"
