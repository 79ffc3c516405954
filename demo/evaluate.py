"""How good the embedded model is, as the judge sees it: `python -m demo.evaluate [--quick] [--json FILE]`.

Samples every (object, style) pair, every person, synonyms, colours, backgrounds and counts in ComfyUI's own UNet, and
prints what the judge recognises beside what it recognises of real drawings that it never saw.
"""

import argparse
import json
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from tqdm import tqdm

from demo.host import CHECKPOINT, load_embedded_model
from demo.hue import commonest_hue
from demo.judge import Judge, kernel_distance, nearest
from demo.vocabulary import (
    BACKGROUNDS,
    COLOURS,
    COUNTS,
    OBJECTS,
    PEOPLE,
    STYLES,
    is_held_out,
    plural,
    with_article,
)
from fmn_core.training.sampling import sample_ddim

STEPS, GUIDANCE, BATCH = 20, 3.0, 20
FEW_SEEDS = {"colours": 2, "backgrounds": 2, "counts": 2}  # at most, in groups that have many prompts of one kind


class Asked(NamedTuple):
    """A prompt, what its picture should be seen as, and what it is counted under."""

    prompt: str
    expected: str
    key: object


class Seen(NamedTuple):
    """What one picture was seen as, beside what it should be."""

    expected: str
    seen: str
    key: object


def accuracy(results: list[Seen], where=lambda key: True) -> float:
    """The share of pictures seen as expected among those whose key passes."""
    right = [result.expected == result.seen for result in results if where(result.key)]
    return sum(right) / len(right) if right else float("nan")


def confusions(results: list[Seen], most=12) -> list[tuple[str, str, int]]:
    """The commonest (expected, seen, count) that differ."""
    return [(*pair, count) for pair, count in Counter(r[:2] for r in results if r.expected != r.seen).most_common(most)]


KINDS_OF_SEEING = {
    "pairs": "object", "plain": "object", "synonyms": "object", "people": "person", "colours": "colour",
    "backgrounds": "background", "counts": "count",
}  # fmt: skip


def what_to_ask(quick) -> dict[str, list[Asked]]:
    """The prompts, by group; in the quick run a few of each."""
    asked = {group: [] for group in KINDS_OF_SEEING}
    for index, name in list(enumerate(OBJECTS))[:: 7 if quick else 1]:
        for style in STYLES[index % 5 :: 5] if quick else STYLES:
            asked["pairs"].append(Asked(f"{with_article(name)} in {style} style", name, (name, style)))
        asked["plain"].append(Asked(with_article(name), name, name))
        asked["synonyms"] += [Asked(with_article(word), name, word) for word in OBJECTS[name].synonyms.split()]
        asked["counts"] += [Asked(f"{count} {plural(name)}", count, name) for count in COUNTS]
        for background in list(BACKGROUNDS)[index % 4 :: 4]:
            asked["backgrounds"].append(Asked(f"{with_article(name)} on a {background} background", background, name))
    for name in [name for name in OBJECTS if OBJECTS[name].recoloured][:: 7 if quick else 1]:
        asked["colours"] += [Asked(with_article(f"{colour} {name}"), colour, name) for colour in COLOURS]
    asked["people"] = [Asked(f"a portrait of {name}", name, name) for name in PEOPLE]
    return asked


@torch.no_grad()
def sample(host, prompts, seeds, steps=STEPS):
    """Pictures [B, H, W, 3] in 0..1, each from its own seed, by DDIM at GUIDANCE."""
    shape = host.latent_shape()
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    with host.training((len(prompts), *shape)):
        return host.decode(
            sample_ddim(host, noise, host.encode(prompts), host.encode([""] * len(prompts)), steps=steps, guidance=GUIDANCE)
        )


def seconds_a_picture(host) -> float:
    """Median seconds of five pictures, sampled one by one after a first that warms up."""
    seconds = []
    for seed in range(6):
        start = time.perf_counter()
        sample(host, ["a cat"], [seed])
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


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


def look(judge, kind, pictures):
    """What each picture shows of one kind."""
    if kind in SEEN_BY_RULE:
        return [SEEN_BY_RULE[kind](picture) for picture in pictures]
    return judge.recognised(pictures, kind)


def evaluate(host, judge, quick, seeds, keep=None):
    """Samples and judges: {group: [Seen]}, "styles" beside "pairs" from the same pictures; and the pairs' features.

    `keep(group, asked, seed, picture)` sees every picture.
    """
    results, features = {"styles": []}, []
    for group, asked in what_to_ask(quick).items():
        results[group] = []
        several = range(min(seeds, FEW_SEEDS.get(group, seeds)))
        todo = [(index, one, seed) for seed in several for index, one in enumerate(asked)]
        for start in tqdm(range(0, len(todo), BATCH), desc=group, leave=False):
            _, some, of_seed = zip(*(part := todo[start : start + BATCH]), strict=True)
            pictures = sample(host, [one.prompt for one in some], [1000 * seed + index for index, _, seed in part])
            if group == "pairs":
                features.append(judge.features(pictures))
                seen = judge.names("object", features[-1])
                styles = judge.names("style", features[-1])
                results["styles"] += [Seen(one.key[1], style, one.key) for one, style in zip(some, styles, strict=True)]
            else:
                seen = look(judge, KINDS_OF_SEEING[group], pictures)
            results[group] += [Seen(one.expected, name, one.key) for one, name in zip(some, seen, strict=True)]
            if keep:
                for one, seed, picture in zip(some, of_seed, pictures, strict=True):
                    keep(group, one, seed, picture)
    return results, torch.cat([shown for shown, _ in features])


def real_features(judge, pairs, seed):
    """What is shown [B, D] in real pictures of (object, style) pairs, drawn as for training; needs the recipe's packages."""
    import random

    from demo.recipe.drawings import default_cache, read_objects
    from demo.recipe.pictures import PLAIN_HANDS, Scene, draw

    objects = read_objects(PLAIN_HANDS, default_cache() / "art")
    scenes = [Scene(*pair) for pair in pairs]
    pictures = [draw(scene, objects, {}, random.Random(f"{seed} {index}")) for index, scene in enumerate(scenes)]
    return judge.features(torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])) / 255)[0]


def distances(judge, made, pairs):
    """How far features [B, D] of generated pairs lie from real ones, and how far other real ones do: {title: (a, b)}."""
    real, other = (real_features(judge, pairs, seed) for seed in ("one", "other"))
    return {
        "nearest real picture, cosine": tuple(nearest(some, real)[0].mean().item() for some in (made, other)),
        "kernel distance to real pictures": tuple(kernel_distance(some, real) for some in (made, other)),
    }


def summarise(results, judge):
    """The figures, as plain values."""
    pairs, styles, real = results["pairs"], results["styles"], judge.held_out
    unseen = lambda key: is_held_out(*key)  # noqa: E731
    rows = {
        "objects, in every style": (accuracy(pairs), real["object"]),
        "  in a style never seen with it": (accuracy(pairs, unseen), real["object"]),
        "styles, of every object": (accuracy(styles), real["style"]),
        "  of an object never seen in it": (accuracy(styles, unseen), real["style"]),
        "objects, no style named": (accuracy(results["plain"]), real["object, drawings"]),
        "objects by another word": (accuracy(results["synonyms"]), real["object, drawings"]),
        "people": (accuracy(results["people"]), real["person"]),
        "colours, by the commonest hue": (accuracy(results["colours"]), None),
        "backgrounds, by the corners": (accuracy(results["backgrounds"]), None),
        "counts, by separate shapes": (accuracy(results["counts"]), None),
    }

    def by(index, name):
        return tuple(accuracy(some, lambda key: key[index] == name) for some in (pairs, styles))

    return {
        "rows": rows,
        "by_object": {name: by(0, name) for name in OBJECTS},
        "by_style": {style: by(1, style) for style in STYLES},
        "confusions": {group: confusions(results[group]) for group in ("pairs", "styles", "people")},
    }


def show(figures):
    """Prints the tables."""
    print(f"\n{'':34}{'generated':>11}{'real, unseen':>14}")
    for title, (generated, real) in figures["rows"].items():
        print(f"{title:34}{generated:11.3f}{'' if real is None else format(real, '14.3f')}")
    for title, (generated, real) in figures.get("distances", {}).items():
        print(f"{title:34}{generated:11.4f}{real:14.4f}")
    print(f"\n{'style':14}{'objects':>9}{'style':>9}")
    for style, (objects, style_accuracy) in figures["by_style"].items():
        print(f"{style:14}{objects:9.3f}{style_accuracy:9.3f}")
    worst = sorted(figures["by_object"].items(), key=lambda item: item[1][0])[:10]
    print("\nweakest objects: " + ", ".join(f"{name} {values[0]:.2f}" for name, values in worst))
    for name, pairs in figures["confusions"].items():
        print(f"taken for another, {name}: " + ", ".join(f"{a} for {b} ({n})" for a, b, n in pairs[:8]))


def draw_sheet(rows, file, size=64, margin=110, panels=1):
    """Writes rows of (label, pictures [H, W, 3]) as one picture, in `panels` beside each other."""
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
    draw_sheet(rows("synonyms"), folder / "synonyms.jpg", panels=3)
    draw_sheet(rows("people"), folder / "people.jpg", 96, panels=2)
    draw_sheet(rows("colours", len(COLOURS)), folder / "colours.jpg", 80, panels=2)
    draw_sheet(rows("counts", len(COUNTS)), folder / "counts.jpg", panels=5)
    draw_sheet(rows("backgrounds", 2), folder / "backgrounds.jpg", panels=5)


def main():
    parser = argparse.ArgumentParser(prog="python -m demo.evaluate", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few pictures of each kind, in under a minute")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument(
        "--seeds", type=int, help="of every prompt (5; quick: 1); at most 2 for colours, backgrounds, counts"
    )
    parser.add_argument("--real", action="store_true", help="distances to real pictures too: needs the recipe's packages")
    parser.add_argument("--sheets", type=Path, help="write the card's sheets into this folder")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--comfyui", type=Path, help="ComfyUI's folder (FMN_COMFYUI, or the one that install.py made)")
    options = parser.parse_args()
    seeds = options.seeds or (1 if options.quick else 5)
    start = time.monotonic()
    host, judge = load_embedded_model(options.comfyui, options.checkpoint), Judge.load()
    kept = []
    keep = (lambda *one: kept.append(one)) if options.sheets else None
    results, features = evaluate(host, judge, options.quick, seeds, keep)
    figures = summarise(results, judge) | {"seconds_a_picture": seconds_a_picture(host)}
    if options.real:
        figures["distances"] = distances(judge, features, sorted({result.key for result in results["pairs"]}))
    show(figures)
    if options.sheets:
        draw_sheets(kept, options.sheets)
    print(f"\none picture alone: {figures['seconds_a_picture']:.2f} s on {torch.get_num_threads()} threads")
    print(f"{seeds} seeds, {STEPS} DDIM steps at guidance {GUIDANCE}; {time.monotonic() - start:.0f} s")
    if options.json:
        options.json.write_text(json.dumps({**figures, "seeds": seeds}, indent=1))


if __name__ == "__main__":
    main()
