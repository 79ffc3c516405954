"""Plain values, as a page or a request gives them, made into what the core takes."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fmn_core.errors import ForgetError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # Pillow has others, of which EPS calls another program
MOST_PIXELS = 64_000_000  # of a picture; more is no photograph


def settings_of(kind: type, values: dict):
    """A settings dataclass of these values; raises ForgetError for an unknown name, a wrong type, or what it refuses."""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    taken = {}
    for name, value in values.items():
        if name not in fields:
            raise ForgetError(f"`{name}` is no setting: there are {', '.join(fields)}.")
        taken[name] = converted(name, value, fields[name].default)
    return kind(**taken)


def converted(name: str, value, default):
    """The value in the type of the default; raises ForgetError where it is another."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**64
    if isinstance(default, bool | str):
        if isinstance(value, type(default)):
            return value
    elif isinstance(default, float) and number:
        return float(value)
    elif isinstance(default, int) and number and value == int(value):
        return int(value)
    wanted = {bool: "true or false", str: "a text", int: "a whole number", float: "a number"}[type(default)]
    raise ForgetError(f"{name} is {value!r}: it has to be {wanted}.")


def read_pictures(
    sources: Sequence[Path | bytes], masks: Sequence[Path | bytes] = ()
) -> tuple[Tensor | None, Tensor | None]:
    """Pictures [P, H, W, 3] and masks [1 or P, H, W] in 0..1, white where the concept is, brought to the size of the first
    picture; None where there are none. Raises ForgetError for what is no picture, and for masks that fit none."""
    if not sources:
        if masks:
            raise ForgetError("There is a mask but no picture: give the pictures it belongs to, or take the mask off.")
        return None, None
    pictures = [opened(source).convert("RGB") for source in sources]
    size = pictures[0].size
    images = torch.stack([tensor_of(ImageOps.fit(picture, size)) for picture in pictures])
    if not masks:
        return images, None
    if len(masks) not in (1, len(pictures)):
        raise ForgetError(f"There are {len(masks)} masks and {len(pictures)} pictures: give one mask, or one for each.")
    fitted = []
    for mask, picture in zip(masks, pictures, strict=False):  # one mask for all has the first picture's shape
        drawn = opened(mask).convert("L")
        if drawn.width * picture.height != drawn.height * picture.width:
            raise ForgetError(
                f"A mask is {drawn.width} x {drawn.height} and its picture {picture.width} x {picture.height}: give the "
                "mask the picture's shape."
            )
        fitted.append(tensor_of(ImageOps.fit(drawn, size)))
    return images, torch.stack(fitted)


def opened(source: Path | bytes) -> Image.Image:
    """A picture, turned as its camera says; raises ForgetError for what is none."""
    name = source.name if isinstance(source, Path) else "What was sent"
    try:
        picture = Image.open(source if isinstance(source, Path) else io.BytesIO(source), formats=FORMATS)
        small = picture.width * picture.height <= MOST_PIXELS
        turned = ImageOps.exif_transpose(picture) if small else None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ForgetError(f"{name} cannot be read as a picture: give PNG, JPEG or WebP.") from error
    if turned is None:
        raise ForgetError(f"{name} has {picture.width} x {picture.height} pixels: make it smaller.")
    return turned


def tensor_of(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(picture).copy()).float() / 255


def decoded(texts, what: str) -> list[bytes]:
    """The bytes of base64 texts, with or without a `data:` head; raises ForgetError for anything else."""
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ForgetError(f"{what} have to be a list of base64 texts.")
    try:
        return [
            base64.b64decode(text.partition(",")[2] if text.startswith("data:") else text, validate=True) for text in texts
        ]
    except (binascii.Error, ValueError) as error:
        raise ForgetError(f"{what} have to be a list of base64 texts, and one is not.") from error


def folder_pictures(folder: str, suffixes: Sequence[str]) -> list[Path]:
    """The pictures in a folder of the server; none for no folder. Raises ForgetError where there is no such folder, or no
    picture in it."""
    if not folder.strip():
        return []
    path = Path(folder.strip())
    if not path.is_dir():
        raise ForgetError(f"There is no folder {path.absolute()}: make it and put pictures of the concept into it.")
    found = sorted(file for file in path.iterdir() if file.suffix.lower() in suffixes)
    if not found:
        raise ForgetError(f"There is no picture in {path}: put PNG, JPEG or WebP files there.")
    return found


def members_of(rows) -> list[tuple[str, float]]:
    """(name, strength) of rows; raises ForgetError for rows that are none."""
    try:
        found = [(str(name), float(strength)) for name, strength in rows]
    except (TypeError, ValueError):
        raise ForgetError("`patches` has to be a list of pairs, each a name and a strength.") from None
    if not all(math.isfinite(strength) for _, strength in found):
        raise ForgetError("A strength has to be a number.")
    return found
