"""Draws docs/rooms.png from the code: `python docs/draw_rooms.py` (needs matplotlib).

A row for each of the core's rooms, from the top down, and in it how many imports it has from each room: all to the right
of the diagonal, which is what the layers contract in pyproject.toml asks.
"""

import ast
from collections import Counter
from pathlib import Path

import matplotlib.pyplot as plt
import tomllib
from matplotlib.patches import Rectangle

ROOT = Path(__file__).resolve().parents[1]
CORE = ROOT / "fmn_core"
INK, LINE, USED, WRONG = "#2b3044", "#d9dce6", "#6c7bd0", "#d04040"


def rooms() -> list[str]:
    """The layers that import-linter holds, from the top down."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    return next(contract["layers"] for contract in contracts if contract["type"] == "layers")


def imports() -> Counter:
    """(room, room below) -> how many imports there are."""
    found: Counter = Counter()
    for file in CORE.rglob("*.py"):
        package = file.relative_to(ROOT).with_suffix("").parts[:-1]
        room = file.relative_to(CORE).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = package[: len(package) - node.level + 1]
                parts = [*base, *(node.module or "").split(".")]
                targets = [parts[1]] if len(parts) > 1 and parts[1] else [alias.name for alias in node.names]
                found.update((room, target) for target in targets if target != room)
    return found


def summary(room: str) -> str:
    """The first sentence of a room's docstring."""
    file = CORE / room / "__init__.py" if (CORE / room).is_dir() else CORE / f"{room}.py"
    return (ast.get_docstring(ast.parse(file.read_text())) or "").split("\n")[0].rstrip(".")


def main() -> None:
    order, counted = rooms(), imports()
    size = len(order)
    figure, axes = plt.subplots(figsize=(13, 0.42 * size + 0.9))
    axes.set(xlim=(-9.4, size), ylim=(size, -1.9))
    axes.axis("off")
    most = max(counted.values())
    for row, room in enumerate(order):
        axes.text(-9.3, row + 0.5, room, va="center", color=INK, weight="bold", fontsize=10)
        axes.text(-6.9, row + 0.5, summary(room), va="center", color=INK, fontsize=7.5)
        axes.text(row + 0.5, -0.15, room, rotation=50, color=INK, fontsize=8)
        axes.axhline(row, color=LINE, lw=0.5)
        axes.add_patch(Rectangle((row, row), 1, 1, color=LINE))
        for column, below in enumerate(order):
            if count := counted[room, below]:
                shade = 0.15 + 0.85 * count / most
                axes.add_patch(Rectangle((column, row), 1, 1, color=USED if column > row else WRONG, alpha=shade, lw=0))
                axes.text(column + 0.5, row + 0.5, count, ha="center", va="center", color=INK, fontsize=7)
    figure.savefig(ROOT / "docs" / "rooms.png", dpi=100, bbox_inches="tight", facecolor="white")


if __name__ == "__main__":
    main()
