"""Names of files that stay in their folder and mean the same on every system, whatever a user or a file's metadata says."""

from __future__ import annotations

import re
import unicodedata
from itertools import count

from ..errors import ForgetError

# What Windows takes for a device, whatever the ending and the case; the digits may be superscripts, which NFKC makes plain.
DEVICES = {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$", *(f"{port}{n}" for port in ("COM", "LPT") for n in range(10))}
FORBIDDEN = set('<>:"|?*')  # Windows; a colon also names a drive or a hidden stream
LOOK_ALIKES = set("\u2044\u2215\u29f8\u2571\u29f5\u2216\u29f9\u2572")  # of slashes: no separators, and none should look so
MOST_NAME_BYTES = 180  # bytes of UTF-8 in one name: of the 255 of most file systems, with room for a number and an ending


def slug(name: str) -> str:
    """A concept's name as part of a file name: letters, digits and hyphens, at most 60, at most 120 bytes."""
    plain = re.sub(r"\W+", "-", unicodedata.normalize("NFKC", name[:1000]).lower())[:60].strip("-_")
    while len(plain.encode()) > 120:
        plain = plain[:-1]
    return f"{plain}-" if plain.upper() in DEVICES else plain or "concept"


def distinct(names: list[str]) -> list[str]:
    """The names, with a number behind each that comes several times, which makes it another than all the rest."""
    several = {name for name in names if names.count(name) > 1}
    taken, found = {*names} - several, []
    for name in names:
        own = next(each for n in count(1) if (each := f"{name}-{n}") not in taken) if name in several else name
        taken.add(own)
        found.append(own)
    return found


def folder_and_name(prefix: str, root: object) -> str:
    """What a user types as a file's name, maybe with folders before it: the same with `/` between them, in NFKC.

    A name that ends in a separator has an empty last part. Raises ForgetError, with `root` in it, for names that lead out
    of their folder, mean something else on another system, or do not look like what they are.
    """
    start = ascii(prefix[:60])
    plain = unicodedata.normalize("NFKC", prefix).replace("\\", "/")
    if not plain.isprintable() or not prefix.isprintable() or {*plain} & (FORBIDDEN | LOOK_ALIKES):
        raise ForgetError(f"{start} holds characters that no file name should: use letters, digits and hyphens.")
    *folders, name = plain.split("/")
    if plain.startswith("/") or ".." in (*folders, name):
        raise ForgetError(f"`{plain}` leads out of {root}: use a name, or a folder inside it, without `..`.")
    folders = [folder for folder in folders if folder not in ("", ".")]
    name = "" if name == "." else name
    for part in (*folders, name):
        if part.split(".")[0].strip().upper() in DEVICES:
            raise ForgetError(f"{start} is the name of a device on Windows: choose another name.")
        if part != part.strip() or part.endswith("."):
            raise ForgetError(f"{start} has a space or a dot at the edge of a name, which Windows drops: take it off.")
        if len(part.encode()) > MOST_NAME_BYTES:
            raise ForgetError(f"{start} cannot be used: File name too long. Choose another name.")
    return "/".join([*folders, name])
