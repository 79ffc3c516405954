"""Two recordings side by side: where words attended in each, the difference, and their shares of the attention."""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..config import setting
from ..errors import ForgetError
from ..log import Tell, Work
from ..plots.canvas import FAINT, INK, PAPER, as_image, as_tensor, font, write
from ..plots.colormaps import colorize, colorize_difference, overlay, percent
from ..plots.sheet import EDGE, GAP, draw_bar
from ..text.tokens import columns_of, distinct_words, phrases_of, words_of
from .heatmap import OTHER, require_recorded, shares, word_heat_maps
from .recorder import AttentionRecording
from .visualize import LARGEST, MOST_NUMBERS, MOST_OVERLAID, SMALLEST, require_few_pictures

TO = "->"
FIRST, SECOND = "#2471a3", "#d68910"  # the bars
COLUMN_BARS, BAR, SIDE, LEAST_ROW = 300, 20, 84, 112  # pixels: the chart beside a row, a bar, colour bars, a row
HEAD = EDGE + 28  # and the titles


@dataclass(frozen=True)
class CompareConfig:
    """Which words of two recordings are compared, and how they are shown."""

    words: str = setting(
        "",
        "Words or phrases, separated by commas or lines; `cat -> dog` compares a word of the first prompt with another one "
        "of the second. Empty: every word of both.",
        multiline=True,
    )  # fmt: skip
    first_title: str = setting("before", "What the first recording is called in the picture.")
    second_title: str = setting("after", "What the second recording is called in the picture.")
    opacity: float = setting(0.6, "How much the heat map covers the picture.", min=0.0, max=1.0, step=0.05)
    color_map: str = setting(
        "inferno", "Colours from low to high; all of them are readable in greyscale and by the colour-blind.",
        choices=("inferno", "viridis", "magma", "cividis"), advanced=True,
    )  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """A phrase of the first prompt and one of the second, None where it is not in that prompt; each one's share of all
    attention, and its heat maps [B, H, W]."""

    names: tuple[str | None, str | None]
    shares: tuple[float, float]
    maps: tuple[Tensor, Tensor]

    @property
    def name(self) -> str:
        one, two = self.names
        return f"{one} {TO} {two}" if one and two and one != two else one or two or ""


@dataclass(frozen=True)
class Comparison:
    """Pairs of phrases in the order of the prompts, and what all words and special tokens get in each recording."""

    pairs: list[Pair]
    all_shares: tuple[dict[str, float], dict[str, float]]

    def as_json(self) -> str:
        """The shares, as JSON."""
        rows = [
            {
                "first": pair.names[0],
                "second": pair.names[1],
                "share": list(pair.shares),
                "change": pair.shares[1] - pair.shares[0],
            }
            for pair in self.pairs
        ]
        return json.dumps({"words": rows, "all": list(self.all_shares)}, indent=1)

    def report(self, titles: tuple[str, str]) -> str:
        """The shares as lines for people."""
        lines = [f"Share of the attention, {titles[0]} and {titles[1]}:"]
        for pair in self.pairs:
            one, two = pair.shares
            there = [percent(share) if name else "not there" for name, share in zip(pair.names, pair.shares, strict=True)]
            change = f", {percent(two - one, signed=True)} of all" if all(pair.names) else ""
            times = f" ({two / one:.2g} times)" if all(pair.names) and one > 0 else ""
            lines.append(f"{pair.name}: {there[0]}, {there[1]}{change}{times}")
        other = [own.get(OTHER, 0.0) for own in self.all_shares]
        if any(other):
            lines.append(
                f"{OTHER}, what another pack added to the prompt or put in its place: {', '.join(map(percent, other))}"
            )
        return "\n".join(lines)


def compare(
    first: AttentionRecording, second: AttentionRecording, words: str, size: tuple[int, int], tell: Tell | None = None
) -> Comparison:
    """Compares phrases of two recordings, on maps of this `size` (height, width); `tell` hears of each pair of maps before
    it is made, and may raise to stop.

    Raises ForgetError for a recording with nothing in it, recordings of unlike numbers of pictures, and a phrase that
    is in neither prompt, and for more maps than a host can hold.
    """
    recordings = (first, second)
    for recording in recordings:
        require_recorded(recording)
    masses = (first.mass(), second.mass())
    counts = [len(mass) for mass in masses]
    if counts[0] != counts[1]:
        raise ForgetError(f"One recording is of {counts[0]} pictures and the other of {counts[1]}: sample the same number.")
    wanted = names_of(recordings, words)
    require_few_pictures("comparison", 2 * len(wanted) * counts[0], *size, MOST_OVERLAID)
    work, pairs = Work(len(wanted), tell), []
    for names in wanted:
        work.step()
        pairs.append(pair_of(recordings, masses, names, *size))
    return Comparison(pairs, (shares(first), shares(second)))


def names_of(recordings: tuple[AttentionRecording, AttentionRecording], words: str) -> list[tuple[str | None, str | None]]:
    """The phrases to compare, as typed or all that there are; None where a prompt has not got one."""
    tokens = [recording.tokens for recording in recordings]
    wanted = [tuple(side.strip() for side in phrase.split(TO, 1)) for phrase in phrases_of(words)]
    wanted = wanted or [(word,) for word in dict.fromkeys(distinct_words(tokens[0]) + distinct_words(tokens[1]))]
    found = []
    for both in wanted:
        one, two = (name if columns_of(own, name) else None for own, name in zip(tokens, (both[0], both[-1]), strict=True))
        names = (one, two)
        missing = [name for name, there in zip((both[0], both[-1]), names, strict=True) if not there]
        if not any(names) or (len(both) == 2 and missing):
            there = " | ".join(", ".join(dict.fromkeys(word for word, _ in words_of(own))) for own in tokens)
            raise ForgetError(f"`{missing[0]}` is not in the recorded prompt: the words of the two prompts are {there}.")
        found.append(names)
    if not found:
        raise ForgetError("The recorded prompts have no words: wire the prompts' texts to Record Token Attention.")
    return found


def pair_of(
    recordings: tuple[AttentionRecording, AttentionRecording],
    masses: tuple[Tensor, Tensor],
    names: tuple[str | None, str | None],
    height: int,
    width: int,
) -> Pair:
    """Both sides' shares and maps; zeros where a prompt has not got the phrase."""

    def side(recording: AttentionRecording, mass: Tensor, name: str | None) -> tuple[float, Tensor]:
        columns = columns_of(recording.tokens, name) if name else []
        heat = word_heat_maps(recording, [name], height, width)[0] if name else torch.zeros(len(mass), height, width)
        return mass.mean(0)[columns].sum().item(), heat

    (one, first), (two, second) = map(side, recordings, masses, names)
    return Pair(names, (one, two), (first, second))


def draw_comparison(
    comparison: Comparison, images: tuple[Tensor, Tensor], settings: CompareConfig, tell: Tell | None = None
) -> Tensor:
    """A picture for each pair of pictures, [B, H', W', 3]: a row for each phrase with its two heat maps on one scale, the
    difference, and bars of its shares; `images` [B, H, W, 3] are what the maps lie over. `tell` hears of each row before it
    is drawn, and may raise to stop. Raises ForgetError for other numbers of pictures, and for more than a host can hold."""
    highest = max(max(heat.max().item() for heat in pair.maps) for pair in comparison.pairs) or 1e-12
    most = max((pair.maps[1] - pair.maps[0]).abs().max().item() for pair in comparison.pairs) or 1e-12
    count, *size = comparison.pairs[0].maps[0].shape
    for image in images:
        if len(image) != count:
            raise ForgetError(
                f"The recordings are of {count} pictures and an image input has {len(image)}: connect the pictures of the "
                "samplers that recorded."
            )
    width, height = size_of_sheet(size[0], size[1], len(comparison.pairs))
    require_few_pictures("comparison", count, height, width, MOST_NUMBERS)
    fitted, work = (fit(images[0], size), fit(images[1], size)), Work(count * len(comparison.pairs), tell)
    scales = (highest, most)
    return torch.stack([draw_sheet(comparison, fitted, i, scales, settings, work=work) for i in range(count)])


def fit(image: Tensor, size: list[int]) -> Tensor:
    """Pictures [B, H, W, C] brought to a size, [B, *size, 3]."""
    image = image[..., :3].float().cpu()
    if list(image.shape[1:3]) == list(size):
        return image
    scaled = torch.nn.functional.interpolate(image.movedim(-1, 1), tuple(size), mode="bilinear", antialias=True)
    return scaled.movedim(1, -1)


def size_of_map(height: int, width: int) -> tuple[int, int]:
    """Height and width at which maps of this size are drawn."""
    scale = min(max(height, width, SMALLEST), LARGEST * 2 // 3) / max(height, width)
    return max(round(height * scale), 1), max(round(width * scale), 1)


def height_of_row(height: int) -> int:
    """The height of a row of maps that are drawn this high."""
    return max(height + GAP + 20, LEAST_ROW)


def size_of_sheet(height: int, width: int, pairs: int) -> tuple[int, int]:
    """Width and height of the sheet of so many pairs of maps of this size."""
    height, width = size_of_map(height, width)
    return EDGE + 3 * (width + GAP) + 2 * SIDE + COLUMN_BARS + EDGE, HEAD + height_of_row(height) * pairs + EDGE


def draw_sheet(
    comparison: Comparison,
    images: tuple[Tensor, Tensor],
    i: int,
    scales: tuple[float, float],
    settings: CompareConfig,
    *,
    work: Work,
) -> Tensor:
    """The rows of the pair of pictures with the number `i`; `scales`: the highest share of all maps, and the largest
    difference."""
    pairs, (highest, most) = comparison.pairs, scales
    own_height, own_width = pairs[0].maps[0].shape[1:]
    height, width = size_of_map(own_height, own_width)
    row, chart = height_of_row(height), EDGE + 3 * (width + GAP) + 2 * SIDE
    canvas = Image.new("RGB", size_of_sheet(own_height, own_width, len(pairs)), PAPER)
    pen = ImageDraw.Draw(canvas)
    titles = (settings.first_title, settings.second_title)
    places = [EDGE, EDGE + width + GAP, EDGE + 2 * (width + GAP) + SIDE]
    for x, title in zip((*places, chart), (*titles, "difference", "share of all attention"), strict=True):
        write(pen, (x, EDGE), title, width if x < chart else COLUMN_BARS, 15)
    longest = max(max(pair.shares) for pair in pairs) or 1.0
    for number, pair in enumerate(pairs):
        work.step()
        y = HEAD + number * row
        over = [
            overlay(image[i], heat[i] / highest, settings.opacity, settings.color_map)
            for image, heat in zip(images, pair.maps, strict=True)
        ]
        tiles = [*over, colorize_difference((pair.maps[1][i] - pair.maps[0][i]) / most)]
        for x, tile in zip(places, tiles, strict=True):
            canvas.paste(as_image(tile).resize((width, height), Image.Resampling.BICUBIC), (x, y))
        write(pen, (EDGE, y + height + 2), f"'{pair.name}'", 2 * width, 13)
        draw_shares(pen, pair, titles, (chart, y), longest)
    tall = min(height, 200)
    ramp = torch.linspace(1, 0, tall)
    draw_bar(
        canvas,
        pen,
        (places[1] + width + GAP, HEAD),
        tall,
        colorize(ramp, settings.color_map),
        ticks=(highest, highest / 2, 0.0),
    )
    ends = (most, 0.0, -most)
    draw_bar(canvas, pen, (places[2] + width + GAP, HEAD), tall, colorize_difference(2 * ramp - 1), ticks=ends, signed=True)
    return as_tensor(canvas)


def draw_shares(pen: ImageDraw.ImageDraw, pair: Pair, titles: tuple[str, str], at: tuple[int, int], longest: float) -> None:
    """Two bars with their figures, one for each recording."""
    x, y = at
    write(pen, (x, y), pair.name, COLUMN_BARS, 14)
    for number, (title, name, share, color) in enumerate(zip(titles, pair.names, pair.shares, (FIRST, SECOND), strict=True)):
        top = y + 24 + number * (BAR + 20)
        length = share / longest * (COLUMN_BARS - 80)
        write(pen, (x, top), title, COLUMN_BARS, 12, color=FAINT)
        pen.rectangle((x, top + 16, x + max(length, 1), top + 16 + BAR - 4), fill=color)
        label = percent(share) if name else "not there"
        pen.text((x + length + 6, top + 16), label, INK, font(12))
