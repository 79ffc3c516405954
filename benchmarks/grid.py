"""Where the published methods' settings come from: `python -m benchmarks.grid [--methods NAME] [--json FILE]`.

Every published method at every combination of the keys that its authors' code documents and that matter here, by one rule
for all: on the first two of four targets that are not in the benchmark, each combination; on the other two, the better
third of them; the one of the best mean H over all four is what the benchmark runs. The published rates belong to models a
hundred times as large, so that rates are tried, and numbers of steps.
"""

import argparse
from functools import partial
from itertools import product
from pathlib import Path

from benchmarks.baselines import esd, forget_me_not, uce
from benchmarks.quality import WORKERS, benchmark, mean_row, show

HELD_OUT = (("object", ("umbrella",)), ("identity", ("mona",)), ("object", ("bus",)), ("style", ("halftone",)))
FIRST = 2  # of these, on which every combination is tried


def combinations(method, **keys):
    """`method` at every combination of these keys' values."""
    return [partial(method, **dict(zip(keys, values, strict=True))) for values in product(*keys.values())]


both = (False, True)
GRID = {
    "FMN (original)": [
        *combinations(forget_me_not, rate=(1e-4, 3e-4, 6e-4, 1e-3), steps=(35, 100), pooler=both, whole=(False,)),
        *combinations(forget_me_not, rate=(3e-5, 1e-4, 3e-4, 6e-4), steps=(35, 100), pooler=both, whole=(True,)),
    ],
    "ESD/LECO": combinations(esd, rate=(1e-3, 3e-3), steps=(30, 60), eta=(1.0, 2.0), full=both),
    "UCE": combinations(uce, generic=both, expand=both, lamb=(0.1, 0.5), erase_scale=(1.0, 3.0)),
}


def label(name: str, method) -> str:
    """A row's name: the method and the values of its keys, of those that are true or false the ones that are true."""
    values = [key if value is True else f"{value:g}" for key, value in method.keywords.items() if value is not False]
    return " ".join([name.split("/")[0].split()[0], *values])


def grid(name: str, workers: int, file: Path | None) -> list[dict]:
    """The mean rows of a published method's combinations over all held-out targets, the best first."""
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
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grid", description=__doc__)
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
