"""Pictures that a user gives: read, checked and brought to a size."""

from __future__ import annotations

import io
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..attention.capture import layer_size
from ..errors import ForgetError, brief
from ..host import DiffusionHost

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # Pillow has others, of which EPS calls another program
MOST_PIXELS = 64_000_000  # of a picture; more is no photograph
THINNEST = 64  # times as long as wide: what is thinner cannot be shrunk, and shows nothing
LARGEST_SIDE = 1024  # the side of what the models here were made for, at most
ORIENTATION = 0x0112  # EXIF's tag
SPARE = 2  # a side of this many times the training's is kept: `fit_pictures` then makes the size
DECODING = threading.Lock()  # a picture takes half a gigabyte while it is decoded, so one at a time


def picture_files(folder: Path) -> list[Path]:
    """The pictures in a folder, by name; raises ForgetError where there is no such folder, or no picture in it."""
    if not folder.is_dir():
        raise ForgetError(f"There is no folder {folder.absolute()}: make it and put pictures of the concept into it.")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise ForgetError(f"There is no picture in {folder}: put PNG, JPEG or WebP files there.")
    return files


def read_images(folder: Path, resolution: int = 0) -> Tensor:
    """The pictures of a folder as [P, H, W, 3] in 0..1, as `read_pictures` reads them."""
    return read_folders([folder], resolution)[0]


def read_folders(folders: Sequence[Path], resolution: int = 0) -> tuple[Tensor, list[int]]:
    """The pictures of several folders, as by `read_images`, and the number of the folder that each is from."""
    files = [(file, number) for number, folder in enumerate(folders) for file in picture_files(folder)]
    images, _ = read_pictures([file for file, _ in files], resolution=resolution)
    assert images is not None
    return images.float() / 255, [number for _, number in files]


def read_pictures(
    sources: Sequence[Path | bytes], masks: Sequence[Path | bytes] = (), resolution: int = 0
) -> tuple[Tensor | None, Tensor | None]:
    """Pictures [P, H, W, 3] and masks [1 or P, H, W] as bytes, white where the concept is, in the size of the first picture;
    None where there are none.

    What is larger than training at `resolution` (0: the model's own) can use is shrunk as it is read. Raises ForgetError
    for what is no picture, and for masks that fit none.
    """
    if not sources:
        if masks:
            raise ForgetError("There is a mask but no picture: give the pictures it belongs to, or take the mask off.")
        return None, None
    if masks and len(masks) not in (1, len(sources)):
        raise ForgetError(f"There are {len(masks)} masks and {len(sources)} pictures: give one mask, or one for each.")
    most = most_pixels(resolution)
    first, size = read_picture(sources[0], "RGB", most)
    fitted, shapes = [np.asarray(first)], [size]
    for source in sources[1:]:
        picture, size = read_picture(source, "RGB", most)
        fitted.append(np.asarray(ImageOps.fit(picture, first.size)))
        shapes.append(size)
    images = torch.from_numpy(np.stack(fitted))
    if not masks:
        return images, None
    fitted = []
    for mask, (width, height) in zip(masks, shapes, strict=False):  # one mask for all has the first picture's shape
        drawn, (mask_width, mask_height) = read_picture(mask, "L", most)
        if mask_width * height != mask_height * width:
            raise ForgetError(
                f"A mask is {mask_width} x {mask_height} and its picture {width} x {height}: give the mask the picture's "
                "shape."
            )
        fitted.append(np.asarray(ImageOps.fit(drawn, first.size)))
    return images, torch.from_numpy(np.stack(fitted))


def most_pixels(resolution: int) -> int:
    """How many pixels of a picture training at this resolution can use."""
    return (SPARE * (resolution or LARGEST_SIDE)) ** 2


def opened(source: Path | bytes) -> Image.Image:
    """A picture of which only the head is read by now; raises ForgetError for what is none, or too large."""
    try:
        picture = Image.open(source if isinstance(source, Path) else io.BytesIO(source), formats=IMAGE_FORMATS)
    except UnidentifiedImageError as error:
        raise unreadable_image(source, "it is of no such kind") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise unreadable_image(source, error) from error
    if picture.width * picture.height > MOST_PIXELS:
        raise ForgetError(
            f"{name_of(source)} has {picture.width} x {picture.height} pixels, and {MOST_PIXELS:,} are the most: make it "
            "smaller."
        )
    if max(picture.size) > THINNEST * min(picture.size):
        raise ForgetError(f"{name_of(source)} has {picture.width} x {picture.height} pixels: give it a picture's shape.")
    return picture


def read_picture(source: Path | bytes, mode: str, most: int) -> tuple[Image.Image, tuple[int, int]]:
    """A picture in this mode with about `most` pixels at most, turned as its camera says, and the size that it had so
    turned; raises ForgetError for what is none."""
    with DECODING, opened(source) as picture:
        full = picture.size
        scale = (most / (full[0] * full[1])) ** 0.5
        small = max(int(full[0] * scale), 1), max(int(full[1] * scale), 1)
        try:
            if scale < 1:
                picture.draft(None, small)  # a JPEG is decoded at a half, a quarter or an eighth
            plain = picture if scale < 1 and picture.mode == mode else picture.convert(mode)
            if plain is not picture:
                picture.close()  # two in full size take twice the memory
            if scale < 1:
                plain = plain.resize(small, Image.Resampling.LANCZOS, reducing_gap=2.0)
            turned = plain.getexif().get(ORIENTATION, 1) > 4  # by a quarter, one way or the other
            return ImageOps.exif_transpose(plain), full[::-1] if turned else full
        except (OSError, ValueError, SyntaxError) as error:
            raise unreadable_image(source, error) from error


def unreadable_image(source: Path | bytes, reason: object) -> ForgetError:
    return ForgetError(f"{name_of(source)} cannot be read as a picture ({brief(reason)}): give a whole PNG, JPEG or WebP.")


def name_of(source: Path | bytes) -> str:
    return str(source) if isinstance(source, Path) else "What was sent"


def prepare_pictures(
    host: DiffusionHost, images: Tensor | None, mask: Tensor | None, flip: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Pictures [P, H, W, 3 or 4] and masks [1 or P, H, W] at the host's size and, with `flip`, their mirror images
    after them; None stays None. Raises ForgetError for those that are not what their names say."""
    check_pictures(images, mask)
    if images is None:
        return None, None
    _, height, width = host.latent_shape()
    images, mask = fit_pictures(images, mask, height * width * 64)
    if flip:
        mask = None if mask is None else mask.expand(len(images), -1, -1)
        images, mask = (None if x is None else torch.cat([x, x.flip(2)]) for x in (images, mask))
    return images, mask


def concept_pictures(
    host: DiffusionHost,
    images: Tensor | None,
    mask: Tensor | None,
    *,
    flip: bool,
    concepts: int,
    concept_of: Sequence[int] | None,
) -> tuple[Tensor | None, Tensor | None, list[int]]:
    """As prepare_pictures, and the number of the concept that each picture shows: as `concept_of` has it for those given,
    or an equal part of them for each concept, in order."""
    check_pictures(images, mask, concepts if concept_of is None else 1)
    if images is None:
        return None, None, []
    shows = [i * concepts // len(images) for i in range(len(images))] if concept_of is None else [*concept_of]
    if len(shows) != len(images) or {*shows} != {*range(concepts)}:
        raise ForgetError(f"Each of {len(images)} pictures has to show one of {concepts} concepts, and none be left out.")
    return *prepare_pictures(host, images, mask, flip), shows * (2 if flip else 1)


def region_of(mask: Tensor, indices: Sequence[int], pixels: int, x_t: Tensor) -> Tensor:
    """The masks [1 or P, H, W] of these pictures at the resolution of a layer that has this many pixels: [B, pixels]."""
    height, width = x_t.shape[-2:]
    height, width = layer_size(height, width, pixels)
    chosen = mask[[i % len(mask) for i in indices], None].to(x_t)
    return rearrange(F.interpolate(chosen, (height, width), mode="area"), "b 1 h w -> b (h w)")


def check_pictures(images: Tensor | None, mask: Tensor | None, concepts: int = 1) -> None:
    """Raises ForgetError for pictures or masks that are not what their names say, and for pictures that cannot be shared
    out evenly among so many concepts."""
    if images is not None and (images.ndim != 4 or images.shape[-1] not in (3, 4) or not images.numel()):
        raise ForgetError(
            f"The pictures have the shape {tuple(images.shape)}: connect an IMAGE of shape [pictures, height, width, 3]."
        )
    if images is not None and len(images) % concepts:
        raise ForgetError(
            f"{len(images)} {'picture' if len(images) == 1 else 'pictures'} cannot be shared out among {concepts} concepts: "
            "give as many of each, first those of the first concept, then those of the next."
        )
    if mask is None:
        return
    if images is None:
        raise ForgetError("There is a mask but no picture: connect the pictures it belongs to, or take the mask off.")
    if mask.ndim != 3 or mask.shape[1:] != images.shape[1:3] or len(mask) not in (1, len(images)):
        raise ForgetError(
            f"The mask has the shape {tuple(mask.shape)} and the pictures {tuple(images.shape)}: "
            "resize the mask to the pictures' height and width, one mask for all pictures or one for each."
        )
    if mask.max() <= 0:
        raise ForgetError("The mask is empty, so nothing would be forgotten: paint where the concept is, or take it off.")


def fit_pictures(images: Tensor, mask: Tensor | None, area: int) -> tuple[Tensor, Tensor | None]:
    """Pictures [P, H, W, 3 or 4] and masks brought to about this many pixels, sides a multiple of 8: [P, h, w, 3].

    A photograph of ten megapixels would otherwise train at ten megapixels; the original resizes to 512.
    """
    height, width = images.shape[1:3]
    scale = (area / (height * width)) ** 0.5
    size = [max(round(side * scale / 8) * 8, 8) for side in (height, width)]

    def resize(x: Tensor) -> Tensor:
        return x if list(x.shape[2:]) == size else F.interpolate(x, size, mode="bilinear", antialias=True)

    fitted = resize(images[..., :3].movedim(-1, 1).float()).movedim(1, -1)
    return fitted, None if mask is None else resize(mask[:, None].float())[:, 0]
