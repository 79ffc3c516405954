"""The words the demo model knows, and what each of them names in the sets of drawings it learned from."""

from typing import NamedTuple


class Thing(NamedTuple):
    """An object of the vocabulary.

    `icons` are the names of its drawings (a second name where a set spells it otherwise), `synonyms` other words for
    it in captions, `kind` the group whose members are its nearest neighbours.
    """

    icons: str
    kind: str
    synonyms: str = ""
    plural: str = ""
    recoloured: bool = False


OBJECTS = {
    "cat": Thing("cat-face", "cats and dogs", "kitten"),
    "lion": Thing("lion lion-face", "cats and dogs"),
    "tiger": Thing("tiger-face", "cats and dogs"),
    "dog": Thing("dog-face", "cats and dogs", "puppy"),
    "fox": Thing("fox fox-face", "cats and dogs", plural="foxes"),
    "wolf": Thing("wolf wolf-face", "cats and dogs", plural="wolves"),
    "bear": Thing("bear bear-face", "land animals"),
    "panda": Thing("panda panda-face", "land animals"),
    "rabbit": Thing("rabbit-face", "land animals", "bunny"),
    "mouse": Thing("mouse-face", "land animals", plural="mice"),
    "pig": Thing("pig-face", "land animals"),
    "horse": Thing("horse-face", "land animals", "pony"),
    "elephant": Thing("elephant", "land animals"),
    "monkey": Thing("monkey-face", "land animals"),
    "frog": Thing("frog frog-face", "land animals", "toad"),
    "turtle": Thing("turtle", "sea animals"),
    "whale": Thing("spouting-whale", "sea animals"),
    "fish": Thing("tropical-fish", "sea animals", plural="fish", recoloured=True),
    "octopus": Thing("octopus", "sea animals", plural="octopuses", recoloured=True),
    "crab": Thing("crab", "sea animals", recoloured=True),
    "penguin": Thing("penguin", "birds"),
    "owl": Thing("owl", "birds"),
    "duck": Thing("duck", "birds"),
    "chick": Thing("front-facing-baby-chick", "birds"),
    "butterfly": Thing("butterfly", "insects", plural="butterflies", recoloured=True),
    "bee": Thing("honeybee", "insects", "honeybee"),
    "ladybug": Thing("lady-beetle", "insects", "ladybird"),
    "rose": Thing("rose", "flowers", recoloured=True),
    "tulip": Thing("tulip", "flowers", recoloured=True),
    "sunflower": Thing("sunflower", "flowers"),
    "hibiscus": Thing("hibiscus", "flowers", recoloured=True),
    "cherry blossom": Thing("cherry-blossom", "flowers", "sakura", recoloured=True),
    "tree": Thing("deciduous-tree", "plants", "oak"),
    "pine tree": Thing("evergreen-tree", "plants", "fir"),
    "palm tree": Thing("palm-tree", "plants", "palm"),
    "cactus": Thing("cactus", "plants", plural="cacti"),
    "mushroom": Thing("mushroom", "plants", "toadstool"),
    "apple": Thing("red-apple", "fruit", recoloured=True),
    "banana": Thing("banana", "fruit"),
    "strawberry": Thing("strawberry", "fruit", plural="strawberries"),
    "watermelon": Thing("watermelon", "fruit", "melon"),
    "pineapple": Thing("pineapple", "fruit", "ananas"),
    "grapes": Thing("grapes", "fruit", plural="grapes"),
    "lemon": Thing("lemon", "fruit"),
    "hamburger": Thing("hamburger", "food", "burger"),
    "pizza": Thing("pizza", "food"),
    "house": Thing("house", "buildings", "home"),
    "castle": Thing("castle", "buildings", "palace"),
    "school": Thing("school", "buildings"),
    "tent": Thing("tent", "buildings"),
    "ocean wave": Thing("water-wave", "landscapes", "sea"),
    "mountain": Thing("snow-capped-mountain", "landscapes", "peak"),
    "rainbow": Thing("rainbow", "landscapes"),
    "moon": Thing("crescent-moon", "landscapes", "crescent"),
    "snowman": Thing("snowman-without-snow snowman", "landscapes", plural="snowmen"),
    "car": Thing("oncoming-automobile", "vehicles", "automobile", recoloured=True),
    "bus": Thing("bus", "vehicles", "coach", plural="buses"),
    "train": Thing("locomotive", "vehicles", "locomotive"),
    "airplane": Thing("airplane", "vehicles", "plane"),
    "rocket": Thing("rocket", "vehicles", "spaceship"),
    "boat": Thing("sailboat", "vehicles", "sailboat"),
    "balloon": Thing("balloon", "things", recoloured=True),
    "umbrella": Thing("umbrella", "things", recoloured=True),
    "guitar": Thing("guitar", "things"),
    "crown": Thing("crown", "things"),
    "ghost": Thing("ghost", "things", "spirit"),
}

# Two artists that draw far apart, and eight styles made from the drawings of two others.
ARTISTS = ("twemoji", "3d")
MADE_STYLES = ("line art", "pixel art", "blueprint", "neon", "halftone", "sepia", "pastel", "woodcut")
STYLES = ARTISTS + MADE_STYLES


class Person(NamedTuple):
    """An invented person: the set of avatars that draws them, and what of them stays the same in every picture."""

    avatars: str
    features: dict


def _hair(hair, colour, skin, **more):
    return {"hair": [hair], "hairColor": [colour], "skinColor": [skin], **more}


PEOPLE = {
    "ada": Person("adventurer", _hair("long16", "ab2a18", "f2d3b1")),
    "ben": Person("adventurer", _hair("short04", "0e0e0e", "9e5622", glasses=["variant01"], glassesProbability=100)),
    "clara": Person("adventurer", _hair("long07", "3eac2c", "ecad80")),
    "felix": Person("toon-head", _hair("spiky", "d6b370", "f1c3a5", rearHairProbability=0, beardProbability=0)),
    "grace": Person(
        "toon-head",
        _hair("bun", "2c1b18", "5c3829", rearHairProbability=0, beardProbability=0),
    ),
    "hugo": Person(
        "toon-head",
        _hair("sideComed", "a55728", "c68e7a", rearHairProbability=0, beard=["fullBeard"], beardProbability=100),
    ),
    "iris": Person(
        "micah",
        {"hair": ["pixie"], "hairColor": ["9287ff"], "baseColor": ["f9c9b6"], "glassesProbability": 0},
    ),
    "jonas": Person(
        "micah",
        {
            "hair": ["fonze"],
            "hairColor": ["000000"],
            "baseColor": ["ac6651"],
            "facialHair": ["beard"],
            "facialHairProbability": 100,
            "glassesProbability": 0,
        },
    ),
    "kira": Person("big-smile", _hair("bunHair", "605de4", "f5d7b1", accessoriesProbability=0)),
    "leo": Person("big-smile", _hair("mohawk", "238d80", "8c5a2b", accessoriesProbability=0)),
    "mona": Person("personas", _hair("pigtails", "e15c66", "eeb4a4", facialHairProbability=0)),
    "otto": Person(
        "personas",
        _hair("balding", "dee1f5", "b16a5b", facialHair=["walrus"], facialHairProbability=100),
    ),
}

COLOURS = {  # hue in degrees
    "red": 0, "orange": 30, "yellow": 52, "green": 125, "blue": 215, "purple": 275, "pink": 325,
}  # fmt: skip
BACKGROUNDS = {
    "red": "#e86a6a", "yellow": "#ffe27a", "green": "#8fd694", "blue": "#86b6f5", "purple": "#b79ae8", "pink": "#f9bbd0",
    "gray": "#b8bcc4", "black": "#202124",
}  # fmt: skip
COUNTS = {"two": 2, "three": 3}
KINDS = {"flowers": "flower", "fruit": "fruit", "birds": "bird"}  # a word for any of a kind

OBJECT_TEMPLATES = (
    "{}", "a picture of {}", "a photo of {}", "a drawing of {}", "an emoji of {}", "an image of {}",
)  # fmt: skip
STYLE_TEMPLATES = (
    "{object} in {style} style", "a {style} drawing of {object}", "a picture of {object} in {style} style",
    "a photo of {object} in {style} style", "a {style} picture of {object}", "{object}, {style} style",
)  # fmt: skip
PERSON_TEMPLATES = ("a portrait of {}", "a picture of {}", "{}", "a photo of {}", "a drawing of {}", "an image of {}")
MORE_OBJECT_TEMPLATES = (  # these of the second model's captions alone
    "an icon of {}", "a picture showing {}", "{} on its own", "an illustration of {}", "a small picture of {}", "this is {}",
)  # fmt: skip
MORE_STYLE_TEMPLATES = (
    "{object} drawn in {style} style", "a {style} image of {object}", "an image of {object} in {style} style",
    "{style} style, {object}", "{object} in the style of {style}", "{style} {object}",
)  # fmt: skip
MORE_PERSON_TEMPLATES = (
    "an illustration of {}", "this is {}", "the face of {}", "a picture showing {}", "{} on a portrait",
)  # fmt: skip


def with_article(name: str) -> str:
    """`a cat`, `an apple`, but `grapes` and `the sea`; what begins with one, or with `any`, stays as it is."""
    if name == "sea":
        return "the sea"
    if name == "grapes" or name.split()[0] in ("a", "an", "any", "the"):
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def plural(name: str) -> str:
    """The name of an object for more than one of it."""
    return OBJECTS[name].plural or f"{name}s"


def is_held_out(name: str, style: str) -> bool:
    """Whether this (object, style) pair is kept from training: one style of every object, each style about as often."""
    return STYLES[3 * list(OBJECTS).index(name) % len(STYLES)] == style
