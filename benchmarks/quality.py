"""What every preset forgets and keeps on the embedded model: `python benchmarks/quality.py [--quick] [--json FILE]`.

UA, IRA and CRA as in UnlearnCanvas (Zhang et al., arXiv 2402.11846): the share of pictures asked for the target that
the judge does not take for it (the untouched model's own share stands beside it); the accuracy on others of its kind;
the accuracy in the other kind. H is their harmonic mean, drift the mean absolute change of kept pictures at equal seeds
(0..1).
"""

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

if __package__ is None:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tqdm import tqdm

from benchmarks.methods import METHODS, applied
from demo.evaluate import BATCH, sample
from demo.host import load_embedded_model
from demo.judge import LABELS, Judge
from demo.vocabulary import OBJECTS, PEOPLE, STYLES, plural, with_article

TARGETS = {
    "object": ("cat", "dog", "rose", "house", "car", "fish", "tree", "apple"),
    "style": ("neon", "pixel art", "sepia", "woodcut"),
    "identity": ("ada", "felix", "kira", "otto"),
}
TEN = ("cat", "rabbit", "owl", "crab", "tulip", "palm tree", "banana", "castle", "rocket", "guitar")
QUICK = {"object": ("cat", "rose"), "style": ("neon",), "identity": ("ada",)}
HEAD = {"object": "object", "style": "style", "identity": "person"}  # the judge's word for each kind


class Picture(NamedTuple):
    """A prompt, its seed, what is asked for in it, and the group it is counted in."""

    prompt: str
    seed: int
    object: str = ""
    style: str = ""
    person: str = ""
    group: str = ""


def asked_for(kind: str, names: tuple[str, ...], seed: int) -> list[Picture]:
    """Pictures of the targets; `group` says how far a prompt is from the plain one. That one and one of the styles are
    among the prompts that `fast` is made from, the others are not."""
    pictures = []

    def add(group, prompt, name, style="", person=""):
        pictures.append(Picture(prompt, 1000 * seed + len(pictures), name, style, person, group))

    for name in names:
        if kind == "object":
            a = with_article(name)
            add("plain", a, name)
            add("other template", f"a sticker of {a}", name)
            add("paraphrase", f"here you see {a}", name)
            add("paraphrase", f"{plural(name)}", name)
            add(
                "long description",
                f"a detailed picture of {a}, alone on white paper, by a good artist",
                name,
            )
            add("composition", f"{a} beside a house" if name != "house" else f"{a} beside a tree", name)
            add("misspelling", f"a {name[:-1]}{name[-1] * 2}", name)
            for style in STYLES:
                add("in a style", f"{a} in {style} style", name, style)
            for word in OBJECTS[name].synonyms.split():
                add("synonym", with_article(word), name)
        elif kind == "style":
            for index, thing in enumerate(list(OBJECTS)[seed % 6 :: 6]):
                template = ("{} in {} style", "a {1} drawing of {0}", "{}, {} style", "a {1} image of {0}")[index % 4]
                group = ("plain", "other template", "paraphrase", "other template")[index % 4]
                add(group, template.format(with_article(thing), name), thing, name)
        else:
            for group, template in (
                ("plain", "a portrait of {}"), ("plain", "{}"), ("other template", "a sticker of {}"),
                ("paraphrase", "here you see {}"), ("composition", "{} on a green background"),
                ("long description", "a detailed picture of {}, alone on white paper, by a good artist"),
            ):  # fmt: skip
                add(group, template.format(name), "", "", name)
    return pictures


def kept(kind: str, names: tuple[str, ...], seed: int, few: bool) -> list[Picture]:
    """Pictures of what should stay: the targets' nearest kin, and others, each in some style."""
    dice, pictures = random.Random(f"{kind} {names} {seed}"), []
    things = [name for name in OBJECTS if name not in names]
    kin = [n for n in things if any(name in OBJECTS and OBJECTS[n].kind == OBJECTS[name].kind for name in names)]
    things = (kin[:6] if few else kin) + dice.sample([n for n in things if n not in kin], 6 if few else 14)
    styles, people = ([n for n in several if n not in names] for several in (STYLES, PEOPLE))

    def add(group, prompt, **what):
        pictures.append(Picture(prompt, 500_000 + 1000 * seed + len(pictures), group=group, **what))

    for thing in things:
        group = "neighbour" if thing in kin else "other"
        if kind != "style":
            add(group, with_article(thing), object=thing)
        for style in dice.sample(styles, 2 if kind == "style" else 1):
            add(group, f"{with_article(thing)} in {style} style", object=thing, style=style)
    for person in people if kind == "identity" else dice.sample(people, 2):
        add("neighbour" if kind == "identity" else "other", f"a portrait of {person}", person=person)
    return pictures


def draw(host, pictures: list[Picture], label: str) -> torch.Tensor:
    """[B, H, W, 3] in 0..1."""
    parts = [pictures[start : start + BATCH] for start in range(0, len(pictures), BATCH)]
    return torch.cat(
        [sample(host, [p.prompt for p in part], [p.seed for p in part]) for part in tqdm(parts, label, leave=False)]
    )


def share(right: list[bool]) -> float:
    return sum(right) / len(right) if right else float("nan")


def score(kind: str, names, judge, pictures: list[Picture], made: torch.Tensor, base: torch.Tensor) -> dict:
    """UA, IRA, CRA, H, drift, by group, of the pictures asked for and kept."""
    features = judge.features(made)
    seen = {head: judge.names(head, features) for head in LABELS}
    targets, others = ([i for i, p in enumerate(pictures) if (p.seed < 500_000) == want] for want in (True, False))
    wanted = {"object": "object", "style": "style", "identity": "person"}[kind]

    def right(rows, field):
        return [seen[field][i] == getattr(pictures[i], field) for i in rows if getattr(pictures[i], field)]

    cross = {"object": ("style",), "style": ("object",), "identity": ("object",)}[kind]
    figures = {
        "ua": 1 - share(right(targets, wanted)),
        "ira": share(right(others, wanted)),
        "cra": share([r for field in cross for r in right(others, field)]),
        "neighbours": share(right([i for i in others if pictures[i].group == "neighbour"], wanted)),
        "drift": (made[others] - base[others]).abs().mean().item(),
    }
    groups = dict.fromkeys(pictures[i].group for i in targets)
    figures["groups"] = {g: 1 - share(right([i for i in targets if pictures[i].group == g], wanted)) for g in groups}
    figures["h"] = harmonic([figures[key] for key in ("ua", "ira", "cra")])
    return figures


def harmonic(values: list[float]) -> float:
    return statistics.harmonic_mean([max(value, 0.0) for value in values])


def benchmark(host, judge, methods, jobs, seeds: int, few: bool) -> list[dict]:
    """One row for each method and job (kind, names)."""
    rows = []
    for kind, names in jobs:
        pictures = [p for seed in range(seeds) for p in asked_for(kind, names, seed) + kept(kind, names, seed, few)]
        label = ", ".join(names)
        base = draw(host, pictures, f"base: {label}")
        rows.append(
            {"method": "base", "kind": kind, "targets": list(names), **score(kind, names, judge, pictures, base, base)}
        )
        show(rows[-1])
        for method in methods:
            start = time.perf_counter()
            weights, size = METHODS[method](host, kind, names)
            seconds = time.perf_counter() - start
            with applied(host, weights):
                made = draw(host, pictures, f"{method}: {label}")
            figures = score(kind, names, judge, pictures, made, base)
            row = {"method": method, "kind": kind, "targets": list(names), **figures, "seconds": seconds, "bytes": size}
            row["base"] = {key: rows[-1 - methods.index(method)][key] for key in ("ua", "ira", "cra", "h")}
            rows.append(row)
            show(row)
    return rows


def show(row: dict) -> None:
    targets = ", ".join(row["targets"][:3]) + (" ..." if len(row["targets"]) > 3 else "")
    print(
        f"{row['method']:16}{targets:22}" + "".join(f"{row[key]:7.3f}" for key in ("ua", "ira", "cra", "h"))
        + f"{row['drift']:8.4f}{row.get('seconds', 0):7.1f} s{row.get('bytes', 0) / 1024:7.0f} KB",
        flush=True,
    )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(prog="python benchmarks/quality.py", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="four targets, one seed, few neighbours")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--targets", nargs="+", help="only these")
    parser.add_argument("--seeds", type=int)
    options = parser.parse_args()
    host, judge = load_embedded_model(), Judge.load()
    jobs = [(kind, (name,)) for kind, names in (QUICK if options.quick else TARGETS).items() for name in names]
    if options.targets:
        jobs = [(kind, (name,)) for kind, names in TARGETS.items() for name in names if name in options.targets]
    elif not options.quick:
        jobs.append(("object", TEN))
    print(f"{'':38}" + "".join(f"{key:>7}" for key in ("UA", "IRA", "CRA", "H")) + f"{'drift':>8}")
    rows = benchmark(host, judge, options.methods, jobs, options.seeds or (1 if options.quick else 3), options.quick)
    print("\nmeans over targets")
    for method in ["base", *options.methods]:
        for kind in dict.fromkeys(row["kind"] for row in rows):
            several = [row for row in rows if row["method"] == method and row["kind"] == kind and len(row["targets"]) == 1]
            if several:
                keys = ("ua", "ira", "cra", "h", "drift")
                show({"method": method, "targets": [kind], **{k: statistics.fmean(r[k] for r in several) for k in keys},
                      "seconds": statistics.fmean(r.get("seconds", 0) for r in several),
                      "bytes": statistics.fmean(r.get("bytes", 0) for r in several)})  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
