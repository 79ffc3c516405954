"""Words and descriptions of the objects that no caption of the second model had: `python -m demo.unseen FOLDER`.

Writes demo/unseen.json. FOLDER holds data.noun, index.noun and cntlist.rev of WordNet 3.0: /usr/share/wordnet of the
Debian package wordnet-base. The rule, without choices by hand: an object's sense is the first that WordNet lists for its
name in the part that its kind belongs to (animals, plants, food, artifacts, natural objects). Its synonyms are the
single words of that sense, those that WordNet's tagged texts use in it apart from those that they never do; its kinds are
those of all senses below it that the texts use. Either way a word counts where it is in no caption, where this is its own
first sense in that part, and for the object that is nearest; the three most used stay. A description is the first part of
the sense's gloss, where it names no object.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from . import vocabulary
from .vocabulary import OBJECTS, plural

FILE = Path(__file__).with_name("unseen.json")
MOST = 3  # words of an object
ANIMAL, ARTIFACT, FOOD, OBJECT, PLANT = "05", "06", "13", "17", "20"  # WordNet's lexicographer files
PARTS = {
    "cats and dogs": ANIMAL, "land animals": ANIMAL, "sea animals": ANIMAL, "birds": ANIMAL, "insects": ANIMAL,
    "flowers": PLANT, "plants": PLANT, "fruit": FOOD, "food": FOOD, "buildings": ARTIFACT, "landscapes": OBJECT,
    "vehicles": ARTIFACT, "things": ARTIFACT,
}  # fmt: skip


class Sense(NamedTuple):
    """A synset: its part of WordNet, its words with how often tagged texts use them in it, the senses below, its gloss."""

    part: str
    words: dict[str, int]
    below: list[str]
    gloss: str


class WordNet:
    """The nouns of WordNet 3.0, from the folder of its files."""

    def __init__(self, folder: Path):
        lines = {name: (folder / name).read_text().splitlines() for name in ("data.noun", "index.noun", "cntlist.rev")}
        self.licence = "\n".join(line[line.index(" ", 2) :].strip() for line in lines["data.noun"] if line.startswith("  "))
        uses = {key: int(count) for key, _, count in map(str.split, lines["cntlist.rev"])}
        self.senses = dict(self._sense(line, uses) for line in lines["data.noun"] if not line.startswith("  "))
        self.index = {}
        for line in lines["index.noun"]:
            if not line.startswith("  "):
                lemma, _, count, *rest = line.split()
                self.index[lemma] = rest[-int(count) :]

    @staticmethod
    def _sense(line: str, uses: dict[str, int]) -> tuple[str, Sense]:
        """A line of data.noun as (its offset, what it says); wndb(5WN) tells the format."""
        fields, gloss = line.split(" | ", 1)
        offset, part, _, count, *fields = fields.split()
        count = 2 * int(count, 16)
        pairs = zip(fields[:count:2], fields[1:count:2], strict=True)
        words = {word: uses.get(f"{word.lower()}%1:{part}:{int(id, 16):02}::", 0) for word, id in pairs}
        pointers = fields[count + 1 :]
        below = [target for kind, target in zip(pointers[::4], pointers[1::4], strict=True) if kind == "~"]
        return offset, Sense(part, words, below, gloss.strip())

    def first(self, name: str, part: str) -> str | None:
        """The sense of a name that WordNet lists first among those of a part."""
        offsets = self.index.get(name.replace(" ", "_").lower(), [])
        return next((offset for offset in offsets if self.senses[offset].part == part), None)

    def under(self, offset: str) -> Iterator[tuple[int, str]]:
        """A sense and all below it, nearest first: (steps, offset)."""
        todo, seen = [(0, offset)], {offset}
        for steps, here in todo:
            yield steps, here
            below = [target for target in self.senses[here].below if target not in seen]
            seen.update(below)
            todo += [(steps + 1, target) for target in below]


def caption_words(synonyms: bool = False) -> set[str]:
    """The words of the second model's captions, or with their synonyms and words for a kind of the first's too."""
    texts = [template for name, value in vars(vocabulary).items() if name.endswith("TEMPLATES") for template in value]
    texts += [
        *OBJECTS,
        *map(plural, OBJECTS),
        *vocabulary.STYLES,
        *vocabulary.PEOPLE,
        *vocabulary.COLOURS,
        *vocabulary.COUNTS,
    ]
    texts += [*vocabulary.BACKGROUNDS, "on a background in style"]
    if synonyms:
        texts += [thing.synonyms for thing in OBJECTS.values()] + list(vocabulary.KINDS.values())
    return {word for text in texts for word in re.findall(r"\w+", re.sub(r"{\w*}", " ", text))}


def find_words(wordnet: WordNet) -> dict[str, dict[str, str]]:
    """{"synonyms": {word: object}, "rare synonyms": ..., "kinds": ...}."""
    captions, found = caption_words(), {}
    for name, thing in OBJECTS.items():
        part = PARTS[thing.kind]
        sense = wordnet.first(name, part)
        for steps, offset in wordnet.under(sense) if sense else ():
            for word, uses in wordnet.senses[offset].words.items():
                plain = word.isalpha() and word.islower() and word not in captions
                if plain and wordnet.first(word, part) == offset and (steps == 0 or uses):
                    found.setdefault(word, []).append((steps, name, uses))
    words = {"synonyms": {}, "rare synonyms": {}, "kinds": {}}
    for word, places in found.items():
        steps, name, uses = min(places)
        if sum(place[0] == steps for place in places) == 1:
            group = "kinds" if steps else "synonyms" if uses else "rare synonyms"
            words[group].setdefault(name, []).append((-uses, steps, word))
    return {
        group: {word: name for name in OBJECTS for _, _, word in sorted(of.get(name, ()))[:MOST]}
        for group, of in words.items()
    }


def find_descriptions(wordnet: WordNet) -> dict[str, str]:
    """{description: object}, one of every object whose gloss names no object."""
    named = {word for name in OBJECTS for word in (name, plural(name))}
    found = {}
    for name, thing in OBJECTS.items():
        if sense := wordnet.first(name, PARTS[thing.kind]):
            text = re.sub(r"\s*\([^)]*\)", "", wordnet.senses[sense].gloss).split(";")[0].split(":")[0].strip()
            others = {word.replace("_", " ").lower() for word in wordnet.senses[sense].words}
            if not any(re.search(rf"\b{re.escape(word)}\b", text.lower()) for word in named | others):
                found[text] = name
    return found


def read_unseen(file: Path = FILE) -> dict[str, dict[str, str]]:
    """{"synonyms": {word: object}, "rare synonyms": ..., "kinds": ..., "descriptions": {text: object}}."""
    return {key: value for key, value in json.loads(file.read_text()).items() if isinstance(value, dict)}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m demo.unseen", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, default=FILE)
    options = parser.parse_args()
    wordnet = WordNet(options.folder)
    lists = {**find_words(wordnet), "descriptions": find_descriptions(wordnet)}
    options.output.write_text(json.dumps({"licence": wordnet.licence, **lists}, indent=1) + "\n")
    print(", ".join(f"{len(group)} {name}" for name, group in lists.items()))


if __name__ == "__main__":
    main()
