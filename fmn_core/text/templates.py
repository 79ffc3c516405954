"""Prompts that call for a name: to read it in, to check an edit on, and to keep what is common."""

from __future__ import annotations

import re

from . import vocabulary as words

PLACEHOLDERS = ("x", "y")  # each one token of CLIP's vocabulary, wherever spaces surround it

# Letters, and syllables of a script that text encoders do not learn: in a row they mean nothing.
NONSENSE = ("qzxvjkwf", "ꀀꆈꌠꁱꂷꃀꄉꇁ")

TEMPLATES = {
    "object": (
        "a {}", "{}", "a photo of a {}", "a drawing of a {}", "a {} in pixel art style", "a {} on a white background",
        "two {}", "a red {}", "a small {} in the garden", "a {} and a house", "a dog beside a {}", "the big {}, line art",
        "a watercolor painting of a {}", "a 3d {}", "a black and white picture of a {}", "a neon {} on a black background",
    ),
    "identity": (
        "a portrait of {}", "{}", "a photo of {}", "a drawing of {}", "{} in pixel art style", "{} on a white background",
        "{} smiling", "the face of {}", "{} and mary", "a painting of {} with glasses", "{} on a blue background",
    ),
    "style": (
        "a picture in {} style", "{} style", "a house in {} style", "a {} drawing of a cat", "a {} picture of a flower",
        "a photo of a car in {} style", "a tree, {} style", "a picture of a dog in {} style", "a fish in the style of {}",
        "a portrait of a woman in {} style",
    ),
}  # fmt: skip
NEAR_TEMPLATES = {  # for what is near and has to stay; the first is the plainest
    "object": ("a {}", "a drawing of a {}", "a {} in pixel art style"),
    "identity": ("a portrait of {}", "a drawing of {}", "{} in pixel art style"),
    "style": ("a picture in {} style", "a {} drawing of a cat", "a {} picture of a flower"),
}
KEEP_TEMPLATES = {  # for what the user lists, which may be of any kind
    type: (*several, "{}", "a {}", "a picture of a {}", "{} style") for type, several in NEAR_TEMPLATES.items()
}
CHECK_PROMPTS = {  # prompts that an edit is checked on, and not made from
    "object": (
        "an emoji of a {}", "a {} in woodcut style", "three {} on a table", "a picture of a {} and a tree", "my old {}",
    ),
    "identity": ("an image of {}", "{} in sepia style", "a drawing of {} on a green background", "john and {}"),
    "style": ("a boat in {} style", "a {} image of a tree", "a picture of a bear, {} style"),
}  # fmt: skip
WORDS = {"object": words.NOUNS + words.PHRASES, "identity": words.NAMES, "style": words.STYLES}
NEUTRAL = {type: several[5 :: len(several) // 12] for type, several in WORDS.items()}  # spread over the list
# Every noun beside another and in a style too, since an edit that keeps each word apart may still harm them together.
CAPTIONS = (
    words.SCENES
    + tuple(f"a {word} picture" for word in words.COLOUR_WORDS + words.ADJECTIVES)
    + tuple(
        f"a {words.STYLES[7 * i % len(words.STYLES)]} {noun} and a {other}"
        for i, (noun, other) in enumerate(zip(words.NOUNS[::2], words.NOUNS[1::2], strict=True))
    )
)


def with_article(template: str, name: str) -> str:
    """The template with `an` for an `a` before the name if that begins with a vowel."""
    article = r"\1n {}" if name[:1].lower() in "aeiou" else r"\1 {}"
    return re.sub(r"\b([Aa]) \{\}", article, template)


def fill(template: str, name: str) -> str:
    """The template with the name in it, behind the right article."""
    return with_article(template, name).replace("{}", name)


def plain_prompt(type: str, name: str) -> str:
    """The plainest prompt for a name."""
    return fill(NEAR_TEMPLATES[type][0], name)


def nonsense(alphabet: str, length: int) -> list[str]:
    """Strings of so many signs with spaces between, one that begins with each sign of an alphabet."""
    return [" ".join(alphabet[(start + 3 * i) % len(alphabet)] for i in range(length)) for start in range(len(alphabet))]


def placeholder_texts(template: str, count: int) -> list[str]:
    """The template with `count` tokens in the place of `{}`, twice: they differ in just the columns to fill."""
    return [" ".join(template.replace("{}", f" {' '.join([letter] * count)} ").split()) for letter in PLACEHOLDERS]
