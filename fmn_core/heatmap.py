"""Heat maps as pictures."""

from __future__ import annotations

import torch
from torch import Tensor

# Matplotlib's perceptually uniform colour maps, sampled at nine points: they read in grey and to the colour-blind.
COLOR_MAPS = {
    "viridis": "440154 482878 3e4989 31688e 26828e 1f9e89 35b779 6ece58 fde725",
    "inferno": "000004 1f0c48 550f6d 88226a ba3655 e35933 f98c0a f9c932 fcffa4",
    "magma": "000004 1d1147 51127c 832681 b73779 e75263 fc8961 fec488 fcfdbf",
}


def colorize(heat: Tensor, color_map: str = "inferno") -> Tensor:
    """Colours [..., 3] in 0..1 of values [...] in 0..1."""
    stops = torch.tensor([[int(c[i : i + 2], 16) / 255 for i in (0, 2, 4)] for c in COLOR_MAPS[color_map].split()])
    place = heat.clamp(0, 1) * (len(stops) - 1)
    low = place.floor().long().clamp(max=len(stops) - 2)
    return stops[low].lerp(stops[low + 1], (place - low)[..., None])


def overlay(picture: Tensor, heat: Tensor, opacity: float, color_map: str = "inferno") -> Tensor:
    """A heat map [..., H, W] in 0..1 laid over a picture [..., H, W, 3] in 0..1: none of it shows at opacity 0."""
    return picture.lerp(colorize(heat, color_map), opacity)
