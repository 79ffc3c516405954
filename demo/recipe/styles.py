"""The styles made from drawings: each takes an RGBA drawing of 128 pixels and returns an RGB picture of that size.

Patterns repeat every 8 pixels, the step of the autoencoder's latents, so that a small one can keep them.
"""

import numpy as np
from PIL import Image, ImageChops, ImageFilter

CELL = 8


def on_paper(image: Image.Image, paper="white") -> Image.Image:
    """Lays an RGBA image on a colour."""
    ground = Image.new("RGBA", image.size, paper)
    ground.alpha_composite(image)
    return ground.convert("RGB")


def _edges(image, width=5):
    """How strong an edge passes each pixel, in 0..1: the spread of colours around it, borders of the shape included."""
    shape = on_paper(image, "#808080")
    spread = ImageChops.difference(shape.filter(ImageFilter.MaxFilter(width)), shape.filter(ImageFilter.MinFilter(width)))
    strongest = Image.fromarray(np.asarray(spread).max(-1)).filter(ImageFilter.GaussianBlur(0.6))
    return np.clip((np.asarray(strongest, np.float32) - 36) / 30, 0, 1)[..., None]


def _luminance(image, paper="white"):
    return np.asarray(on_paper(image, paper).convert("L"), np.float32)[..., None] / 255


def _mix(first, second, share):
    """`second` where share is 1, `first` where it is 0."""
    picture = np.asarray(first, np.float32) * (1 - share) + np.asarray(second, np.float32) * share
    return Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))


def line_art(image):
    """Black outlines on white."""
    return _mix((255, 255, 255), (20, 20, 20), _edges(image))


def pixel_art(image):
    """16 x 16 cells of flat colour."""
    cells = on_paper(image).resize((image.width // CELL,) * 2, Image.BOX)
    return cells.resize(image.size, Image.NEAREST)


def blueprint(image):
    """White outlines on blue paper with a grid."""
    paper = np.full((*image.size, 3), (28, 78, 160), np.float32)
    grid = np.arange(image.width) % (2 * CELL) == CELL
    paper[grid], paper[:, grid] = (62, 112, 188), (62, 112, 188)
    return _mix(paper, (235, 243, 255), _edges(image))


def neon(image):
    """Glowing outlines in the drawing's own bright colours, on black."""
    colour = on_paper(image, "#808080").filter(ImageFilter.MedianFilter(5)).convert("HSV")
    hue, saturation, _ = (np.asarray(band) for band in colour.split())
    vivid = np.stack([hue, np.where(saturation > 40, 230, 60), np.full_like(hue, 255)], -1)
    vivid = np.asarray(Image.fromarray(vivid.astype(np.uint8), "HSV").convert("RGB"), np.float32)
    line = _edges(image, 3)
    lit = Image.fromarray((vivid * line).astype(np.uint8))
    glow = np.asarray(lit.filter(ImageFilter.GaussianBlur(5)), np.float32)
    return _mix(np.clip((8, 8, 20) + 1.1 * glow, 0, 255), np.minimum(vivid * 0.85 + 40, 255), line)


def halftone(image):
    """Dots of ink in the local colour on white, larger where the drawing is darker, with a thin outline."""
    cells = on_paper(image).resize((image.width // CELL,) * 2, Image.BOX)
    ink = np.asarray(cells, np.float32)
    cover = 1 - ink.min(-1) / 255
    radius = CELL * 0.62 * np.sqrt(cover)
    strong = 255 - np.clip((255 - ink) / np.maximum(cover, 0.25)[..., None], 0, 255)
    grow = lambda cells: cells.repeat(CELL, 0).repeat(CELL, 1)  # noqa: E731
    offset = np.arange(image.width) % CELL - (CELL - 1) / 2
    distance = np.hypot(offset[:, None], offset[None])
    dots = np.clip(grow(radius) - distance + 0.5, 0, 1)[..., None]
    return _mix(_mix((255, 255, 255), grow(strong), dots), (40, 40, 48), _edges(image, 3) * 0.9)


def sepia(image):
    """Shades of brown, as an old photograph."""
    return _mix((58, 34, 18), (246, 228, 196), _luminance(image))


def pastel(image):
    """Soft pale colours on rose paper."""
    paper = on_paper(image, "#f6dfe6").filter(ImageFilter.GaussianBlur(1.2))
    chalk = _mix(np.asarray(paper, np.float32), (255, 246, 240), 0.45)
    return _mix(np.asarray(chalk, np.float32), (255, 255, 255), 0.75 * _edges(image, 3))


def woodcut(image):
    """Black ink on brown paper: outlines, and hatching where the drawing is darker."""
    light = _luminance(image.filter(ImageFilter.GaussianBlur(1)))
    row = np.abs(np.arange(image.height) % CELL - (CELL - 1) / 2)[:, None, None]
    ink = np.clip((1 - light) * CELL * 0.45 - row + 0.5, 0, 1)
    return _mix((214, 172, 118), (24, 18, 14), np.maximum(ink, _edges(image, 3)))


RESTYLE = {
    "line art": line_art, "pixel art": pixel_art, "blueprint": blueprint, "neon": neon, "halftone": halftone,
    "sepia": sepia, "pastel": pastel, "woodcut": woodcut,
}  # fmt: skip
