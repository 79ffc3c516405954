"""What the quality benchmark asks for: targets, prompts near and far from those an edit was made from, kept things."""

import random
from typing import NamedTuple

from demo.vocabulary import OBJECTS, PEOPLE, STYLES, plural, with_article

TARGETS = {
    "object": ("cat", "dog", "rose", "house", "car", "fish", "tree", "apple"),
    "style": ("neon", "pixel art", "sepia", "woodcut"),
    "identity": ("ada", "felix", "kira", "otto"),
}
TEN = ("cat", "rabbit", "owl", "crab", "tulip", "palm tree", "banana", "castle", "rocket", "guitar")
QUICK = {"object": ("cat",), "style": ("neon",), "identity": ("ada",)}
HEAD = {"object": "object", "style": "style", "identity": "person"}  # the classifier's word for each kind
SEEN = ("plain", "in a style")  # groups whose prompts are near those that `fast` is made from
UNKNOWN = ("misspelling",)  # groups that the model itself does not know; they have rows, and do not count in UA
KEPT_SEEDS = 500_000  # pictures of what is kept have seeds from here on
LONG = "a detailed picture of {}, alone on white paper, by a good artist"


class Picture(NamedTuple):
    """A prompt, its seed, what is asked for in it, and the group it is counted in."""

    prompt: str
    seed: int
    object: str = ""
    style: str = ""
    person: str = ""
    group: str = ""

    @property
    def kept(self) -> bool:
        return self.seed >= KEPT_SEEDS


def asked_for(kind: str, names: tuple[str, ...], seed: int, few: bool = False) -> list[Picture]:
    """Pictures of the targets; `group` says how far a prompt is from the plain one."""
    make = {"object": objects_asked, "style": styles_asked, "identity": people_asked}[kind]
    asked = [one for name in names for one in make(name, seed, few or len(names) > 1)]
    return [Picture(prompt, 1000 * seed + index, group=group, **what) for index, (group, prompt, what) in enumerate(asked)]


def objects_asked(name, seed, few):
    """Yields (group, prompt, what is asked for) of an object."""
    a, other = with_article(name), "tree" if name == "house" else "house"
    yield "plain", a, {"object": name}
    yield "other template", f"a sticker of {a}", {"object": name}
    yield "paraphrase", f"here you see {a}", {"object": name}
    yield "long description", LONG.format(a), {"object": name}
    yield "composition", f"{a} beside a {other}", {"object": name}
    yield "misspelling", f"{a}{name[-1]}", {"object": name}
    if not few:
        yield "paraphrase", f"several {plural(name)}", {"object": name}
        yield "composition", f"a {other} with {a}", {"object": name}
    for word in OBJECTS[name].synonyms.split():
        yield "synonym", with_article(word), {"object": name}
    for style in [STYLES[(seed + i) % len(STYLES)] for i in range(0, len(STYLES), 10 if few else 3)]:
        yield "in a style", f"{a} in {style} style", {"object": name, "style": style}


def styles_asked(name, seed, few):
    """Yields (group, prompt, what is asked for) of a style, each with another object."""
    groups = (
        ("in a style", "{} in {} style"), ("other template", "a {1} image of {0}"),
        ("paraphrase", "here you see {}, {} style"),
        ("composition", "{} beside a house in {} style"), ("long description", LONG + ", in {} style"),
        ("misspelling", "{} in {}" + name[-1] + " style"),
    )  # fmt: skip
    things = list(OBJECTS)[seed % 5 :: 11 if few else 5]
    for index, thing in enumerate(things):
        group, template = groups[index % len(groups)]
        yield group, template.format(with_article(thing), name), {"object": thing, "style": name}


def people_asked(name, seed, few):
    """Yields (group, prompt, what is asked for) of a person."""
    for group, template in (
        ("plain", "a portrait of {}"), ("other template", "a sticker of {}"), ("paraphrase", "here you see {}"),
        ("composition", "{} on a green background"), ("composition", "{} beside a house"),
        ("long description", LONG), ("misspelling", "a portrait of {}" + name[-1]), ("plain", "{}"),
    )[: 7 if few else None]:  # fmt: skip
        yield group, template.format(name), {"person": name}


def kept(kind: str, names: tuple[str, ...], seed: int, few: bool = False) -> list[Picture]:
    """Pictures of what should stay: the targets' nearest kin, the other half of the compositions, and others."""
    dice, pictures = random.Random(f"{kind} {names} {seed}"), []
    things = [name for name in OBJECTS if name not in names]
    kin = [n for n in things if any(name in OBJECTS and OBJECTS[n].kind == OBJECTS[name].kind for name in names)]
    if len(names) > 1 or few:
        kin = dice.sample(kin, min(len(kin), 12 if len(names) > 1 else 3))
    others = dice.sample([n for n in things if n not in kin], 3 if few else 8)
    styles, people = ([n for n in several if n not in names] for several in (STYLES, PEOPLE))
    dice.shuffle(styles)

    def add(group, prompt, **what):
        pictures.append(Picture(prompt, KEPT_SEEDS + 1000 * seed + len(pictures), group=group, **what))

    def add_in_styles(group, thing, count):
        for _ in range(count):
            styles.append(styles.pop(0))
            add(group, f"{with_article(thing)} in {styles[-1]} style", object=thing, style=styles[-1])

    if kind == "object":
        for thing in kin:
            add("neighbour", with_article(thing), object=thing)
            add_in_styles("neighbour", thing, 1 if few else 2)
        for thing in others:
            add("other", with_article(thing), object=thing)
            add_in_styles("other", thing, 1)
        add("companion", "a tree" if "house" in names else "a house", object="tree" if "house" in names else "house")
        for person in dice.sample(people, 1):
            add("other", f"a portrait of {person}", person=person)
    elif kind == "style":
        for thing in others:
            add_in_styles("neighbour", thing, 2 if few else 3)
    else:
        for person in people[:: 2 if few else 1]:
            add("neighbour", f"a portrait of {person}", person=person)
            if not few:
                add("neighbour", f"a drawing of {person}", person=person)
        for thing in others[: 3 if few else 6]:
            add("other", with_article(thing), object=thing)
    return pictures


def half_the_vocabulary() -> tuple[str, ...]:
    """Every second object: what the curve of many concepts forgets, in the order in which it does."""
    return tuple(list(OBJECTS)[::2])
