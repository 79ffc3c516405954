"""Pictures that a user gives: read, checked and brought to a size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from .errors import ForgetError
from .hosts.base import DiffusionHost

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def read_images(folder: Path) -> Tensor:
    """The pictures of a folder as [P, H, W, 3] in 0..1, brought to the size of the first.

    Raises ForgetError where there is no such folder, or no picture in it.
    """
    if not folder.is_dir():
        raise ForgetError(f"There is no folder {folder.absolute()}: make it and put pictures of the concept into it.")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not files:
        raise ForgetError(f"There is no picture in {folder}: put PNG, JPEG or WebP files there.")
    fitted, size = [], None
    for file in files:
        try:
            with Image.open(file) as picture:
                upright = ImageOps.exif_transpose(picture).convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ForgetError(f"{file} cannot be read ({error}): it is damaged or no picture; take it away.") from error
        size = size or upright.size
        fitted.append(np.asarray(ImageOps.fit(upright, size)))
    return torch.from_numpy(np.stack(fitted)).float() / 255


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


def check_pictures(images: Tensor | None, mask: Tensor | None) -> None:
    """Raises ForgetError for pictures or masks that are not what their names say."""
    if images is not None and (images.ndim != 4 or images.shape[-1] not in (3, 4) or not images.numel()):
        raise ForgetError(
            f"The pictures have the shape {tuple(images.shape)}: connect an IMAGE of shape [pictures, height, width, 3]."
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
