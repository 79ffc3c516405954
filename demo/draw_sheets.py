"""The cards' sheets: generated pictures in rows, with what was asked for."""

from __future__ import annotations

from PIL import Image, ImageDraw, ImageFont

from .unseen import read_unseen
from .vocabulary import COLOURS, COUNTS, OBJECTS, STYLES


def draw_sheet(rows, file, size=64, margin=110, panels=1):
    """Writes rows of (label, pictures [H, W, 3]) as one picture, in `panels` beside each other; nothing for no rows."""
    if not rows:
        return
    columns, height = max(len(pictures) for _, pictures in rows), -(-len(rows) // panels)
    width = margin + columns * size
    canvas = Image.new("RGB", (panels * width, height * size), "white")
    text, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    for index, (label, pictures) in enumerate(rows):
        x, y = index // height * width, index % height * size
        text.text((x + 6, y + size // 2 - 8), label, "black", font)
        for column, picture in enumerate(pictures):
            if picture is None:
                continue
            tile = Image.fromarray((picture * 255).round().byte().numpy()).resize((size, size), Image.Resampling.LANCZOS)
            canvas.paste(tile, (x + margin + column * size, y))
    canvas.save(file, quality=85)


def draw_sheets(kept, folder):
    """The card's sheets, from [(group, Asked, seed, picture)]."""
    folder.mkdir(parents=True, exist_ok=True)
    first = {(group, asked.key): picture for group, asked, seed, picture in kept if seed == 0}

    def rows(group, most=None):
        """Pictures by key, in the order asked."""
        by_key = {}
        for name, asked, _, picture in kept:
            if name == group:
                by_key.setdefault(asked.key, []).append(picture)
        return [(key, pictures[:most]) for key, pictures in by_key.items()]

    pairs = [
        (name, [first["plain", name], *(first.get(("pairs", (name, style))) for style in STYLES)])
        for name, _ in rows("plain")
    ]
    draw_sheet(pairs, folder / "objects-and-styles.jpg", panels=2)
    draw_sheet(sorted(rows("plain"), key=lambda row: OBJECTS[row[0]].kind), folder / "related.jpg", panels=3)
    draw_sheet(rows("other words"), folder / "synonyms.jpg", panels=3)
    unseen = [row for group in read_unseen() if group != "descriptions" for row in rows(group)]
    draw_sheet(unseen, folder / "unseen.jpg", panels=3)
    draw_sheet(rows("people"), folder / "people.jpg", 96, panels=2)
    draw_sheet(rows("colours", len(COLOURS)), folder / "colours.jpg", 80, panels=2)
    draw_sheet(rows("counts", len(COUNTS)), folder / "counts.jpg", panels=5)
    draw_sheet(rows("backgrounds", 2), folder / "backgrounds.jpg", panels=5)
