"""Token attention as pictures: heat maps over the picture, side by side, sheets of words, steps, layers and heads."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from PIL import Image, ImageDraw
from torch import Tensor

from .drawing import FAINT, INK, PAPER, as_image, as_tensor, font, write
from .errors import ForgetError
from .frames import Frame
from .heatmap import chosen_phrases, colorize, overlay, percent, require_recorded, word_heat_maps
from .recording import AttentionRecording
from .settings import setting

VIEWS = ("overlay", "side by side", "contact sheet", "over steps", "layers", "heads")
CAPTION, BAR, EDGE, GAP = 22, 92, 14, 6  # pixels: a tile's caption, the colour bar with its numbers, margin and distance
SMALLEST, LARGEST, OF_A_HEAD = 192, 384, 112  # a tile's longer side
MOST_NUMBERS = 400_000_000  # of all sheets of a view: 1.6 GB


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
    brightest = scale(settings, heat)
    masks = rearrange(heat / brightest, "w b y x -> (w b) y x").clamp(0, 1)
    if settings.view == "overlay":
        pictures = torch.cat([overlay(image, one / brightest, settings.opacity, settings.color_map) for one in heat])
    else:
        pictures, brightest = View(recording, image, phrases, settings).draw()
    if settings.threshold:
        masks = (masks > settings.threshold).float()
    return pictures, masks, brightest


def scale(settings: ViewSettings, *heats: Tensor) -> float:
    """The share that gets the brightest colour: what was asked for, or the highest."""
    return settings.maximum or min(max(max(heat.max().item() for heat in heats), 1e-12), 1.0)


class View:
    """Sheets of phrases' heat maps over pictures [B, H, W, 3], made at the size of a tile."""

    def __init__(self, recording: AttentionRecording, image: Tensor, phrases: list[str], settings: ViewSettings):
        self.recording, self.phrases, self.settings = recording, phrases, settings
        height, width = image.shape[1:3]
        side = OF_A_HEAD if settings.view == "heads" else min(max(height, width, SMALLEST), LARGEST)
        self.size = tuple(max(round(x * side / max(height, width)), 1) for x in (height, width))
        tiles = [as_image(one).resize(self.size[::-1], Image.Resampling.BICUBIC) for one in image]
        self.image = torch.stack([as_tensor(tile) for tile in tiles])

    def draw(self) -> tuple[Tensor, float]:
        """The sheets [N, H', W', 3] in 0..1, and the share that is brightest."""
        views = {
            "side by side": self.side_by_side,
            "contact sheet": self.contact_sheets,
            "over steps": self.over_steps,
            "layers": self.layers,
            "heads": self.heads,
        }
        return views[self.settings.view]()

    def maps(self, **chosen) -> Tensor:
        """The phrases' maps [W, B, h, w] of some layers, a frame, or a head, in a tile's size."""
        return word_heat_maps(self.recording, self.phrases, *self.size, **chosen)

    def over(self, picture: int, heat: Tensor) -> Tensor:
        """A heat map [h, w] in 0..1 over one of the pictures."""
        return overlay(self.image[picture], heat, self.settings.opacity, self.settings.color_map)

    def sheets(self, titled: Iterable[tuple[str, list[Tile]]], count: int, maximum: float, columns: int = 0) -> Tensor:
        """`count` sheets, of titles and tiles; raises ForgetError for more than a host can hold."""
        drawn: list[Tensor] = []
        for title, tiles in titled:
            drawn.append(sheet(title, tiles, maximum, self.settings.color_map, columns))
            if drawn[0].numel() * count > MOST_NUMBERS:
                raise ForgetError(
                    f"The view `{self.settings.view}` would be {count} sheets of {drawn[0].shape[1]} x {drawn[0].shape[0]} "
                    "pixels: name fewer words, or record fewer pictures or layers."
                )
        return torch.stack(drawn)

    def side_by_side(self) -> tuple[Tensor, float]:
        heats = self.maps()
        maximum = scale(self.settings, heats)

        def tiles(i: int, heat: Tensor) -> list[Tile]:
            alone = colorize(heat, self.settings.color_map)
            return [Tile("picture", self.image[i]), Tile("both", self.over(i, heat)), Tile("attention", alone)]

        rows = ((f"'{phrase}'", tiles(i, heat / maximum)) for phrase, maps in zip(self.phrases, heats, strict=True)
                for i, heat in enumerate(maps))  # fmt: skip
        return self.sheets(rows, len(self.phrases) * len(self.image), maximum, columns=3), maximum

    def words_over(self, heat: Tensor, picture: int) -> list[Tile]:
        """The picture, and under each phrase the same with its map [W, B, h, w] in 0..1."""
        words = [Tile(phrase, self.over(picture, maps[picture])) for phrase, maps in zip(self.phrases, heat, strict=True)]
        return [Tile("picture", self.image[picture]), *words]

    def contact_sheets(self) -> tuple[Tensor, float]:
        heat = self.maps()
        maximum = scale(self.settings, heat)
        title, count = f"'{self.recording.text.strip()}'", len(self.image)
        return self.sheets(((title, self.words_over(heat / maximum, i)) for i in range(count)), count, maximum), maximum

    def over_steps(self) -> tuple[Tensor, float]:
        self.require_kept("steps")
        frames = self.recording.frames
        heats = [self.maps(frame=i) for i in range(len(frames))]
        maximum = scale(self.settings, *heats)
        titles = [f"{steps_of(frame)} of {frames[-1].last + 1}" for frame in frames]
        rows = ((title, self.words_over(heat / maximum, i)) for i in range(len(self.image))
                for title, heat in zip(titles, heats, strict=True))  # fmt: skip
        return self.sheets(rows, len(self.image) * len(frames), maximum), maximum

    def layers(self) -> tuple[Tensor, float]:
        names = self.recording.layers
        sizes = {name: "{} x {}".format(*self.recording.sizes[name][2:]) for name in names}
        return self.grids([(f"{layer_title(name)}, {sizes[name]}", self.maps(layers=[name])) for name in names])

    def heads(self) -> tuple[Tensor, float]:
        self.require_kept("heads")
        tiles: list[tuple[str, Tensor | None]] = []
        most = max(self.recording.sizes[name][1] for name in self.recording.layers)
        for name in self.recording.layers:
            heads = self.recording.sizes[name][1]
            title = layer_title(name)
            tiles += [(f"{title} #{head + 1}", self.maps(layers=[name], head=head)) for head in range(heads)]
            tiles += [("", None)] * (most - heads)
        return self.grids(tiles, columns=most)

    def grids(self, titled: list[tuple[str, Tensor | None]], columns: int = 0) -> tuple[Tensor, float]:
        """A sheet for each phrase and picture, with a tile for each titled map, and gaps for none."""
        maximum = scale(self.settings, *(heat for _, heat in titled if heat is not None))

        def tiles(word: int, i: int) -> list[Tile]:
            empty = torch.ones_like(self.image[0])
            return [Tile(title, empty if heat is None else self.over(i, heat[word, i] / maximum)) for title, heat in titled]

        rows = ((f"'{phrase}'", tiles(word, i)) for word, phrase in enumerate(self.phrases) for i in range(len(self.image)))
        return self.sheets(rows, len(self.phrases) * len(self.image), maximum, columns), maximum

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


def steps_of(frame: Frame) -> str:
    """A frame's steps, counted from 1."""
    return f"step {frame.first + 1}" if frame.first == frame.last else f"steps {frame.first + 1} to {frame.last + 1}"


def layer_title(name: str) -> str:
    """`input_blocks.4.1.transformer_blocks.0.attn2` -> "input 4.1": where a layer sits."""
    place, block = name.removesuffix(".attn2").split(".transformer_blocks.")
    where, _, number = place.replace("attentions.", "").partition(".")
    several = "" if block == "0" else f" / {block}"
    return f"{where.removesuffix('s').removesuffix('_block')} {number}{several}"


def sheet(title: str, tiles: list[Tile], maximum: float, color_map: str, columns: int = 0) -> Tensor:
    """Tiles with their captions in rows under a title, a colour bar beside them: [H, W, 3] in 0..1."""
    columns = columns or min(len(tiles), math.ceil(math.sqrt(1.5 * len(tiles))))
    height, width = tiles[0].picture.shape[:2]
    rows = -(-len(tiles) // columns)
    top = EDGE + 26
    size = (2 * EDGE + columns * (width + GAP) + BAR, top + rows * (height + CAPTION + GAP) + EDGE)
    canvas = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(canvas)
    write(pen, (EDGE, EDGE - 4), title, size[0] - 2 * EDGE, 18)
    for i, tile in enumerate(tiles):
        x, y = EDGE + i % columns * (width + GAP), top + i // columns * (height + CAPTION + GAP)
        canvas.paste(as_image(tile.picture), (x, y))
        write(pen, (x, y + height + 3), tile.caption, width, 13)
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
