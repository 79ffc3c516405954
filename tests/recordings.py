"""Recordings of random attention, for tests of what is made of one."""

from __future__ import annotations

import torch

from fmn_core.attention.recorder import AttentionRecording, RecordingConfig
from fmn_core.host import Token

LAYER = "input_blocks.{}.1.transformer_blocks.0.attn2"


def tokens(*pieces):
    words = (Token(5, piece, "word") for piece in pieces)
    return (Token(0, "<start>", "start"), *words, Token(1, "<end>", "end"), Token(1, "<end>", "padding"))


def recorded(*pieces, granularity="mean", pictures=1, steps=2, seed=0):
    """A recording of two layers with two heads, of random queries and keys."""
    recording = AttentionRecording(
        " ".join(pieces), tokens(*(f"{piece}</w>" for piece in pieces)), RecordingConfig(granularity=granularity)
    )
    generator = torch.Generator().manual_seed(seed)
    columns = len(recording.tokens)
    recording.begin()
    for step in range(steps):
        for number, side in ((1, 4), (2, 2)):
            q, k = (torch.randn(pictures, n, 6, generator=generator) for n in (side * side, columns))
            recording.add(LAYER.format(number), q, k, 2, (side, side), step=step)
    recording.end()
    return recording
