"""Token attention as pictures: heat maps over the picture, side by side, sheets of words, steps, layers and heads."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from PIL import Image, ImageDraw
from torch import Tensor

from .drawing import FAINT, INK, PAPER, as_image, as_tensor, font, shortened
from .errors import ForgetError
from .heatmap import chosen_phrases, colorize, overlay, require_recorded, word_heat_maps
from .recording import AttentionRecording
from .settings import setting

VIEWS = ("overlay", "side by side", "contact sheet", "over steps", "layers", "heads")
CAPTION, BAR, EDGE, GAP = 22, 92, 14, 6  # pixels: a tile's caption, the colour bar with its numbers, margin and distance
SMALLEST, LARGEST, OF_A_HEAD = 192, 384, 112  # a tile's longer side


@dataclass(frozen=True)
class ViewSettings:
    """How a recording is shown."""

    words: str = setting(
        "", "Words or phrases of the prompt, separated by commas or lines. Empty: every word.", multiline=True
    )
    view: str = setting(
        "overlay",
        "`overlay`: the heat map over the picture, in the picture's size. `side by side`: picture, both, and heat map. "
        "`contact sheet`: all words of a picture. `over steps`: that for each step, for an animation. `layers`, `heads`: a "
        "word in each of them.",
        choices=VIEWS,
    )  # fmt: skip
    maximum: float = setting(
        0.0,
        "The share of attention that gets the brightest colour. 0: the highest found. Wire another one's maximum here to "
        "compare two pictures on one scale.",
        min=0.0, max=1.0, step=0.001,
    )  # fmt: skip
    threshold: float = setting(
        0.0, "MASK is 1 where the heat map is above this part of the maximum, and 0 elsewhere. 0: the heat map itself.",
        min=0.0, max=1.0, step=0.01,
    )  # fmt: skip
    opacity: float = setting(0.6, "How much the heat map covers the picture.", min=0.0, max=1.0, step=0.05)
    color_map: str = setting(
        "inferno", "Colours from low to high; all of them read in grey and to the colour-blind.",
        choices=("inferno", "viridis", "magma", "cividis"), advanced=True,
    )  # fmt: skip


@dataclass(frozen=True)
class Tile:
    """A picture [H, W, 3] in 0..1 with the words under it."""

    caption: str
    picture: Tensor


def visualize(
    recording: AttentionRecording, image: Tensor, settings: ViewSettings | None = None
) -> tuple[Tensor, Tensor, float]:
    """The view's pictures [N, H', W', 3], the words' masks [W * B, H, W] in 0..1, and the share that is brightest.

    `image` [B, H, W, 3] is what was sampled. Masks come word by word: those of all pictures for the first word, then the
    next. Raises ForgetError for a word that is not in the prompt, a recording of other pictures, and a view of what was
    not kept.
    """
    settings = settings or ViewSettings()
    require_recorded(recording)
    phrases = chosen_phrases(recording, settings.words)
    image = image[..., :3].float().cpu()
    heat = word_heat_maps(recording, phrases, *image.shape[1:3])
    if heat.shape[1] != len(image):
        raise ForgetError(
            f"The recording is of {heat.shape[1]} pictures and the image input has {len(image)}: "
            "connect the pictures of the sampler that recorded."
        )
    view = View(recording, image, phrases, heat, settings)
    pictures, maximum = view.draw()
    masks = rearrange(heat / view.scale(heat), "w b y x -> (w b) y x").clamp(0, 1)
    if settings.threshold:
        masks = (masks > settings.threshold).float()
    return pictures, masks, maximum


@dataclass
class View:
    """Heat maps [W, B, H, W] of phrases over pictures [B, H, W, 3], to be drawn in one of the ways."""

    recording: AttentionRecording
    image: Tensor
    phrases: list[str]
    heat: Tensor
    settings: ViewSettings

    def draw(self) -> tuple[Tensor, float]:
        """The pictures [N, H', W', 3] in 0..1, and the share that is brightest."""
        if self.settings.view == "overlay":
            maximum = self.scale(self.heat)
            pictures = repeat(self.image, "b y x c -> (w b) y x c", w=len(self.phrases))
            flat = rearrange(self.heat, "w b y x -> (w b) y x")
            return overlay(pictures, flat / maximum, self.settings.opacity, self.settings.color_map), maximum
        sheets = {
            "side by side": self.side_by_side,
            "contact sheet": self.contact_sheets,
            "over steps": self.over_steps,
            "layers": self.layers,
            "heads": self.heads,
        }[self.settings.view]
        return sheets()

    def scale(self, *heats: Tensor) -> float:
        """The share that gets the brightest colour: what was asked for, or the highest."""
        return self.settings.maximum or min(max(max(heat.max().item() for heat in heats), 1e-12), 1.0)

    def over(self, picture: int, heat: Tensor) -> Tensor:
        """A heat map [H, W] in 0..1 over one of the pictures."""
        return overlay(self.image[picture], heat, self.settings.opacity, self.settings.color_map)

    def sheet(self, title: str, tiles: list[Tile], maximum: float, columns: int = 0, side: int = 0) -> Tensor:
        return sheet(title, tiles, maximum, self.settings.color_map, columns, side)

    def side_by_side(self) -> tuple[Tensor, float]:
        maximum = self.scale(self.heat)
        sheets = []
        for phrase, maps in zip(self.phrases, self.heat / maximum, strict=True):
            for i, heat in enumerate(maps):
                alone = colorize(heat, self.settings.color_map)
                tiles = [Tile("picture", self.image[i]), Tile("both", self.over(i, heat)), Tile("attention", alone)]
                sheets.append(self.sheet(f"“{phrase}”", tiles, maximum, columns=3))
        return torch.stack(sheets), maximum

    def words_over(self, heat: Tensor, picture: int) -> list[Tile]:
        """The picture, and under each phrase the same with its map [W, B, H, W] in 0..1."""
        words = [Tile(phrase, self.over(picture, maps[picture])) for phrase, maps in zip(self.phrases, heat, strict=True)]
        return [Tile("picture", self.image[picture]), *words]

    def contact_sheets(self) -> tuple[Tensor, float]:
        maximum = self.scale(self.heat)
        title = f"“{self.recording.text.strip()}”"
        sheets = [self.sheet(title, self.words_over(self.heat / maximum, i), maximum) for i in range(len(self.image))]
        return torch.stack(sheets), maximum

    def over_steps(self) -> tuple[Tensor, float]:
        self.require_kept("steps")
        frames = self.recording.frames
        heats = [self.maps(frame=i) for i in range(len(frames))]
        maximum = self.scale(*heats)
        sheets = []
        for picture in range(len(self.image)):
            for frame, heat in zip(frames, heats, strict=True):
                span = (
                    f"step {frame.first + 1}"
                    if frame.first == frame.last
                    else f"steps {frame.first + 1} to {frame.last + 1}"
                )
                title = f"{span} of {frames[-1].last + 1}"
                sheets.append(self.sheet(title, self.words_over(heat / maximum, picture), maximum))
        return torch.stack(sheets), maximum

    def layers(self) -> tuple[Tensor, float]:
        names = self.recording.layers
        sizes = {name: "{} x {}".format(*self.recording.sizes[name][2:]) for name in names}
        return self.grids([(f"{layer_title(name)}, {sizes[name]}", self.maps(layers=[name])) for name in names])

    def heads(self) -> tuple[Tensor, float]:
        self.require_kept("heads")
        tiles = []
        most = max(self.recording.sizes[name][1] for name in self.recording.layers)
        for name in self.recording.layers:
            heads = self.recording.sizes[name][1]
            title = layer_title(name)
            tiles += [(f"{title} #{head + 1}", self.maps(layers=[name], head=head)) for head in range(heads)]
            tiles += [("", torch.zeros_like(self.heat))] * (most - heads)
        return self.grids(tiles, columns=most, side=OF_A_HEAD)

    def grids(self, titled: list[tuple[str, Tensor]], columns: int = 0, side: int = 0) -> tuple[Tensor, float]:
        """A sheet for each phrase and picture, with a tile for each titled map."""
        maximum = self.scale(*(heat for _, heat in titled))
        sheets = []
        for word, phrase in enumerate(self.phrases):
            for i in range(len(self.image)):
                tiles = [Tile(title, self.over(i, heat[word, i] / maximum)) for title, heat in titled]
                sheets.append(self.sheet(f"“{phrase}”", tiles, maximum, columns, side))
        return torch.stack(sheets), maximum

    def maps(self, **chosen) -> Tensor:
        """The phrases' maps [W, B, H, W] of some layers, a frame, or a head."""
        return word_heat_maps(self.recording, self.phrases, *self.image.shape[1:3], **chosen)

    def require_kept(self, what: str) -> None:
        """Raises ForgetError where the recording has not kept its steps, or heads, apart."""
        settings = self.recording.settings
        if settings.keep != what:
            raise ForgetError(
                f"The recording did not keep its {what} apart: set `keep` of Record Token Attention to `{what}`, and sample."
            )
        if what == "heads" and not self.recording.apart:
            raise ForgetError(
                f"{settings.memory} MB were too few to keep the heads apart: raise `memory` of Record Token Attention, "
                "record fewer pictures, or choose some of the layers, and sample."
            )


def layer_title(name: str) -> str:
    """`input_blocks.4.1.transformer_blocks.0.attn2` -> "input 4.1": where a layer sits."""
    place, block = name.removesuffix(".attn2").split(".transformer_blocks.")
    where, _, number = place.replace("attentions.", "").partition(".")
    several = "" if block == "0" else f" / {block}"
    return f"{where.removesuffix('s').removesuffix('_block')} {number}{several}"


def sheet(title: str, tiles: list[Tile], maximum: float, color_map: str, columns: int = 0, side: int = 0) -> Tensor:
    """Tiles with their captions in rows under a title, a colour bar beside them: [H, W, 3] in 0..1."""
    columns = columns or min(len(tiles), math.ceil(math.sqrt(1.5 * len(tiles))))
    height, width = tiles[0].picture.shape[:2]
    scale = (side or min(max(height, width, SMALLEST), LARGEST)) / max(height, width)
    height, width = max(round(height * scale), 1), max(round(width * scale), 1)
    rows = -(-len(tiles) // columns)
    top = EDGE + 26
    size = (2 * EDGE + columns * (width + GAP) + BAR, top + rows * (height + CAPTION + GAP) + EDGE)
    canvas = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(canvas)
    pen.text((EDGE, EDGE - 4), shortened(pen, title, size[0] - 2 * EDGE, 18), INK, font(18))
    for i, tile in enumerate(tiles):
        if not tile.caption:
            continue
        x, y = EDGE + i % columns * (width + GAP), top + i // columns * (height + CAPTION + GAP)
        canvas.paste(as_image(tile.picture).resize((width, height), Image.Resampling.BICUBIC), (x, y))
        pen.text((x, y + height + 3), shortened(pen, tile.caption, width, 13), INK, font(13))
    x, tall = EDGE + columns * (width + GAP) + 4, min(height, 240)
    draw_bar(canvas, pen, (x, top), tall, colorize(torch.linspace(1, 0, tall), color_map), (maximum, maximum / 2, 0.0))
    return as_tensor(canvas)


def draw_bar(
    canvas: Image.Image,
    pen: ImageDraw.ImageDraw,
    at: tuple[int, int],
    tall: int,
    colors: Tensor,
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
    pen.text((x, y + tall + 4), "of attention", FAINT, font(11))


def percent(share: float, signed: bool = False) -> str:
    """A share with as many digits as it takes to read it."""
    digits = 0 if share == 0 else min(max(1 - math.floor(math.log10(abs(100 * share))), 0), 5)
    return f"{100 * share:{'+' if signed and share else ''}.{digits}f} %"
