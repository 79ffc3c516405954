"""Heat maps of a generation's words, as pictures for its gallery."""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
from modules import images, shared
from PIL import Image
from torch import Tensor

from fmn_core.attention.heatmap import chosen_phrases
from fmn_core.attention.recorder import AttentionRecording
from fmn_core.attention.visualize import ViewConfig, visualize
from fmn_core.errors import ForgetError
from fmn_core.files.names import slug

from .infotext import ScriptOptions
from .webui import picture_of


@dataclass(frozen=True)
class HeatMap:
    """A picture of where its words were looked for; `text`: which of the texts that its prompt comes to, where it is not
    the only one."""

    words: str
    picture: Image.Image
    text: str = ""

    def infotext(self, picture: str) -> str:
        """Its infotext, after that of its picture."""
        keys = {"FMN heat map of": self.words} | ({"FMN heat map in": self.text} if self.text else {})
        return ", ".join([picture, *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in keys.items())])


def heat_pictures(
    recording: AttentionRecording, pictures: Tensor, options: ScriptOptions, words: str, several: bool
) -> list[list[HeatMap]]:
    """For every picture of [B, H, W, 3] in 0..1 its heat maps: one a phrase, or a sheet of all. `several`: whether the
    prompt comes to other texts too.

    All of them have one scale. Raises ForgetError where nothing was recorded and for words that the text does not have.
    """
    if not recording.layers:
        raise ForgetError("No attention was recorded: heat maps need SD1.x, SD2.x or SDXL, and a sampler that ran.")
    phrases = chosen_phrases(recording, words)
    view = ViewConfig(words=words, view=options.layout, opacity=options.opacity, color_map=options.colours)
    drawn, _, _ = visualize(recording, pictures, view)
    text = recording.text if several else ""
    if options.layout == "contact_sheet":
        return [[HeatMap(", ".join(phrases), picture_of(one), text)] for one in drawn]
    by_picture = drawn.unflatten(0, (len(phrases), len(pictures))).movedim(1, 0)
    return [[HeatMap(p, picture_of(one), text) for p, one in zip(phrases, each, strict=True)] for each in by_picture]


def to_images(batch: Tensor) -> Tensor:
    """The host's [B, 3, H, W] as [B, H, W, 3]."""
    return torch.movedim(batch.detach(), 1, -1)


def script_runs(p) -> bool:
    """Whether a script chosen from the page's list draws: these count the pictures that a generation gives them, and build
    grids of all, so that nothing may be added."""
    return bool(p.script_args and p.script_args[0])  # the list's value comes first


def hand_over(p, processed, maps: list[list[HeatMap]], options: ScriptOptions) -> None:
    """Puts heat maps at the end of the gallery, each with its picture's infotext, and into files where that is options or
    the gallery is a script's."""
    for number, several in enumerate(maps):
        at = processed.index_of_first_image + number
        for each in several:
            text = each.infotext(processed.infotexts[at] if at < len(processed.infotexts) else "")
            if not script_runs(p):
                processed.images.append(each.picture)
                processed.infotexts.append(text)
            if options.save or script_runs(p):
                seed, prompt = processed.all_seeds[number], processed.all_prompts[number]
                suffix = {"p": p, "suffix": f"-heat-{slug(each.words)}"}
                images.save_image(
                    each.picture, p.outpath_samples, "", seed, prompt, shared.opts.samples_format, info=text, **suffix
                )
