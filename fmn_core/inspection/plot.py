"""An inspection as one picture: what the patch is, how strongly it changes each layer, and its own report as bars."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

from PIL import Image, ImageDraw
from torch import Tensor

from ..evaluation.plot import BAR, GAP, GROUP_COLOURS, GROUP_TITLES, HIGHEST, MARGIN
from ..patch.report import PatchReport
from ..patch.summary import report_lines
from ..plots.canvas import FAINT, INK, MOST_LINE_LETTERS, PAPER, as_tensor, font, shortened, wrapped
from .describe import LETTERS, SHOWN, base, file_facts, made, purpose
from .inspect import Inspection

WIDTH, CHART_HEIGHT, AXIS = 1024, 210, 56  # pixels; the axis is what stands left of the bars
WIDEST = 26  # a bar of the chart
ROW, NAME, VALUE = BAR + 6, 118, 52  # of a panel: height of a row, width of its name and of its figure
MATRIX_COLOURS = {"to_k": "#2471a3", "to_v": "#d68910", "to_q": "#1e8449", "to_out": "#7d3c98"}
LINE = "#e5e8e8"
MOST_OF_A_LINE = 4000  # letters before it is wrapped


@dataclass(frozen=True)
class Panel:
    """A title and rows (name, value, colour), whose bars are as long as their value's share of `full`."""

    title: str
    rows: list[tuple[str, float, str]]
    full: float
    written: Callable[[float], str]


def draw_inspection(inspection: Inspection) -> Tensor:
    """The picture [H, W, 3] in 0..1, W = 1024."""
    canvas = Image.new("RGB", (WIDTH, HIGHEST), PAPER)
    pen = ImageDraw.Draw(canvas)
    y = draw_head(pen, inspection)
    y = draw_changes(pen, inspection, y + 2 * GAP)
    y = draw_panels(pen, panels_of(inspection.report), y + 3 * GAP)
    y = draw_lines(pen, sentences(inspection), y + 2 * GAP, 14, INK)
    return as_tensor(canvas.crop((0, 0, WIDTH, min(y + MARGIN, HIGHEST))))


def draw_head(pen: ImageDraw.ImageDraw, inspection: Inspection) -> int:
    """What the patch forgets, what is wrong with it in red, and how it was made; returns where that ends."""
    title = textwrap.shorten(purpose(inspection.patch), MOST_LINE_LETTERS, placeholder=" ...")
    y = draw_lines(pen, [title[0].upper() + title[1:]], MARGIN, 24, INK)
    y = draw_lines(pen, inspection.warnings, y + GAP, 14, GROUP_COLOURS["concept"])
    made_for, fit = base(inspection)[0], inspection.fit
    y = draw_lines(pen, [*made(inspection.patch), *file_facts(inspection), made_for], y + GAP, 13, FAINT)
    if fit and fit.fits:
        y = draw_lines(pen, [fit.sentence], y, 13, GROUP_COLOURS["kept" if fit.same else "near"])
    return y


def draw_lines(pen: ImageDraw.ImageDraw, lines: list[str], y: int, size: int, colour: str) -> int:
    """Lines of text as wide as the picture; returns where they end."""
    for line in lines:
        for part in wrapped(pen, line[:MOST_OF_A_LINE], WIDTH - 2 * MARGIN, size):
            if y > HIGHEST:
                return y
            pen.text((MARGIN, y), shortened(pen, part, WIDTH - 2 * MARGIN, size), colour, font(size))
            y += round(1.4 * size)
    return y


def draw_changes(pen: ImageDraw.ImageDraw, inspection: Inspection, y: int) -> int:
    """Bars of the change of each projection, layer by layer, over the names of the blocks; returns where they end."""
    changes = inspection.changes
    known = changes[0].relative is not None
    pen.text((MARGIN, y), f"Change of the weights, |delta W|{' / |W|' if known else ''}", INK, font(16))
    draw_legend(pen, [matrix for matrix in LETTERS if any(c.matrix == matrix for c in changes)], y + 2)
    top, left = y + 34, MARGIN + AXIS
    highest = max(change.amount for change in changes)
    ticks = axis_ticks(highest)
    for tick in ticks:
        height = top + CHART_HEIGHT * (1 - tick / ticks[-1])
        pen.line((left, height, WIDTH - MARGIN, height), LINE)
        name = f"{tick * 100:.3g} %" if known else f"{tick:.3g}"
        pen.text((left - 8, height), name, FAINT, font(12), anchor="rm")
    layers = [list(of) for _, of in groupby(changes, lambda c: (c.unet_block, c.block, c.depth))]
    slot = (WIDTH - MARGIN - left) / len(layers)
    bar = min(WIDEST, (slot - max(2, slot / 6)) / max(map(len, layers)))
    for number, layer in enumerate(layers):
        x = left + (number + 0.5) * slot - bar * len(layer) / 2
        for change in layer:
            high = top + CHART_HEIGHT * (1 - change.amount / ticks[-1])
            pen.rectangle((x, high, x + max(bar - 2, 1), top + CHART_HEIGHT), fill=MATRIX_COLOURS[change.matrix])
            x += bar
    bottom = top + CHART_HEIGHT
    pen.line((left, bottom, WIDTH - MARGIN, bottom), FAINT)
    firsts = [layer[0] for layer in layers]
    blocks, places = [(c.unet_block, c.block) for c in firsts], [c.unet_block for c in firsts]
    draw_spans(pen, blocks, block_name, (left, bottom + 14), slot, size=12)
    draw_spans(pen, places, str, (left, bottom + 34), slot, size=14, ruled=True)
    return bottom + 44


def draw_spans(
    pen: ImageDraw.ImageDraw,
    keys: list,
    name: Callable,
    at: tuple[int, int],
    slot: float,
    *,
    size: int,
    ruled: bool = False,
) -> None:
    """A name in the middle of each run of equal keys, one key for each slot from `at` on, and with `ruled` a line between
    runs."""
    (left, y), start = at, 0
    for key, run in groupby(keys):
        length = len(list(run))
        middle = left + (start + length / 2) * slot
        pen.text((middle, y), shortened(pen, name(key), length * slot - 2, size), INK, font(size), anchor="mm")
        if ruled and start:
            pen.line((left + start * slot, y - 34, left + start * slot, y + 8), LINE, 2)
        start += length


def block_name(key: tuple[str, tuple[int, ...]]) -> str:
    """A block's number in its place; the one in the middle has none."""
    unet_block, block = key
    return "" if unet_block == "mid" else ".".join(map(str, block))


def draw_legend(pen: ImageDraw.ImageDraw, matrices: list[str], y: int) -> None:
    """The colours of the matrices, from the right."""
    x = WIDTH - MARGIN
    for matrix in reversed(matrices):
        x -= round(pen.textlength(LETTERS[matrix], font(14)))
        pen.text((x, y), LETTERS[matrix], INK, font(14))
        pen.rectangle((x - 20, y + 2, x - 6, y + 15), fill=MATRIX_COLOURS[matrix])
        x -= 38


def axis_ticks(highest: float) -> list[float]:
    """Four to six round numbers in equal steps, from 0 to `highest` or the next."""
    highest = highest or 1.0
    unit = 10 ** math.floor(math.log10(highest / 4))
    step = next(unit * times for times in (1, 2, 2.5, 5, 10) if unit * times * 5 >= highest)
    return [step * number for number in range(math.ceil(highest / step - 1e-9) + 1)]


def panels_of(report: PatchReport) -> list[Panel]:
    """The figures of a patch's own report, erased concepts and near words on one scale."""
    found, (red, amber, green, blue) = [], (GROUP_COLOURS[key] for key in ("concept", "near", "kept", "unrelated"))
    erasure, drift = report.erasure, report.preserve_drift
    full = max([1.0, *erasure.values(), *drift.values()])
    if erasure:
        least = sorted(erasure.items(), key=lambda item: item[1])[:SHOWN] if len(erasure) > SHOWN else erasure.items()
        title = f"Erasure, the least {SHOWN} of {len(erasure)}" if len(erasure) > SHOWN else "Erasure: way to the target"
        found.append(Panel(title, [(name, way, green) for name, way in least], full, "{:.0%}".format))
    if drift:
        title = f"Drift of near words, the {SHOWN} of {len(drift)} that move most"
        title = title if len(drift) > SHOWN else "Drift of near words"
        found.append(Panel(title, [(word, way, amber) for word, way in [*drift.items()][:SHOWN]], full, "{:.1%}".format))
    mass = report.attention_mass
    if mass:
        rows = [(when, share, blue) for when, share in mass.items()]
        found.append(Panel("Attention to the concept", rows, max(mass.values()), "{:.4f}".format))
    errors = report.target_error
    if errors:
        rows = [(when, left, red) for when, left in errors.items()]
        found.append(Panel("Noise estimates: error left", rows, max(1.0, *errors.values()), "{:.0%}".format))
    most = sorted(report.response_errors, key=lambda one: -one["added"])[: SHOWN // 2]
    if most:
        both = (("added", amber), ("jointly", green))
        rows = [(f"{one['concept']}, {how}", one[how], colour) for one in most for how, colour in both]
        found.append(Panel("What the others change, simply added and jointly", rows, 1.0, "{:.0%}".format))
    measured = report.evaluation.get("prompt_drift", {})
    if measured:
        rows = [(GROUP_TITLES[group], measured[group], GROUP_COLOURS[group]) for group in GROUP_TITLES if group in measured]
        found.append(Panel("Measured change of prompts", rows, max(1.0, *measured.values()), "{:.1%}".format))
    return found


def draw_panels(pen: ImageDraw.ImageDraw, panels: list[Panel], y: int) -> int:
    """Two or three columns of bars, each panel where there is most room; returns where they end."""
    columns = min(max(len(panels), 2), 3)
    wide = (WIDTH - 2 * MARGIN) / columns
    bottoms = [y] * columns
    for panel in panels:
        column = bottoms.index(min(bottoms))
        top = bottoms[column]
        x = round(MARGIN + column * wide)
        room = wide - NAME - VALUE - 3 * GAP
        pen.text((x, top), shortened(pen, panel.title, wide - 2 * GAP, 14), INK, font(14))
        for row, (name, value, colour) in enumerate(panel.rows):
            middle = top + 36 + row * ROW
            pen.text((x, middle), shortened(pen, name, NAME - 8, 12), INK, font(12), anchor="lm")
            length = max(room * value / (panel.full or 1.0), 1)
            pen.rectangle((x + NAME, middle - BAR // 2, x + NAME + length, middle + BAR // 2 - 1), fill=colour)
            pen.text((x + NAME + length + 6, middle), panel.written(value), INK, font(12), anchor="lm")
        bottoms[column] = top + 36 + len(panel.rows) * ROW + 2 * GAP
    return max(bottoms)


def sentences(inspection: Inspection) -> list[str]:
    """The patch's own report in words, less its warnings, which stand at the top."""
    lines = [line for line in report_lines(inspection.report) if line not in inspection.warnings]
    return [textwrap.shorten(line[:MOST_OF_A_LINE], 2 * MOST_LINE_LETTERS, placeholder=" ...") for line in lines] or [
        "It holds no figures of its own."
    ]
