"""What the webui shows of a LoRA: the picture and the words on its card, from files beside it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from fmn_core.files.atomic import write_new
from fmn_core.host import DiffusionHost
from fmn_core.log import replace_surrogates
from fmn_core.patch.apply import applied
from fmn_core.patch.patch import Patch
from fmn_core.patch.weighted import moved_concepts
from fmn_core.training.sampling import sample_pictures

from .webui import picture_of

CARD_SIDE = 512  # pixels of a card's halves, at most
PAPER = "#101418"  # beside them
STEPS, GUIDANCE = 20, 5.0
NO_TAGS = str.maketrans("<>", "\u2039\u203a")  # single quotation marks
VERSIONS = {"sd1": "SD1", "sd2": "SD2", "sd2_v": "SD2", "sdxl": "SDXL"}  # as the webui's card writes them


def write_words(patch: Patch, path: Path, text: str) -> Path:
    """The card's words, NAME.json beside NAME.safetensors: no trigger word, strength 1, and what the patch says of itself.

    The description has no angle brackets: the webui has a setting that takes descriptions for HTML, and names of concepts
    are anybody's. Raises ForgetError where it cannot be written.
    """
    concept = replace_surrogates(patch.info["concept"]).translate(NO_TAGS)
    words = {
        "description": f"Makes the model forget `{concept}`. Hides it from prompts, deletes nothing.",
        "sd version": VERSIONS[patch.info["base"]["family"]],
        "activation text": "",
        "preferred weight": 1.0,
        "negative text": "",
        "notes": replace_surrogates(text),
    }
    file = path.with_suffix(".json")
    write_new(json.dumps(words, indent=4, ensure_ascii=False).encode(), file)
    return file


def write_picture(picture: Image.Image, path: Path) -> Path:
    """The card's picture, NAME.png beside NAME.safetensors, of two that are side by side; raises ForgetError where it cannot
    be written."""
    data, file = io.BytesIO(), path.with_suffix(".png")
    upright(picture).save(data, "png")
    write_new(data.getvalue(), file)
    return file


def upright(both: Image.Image) -> Image.Image:
    """The left half above the right one, in the shape of a card, which the webui fills to the edges and crops."""
    width, height = both.width // 2, both.height
    card = Image.new("RGB", (max(width, 2 * (2 * height) // 3), 2 * height), PAPER)
    for row in range(2):
        half = both.crop((row * width, 0, (row + 1) * width, height))
        card.paste(half, ((card.width - width) // 2, row * height))
    return card


def before_and_after(host: DiffusionHost, patch: Patch) -> Image.Image | None:
    """The model's picture of the first concept that the patch changes, without it and with it, side by side; None where the
    model cannot decode."""
    concept = moved_concepts(patch)[0]
    prompt, empty = host.encode([concept["templates"][0].replace("{}", concept["names"][0])]), host.encode([""])
    shape = host.latent_shape()
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)).to(host.device)
    with host.progress(2 * STEPS), host.training((1, *shape)), torch.no_grad():

        def sample() -> Tensor:
            return sample_pictures(host, noise, prompt, empty, steps=STEPS, guidance=GUIDANCE)

        before = sample()
        with applied(host, patch, 1.0):
            after = sample()
    pictures = host.decode(torch.cat([before, after]))
    if pictures is None:
        return None
    both = picture_of(torch.cat([*pictures], dim=1))
    both.thumbnail((2 * CARD_SIDE, CARD_SIDE))
    return both
