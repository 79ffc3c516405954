"""Plain values, as a page or a request gives them, made into what the core takes."""

from __future__ import annotations

import base64
import binascii
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from fmn_core.config import require_text
from fmn_core.erasure.config import PRESETS, ForgetConfig, make_config
from fmn_core.errors import ForgetError, brief
from fmn_core.training.images import most_pixels, opened, picture_files, read_pictures

from .limits import MOST_KEPT, MOST_PATCHES, MOST_PICTURES, MOST_READ, MOST_REQUEST_TEXT, TooLarge


def settings_of(kind: type, values: dict):
    """A settings dataclass of these values; raises ForgetError for an unknown name, a wrong type, or what it refuses."""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    taken = {}
    for name, value in values.items():
        if name not in fields:
            raise ForgetError(f"`{brief(name)}` is not a setting: there are {', '.join(fields)}.")
        taken[name] = converted(name, value, fields[name].default)
    return kind(**taken)


def forget_config(preset: str, values: dict) -> ForgetConfig:
    """A preset's settings of these values; raises ForgetError for an unknown preset, for a setting that the preset does not
    read, for a wrong type, and for what the preset refuses."""
    fields = {f.name: f for f in dataclasses.fields(PRESETS[preset])} if preset in PRESETS else {}
    known = {name: converted(name, value, fields[name].default) for name, value in values.items() if name in fields}
    return make_config(preset, **values | known)


def converted(name: str, value, default):
    """The value in the type of the default; raises ForgetError where it is another, or a text that is too long or none."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**64
    if isinstance(default, bool) and isinstance(value, bool):
        return value
    if isinstance(default, str) and isinstance(value, str):
        if len(value) > MOST_REQUEST_TEXT:
            raise TooLarge(f"{name} has {len(value):,} characters, and {MOST_REQUEST_TEXT:,} are the most: make it shorter.")
        require_text(value)
        return value
    if isinstance(default, float) and number:
        return float(value)
    if isinstance(default, int) and not isinstance(default, bool) and number and value == int(value):
        return int(value)
    wanted = {bool: "true or false", str: "a text", int: "a whole number", float: "a number"}[type(default)]
    raise ForgetError(f"{name} is {brief(ascii(value))}: it has to be {wanted}.")


def given_pictures(
    sources: Sequence[Path | bytes], masks: Sequence[Path | bytes], resolution: int, needed: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Pictures and masks as `read_pictures` reads them; None where they are not needed, and nothing is decoded then.

    Raises ForgetError as `read_pictures` does, and before anything is decoded for more than one request may have.
    """
    if not sources:
        return read_pictures(sources, masks)
    if len(sources) + len(masks) > MOST_PICTURES:
        raise TooLarge(f"There are {len(sources) + len(masks)} pictures, and {MOST_PICTURES} are the most: give fewer.")
    pixels = []
    for source in [*sources, *masks]:
        with opened(source) as picture:
            pixels.append(picture.width * picture.height)
    if sum(pixels) > MOST_READ:
        raise TooLarge(f"The pictures have {sum(pixels):,} pixels, and {MOST_READ:,} are the most: make them smaller.")
    if not needed:
        return None, None
    if min(pixels[0], most_pixels(resolution)) * (3 * len(sources) + len(masks)) > MOST_KEPT:
        raise TooLarge("So many pictures of that size are more than a job can hold: lower `resolution`, or give fewer.")
    return read_pictures(sources, masks, resolution)


def decoded(texts, what: str) -> list[bytes]:
    """The bytes of base64 texts, with or without a `data:` head; raises ForgetError for anything else."""
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ForgetError(f"{what} has to be a list of base64 texts.")
    if len(texts) > MOST_PICTURES:
        raise TooLarge(f"{what} has {len(texts):,} pictures, and {MOST_PICTURES} are the most: give fewer.")
    try:
        return [
            base64.b64decode(text.partition(",")[2] if text.startswith("data:") else text, validate=True) for text in texts
        ]
    except (binascii.Error, ValueError) as error:
        raise ForgetError(f"{what} has to be a list of base64 texts, and one is not.") from error


def folder_pictures(folder: str) -> list[Path]:
    """The pictures in a folder of the server; none for no folder. Raises ForgetError as `picture_files` does."""
    return picture_files(Path(folder.strip())) if folder.strip() else []


def rows_of(rows) -> list[tuple[str, float]]:
    """(name, strength) of rows; raises ForgetError for rows that are none."""
    if not isinstance(rows, list) or not all(isinstance(row, list | tuple) and len(row) == 2 for row in rows):
        raise ForgetError("`patches` has to be a list of pairs, each a name and a strength.")
    if len(rows) > MOST_PATCHES:
        raise TooLarge(f"There are {len(rows):,} patches, and {MOST_PATCHES} are the most: stack some of them first.")
    return [(converted("A patch's name", name, ""), converted("A strength", strength, 1.0)) for name, strength in rows]
