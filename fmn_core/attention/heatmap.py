"""Word heat maps (DAAM), and the share of attention that words get."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ForgetError
from ..host import Token
from ..log import Work
from ..plots.colormaps import percent
from ..text.tokens import distinct_words, find_phrase, phrases_of, words_of
from .recorder import AttentionRecording

OTHER = "<other>"  # columns of the context that are none of the prompt's
ATTENTION_ROUNDING = 1e-4  # of all attention


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
    *,
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
    return found | ({OTHER: 1 - words} if 0 < words < 1 - ATTENTION_ROUNDING else {})


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
