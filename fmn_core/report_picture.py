"""An evaluation as one picture: the same seeds before and after, where the concept is attended to, and the figures."""

from __future__ import annotations

import textwrap

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .evaluate import Evaluation
from .heatmap import overlay

TILE, GAP, MARGIN, LABEL = 144, 6, 24, 92  # pixels
MOST = 4  # prompts of a group that are shown
TITLES = {"concept": "forgotten", "near": "near", "kept": "to be kept", "unrelated": "unrelated", "empty": "empty prompt"}
COLOURS = {"concept": "#c0392b", "near": "#d68910", "kept": "#1e8449", "unrelated": "#2471a3", "empty": "#7f8c8d"}
INK, FAINT, PAPER = "#1c2833", "#808b96", "#ffffff"
CHARTS = (
    ("prompt_drift", "change of what the prompt does"),
    ("kv_drift", "change of keys and values"),
    ("picture_change", "change of the picture"),
)
BAR, CHART_WIDTH = 18, 330


def font(size: int):
    """Pillow's own font."""
    return ImageFont.load_default(size)


def draw_report(evaluation: Evaluation) -> Tensor:
    """The picture [H, W, 3] in 0..1: rows before and after at equal seeds, attention to the concept before and after
    on one scale, bars, and what the figures say. Without a VAE there are no pictures, only the rest."""
    report = evaluation.report
    columns = shown_columns(evaluation)
    groups = list(dict.fromkeys(group for group, _, _ in columns))
    width = max(MARGIN * 2 + LABEL + len(columns) * (TILE + GAP) + (len(groups) - 1) * 3 * GAP, 3 * CHART_WIDTH + 2 * MARGIN)
    canvas = Image.new("RGB", (width, 4000), PAPER)
    pen = ImageDraw.Draw(canvas)
    names = ", ".join(report["forgotten"])
    pen.text((MARGIN, MARGIN), f"Forgotten: {names}", INK, font(24))
    settings = report["settings"]
    facts = (
        f"{report['model']}, strength {settings['strength']:g}, {settings['steps']} steps, guidance {settings['guidance']:g}"
    )
    pen.text((MARGIN, MARGIN + 32), facts, FAINT, font(13))
    y = draw_grid(canvas, pen, evaluation, columns, MARGIN + 64)
    y = draw_charts(pen, report, y + 2 * GAP)
    y = draw_words(pen, report, width, y + 2 * GAP)
    canvas = canvas.crop((0, 0, width, y + MARGIN))
    return torch.from_numpy(np.asarray(canvas).copy()).float() / 255


def shown_columns(evaluation: Evaluation) -> list[tuple[str, str, int]]:
    """(group, prompt, number of its first picture) of every column."""
    repeats = evaluation.report["settings"]["pictures"]
    drawn = [probe for probe in evaluation.probes if probe.group != "empty"]
    found: list[tuple[str, str, int]] = []
    for index, probe in enumerate(drawn):
        if sum(group == probe.group for group, _, _ in found) < MOST:
            found.append((probe.group, probe.prompt, index * repeats))
    return found


def draw_grid(canvas: Image.Image, pen: ImageDraw.ImageDraw, evaluation: Evaluation, columns: list, y: int) -> int:
    """Pictures and heat maps under their group's title and their prompt; returns where the next thing may begin."""
    rows: list[tuple[str, list]] = []
    before, after = evaluation.pictures or (None, None)
    if before is not None:
        rows = [(when, [made[i] for _, _, i in columns]) for when, made in (("before", before), ("after", after))]
    top = max(heat.max().item() for heat in evaluation.heat) or 1.0
    repeats = evaluation.report["settings"]["pictures"]
    for when, heat in zip(("attention\nbefore", "attention\nafter"), evaluation.heat, strict=True):
        maps = []
        for group, _, i in columns:
            if group == "concept":
                h = heat[i // repeats]
                ground = torch.zeros(*h.shape, 3) if before is None else before[i]
                maps.append(overlay(ground, h / top, 0.75))
        rows.append((when, maps))
    x, last = MARGIN + LABEL, ""
    for place, (group, prompt, _) in enumerate(columns):
        if group != last:
            x += 3 * GAP if last else 0
            pen.text((x, y), TITLES[group], COLOURS[group], font(16))
            last = group
        for line, text in enumerate(textwrap.wrap(prompt, 22)[:2]):
            pen.text((x, y + 24 + 14 * line), text, INK, font(12))
        for row, (_, tiles) in enumerate(rows):
            if place < len(tiles):
                canvas.paste(tile_of(tiles[place]), (x, y + 56 + row * (TILE + GAP)))
        x += TILE + GAP
    for row, (label, _) in enumerate(rows):
        pen.text((MARGIN, y + 56 + row * (TILE + GAP) + TILE // 2 - 10), label, INK, font(14))
    shown = sum(group == "concept" for group, _, _ in columns)
    note = MARGIN + LABEL + shown * (TILE + GAP) + 3 * GAP
    scale = f"Attention to the concept's own tokens, on the pictures before, noised.\nBrightest: {top:.3f} of a pixel's attention."
    pen.text((note, y + 56 + (len(rows) - 2) * (TILE + GAP) + GAP), scale, FAINT, font(12))
    return y + 56 + len(rows) * (TILE + GAP)


def tile_of(picture: Tensor) -> Image.Image:
    """A picture [H, W, 3] in 0..1 fitted into a square."""
    image = Image.fromarray((picture.clamp(0, 1) * 255).round().byte().cpu().numpy())
    image.thumbnail((TILE, TILE), Image.Resampling.LANCZOS) if max(image.size) > TILE else None
    scale = TILE / max(image.size)
    image = image.resize([round(side * scale) for side in image.size], Image.Resampling.LANCZOS)
    square = Image.new("RGB", (TILE, TILE), "#f2f3f4")
    square.paste(image, ((TILE - image.width) // 2, (TILE - image.height) // 2))
    return square


def draw_charts(pen: ImageDraw.ImageDraw, report: dict, y: int) -> int:
    """A bar for each group in each measure, each chart on its own scale."""
    x, bottom = MARGIN, y
    for measure, title in CHARTS:
        groups = report.get(measure)
        if not groups:
            continue
        pen.text((x, y), title, INK, font(14))
        longest = max(group["mean"] for group in groups.values()) or 1.0
        for row, (group, figures) in enumerate(groups.items()):
            top = y + 26 + row * (BAR + 4)
            pen.text((x, top + 2), TITLES[group], INK, font(12))
            length = figures["mean"] / longest * (CHART_WIDTH - 170)
            pen.rectangle((x + 88, top, x + 88 + max(length, 1), top + BAR - 1), fill=COLOURS[group])
            pen.text((x + 94 + length, top + 2), f"{figures['mean']:.3g}", INK, font(12))
            bottom = max(bottom, top + BAR)
        x += CHART_WIDTH
    return bottom + 2 * GAP


def draw_words(pen: ImageDraw.ImageDraw, report: dict, width: int, y: int) -> int:
    """The summary, its warnings in red."""
    letters = (width - 2 * MARGIN) // 7
    for line in report["summary"].splitlines():
        colour = COLOURS["concept"] if line in report["warnings"] else INK
        for part in textwrap.wrap(line, letters):
            pen.text((MARGIN, y), part, colour, font(14))
            y += 20
        y += 3
    return y
