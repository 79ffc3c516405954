"""How good a demo model is, as the classifier sees it: `python -m demo.evaluate [--model flux] [--quick] [--json FILE]`.

Samples every (object, style) pair, every person, synonyms, words that no caption had (demo/unseen.py), colours,
backgrounds and counts, the first model in ComfyUI's own UNet and the second in diffusers' FluxTransformer2DModel, and
prints what the classifier recognises beside what it recognises of real drawings that it never saw; with `--model flux`
beside the first model's figures too.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo.asked import FEW_SEEDS, KINDS_OF_SEEING, ROWS, what_to_ask
from demo.classifier import Classifier, kernel_distance, nearest
from demo.draw_sheets import draw_sheets
from demo.host import CHECKPOINT, load_demo_model
from demo.seen_by_rule import SEEN_BY_RULE
from demo.unseen import read_unseen
from demo.vocabulary import OBJECTS, STYLES, is_held_out
from fmn_core.training.sampling import sample_ddim

STEPS, GUIDANCE, BATCH = 20, 3.0, 20


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


@torch.no_grad()
def sample(host, prompts, seeds, steps=STEPS):
    """Pictures [B, H, W, 3] in 0..1, each from its own seed, by DDIM at GUIDANCE."""
    shape = host.latent_shape()
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    with host.training((len(prompts), *shape)):
        return host.decode(
            sample_ddim(host, noise, host.encode(prompts), host.encode([""] * len(prompts)), steps=steps, guidance=GUIDANCE)
        )


def load_sampler(model: str, options) -> Callable:
    """draw(prompts, seeds) -> pictures [B, H, W, 3] in 0..1, of the model "sd" or "flux"."""
    if model == "sd":
        return partial(sample, load_demo_model(options.comfyui, options.checkpoint))
    from demo.flux import pipeline as flux

    pipeline = flux.make_pipeline()

    def draw(prompts, seeds):
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
            return flux.sample(pipeline, list(prompts), flux.make_noise(seeds))

    return draw


def seconds_a_picture(draw) -> float:
    """Median seconds of five pictures, sampled one by one after a first that warms up."""
    seconds = []
    for seed in range(6):
        start = time.perf_counter()
        draw(["a cat"], [seed])
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def look(classifier, kind, pictures):
    """What each picture shows of one kind."""
    if kind in SEEN_BY_RULE:
        return [SEEN_BY_RULE[kind](picture) for picture in pictures]
    return classifier.recognised(pictures, kind)


def evaluate(draw, classifier, quick, seeds, keep=None, groups=tuple(KINDS_OF_SEEING)):
    """Samples and judges: {group: [Seen]}, "styles" beside "pairs" from the same pictures; and the pairs' features.

    `keep(group, asked, seed, picture)` sees every picture.
    """
    results, features = {"styles": []}, []
    for group, asked in what_to_ask(quick).items():
        results[group] = []
        if group not in groups:
            continue
        several = range(min(seeds, FEW_SEEDS.get(group, seeds)))
        todo = [(index, one, seed) for seed in several for index, one in enumerate(asked)]
        for start in tqdm(range(0, len(todo), BATCH), desc=group, leave=False):
            _, some, of_seed = zip(*(part := todo[start : start + BATCH]), strict=True)
            pictures = draw([one.prompt for one in some], [1000 * seed + index for index, _, seed in part])
            if group == "pairs":
                features.append(classifier.features(pictures))
                seen = classifier.names("object", features[-1])
                styles = classifier.names("style", features[-1])
                results["styles"] += [Seen(one.key[1], style, one.key) for one, style in zip(some, styles, strict=True)]
            else:
                seen = look(classifier, KINDS_OF_SEEING[group], pictures)
            results[group] += [Seen(one.expected, name, one.key) for one, name in zip(some, seen, strict=True)]
            if keep:
                for one, seed, picture in zip(some, of_seed, pictures, strict=True):
                    keep(group, one, seed, picture)
    return results, torch.cat([shown for shown, _ in features]) if features else None


def real_features(classifier, pairs, seed):
    """What is shown [B, D] in real pictures of (object, style) pairs, drawn as for training; needs the recipe's packages."""
    import random

    from demo.recipe.drawings import default_cache, read_objects
    from demo.recipe.pictures import PLAIN_ARTISTS, Scene, draw

    objects = read_objects(PLAIN_ARTISTS, default_cache() / "art")
    scenes = [Scene(*pair) for pair in pairs]
    pictures = [draw(scene, objects, {}, random.Random(f"{seed} {index}")) for index, scene in enumerate(scenes)]
    return classifier.features(torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])) / 255)[0]


def distances(classifier, made, pairs):
    """How far features [B, D] of generated pairs lie from real ones, and how far other real ones do: {title: (a, b)}."""
    real, other = (real_features(classifier, pairs, seed) for seed in ("one", "other"))
    return {
        "nearest real picture, cosine": tuple(nearest(some, real)[0].mean().item() for some in (made, other)),
        "kernel distance to real pictures": tuple(kernel_distance(some, real) for some in (made, other)),
    }


def summarise(results, classifier):
    """The figures, as plain values."""
    pairs, styles, real = results["pairs"], results["styles"], classifier.held_out
    rows = {
        "objects, in every style": (accuracy(pairs), real["object"]),
        "  in a style never seen with it": (accuracy(pairs, lambda key: is_held_out(*key)), real["object"]),
        "styles, of every object": (accuracy(styles), real["style"]),
        "  of an object never seen in it": (accuracy(styles, lambda key: is_held_out(*key)), real["style"]),
    }
    for group, (title, kind) in ROWS.items():
        rows[title] = (accuracy(results[group]), real.get(kind))
    rows = {title: values for title, values in rows.items() if not math.isnan(values[0])}

    def by(index, name):
        return tuple(accuracy(some, lambda key: key[index] == name) for some in (pairs, styles))

    return {
        "rows": rows,
        "by_word": {
            word: accuracy(results[group], lambda key, word=word: key == word)
            for group, words in read_unseen().items()
            for word in words
        },
        "by_object": {name: by(0, name) for name in OBJECTS},
        "by_style": {style: by(1, style) for style in STYLES},
        "confusions": {group: confusions(results[group]) for group in ("pairs", "styles", "people")},
    }


def show(figures, beside=None):
    """Prints the tables, with the rows of `beside`, another model's figures, next to the first."""
    print(f"\n{'':34}{'generated':>11}{'first model' if beside else '':>14}{'real, unseen':>14}")
    for title, (generated, real) in figures["rows"].items():
        other = format(beside["rows"][title][0], "14.3f") if beside and title in beside["rows"] else f"{'':14}"
        print(f"{title:34}{generated:11.3f}{other}{'' if real is None else format(real, '14.3f')}")
    for title, (generated, real) in figures.get("distances", {}).items():
        print(f"{title:34}{generated:11.4f}{real:14.4f}")
    if "objects, in every style" in figures["rows"]:
        show_pairs(figures)


def show_pairs(figures):
    """Prints what is told of every (object, style) pair."""
    print(f"\n{'style':14}{'objects':>9}{'style':>9}")
    for style, (objects, style_accuracy) in figures["by_style"].items():
        print(f"{style:14}{objects:9.3f}{style_accuracy:9.3f}")
    worst = sorted(figures["by_object"].items(), key=lambda item: item[1][0])[:10]
    print("\nweakest objects: " + ", ".join(f"{name} {values[0]:.2f}" for name, values in worst))
    for name, pairs in figures["confusions"].items():
        print(f"taken for another, {name}: " + ", ".join(f"{a} for {b} ({n})" for a, b, n in pairs[:8]))


def measure(model, classifier, options, sheets=None) -> dict:
    """Samples and judges one of the models; the figures, and its sheets where a folder is given."""
    draw, kept = load_sampler(model, options), []
    keep = (lambda *one: kept.append(one)) if sheets else None
    results, features = evaluate(draw, classifier, options.quick, options.seeds, keep, options.groups)
    figures = summarise(results, classifier) | {"seconds_a_picture": seconds_a_picture(draw)}
    if options.real:
        figures["distances"] = distances(classifier, features, sorted({result.key for result in results["pairs"]}))
    if sheets:
        draw_sheets(kept, sheets)
    return figures


def main():
    parser = argparse.ArgumentParser(prog="python -m demo.evaluate", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few pictures of each kind, in under a minute")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument(
        "--seeds", type=int, help="of every prompt (5; quick: 1); at most 2 for colours, backgrounds, counts"
    )
    parser.add_argument(
        "--groups", nargs="+", choices=KINDS_OF_SEEING, default=[*KINDS_OF_SEEING], help="only these prompts"
    )
    parser.add_argument("--real", action="store_true", help="distances to real pictures too: needs the recipe's packages")
    parser.add_argument("--sheets", type=Path, help="write the card's sheets into this folder")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--comfyui", type=Path, help="ComfyUI's folder (FMN_COMFYUI, or the one that install.py made)")
    parser.add_argument("--model", choices=["sd", "flux"], default="sd", help="the first demo model, or the second")
    parser.add_argument("--beside", type=Path, help="with --model flux: the first model's figures, as --json wrote them")
    parser.add_argument("--bf16", action="store_true", help="compute the second model in bfloat16: faster on CPUs with AMX")
    options = parser.parse_args()
    options.seeds = options.seeds or (1 if options.quick else 5)
    start, classifier, beside = time.monotonic(), Classifier.load(), None
    figures = measure(options.model, classifier, options, options.sheets)
    if options.model == "flux":
        read = options.beside and json.loads(options.beside.read_text())
        beside = read or measure("sd", classifier, options)
    show(figures, beside)
    print(f"\none picture alone: {figures['seconds_a_picture']:.2f} s on {torch.get_num_threads()} threads")
    print(f"{options.seeds} seeds, {STEPS} steps at guidance {GUIDANCE}; {time.monotonic() - start:.0f} s")
    if options.json:
        options.json.write_text(json.dumps({**figures, "seeds": options.seeds, "first model": beside}, indent=1))


if __name__ == "__main__":
    main()
