"""What every method forgets and keeps on the demo model: `python -m benchmarks.quality [--quick] [--json FILE]`.

UA, IRA and CRA as in UnlearnCanvas (Zhang et al., arXiv 2402.11846): the share of pictures asked for the target that
the classifier does not take for it (the untouched model's own share stands beside it); the accuracy on others of its kind;
the accuracy in the other kind. H is their harmonic mean, drift the mean absolute change of kept pictures at equal seeds
(0..1), `worst` the accuracy that the worst neighbour loses. M-Score and recovery: benchmarks/robustness.py.
"""

import argparse
import json
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from benchmarks.baselines import applied
from benchmarks.methods import METHODS
from benchmarks.prompts import HEAD, QUICK, SEEN, TARGETS, TEN, UNKNOWN, Picture, asked_for, half_the_vocabulary, kept
from benchmarks.robustness import learned_back
from demo.classifier import LABELS, Classifier
from demo.evaluate import BATCH, sample
from demo.host import load_demo_model
from demo.vocabulary import OBJECTS, with_article

CROSS = {"object": "style", "style": "object", "identity": "object"}
WORKERS = 2  # processes of one thread each: on two cores they draw a third more than one process of two
SECONDS_A_PICTURE = 0.7  # on one core, for the estimate
QUICK_METHODS = ("fast", "balanced", "paper", "ESD/LECO", "UCE")  # the others take minutes, or do as `paper` does
CURVE = (1, 2, 4, 8, 16, 33)
COLUMNS = {"ua": "UA", "ira": "IRA", "cra": "CRA", "h": "H", "m_score": "M-Score", "recovery": "recov."}


@cache
def model():
    """This process's own demo model and classifier, on one thread."""
    torch.set_num_threads(1)
    return load_demo_model(), Classifier.load()


def draw(host, pictures: list[Picture]) -> np.ndarray:
    """[B, H, W, 3] in bytes."""
    parts = [pictures[start : start + BATCH] for start in range(0, len(pictures), BATCH)]
    made = torch.cat([sample(host, [p.prompt for p in part], [p.seed for p in part]) for part in parts])
    return (made * 255).round().byte().numpy()


def see(classifier, made: np.ndarray) -> dict[str, list[str]]:
    """What the classifier takes each picture for: the object, the style, the person."""
    features = classifier.features(torch.from_numpy(made).float() / 255)
    return {head: classifier.names(head, features) for head in LABELS}


def share(right) -> float:
    right = list(right)
    return sum(right) / len(right) if right else float("nan")


def score(kind: str, pictures: list[Picture], seen: dict, seen_before: dict) -> dict:
    """UA, IRA, CRA, H, and UA or accuracy by group, of pictures as the classifier sees them now and saw them before."""
    head = HEAD[kind]

    def right(seen, where, field=head):
        """The share of those pictures that are seen as what they were asked for in this respect."""
        asked = [(getattr(p, field), s) for p, s in zip(pictures, seen[field], strict=True) if where(p)]
        return share(want == saw for want, saw in asked if want)

    def by_group(want_kept):
        return dict.fromkeys(p.group for p in pictures if p.kept == want_kept and getattr(p, head))

    figures = {
        "ua": 1 - right(seen, lambda p: not p.kept and p.group not in UNKNOWN),
        "ira": right(seen, lambda p: p.kept),
        "cra": right(seen, lambda p: p.kept, CROSS[kind]),
    }
    figures["h"] = statistics.harmonic_mean([max(figures[key], 0.0) for key in ("ua", "ira", "cra")])
    figures["groups"] = {g: 1 - right(seen, lambda p, g=g: not p.kept and p.group == g) for g in by_group(False)}
    figures["kept"] = {g: right(seen, lambda p, g=g: p.kept and p.group == g) for g in by_group(True)}
    losses, count = {}, {}
    for name in dict.fromkeys(getattr(p, head) for p in pictures if p.group == "neighbour"):
        own = lambda p, name=name: p.kept and p.group == "neighbour" and getattr(p, head) == name  # noqa: E731
        losses[name], count[name] = right(seen_before, own) - right(seen, own), sum(map(own, pictures))
    worst = max(losses, key=losses.get) if losses else ""
    figures["worst_neighbour"] = {"name": worst, "loss": losses.get(worst, 0.0), "pictures": count.get(worst, 0)}
    return figures


def pictures_of(job, seeds: int, few: bool) -> list[Picture]:
    kind, names = job
    return [p for seed in range(seeds) for p in asked_for(kind, names, seed, few) + kept(kind, names, seed, few)]


def measure_base(job, pictures):
    """The untouched model's row, pictures and what is seen in them."""
    host, classifier = model()
    made = draw(host, pictures)
    seen = see(classifier, made)
    row = {"method": "base", "kind": job[0], "targets": list(job[1]), "pictures": len(pictures)}
    row |= score(job[0], pictures, seen, seen) | {"drift": 0.0}
    return row, made, seen


def measure(job, pictures, base, attacked, name, method):
    """The row of one method; `attacked`: with what learned words bring back."""
    host, classifier = model()
    (kind, names), (base_row, before, seen_before) = job, base
    start = time.perf_counter()
    weights, size = method(host, kind, names)
    seconds = time.perf_counter() - start
    with applied(host, weights):
        made = draw(host, pictures)
    rest = [i for i, p in enumerate(pictures) if p.kept]
    return {
        "method": name, "kind": kind, "targets": list(names), "pictures": len(pictures),
        **score(kind, pictures, see(classifier, made), seen_before),
        **(learned_back(host, weights, kind, names, classifier) if attacked else {}),
        "drift": np.abs(made[rest].astype(np.float32) - before[rest]).mean().item() / 255,
        "seconds": seconds, "bytes": size,
        "base": {key: base_row[key] for key in ("ua", "ira", "cra", "h", "groups", "kept")},
    }  # fmt: skip


class Record:
    """Rows in a JSON file, written as they come; a run that finds some of its rows there does not measure them again."""

    def __init__(self, file: Path | None):
        self.file = file
        self.rows = json.loads(file.read_text()) if file and file.exists() else []

    def find(self, method, job, pictures) -> dict | None:
        """The row of this method on this job with as many pictures, if it is there."""
        wanted = method, job[0], list(job[1]), len(pictures)
        return next((r for r in self.rows if (r["method"], r["kind"], r["targets"], r["pictures"]) == wanted), None)

    def add(self, row) -> None:
        self.rows.append(row)
        if self.file:
            part = self.file.with_suffix(".part")
            part.write_text(json.dumps(self.rows, indent=1))
            part.replace(self.file)


def measure_all(methods: dict, jobs, pictures, attacked: bool, workers: int, record: Record) -> list[dict]:
    """One row for the untouched model and one for each method, for each job and its pictures, shown as they come."""
    rows, waiting = [], []
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for job, asked in zip(jobs, pictures, strict=True):
            known = {name: record.find(name, job, asked) for name in ("base", *methods)}
            waiting.append((job, asked, known, None if all(known.values()) else pool.submit(measure_base, job, asked)))
        for at, (job, asked, known, base) in enumerate(waiting):
            several = {"base": base} if base else {}
            for name in (name for name in methods if not known[name]):
                several[name] = pool.submit(measure, job, asked, base.result(), attacked, name, methods[name])
            waiting[at] = known, several
        show_header()
        for known, several in waiting:
            for name, row in known.items():
                if row is None:
                    found = several[name].result()
                    row = found[0] if name == "base" else found
                    record.add(row)
                rows.append(row)
                show(row)
    return rows


def benchmark(methods: dict, jobs, seeds: int, few: bool, workers: int, file: Path | None = None) -> list[dict]:
    """The rows of these methods where each job (kind, names) is asked for with `seeds` pictures of a prompt."""
    pictures = [pictures_of(job, seeds, few) for job in jobs]
    total = sum(map(len, pictures)) * (1 + len(methods))
    print(f"{total} pictures, about {total * SECONDS_A_PICTURE / workers / 60:.0f} minutes beside the methods' own time\n")
    return measure_all(methods, jobs, pictures, not few, workers, Record(file))


def curve(methods: dict, workers: int, file: Path | None = None) -> list[dict]:
    """UA, and accuracy on the rest, of plain prompts where 1 to half of the vocabulary is forgotten at once."""
    things = half_the_vocabulary()
    rest = [name for name in OBJECTS if name not in things]
    jobs, pictures = [("object", things[:count]) for count in CURVE], []
    for _, names in jobs:
        asked = [Picture(with_article(name), seed, name, group="plain") for seed, name in enumerate(names)]
        asked += [Picture(with_article(n), 500_000 + i, n, group="neighbour") for i, n in enumerate(rest)]
        asked += [
            Picture(f"{p.object} in neon style", p.seed + 1000, p.object, "neon", group="other") for p in asked if p.kept
        ]
        pictures.append(asked)
    return measure_all(methods, jobs, pictures, False, workers, Record(file))


def show_header() -> None:
    print(f"{'':49}" + "".join(f"{name:>8}" for name in COLUMNS.values()) + "   drift   seconds     file  worst neighbour")


def show(row: dict) -> None:
    targets = ", ".join(row["targets"][:2]) + (f" ({len(row['targets'])})" if len(row["targets"]) > 2 else "")
    figures = "".join(f"{'-' if row.get(key) is None else format(row[key], '.3f'):>8}" for key in COLUMNS)
    worst = row.get("worst_neighbour")
    print(
        f"{row['method']:28}{targets:21}{figures}{row['drift']:8.4f}"
        + (f"{row['seconds']:8.1f} s{row['bytes'] / 1024:6.0f} KB" if "seconds" in row else " " * 19)
        + (f"  {worst['name']} -{worst['loss']:.3f} of {worst['pictures']}" if worst and worst["loss"] > 0 else ""),
        flush=True,
    )


def mean_row(rows: list[dict], label: str) -> dict:
    """The mean of several rows of a method; of the worst neighbours, the worst."""
    present = {
        key: [row[key] for row in rows if row.get(key) is not None] for key in (*COLUMNS, "drift", "seconds", "bytes")
    }
    means = {key: statistics.fmean(values) for key, values in present.items() if values}
    worst = max((row["worst_neighbour"] for row in rows), key=lambda one: one["loss"])
    return {"method": rows[0]["method"], "targets": [label], "worst_neighbour": worst, **means}


def show_means(rows: list[dict], methods) -> None:
    """The means over targets, by kind and of all, of what was forgotten one at a time."""
    print("\nmeans over targets")
    show_header()
    single = [row for row in rows if len(row["targets"]) == 1]
    for kind in (*dict.fromkeys(row["kind"] for row in single), "all"):
        for method in ("base", *methods):
            several = [row for row in single if row["method"] == method and kind in (row["kind"], "all")]
            if several:
                show(mean_row(several, kind))


def show_groups(rows: list[dict], methods) -> None:
    """UA for each group of prompts, and accuracy for each group of what is kept: a row each, a column a method."""
    for key, title in (("groups", "UA by group of prompts"), ("kept", "accuracy by group of what is kept")):
        print(f"\n{title}\n{'':26}" + "".join(f"{method[:14]:>15}" for method in ("base", *methods)))
        for group in dict.fromkeys(group for row in rows for group in row[key]):
            means = [
                statistics.fmean([row[key][group] for row in rows if row["method"] == method and group in row[key]] or [0])
                for method in ("base", *methods)
            ]
            seen = " (near its own)" if key == "groups" and group in SEEN else ""
            print(f"{group + seen:26}" + "".join(f"{mean:15.3f}" for mean in means))


def add_arguments(parser, methods) -> None:
    parser.add_argument("--quick", action="store_true", help="one target of each kind, one seed, few prompts")
    parser.add_argument("--json", type=Path, help="rows as they come; those that stand there already are taken as they are")
    parser.add_argument("--methods", nargs="+", choices=methods)
    parser.add_argument("--targets", nargs="+", help="only these")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--workers", type=int, default=WORKERS, help="processes of one thread")


def jobs_of(options) -> list:
    """(kind, names) to forget: every target alone and, in the whole run, ten objects at once."""
    targets = [(kind, (name,)) for kind, names in TARGETS.items() for name in names]
    if options.targets:
        return [(kind, names) for kind, names in targets if names[0] in options.targets]
    if options.quick:
        return [(kind, (name,)) for kind, names in QUICK.items() for name in names]
    return [*targets, ("object", TEN)]


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    add_arguments(parser, METHODS)
    parser.add_argument("--curve", action="store_true", help="also 1 to half of the vocabulary at once")
    options = parser.parse_args()
    names = options.methods or (QUICK_METHODS if options.quick else list(METHODS))
    methods = {name: METHODS[name] for name in names}
    start = time.monotonic()
    rows = benchmark(
        methods, jobs_of(options), options.seeds or (1 if options.quick else 3), options.quick, options.workers, options.json
    )
    show_means(rows, methods)
    show_groups(rows, methods)
    if options.curve:
        print(f"\nplain prompts, {', '.join(map(str, CURVE))} objects at once")
        rows += curve({name: methods[name] for name in methods if name in ("fast", "UCE")}, options.workers, options.json)
    print(f"\n{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
