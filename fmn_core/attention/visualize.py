"""Token attention as pictures: heat maps over the picture, side by side, sheets of words, steps, layers and heads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from ..config import setting
from ..errors import ForgetError
from ..log import Tell, Work
from ..plots.canvas import as_image, as_tensor
from ..plots.colormaps import colorize, overlay
from ..plots.sheet import Tile, sheet, sheet_size
from .frames import Frame
from .heatmap import chosen_phrases, require_recorded, word_heat_maps
from .recorder import AttentionRecording

VIEWS = ("overlay", "side_by_side", "contact_sheet", "over_steps", "layers", "heads")
SMALLEST, LARGEST, OF_A_HEAD = 192, 384, 112  # a tile's longer side
MOST_NUMBERS = 400_000_000  # of all sheets of a view: 1.6 GB
MOST_OVERLAID = 2_000_000_000  # of all pictures of the overlay, and as many masks


@dataclass(frozen=True)
class ViewConfig:
    """How a recording is shown."""

    words: str = setting(
        "", "Words or phrases of the prompt, separated by commas or lines. Empty: every word.", multiline=True
    )
    view: str = setting(
        "overlay",
        "`overlay`: the heat map over the picture, in the picture's size. `side_by_side`: picture, both, and heat map. "
        "`contact_sheet`: all words of a picture. `over_steps`: that for each step, for an animation. `layers`, `heads`: a "
        "word in each of them.",
        choices=VIEWS,
    )  # fmt: skip
    vmax: float = setting(
        0.0,
        "The share of attention that gets the brightest colour. 0: the highest found. Connect another node's vmax to "
        "compare two pictures on one scale.",
        min=0.0, max=1.0, step=0.001, auto=True,
    )  # fmt: skip
    threshold: float = setting(
        0.0, "MASK is 1 where the heat map is above this fraction of vmax, and 0 elsewhere. 0: the heat map itself.",
        min=0.0, max=1.0, step=0.01,
    )  # fmt: skip
    opacity: float = setting(0.6, "How much the heat map covers the picture.", min=0.0, max=1.0, step=0.05)
    color_map: str = setting(
        "inferno", "Colours from low to high; all of them are readable in greyscale and by the colour-blind.",
        choices=("inferno", "viridis", "magma", "cividis"), advanced=True,
    )  # fmt: skip


def visualize(
    recording: AttentionRecording, image: Tensor, settings: ViewConfig | None = None, tell: Tell | None = None
) -> tuple[Tensor, Tensor, float]:
    """The view's pictures [N, H', W', 3], the words' masks [W * B, H, W] in 0..1, and the share that is brightest.

    `image` [B, H, W, 3] is what was sampled. Masks come word by word: those of all pictures for the first word, then the
    next. `tell` hears of each map and each tile before it is made, and may raise to stop. Raises ForgetError for a word that
    is not in the prompt, a recording of other pictures, a view of what was not kept, and one too large for a host to hold.
    """
    settings = settings or ViewConfig()
    require_recorded(recording)
    phrases = chosen_phrases(recording, settings.words)
    image = image[..., :3].float().cpu()
    if recording.pictures != len(image):
        raise ForgetError(
            f"The recording is of {recording.pictures} pictures and the image input has {len(image)}: "
            "connect the pictures of the sampler that recorded."
        )
    height, width = image.shape[1:3]
    require_few_pictures(settings.view, len(phrases) * len(image), height, width, MOST_OVERLAID)
    view = None if settings.view == "overlay" else View(recording, image, phrases, settings)
    work = Work(len(phrases) * (1 + (view.units() if view else len(image))), tell)
    heat = word_heat_maps(recording, phrases, height, width, work=work)
    brightest = vmax_of(settings, heat)
    masks = rearrange(heat / brightest, "w b y x -> (w b) y x").clamp_(0, 1)
    if view is None:
        pictures = torch.empty(*masks.shape, 3)
        for i, one in enumerate(heat.flatten(0, 1)):
            work.step()
            pictures[i] = overlay(image[i % len(image)], one / brightest, settings.opacity, settings.color_map)
    else:
        pictures, brightest = view.draw(work)
    if settings.threshold:
        masks = (masks > settings.threshold).float()
    return pictures, masks, brightest


def require_few_pictures(view: str, count: int, height: int, width: int, most: int) -> None:
    """Raises ForgetError for more pictures of this size than `most` numbers."""
    if 3 * count * height * width > most:
        raise ForgetError(
            f"The view `{view}` would be {count} pictures or masks of {width} x {height} pixels: name fewer words, or "
            "record fewer pictures or layers."
        )


def vmax_of(settings: ViewConfig, *heats: Tensor) -> float:
    """The share that gets the brightest colour: what was asked for, or the highest."""
    return settings.vmax or min(max(max(heat.max().item() for heat in heats), 1e-12), 1.0)


class View:
    """Sheets of phrases' heat maps over pictures [B, H, W, 3], made at the size of a tile."""

    def __init__(self, recording: AttentionRecording, image: Tensor, phrases: list[str], settings: ViewConfig):
        self.recording, self.phrases, self.settings = recording, phrases, settings
        height, width = image.shape[1:3]
        side = OF_A_HEAD if settings.view == "heads" else min(max(height, width, SMALLEST), LARGEST)
        self.height, self.width = (max(round(x * side / max(height, width)), 1) for x in (height, width))
        tiles = [as_image(one).resize((self.width, self.height), Image.Resampling.BICUBIC) for one in image]
        self.image = torch.stack([as_tensor(tile) for tile in tiles])
        self.work = Work(0)

    def units(self) -> int:
        """How many maps and tiles of each phrase are made."""
        recording, view = self.recording, self.settings.view
        heads = [recording.sizes[name][1] for name in recording.layers]
        maps = {"over_steps": len(recording.frames), "layers": len(heads), "heads": sum(heads)}.get(view, 1)
        return maps * (1 + len(self.image))

    def draw(self, work: Work) -> tuple[Tensor, float]:
        """The sheets [N, H', W', 3] in 0..1, and the share that is brightest; each map and tile is a unit of the work."""
        self.work = work
        views = {
            "side_by_side": self.side_by_side,
            "contact_sheet": self.contact_sheets,
            "over_steps": self.over_steps,
            "layers": self.layers,
            "heads": self.heads,
        }
        return views[self.settings.view]()

    def maps(self, **chosen) -> Tensor:
        """The phrases' maps [W, B, h, w] of some layers, a frame, or a head, in a tile's size."""
        return word_heat_maps(self.recording, self.phrases, self.height, self.width, work=self.work, **chosen)

    def over(self, picture: int, heat: Tensor) -> Tensor:
        """A heat map [h, w] in 0..1 over one of the pictures."""
        self.work.step()
        return overlay(self.image[picture], heat, self.settings.opacity, self.settings.color_map)

    def sheets(
        self, titled: Iterable[tuple[str, list[Tile]]], count: int, tiles: int, maximum: float, columns: int = 0
    ) -> Tensor:
        """`count` sheets, of titles and as many `tiles`; raises ForgetError for more than a host can hold."""
        width, height = sheet_size(tiles, self.height, self.width, columns)
        require_few_pictures(self.settings.view, count, height, width, MOST_NUMBERS)
        sheets = torch.empty(count, height, width, 3)
        for one, (title, several) in zip(sheets, titled, strict=True):
            one[:] = sheet(title, several, maximum, self.settings.color_map, columns)
        return sheets

    def side_by_side(self) -> tuple[Tensor, float]:
        heats = self.maps()
        maximum = vmax_of(self.settings, heats)

        def tiles(i: int, heat: Tensor) -> list[Tile]:
            alone = colorize(heat, self.settings.color_map)
            return [Tile("picture", self.image[i]), Tile("both", self.over(i, heat)), Tile("attention", alone)]

        rows = ((f"'{phrase}'", tiles(i, heat / maximum)) for phrase, maps in zip(self.phrases, heats, strict=True)
                for i, heat in enumerate(maps))  # fmt: skip
        return self.sheets(rows, len(self.phrases) * len(self.image), 3, maximum, columns=3), maximum

    def words_over(self, heat: Tensor, picture: int) -> list[Tile]:
        """The picture, and under each phrase the same with its map [W, B, h, w] in 0..1."""
        words = [Tile(phrase, self.over(picture, maps[picture])) for phrase, maps in zip(self.phrases, heat, strict=True)]
        return [Tile("picture", self.image[picture]), *words]

    def contact_sheets(self) -> tuple[Tensor, float]:
        heat = self.maps()
        maximum = vmax_of(self.settings, heat)
        title, count = f"'{self.recording.text.strip()}'", len(self.image)
        rows = ((title, self.words_over(heat / maximum, i)) for i in range(count))
        return self.sheets(rows, count, 1 + len(self.phrases), maximum), maximum

    def over_steps(self) -> tuple[Tensor, float]:
        self.require_kept("steps")
        frames = self.recording.frames
        heats = [self.maps(frame=i) for i in range(len(frames))]
        maximum = vmax_of(self.settings, *heats)
        titles = [f"{steps_of(frame)} of {frames[-1].last + 1}" for frame in frames]
        rows = ((title, self.words_over(heat / maximum, i)) for i in range(len(self.image))
                for title, heat in zip(titles, heats, strict=True))  # fmt: skip
        return self.sheets(rows, len(self.image) * len(frames), 1 + len(self.phrases), maximum), maximum

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
        maximum = vmax_of(self.settings, *(heat for _, heat in titled if heat is not None))

        def tiles(word: int, i: int) -> list[Tile]:
            empty = torch.ones_like(self.image[0])
            return [Tile(title, empty if heat is None else self.over(i, heat[word, i] / maximum)) for title, heat in titled]

        rows = ((f"'{phrase}'", tiles(word, i)) for word, phrase in enumerate(self.phrases) for i in range(len(self.image)))
        return self.sheets(rows, len(self.phrases) * len(self.image), len(titled), maximum, columns), maximum

    def require_kept(self, what: str) -> None:
        """Raises ForgetError where the recording has not kept its steps, or heads, apart."""
        settings = self.recording.settings
        if settings.granularity != what:
            raise ForgetError(
                f"The recording did not keep its {what} apart: set `granularity` of Record Token Attention to `{what}`, and "
                "sample again."
            )
        if what == "heads" and not self.recording.apart:
            raise ForgetError(
                f"{settings.max_memory_mb} MB were too few to keep the heads apart: raise `max_memory_mb` of Record Token "
                "Attention, record fewer pictures, or choose some of the layers, and sample."
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
