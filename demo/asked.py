"""What a demo model is asked for when it is evaluated: prompts in groups, and what their pictures should show."""

from __future__ import annotations

from typing import NamedTuple

from .unseen import read_unseen
from .vocabulary import BACKGROUNDS, COLOURS, COUNTS, OBJECTS, PEOPLE, STYLES, plural, with_article

FEW_SEEDS = {"colours": 2, "backgrounds": 2, "counts": 2}  # at most, in groups that have many prompts of one kind


class Asked(NamedTuple):
    """A prompt, what its picture should be seen as, and what it is counted under."""

    prompt: str
    expected: str
    key: object


KINDS_OF_SEEING = {
    "pairs": "object", "plain": "object", "other words": "object", "people": "person", "colours": "colour",
    "backgrounds": "background", "counts": "count", **dict.fromkeys(read_unseen(), "object"),
}  # fmt: skip


ROWS = {  # group: its row, and what of the classifier's accuracy on real drawings stands beside it
    "plain": ("objects, no style named", "object, drawings"),
    "other words": ("objects by another word", "object, drawings"),
    "synonyms": ("objects by unseen synonyms", "object, drawings"),
    "rare synonyms": ("  by rare ones", "object, drawings"),
    "kinds": ("  by kinds of them", "object, drawings"),
    "descriptions": ("  by a description", "object, drawings"),
    "people": ("people", "person"),
    "colours": ("colours, by the commonest hue", None),
    "backgrounds": ("backgrounds, by the corners", None),
    "counts": ("counts, by separate shapes", None),
}


def what_to_ask(quick) -> dict[str, list[Asked]]:
    """The prompts, by group; in the quick run a few of each."""
    asked = {group: [] for group in KINDS_OF_SEEING}
    for index, name in list(enumerate(OBJECTS))[:: 7 if quick else 1]:
        for style in STYLES[index % 5 :: 5] if quick else STYLES:
            asked["pairs"].append(Asked(f"{with_article(name)} in {style} style", name, (name, style)))
        asked["plain"].append(Asked(with_article(name), name, name))
        asked["other words"] += [Asked(with_article(word), name, word) for word in OBJECTS[name].synonyms.split()]
        asked["counts"] += [Asked(f"{count} {plural(name)}", count, name) for count in COUNTS]
        for background in list(BACKGROUNDS)[index % 4 :: 4]:
            asked["backgrounds"].append(Asked(f"{with_article(name)} on a {background} background", background, name))
    for name in [name for name in OBJECTS if OBJECTS[name].recoloured][:: 7 if quick else 1]:
        asked["colours"] += [Asked(with_article(f"{colour} {name}"), colour, name) for colour in COLOURS]
    asked["people"] = [Asked(f"a portrait of {name}", name, name) for name in PEOPLE]
    for group, words in read_unseen().items():
        several = list(words.items())[:: 4 if quick and len(words) > 10 else 1]
        asked[group] = [Asked(with_article(text), name, text) for text, name in several]
    return asked
