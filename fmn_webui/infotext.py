"""The script's values in a picture's infotext, and back."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from fmn_core.config import require_text
from fmn_core.errors import ForgetError, brief
from fmn_core.plots.colormaps import COLOR_MAPS

from .names import NONE

SCRIPT_ROWS = 3
LAYOUTS = ("overlay", "side_by_side", "contact_sheet")  # of the core's views
PATCHES, JOINTLY, LAYOUT, WORDS, OPACITY, COLOURS = (
    "FMN patches", "FMN patches jointly", "FMN heat maps", "FMN heat map words", "FMN heat map opacity",
    "FMN heat map colours",
)  # fmt: skip


@dataclass(frozen=True)
class ScriptOptions:
    """What the script should do: patches by name and strength, solved jointly or added; heat maps of words."""

    patches: tuple[tuple[str, float], ...] = ()
    jointly: bool = True
    heat_maps: bool = False
    words: str = ""
    layout: str = LAYOUTS[0]
    opacity: float = 0.6
    colours: str = "inferno"
    save: bool = False

    @classmethod
    def of(cls, values: tuple) -> ScriptOptions:
        """From the components' values, in their order; raises ForgetError for what a request got wrong."""
        names, strengths, rest = values[: 2 * SCRIPT_ROWS : 2], values[1 : 2 * SCRIPT_ROWS : 2], values[2 * SCRIPT_ROWS :]
        try:
            rows = [(str(n).strip(), float(s)) for n, s in zip(names, strengths, strict=True) if n not in (None, "", NONE)]
            jointly, heat_maps, words, layout, opacity, colours, save = rest
            options = cls(
                merged(rows), bool(jointly), bool(heat_maps), str(words or ""), str(layout), float(opacity), str(colours),
                bool(save),
            )  # fmt: skip
            require_text(options.words, *(name for name, _ in rows))
        except (TypeError, ValueError, OverflowError) as error:
            raise ForgetError(f"The values of Forget-Me-Not cannot be read ({brief(error)}).") from error
        for name, strength in (*rows, *options.patches):
            if not math.isfinite(strength):
                raise ForgetError(f"The strength of `{brief(name)}` is {strength}: it has to be a number.")
        if options.layout not in LAYOUTS or options.colours not in COLOR_MAPS or not 0 <= options.opacity <= 1:
            known = f"the layouts {', '.join(LAYOUTS)}, the colours {', '.join(COLOR_MAPS)}"
            raise ForgetError(f"Heat maps have {known} and an opacity from 0 to 1.")
        return options

    def infotext(self) -> dict[str, str]:
        """Key -> value of what differs from doing nothing."""
        found = {}
        if self.patches:
            found[PATCHES] = ", ".join(f"{name}: {strength:g}" for name, strength in self.patches)
        if len(self.patches) > 1:
            found[JOINTLY] = str(self.jointly)
        return found | (self.heat_maps_infotext() if self.heat_maps else {})

    def heat_maps_infotext(self) -> dict[str, str]:
        """Key -> value of what its heat maps are."""
        words = {WORDS: ", ".join(self.words.split("\n"))} if self.words.strip() else {}
        return {LAYOUT: self.layout} | words | {OPACITY: f"{self.opacity:g}", COLOURS: self.colours}


def merged(rows: list[tuple[str, float]]) -> tuple[tuple[str, float], ...]:
    """Rows with each name once, at the sum of its strengths, and none at 0."""
    sums: dict[str, float] = {}
    for name, strength in rows:
        sums[name] = sums.get(name, 0.0) + strength
    return tuple((name, strength) for name, strength in sums.items() if strength)


def patch_of(row: int) -> Callable[[dict], str]:
    """What reads a row's patch from an infotext's values: none where the picture was made without."""
    return lambda params: infotext_rows(params)[row][0]


def strength_of(row: int) -> Callable[[dict], float]:
    """What reads a row's strength."""
    return lambda params: infotext_rows(params)[row][1]


def infotext_rows(params: dict) -> list[tuple[str, float]]:
    """(name, strength) of every row of the script; a text that is not what `infotext` writes stands in the first row as it
    is, which is no patch's name, so that it is refused and not passed over."""
    text = str(params.get(PATCHES, "")).strip()
    parts = [part.strip().rpartition(":") for part in text.split(",")] if text else []
    try:
        rows = [(name.strip(), float(strength)) for name, _, strength in parts]
    except ValueError:
        rows = []
    if len(rows) > SCRIPT_ROWS or not all(name and math.isfinite(strength) for name, strength in rows):
        rows = []
    return ((rows or ([(text, 1.0)] if text else [])) + SCRIPT_ROWS * [(NONE, 1.0)])[:SCRIPT_ROWS]


def restored(key: str, default, read: Callable = str) -> Callable[[dict], object]:
    """What reads a value from an infotext, or gives the default where it has none or nonsense."""

    def value(params: dict):
        try:
            return read(params[key]) if key in params else default
        except ValueError:
            return default

    return value
