"""An evaluation as one picture: the same seeds before and after, where the concept is attended to, and the figures."""

from __future__ import annotations

import textwrap

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..plots.canvas import FAINT, INK, PAPER, as_image, as_tensor, font, wrapped
from ..plots.colormaps import overlay
from .evaluate import Evaluation

TILE, GAP, MARGIN, LABEL, HEADING = 144, 6, 24, 92, 56  # pixels
HIGHEST = 4000
PROMPTS_SHOWN = {"concept": 4, "near": 3, "kept": 4, "unrelated": 3}  # prompts of a group that are shown
GROUP_TITLES = dict(concept="forgotten", near="near", kept="to be kept", unrelated="unrelated", empty="empty prompt")
GROUP_COLOURS = {"concept": "#c0392b", "near": "#d68910", "kept": "#1e8449", "unrelated": "#2471a3", "empty": "#7f8c8d"}
CHARTS = (
    ("prompt_drift", "change of what the prompt does"),
    ("kv_drift", "change of keys and values"),
    ("picture_change", "change of the picture"),
)
BAR, CHART_WIDTH = 18, 330  # the least


def draw_report(evaluation: Evaluation) -> Tensor:
    """The picture [H, W, 3] in 0..1: rows before and after at equal seeds, attention to the concept before and after,
    what learned words draw through the patch; beside them bars, and what the figures say. Without a VAE there are no
    pictures, only the rest."""
    report = evaluation.report
    columns = shown_columns(evaluation)
    groups = list(dict.fromkeys(group for group, _, _ in columns))
    concept = sum(group == "concept" for group, _, _ in columns)
    left = MARGIN + LABEL + concept * (TILE + GAP) + 3 * GAP  # where what is not the concept begins
    grid = MARGIN + LABEL + len(columns) * (TILE + GAP) + (len(groups) - 1) * 3 * GAP
    width = max(grid, left + 3 * CHART_WIDTH) + MARGIN
    canvas = Image.new("RGB", (width, HIGHEST), PAPER)
    pen = ImageDraw.Draw(canvas)
    pen.text((MARGIN, MARGIN), f"Forgotten: {', '.join(report['forgotten'])}", INK, font(24))
    settings = report["settings"]
    facts = f"{report['model']}, strength {settings['strength']:g}, {settings['num_inference_steps']} steps"
    pen.text((MARGIN, MARGIN + 32), f"{facts}, guidance {settings['guidance_scale']:g}, equal seeds", FAINT, font(13))
    shared = 0 if evaluation.pictures is None else 2  # rows that all columns have
    bottom = draw_grid(canvas, pen, evaluation, columns, MARGIN + 64)
    y = draw_charts(pen, report, left, width - MARGIN, MARGIN + 64 + HEADING + shared * (TILE + GAP) + 2 * GAP)
    y = draw_words(pen, report, left, width - MARGIN, y + GAP)
    canvas = canvas.crop((0, 0, width, min(max(y, bottom) + MARGIN, HIGHEST)))
    return as_tensor(canvas)


def shown_columns(evaluation: Evaluation) -> list[tuple[str, str, int]]:
    """(group, prompt, number of its first picture) of every column."""
    repeats = evaluation.report["settings"]["images_per_prompt"]
    drawn = [probe for probe in evaluation.probes if probe.group != "empty"]
    found: list[tuple[str, str, int]] = []
    for index, probe in enumerate(drawn):
        if sum(group == probe.group for group, _, _ in found) < PROMPTS_SHOWN[probe.group]:
            found.append((probe.group, probe.prompt, index * repeats))
    return found


def draw_grid(canvas: Image.Image, pen: ImageDraw.ImageDraw, evaluation: Evaluation, columns: list, y: int) -> int:
    """Pictures and heat maps under their group's title and their prompt; returns where they end."""
    rows = picture_rows(evaluation, columns)
    x, last = MARGIN + LABEL, ""
    for place, (group, prompt, _) in enumerate(columns):
        if group != last:
            x += 3 * GAP if last else 0
            pen.text((x, y), GROUP_TITLES[group], GROUP_COLOURS[group], font(16))
            last = group
        for line, text in enumerate(textwrap.wrap(prompt, 22)[:2]):
            pen.text((x, y + 24 + 14 * line), text, INK, font(12))
        for row, (_, tiles) in enumerate(rows):
            if place < len(tiles):
                canvas.paste(tile_of(tiles[place]), (x, y + HEADING + row * (TILE + GAP)))
        x += TILE + GAP
    for row, (label, _) in enumerate(rows):
        pen.text((MARGIN, y + HEADING + row * (TILE + GAP) + TILE // 2 - 10), label, INK, font(14))
    return y + HEADING + len(rows) * (TILE + GAP)


def picture_rows(evaluation: Evaluation, columns: list) -> list[tuple[str, list[Tensor]]]:
    """(label, pictures from the left) of every row; those of the attention lie over the picture before, and a prompt's
    two share one scale."""
    rows: list[tuple[str, list[Tensor]]] = []
    before, after = evaluation.pictures or (None, None)
    if before is not None and after is not None:
        rows = [(when, [made[i] for _, _, i in columns]) for when, made in (("before", before), ("after", after))]
    repeats = evaluation.report["settings"]["images_per_prompt"]
    for when, heat in zip(("before", "after"), evaluation.heat, strict=True):
        maps = []
        for i in (i for group, _, i in columns if group == "concept"):
            own = heat[i // repeats]
            brightest = evaluation.heat[0][i // repeats].max().clamp(min=1e-12)
            maps.append(overlay(torch.zeros(*own.shape, 3) if before is None else before[i], own / brightest, 0.75))
        rows.append((f"attention\n{when}", maps))
    if evaluation.recovered is not None:
        rows.append(("after, with\nlearned\nwords", list(evaluation.recovered[: len(rows[-1][1])])))
    return rows


def tile_of(picture: Tensor) -> Image.Image:
    """A picture [H, W, 3] in 0..1 fitted into a square."""
    image = as_image(picture)
    scale = TILE / max(image.size)
    image = image.resize([round(side * scale) for side in image.size], Image.Resampling.LANCZOS)
    square = Image.new("RGB", (TILE, TILE), "#f2f3f4")
    square.paste(image, ((TILE - image.width) // 2, (TILE - image.height) // 2))
    return square


def draw_charts(pen: ImageDraw.ImageDraw, report: dict, left: int, right: int, y: int) -> int:
    """A bar for each group in each measure, each chart on its own scale; returns where they end."""
    x, bottom, wide = left, y, (right - left) // len(CHARTS)
    for measure, title in CHARTS:
        groups = report[measure]
        if groups is None:
            continue
        pen.text((x, y), title, INK, font(14))
        longest = max(group["mean"] for group in groups.values()) or 1.0
        for row, (group, figures) in enumerate(groups.items()):
            top = y + 26 + row * (BAR + 4)
            pen.text((x, top + 2), GROUP_TITLES[group], INK, font(12))
            length = figures["mean"] / longest * (wide - 170)
            pen.rectangle((x + 88, top, x + 88 + max(length, 1), top + BAR - 1), fill=GROUP_COLOURS[group])
            pen.text((x + 94 + length, top + 2), f"{figures['mean']:.3g}", INK, font(12))
            bottom = max(bottom, top + BAR)
        x += wide
    return bottom + 2 * GAP


def draw_words(pen: ImageDraw.ImageDraw, report: dict, left: int, right: int, y: int) -> int:
    """The summary, its warnings in red; returns where it ends."""
    for line in report["summary"].splitlines():
        colour = GROUP_COLOURS["concept"] if line in report["warnings"] else INK
        for part in wrapped(pen, line, right - left):
            pen.text((left, y), part, colour, font(14))
            y += 19
        y += 5
    return y
