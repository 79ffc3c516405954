"""Makes captioned pictures of the drawings: every object in every style, colours, counts, backgrounds, people."""

import math
import random
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..hue import commonest_hue
from ..vocabulary import (
    ARTISTS,
    BACKGROUNDS,
    COLOURS,
    COUNTS,
    KINDS,
    MORE_OBJECT_TEMPLATES,
    MORE_PERSON_TEMPLATES,
    MORE_STYLE_TEMPLATES,
    OBJECT_TEMPLATES,
    OBJECTS,
    PEOPLE,
    PERSON_TEMPLATES,
    STYLE_TEMPLATES,
    STYLES,
    is_held_out,
    plural,
    with_article,
)
from .drawings import SIZE
from .styles import RESTYLE, on_paper

PLAIN_ARTISTS = {"noto": 0.4, "flat": 0.2, "twemoji": 0.2, "3d": 0.2}  # how often each draws what names no style
RESTYLED_ARTISTS = {"noto": 0.5, "flat": 0.5}  # and what the made styles are made from


class Scene(NamedTuple):
    """What a picture shows; "" where nothing is said of it, as the caption says nothing of it then."""

    object: str = ""
    style: str = ""
    person: str = ""
    colour: str = ""
    background: str = ""
    count: str = ""


def caption(scene: Scene, dice: random.Random) -> tuple[str, Scene]:
    """A caption of the scene, and what it says of it: a template, sometimes a synonym or a word for the whole kind."""
    background = f" on a {scene.background} background" if scene.background else ""
    if scene.person:
        return dice.choice(PERSON_TEMPLATES).format(scene.person) + background, scene
    if scene.style and dice.random() < 0.05:
        return f"a picture in {scene.style} style", scene._replace(object="")
    thing, name, said = OBJECTS[scene.object], scene.object, scene
    if scene.count:
        words = f"{scene.count} {plural(name)}"
    else:
        if thing.synonyms and dice.random() < 0.2:
            name = dice.choice(thing.synonyms.split())
        elif thing.kind in KINDS and not scene.colour and dice.random() < 0.08:
            name = KINDS[thing.kind]
            said = scene._replace(object=name)
        words = f"{scene.colour} {name}".strip()
        if dice.random() < 0.85:
            words = with_article(words)
    if scene.style:
        return dice.choice(STYLE_TEMPLATES).format(object=words, style=scene.style), said
    return dice.choice(OBJECT_TEMPLATES).format(words) + background, said


def caption_by_name(scene: Scene, dice: random.Random) -> tuple[str, Scene]:
    """A caption that calls an object by its own name alone, in more templates, and what it says of the scene."""
    background = f" on a {scene.background} background" if scene.background else ""
    if scene.person:
        return dice.choice(PERSON_TEMPLATES + MORE_PERSON_TEMPLATES).format(scene.person) + background, scene
    if scene.style and dice.random() < 0.05:
        return f"a picture in {scene.style} style", scene._replace(object="")
    if scene.count:
        words = f"{scene.count} {plural(scene.object)}"
    else:
        words = f"{scene.colour} {scene.object}".strip()
        if dice.random() < 0.85:
            words = with_article(words)
    if scene.style:
        template = dice.choice(STYLE_TEMPLATES + MORE_STYLE_TEMPLATES)
        words = scene.object if template == "{style} {object}" else words
        return template.format(object=words, style=scene.style), scene
    return dice.choice(OBJECT_TEMPLATES + MORE_OBJECT_TEMPLATES).format(words) + background, scene


def move(image: Image.Image, dice: random.Random, zoom=(0.86, 0.97), angle=4, shift=3) -> Image.Image:
    """Turns, scales and shifts an RGBA drawing a little."""
    angle, scale = math.radians(dice.uniform(-angle, angle)), 1 / dice.uniform(*zoom)
    cos, sin, middle = scale * math.cos(angle), scale * math.sin(angle), SIZE / 2
    x, y = (middle + dice.uniform(-shift, shift) for _ in range(2))
    matrix = (cos, -sin, middle - cos * x + sin * y, sin, cos, middle - sin * x - cos * y)
    return image.transform(image.size, Image.AFFINE, matrix, Image.BICUBIC)


def recolour(image: Image.Image, colour: str) -> Image.Image:
    """Turns the commonest hue of an RGBA drawing, and hues near it, into the named colour."""
    hue, saturation, value = (np.asarray(band, np.float32) for band in image.convert("RGB").convert("HSV").split())
    alpha = np.asarray(image.getchannel("A"), np.float32)
    weight = np.where(saturation > 50, saturation * value * alpha, 0)
    offset = (hue - commonest_hue(hue, weight) + 128) % 256 - 128
    near = (np.abs(offset) < 30) & (saturation > 50)
    hue = np.where(near, (COLOURS[colour] / 360 * 256 + 0.3 * offset) % 256, hue)
    pink = colour == "pink"
    saturation = np.where(near, np.clip(saturation, *((70, 130) if pink else (150, 255))), saturation)
    value = np.where(near, np.maximum(value, 215 if pink or colour in ("yellow", "orange") else 130), value)
    bands = [Image.fromarray(band.astype(np.uint8)) for band in (hue, saturation, value)]
    changed = Image.merge("HSV", bands).convert("RGBA")
    changed.putalpha(image.getchannel("A"))
    return changed


def repeat(image: Image.Image, count: int, dice: random.Random) -> Image.Image:
    """Puts two or three small copies of an RGBA drawing beside each other."""
    places = {2: ((0.27, 0.5), (0.73, 0.5)), 3: ((0.27, 0.28), (0.73, 0.28), (0.5, 0.73))}[count]
    side = round(SIZE * (0.47 if count == 2 else 0.43))
    canvas = Image.new("RGBA", image.size)
    for x, y in places:
        corner = [round(SIZE * place - side / 2 + dice.uniform(-2, 2)) for place in (x, y)]
        canvas.alpha_composite(image.resize((side, side), Image.LANCZOS), [max(0, at) for at in corner])
    return canvas


def draw(scene: Scene, objects: dict, people: dict, dice: random.Random) -> Image.Image:
    """Draws a scene, 128 x 128 RGB, from `objects` {artist: {object: RGBA}} and `people` {person: [RGBA]}."""
    if scene.person:
        image = move(dice.choice(people[scene.person]), dice, (0.9, 1.08), 5, 5)
        return on_paper(image, BACKGROUNDS.get(scene.background, "white"))
    artists = {scene.style: 1} if scene.style in ARTISTS else RESTYLED_ARTISTS if scene.style else PLAIN_ARTISTS
    image = objects[dice.choices(list(artists), artists.values())[0]][scene.object]
    if scene.colour:
        image = recolour(image, scene.colour)
    if scene.count:
        image = repeat(image, COUNTS[scene.count], dice)
    image = move(image, dice)
    if scene.style in RESTYLE:
        return RESTYLE[scene.style](image)
    return on_paper(image, BACKGROUNDS.get(scene.background, "white"))


def scenes(repeats: int) -> Iterator[Scene]:
    """The training set: `repeats` pictures of every (object, style) pair but the held-out ones, and the rest in step."""
    for name, thing in OBJECTS.items():
        for style in STYLES:
            if not is_held_out(name, style):
                yield from [Scene(name, style)] * repeats
        yield from [Scene(name)] * (2 * repeats)
        for background in BACKGROUNDS:
            yield from [Scene(name, background=background)] * max(1, repeats // 8)
        for count in COUNTS:
            yield from [Scene(name, count=count)] * max(1, repeats // 4)
        if thing.recoloured:
            for colour in COLOURS:
                yield from [Scene(name, colour=colour)] * max(1, repeats // 4)
    for person in PEOPLE:
        yield from [Scene(person=person)] * (4 * repeats)
        for background in BACKGROUNDS:
            yield from [Scene(person=person, background=background)] * max(1, repeats // 4)
