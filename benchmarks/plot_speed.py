"""How cost grows: `python -m benchmarks.plot_speed ROWS.json PICTURE.png`, of the rows of benchmarks/speed.py."""

import argparse
import json
from pathlib import Path

import numpy as np


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot_speed", description=__doc__)
    parser.add_argument("rows", type=Path, metavar="ROWS.json", help="what `python -m benchmarks.speed --json` wrote")
    parser.add_argument("picture", type=Path, metavar="PICTURE.png")
    options = parser.parse_args()
    try:
        import matplotlib
    except ImportError:
        parser.exit(1, "The picture is drawn by matplotlib: pip install matplotlib.\n")
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    rows = json.loads(options.rows.read_text())
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    fast = [r for r in rows if r["what"].startswith("sd1 fast") and r["seconds"] and "first" not in r["what"]]
    steps = [r for r in rows if "steps" in r and r["what"].startswith("paper:")]
    for axes, several, key, title in (
        (left, fast, "concepts", "`fast`, SD1.5, concepts at once"),
        (right, steps, "steps", f"`paper`, SD1.5, {next((r['side'] for r in rows if 'side' in r), '')} px, steps"),
    ):
        x, y = np.array([(r[key], r["seconds"]) for r in several]).T
        slope, start = np.polyfit(x, y, 1)
        axes.plot(x, start + slope * x, color="0.7", label=f"{start:.1f} s + {slope:.2f} s each")
        axes.plot(x, y, "o", color="tab:blue")
        axes.set(title=title, xlabel=key, ylabel="seconds", ylim=(0, None))
        axes.legend(frameon=False)
    figure.savefig(options.picture, dpi=110)


if __name__ == "__main__":
    main()
