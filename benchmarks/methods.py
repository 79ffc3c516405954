"""The methods compared: the pack's presets, the published ones, and the grid that their settings come from.

`python -m benchmarks.methods` prints the grid: every published method at every combination of the keys that its
authors' code documents and that matter here, by one rule for all. On the first two of four targets that are not in the
benchmark, each combination; on the other two, the better third of them; the one of the best mean H over all four is what
the benchmark runs. The published rates belong to models a hundred times as large: rates are tried, and where no number of
steps is published, two.
"""

import argparse
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from functools import partial
from importlib import import_module
from itertools import product
from pathlib import Path

from benchmarks.baselines import esd, forget_me_not, uce, weight_name
from benchmarks.k_resteering import k_resteering
from demo.vocabulary import OBJECTS, PEOPLE, STYLES
from fmn_core import paraphrases
from fmn_core.applied import patch_factors
from fmn_core.forget import forget
from fmn_core.patch import serialize
from fmn_core.settings import ForgetSettings

HELD_OUT = (("object", ("umbrella",)), ("identity", ("mona",)), ("object", ("bus",)), ("style", ("halftone",)))
FIRST = 2  # of these, on which every combination is tried


def combinations(method, **keys):
    """`method` at every combination of these keys' values."""
    return [partial(method, **dict(zip(keys, values, strict=True))) for values in product(*keys.values())]


both = (False, True)
GRID = {
    "FMN (original)": [
        *combinations(forget_me_not, rate=(1e-4, 3e-4, 6e-4, 1e-3), pooler=both, whole=(False,)),
        *combinations(forget_me_not, rate=(3e-6, 1e-5, 3e-5, 1e-4), pooler=both, whole=(True,)),
    ],
    "ESD/LECO": combinations(esd, rate=(1e-3, 3e-3), steps=(30, 60), eta=(1.0, 2.0), full=both),
    "UCE": combinations(uce, generic=both, expand=both, lamb=(0.1, 0.5), erase_scale=(1.0, 3.0)),
}


def label(name: str, method) -> str:
    """A row's name: the method and the values of its keys, of those that are true or false the ones that are true."""
    values = [key if value is True else f"{value:g}" for key, value in method.keywords.items() if value is not False]
    return " ".join([name.split("/")[0].split()[0], *values])


def changes(host, patch):
    """A patch as changes of weights, as its file holds them."""
    return {weight_name(*target): up @ down for target, (up, down) in patch_factors(host, patch).items()}


@contextmanager
def replaced(values):
    """Context in which these names of modules stand for other values: {"fmn_core.fast.ERASED": 1.0}."""
    with ExitStack() as stack:
        for path, value in values.items():
            module, name = path.rsplit(".", 1)
            module = import_module(module)
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, value)
        yield


def by_preset(host, kind, names, instead=None, **settings):
    """A preset of the pack at its defaults, but for these settings, and with other values in place of its modules'."""
    with replaced(instead or {}):
        patch, _ = forget(host, "\n".join(names), ForgetSettings(concept_type=kind, **settings))
    return changes(host, patch), len(serialize(patch, "patch"))


def without_vocabulary():
    """The pack's word list and captions less every word that the embedded model was trained on, for `replaced`: what
    the benchmark keeps is then nothing that the edit was told to keep."""
    own = {*OBJECTS, *STYLES, *PEOPLE, *(word for thing in OBJECTS.values() for word in thing.synonyms.split())}
    words = {type: tuple(word for word in several if word not in own) for type, several in paraphrases.WORDS.items()}
    captions = tuple(c for c in paraphrases.CAPTIONS if not any(f" {word} " in f" {c} " for word in own))
    neutral = {type: tuple(word for word in several if word not in own) for type, several in paraphrases.NEUTRAL.items()}
    lists = {"WORDS": words, "CAPTIONS": captions, "NEUTRAL": neutral}
    return {f"{paraphrases.__name__}.{name}": value for name, value in lists.items()}


PRESETS = next(f for f in fields(ForgetSettings) if f.name == "preset").metadata["choices"]
BASELINES = {
    "FMN (original)": partial(forget_me_not, rate=6e-4),
    "ESD/LECO": partial(esd, rate=3e-3, steps=30),
    "UCE": uce,
}
METHODS = {
    **{name: partial(by_preset, preset=name) for name in PRESETS},
    **BASELINES,
    "fast, V alone": partial(by_preset, preset="fast", matrices="v"),
    "K re-steered": k_resteering,
    "fast, words withheld": partial(by_preset, preset="fast", instead=without_vocabulary()),
    "paper, residual stream": partial(by_preset, preset="paper", gradient="residual stream"),
    "paper, onward": partial(by_preset, preset="paper", tokens="concept onward"),
    "FMN, published rate": partial(forget_me_not, rate=2e-6),
}


def grid(name: str, workers: int, file: Path | None) -> list[dict]:
    """The mean rows of a published method's combinations over all held-out targets, the best first."""
    from benchmarks.quality import benchmark, mean_row

    several = {label(name, method): method for method in GRID[name]}
    rows: list[dict] = []

    def means():
        of = {one: [row for row in rows if row["method"] == one] for one in several}
        return sorted((mean_row(of[one], "all") for one in several), key=lambda row: -row["h"])

    for jobs in (HELD_OUT[:FIRST], HELD_OUT[FIRST:]):
        rows += benchmark(several, jobs, seeds=1, few=True, workers=workers, file=file)
        best = means()[: -(-len(several) // 3)] if jobs == HELD_OUT[:FIRST] else means()
        several = {row["method"]: several[row["method"]] for row in best}
    return best


def main():
    from benchmarks.quality import WORKERS, show

    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods", description=__doc__)
    parser.add_argument("--methods", nargs="+", choices=GRID, default=list(GRID))
    parser.add_argument("--json", type=Path, help="rows as they come; those that stand there already are taken as they are")
    parser.add_argument("--workers", type=int, default=WORKERS, help="processes of one thread")
    options = parser.parse_args()
    best = {name: grid(name, options.workers, options.json) for name in options.methods}
    for name, rows in best.items():
        print(f"\n{name}, means over all four targets, the best first")
        for row in rows:
            show(row)


if __name__ == "__main__":
    main()
