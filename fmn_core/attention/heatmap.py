"""Word heat maps (DAAM), the share of attention that words get, and their colours."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ForgetError
from ..host import Token
from ..text.tokens import distinct_words, find_phrase, phrases_of, words_of
from ..work import Work
from .recorder import AttentionRecording

# Matplotlib's perceptually uniform colour maps, sampled at nine points: they read in grey and to the colour-blind.
COLOR_MAPS = {
    "viridis": "440154 482878 3e4989 31688e 26828e 1f9e89 35b779 6ece58 fde725",
    "inferno": "000004 1f0c48 550f6d 88226a ba3655 e35933 f98c0a f9c932 fcffa4",
    "magma": "000004 1d1147 51127c 832681 b73779 e75263 fc8961 fec488 fcfdbf",
    "cividis": "00224e 123570 3b496c 575d6d 707173 8a8678 a59c74 c3b369 fee838",
}
# ColorBrewer's diverging blue to red, which the colour-blind tell apart: less, the same, more.
DIFFERENCES = "053061 2166ac 4393c3 92c5de f7f7f7 f4a582 d6604d b2182b 67001f"
OTHER = "<other>"  # columns of the context that are none of the prompt's
ROUNDING = 1e-4  # of all attention


def colorize(heat: Tensor, color_map: str = "inferno") -> Tensor:
    """Colours [..., 3] in 0..1 of values [...] in 0..1."""
    return between(heat, COLOR_MAPS[color_map])


def colorize_difference(difference: Tensor) -> Tensor:
    """Colours [..., 3] in 0..1 of values [...] in -1..1: blue below zero, white at it, red above."""
    return between(difference / 2 + 0.5, DIFFERENCES)


def between(values: Tensor, colors: str) -> Tensor:
    """Colours [..., 3] at values [...] in 0..1, between colours at equal distances."""
    stops = torch.tensor([[int(c[i : i + 2], 16) / 255 for i in (0, 2, 4)] for c in colors.split()])
    place = values.clamp(0, 1) * (len(stops) - 1)
    low = place.floor().long().clamp(max=len(stops) - 2)
    return stops[low].lerp(stops[low + 1], (place - low)[..., None])


def overlay(picture: Tensor, heat: Tensor, opacity: float, color_map: str = "inferno") -> Tensor:
    """A heat map [..., H, W] in 0..1 laid over a picture [..., H, W, 3] in 0..1: none of it shows at opacity 0."""
    return picture.lerp(colorize(heat, color_map), opacity)


def require_recorded(recording: AttentionRecording) -> None:
    """Raises ForgetError for a recording with nothing in it, or of several batches."""
    if not recording.layers:
        raise ForgetError(
            f"Nothing was recorded of the prompt `{recording.text}`: connect the MODEL output of Record Token Attention to "
            "the sampler whose picture this is, and give it the same text and CLIP as the sampler's positive prompt, or "
            "connect that prompt's CONDITIONING to it. If the sampler did not run, change its seed; if it ran for a part of "
            "the noise, look at `start_percent` and `end_percent`."
        )
    if recording.several:
        raise ForgetError(
            "The sampler's node sampled several times, one after the other (several batches, or passes of its own), and the "
            "recording holds the last one: give it one batch of pictures, and each pass a sampler of its own."
        )


def chosen_phrases(recording: AttentionRecording, words: str) -> list[str]:
    """The phrases typed, or every word of the prompt where there are none; raises ForgetError where it has no words, and for
    more phrases than anybody looks at."""
    phrases = phrases_of(words) or distinct_words(recording.tokens)
    if not phrases:
        raise ForgetError("The recorded prompt has no words: wire the prompt's text to Record Token Attention.")
    return phrases


def word_heat_maps(
    recording: AttentionRecording,
    phrases: list[str],
    height: int,
    width: int,
    layers: list[str] | None = None,
    frame: int | None = None,
    head: int | None = None,
    work: Work | None = None,
) -> Tensor:
    """DAAM's word heat maps [W, B, height, width]: the mean of the global heat map over a phrase's columns, brought to the
    picture's size bicubically. Each phrase is a unit of the work.

    Raises ForgetError for a phrase that is not in the prompt and for a recording with nothing in it.
    """
    require_recorded(recording)
    columns = [find_phrase(recording.tokens, phrase) for phrase in phrases]
    work = work or Work(len(columns))
    maps = torch.empty(len(columns), recording.pictures, height, width)
    for map, own in zip(maps, columns, strict=True):
        work.step()
        heat = recording.heat_maps(own, layers, frame, head).mean(1)
        map[:] = F.interpolate(heat[None], (height, width), mode="bicubic")[0].clamp_(min=0)
    return maps.nan_to_num_()  # a model that overflows in fp16 attends to nothing in particular


def shares(recording: AttentionRecording) -> dict[str, float]:
    """How much of all attention each word gets, a mean over layers, pixels and pictures; with what the start token, and the
    end and padding get, the shares sum to 1. Where that leaves something, it went to columns that another pack has put
    beside the prompt's or in their place, and is the share of OTHER."""
    require_recorded(recording)
    mass = recording.mass().mean(0)
    kinds = groups_of(recording.tokens)
    found = {name: mass[columns].sum().item() for name, columns in kinds.items()}
    words = mass.sum().item()
    return found | ({OTHER: 1 - words} if 0 < words < 1 - ROUNDING else {})


def told_of_others(recording: AttentionRecording) -> str:
    """A sentence on what went to columns that are none of the prompt's; empty where nothing did."""
    share = shares(recording).get(OTHER, 0.0)
    return (
        f"{percent(share)} of the attention went to what other packs put beside the prompt or in its place." if share else ""
    )


def groups_of(tokens: tuple[Token, ...]) -> dict[str, list[int]]:
    """Every column under its word, the start token or the end and padding."""
    groups: dict[str, list[int]] = {}
    for word, columns in words_of(tokens):
        groups.setdefault(word, []).extend(columns)
    groups["<start>"] = [i for i, token in enumerate(tokens) if token.kind == "start"]
    groups["<end and padding>"] = [i for i, token in enumerate(tokens) if token.kind in ("end", "padding")]
    return groups


def percent(share: float, signed: bool = False) -> str:
    """A share with as many digits as it takes to read it."""
    digits = 0 if share == 0 else min(max(1 - math.floor(math.log10(abs(100 * share))), 0), 5)
    return f"{100 * share:{'+' if signed and share else ''}.{digits}f} %"
