"""Pictures from files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .errors import ForgetError

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
    pictures = [ImageOps.exif_transpose(Image.open(file)).convert("RGB") for file in files]
    fitted = [np.asarray(ImageOps.fit(picture, pictures[0].size)) for picture in pictures]
    return torch.from_numpy(np.stack(fitted)).float() / 255
