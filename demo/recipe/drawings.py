"""Fetches openly licensed drawings from npm and renders them: emoji by several artists, and invented people."""

import io
import json
import os
import subprocess
import tarfile
from pathlib import Path
from typing import NamedTuple

import resvg_py
from PIL import Image

from ..vocabulary import OBJECTS, PEOPLE

SIZE = 128


class ArtSet(NamedTuple):
    """An npm package of icons; sets of one artist share its drawings and are held out together."""

    package: str
    version: str
    artist: str
    licence: str


ART = {
    "noto": ArtSet("@iconify-json/noto", "1.2.9", "Google", "Apache-2.0"),
    "noto v1": ArtSet("@iconify-json/noto-v1", "1.2.5", "Google", "Apache-2.0"),
    "twemoji": ArtSet("@iconify-json/twemoji", "1.2.5", "Twitter", "CC-BY-4.0"),
    "flat": ArtSet("@iconify-json/fluent-emoji-flat", "1.2.6", "Microsoft", "MIT"),
    "fluent": ArtSet("@iconify-json/fluent-emoji", "1.2.7", "Microsoft", "MIT"),
    "3d": ArtSet("@lobehub/fluent-emoji-3d", "1.1.0", "Microsoft", "MIT"),
    "emojione": ArtSet("@iconify-json/emojione", "1.2.3", "EmojiOne", "CC-BY-4.0"),
    "fxemoji": ArtSet("@iconify-json/fxemoji", "1.2.2", "Mozilla", "Apache-2.0"),
}
DICEBEAR = ("@dicebear/core@9.4.3", "@dicebear/collection@9.4.3")
AVATARS = {  # set: (artist, licence)
    "adventurer": ("Lisa Wischofsky", "CC-BY-4.0"),
    "toon-head": ("Johan Melin", "CC-BY-4.0"),
    "micah": ("Micah Lanier", "CC-BY-4.0"),
    "big-smile": ("Ashley Seo", "CC-BY-4.0"),
    "personas": ("Draftbit", "CC-BY-4.0"),
}


def default_cache() -> Path:
    """Where packages and data are kept between runs, outside the repository."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "forget-me-not"


def fetch(art: ArtSet, cache: Path) -> Path:
    """Fetches one npm package into `cache` by `npm pack`, once; returns its archive."""
    archive = cache / f"{art.package.strip('@').replace('/', '-')}-{art.version}.tgz"
    if not archive.exists():
        cache.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", "--silent", "--pack-destination", cache, f"{art.package}@{art.version}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return archive


def read_json(archive: Path, name: str):
    """Reads one JSON file of an npm archive."""
    with tarfile.open(archive) as files:
        return json.load(files.extractfile(f"package/{name}"))


def render(svg: str) -> Image.Image:
    """Renders an SVG as RGBA, SIZE pixels square."""
    png = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA").resize((SIZE, SIZE))


def read_icons(archive: Path, wanted) -> dict[str, Image.Image]:
    """Renders the icons of one Iconify set whose names are in `wanted`."""
    icons = read_json(archive, "icons.json")
    names = {alias: entry["parent"] for alias, entry in icons.get("aliases", {}).items() if len(entry) == 1}
    drawings = {}
    for name in wanted:
        icon = icons["icons"].get(name) or icons["icons"].get(names.get(name))
        if icon:
            width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
            box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
            spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
            drawings[name] = render(f'<svg {spaces} viewBox="{box}">{icon["body"]}</svg>')
    return drawings


def read_renders(archive: Path, codes: dict[str, str], wanted) -> dict[str, Image.Image]:
    """Reads the pictures of the 3D set, whose files are named by code points."""
    drawings = {}
    with tarfile.open(archive) as files:
        members = {Path(file.name).stem.replace("-fe0f", ""): file for file in files.getmembers()}
        for name in wanted:
            if codes.get(name) in members:
                image = Image.open(files.extractfile(members[codes[name]])).convert("RGBA")
                drawings[name] = image.resize((SIZE, SIZE), Image.LANCZOS)
    return drawings


def read_art(title: str, wanted, cache: Path) -> dict[str, Image.Image]:
    """The drawings of the set ART[title] whose icon names are in `wanted`, RGBA, SIZE pixels square."""
    archive = fetch(ART[title], cache)
    if title != "3d":
        return read_icons(archive, wanted)
    codes = read_json(fetch(ART["flat"], cache), "chars.json")
    return read_renders(archive, {name: code.replace("-fe0f", "") for code, name in codes.items()}, wanted)


def read_objects(titles, cache: Path) -> dict[str, dict[str, Image.Image]]:
    """One drawing of every object by every set of `titles`: {title: {object: image}}; absent where a set lacks it."""
    drawings = {}
    for title in titles:
        icons = read_art(title, [icon for thing in OBJECTS.values() for icon in thing.icons.split()], cache)
        found = {name: [icons[icon] for icon in thing.icons.split() if icon in icons] for name, thing in OBJECTS.items()}
        drawings[title] = {name: images[0] for name, images in found.items() if images}
    return drawings


AVATAR_SCRIPT = """
import { createAvatar } from '@dicebear/core';
import * as sets from '@dicebear/collection';
import { readFileSync, writeFileSync } from 'node:fs';
const [people, count, seed, out] = JSON.parse(readFileSync(0));
const key = name => name.replace(/-(.)/g, (_, letter) => letter.toUpperCase());
const drawings = {};
for (const [name, [set, features]] of Object.entries(people))
  drawings[name] = Array.from({ length: count }, (_, index) =>
    createAvatar(sets[key(set)], { seed: `${seed} ${name} ${index}`, ...features }).toString());
writeFileSync(out, JSON.stringify(drawings));
"""


def read_people(count: int, seed, cache: Path, people=PEOPLE) -> dict[str, list[Image.Image]]:
    """Draws every one of `people` `count` times, RGBA, features fixed, expression and clothes free; runs Node."""
    home = cache / "dicebear"
    if not (home / "node_modules/@dicebear/collection").exists():
        home.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "install", "--silent", "--no-save", "--prefix", home, *DICEBEAR], check=True)
    script, out = home / "avatars.mjs", home / "avatars.json"
    script.write_text(AVATAR_SCRIPT)
    request = json.dumps([people, count, seed, str(out)])
    subprocess.run(["node", script], input=request, text=True, check=True, cwd=home)
    return {name: [render(svg) for svg in svgs] for name, svgs in json.loads(out.read_text()).items()}
