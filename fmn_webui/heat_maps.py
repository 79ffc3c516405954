"""Heat maps of a generation's words, as pictures for its gallery."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from fmn_core.attention_picture import ViewSettings, visualize
from fmn_core.errors import ForgetError
from fmn_core.heatmap import chosen_phrases
from fmn_core.recording import AttentionRecording

from .infotext import Wanted
from .webui import picture_of


def heat_pictures(recording: AttentionRecording, images: Tensor, wanted: Wanted) -> list[list[tuple[str, Image.Image]]]:
    """For every picture of [B, H, W, 3] in 0..1 its heat maps, each with its words: one a phrase, or a sheet of all.

    All of them have one scale. Raises ForgetError where nothing was recorded and for words that the prompt does not have.
    """
    if not recording.layers:
        raise ForgetError("No attention was recorded: heat maps need SD1.x, SD2.x or SDXL, and a sampler that ran.")
    phrases = chosen_phrases(recording, wanted.words)
    view = ViewSettings(words=wanted.words, view=wanted.layout, opacity=wanted.opacity, color_map=wanted.colours)
    drawn, _, _ = visualize(recording, images, view)
    if wanted.layout == "contact sheet":
        return [[(", ".join(phrases), picture_of(one))] for one in drawn]
    by_picture = drawn.unflatten(0, (len(phrases), len(images))).movedim(1, 0)
    return [[(phrase, picture_of(one)) for phrase, one in zip(phrases, several, strict=True)] for several in by_picture]


def to_images(batch: Tensor) -> Tensor:
    """The host's [B, 3, H, W] as [B, H, W, 3]."""
    return torch.movedim(batch.detach(), 1, -1)
