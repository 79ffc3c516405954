"""What a picture shows by a rule, without the classifier: its colour, its background, how many things."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageColor

from .hue import commonest_hue
from .vocabulary import BACKGROUNDS, COLOURS, COUNTS


def dominant_colour(picture):
    """The COLOURS name of the commonest hue among a picture's vivid pixels [H, W, 3]."""
    hue, saturation, value = np.asarray(Image.fromarray((picture.numpy() * 255).astype(np.uint8)).convert("HSV")).T
    weight = np.where((saturation > 60) & (value > 60), saturation.astype(float), 0)
    degrees = commonest_hue(hue, weight) * 360 / 256
    return min(COLOURS, key=lambda name: abs((COLOURS[name] - degrees + 180) % 360 - 180))


def background_colour(picture):
    """The BACKGROUNDS name nearest to the median of a picture's corners [H, W, 3], or "white"."""
    corners = torch.cat(
        [picture[y][:, x].reshape(-1, 3) for y in (slice(6), slice(-6, None)) for x in (slice(6), slice(-6, None))]
    )
    colour = corners.median(0).values * 255
    known = {name: ImageColor.getrgb(code) for name, code in {**BACKGROUNDS, "white": "white"}.items()}
    return min(known, key=lambda name: (colour - torch.tensor(known[name])).square().sum().item())


def count_things(picture):
    """The COUNTS name for how many large separate shapes stand on white [H, W, 3], or "other"."""
    from scipy import ndimage

    shape = ndimage.binary_closing((picture < 0.9).any(-1).numpy(), iterations=2)
    labels, number = ndimage.label(shape)
    sizes = ndimage.sum_labels(shape, labels, range(1, number + 1))
    large = int((np.asarray(sizes) > 0.015 * shape.size).sum())
    return next((name for name, count in COUNTS.items() if count == large), "other")


SEEN_BY_RULE = {"colour": dominant_colour, "background": background_colour, "count": count_things}
