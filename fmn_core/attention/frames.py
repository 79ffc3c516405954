"""Sums of attention maps over some steps, and maps of other sizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


@dataclass(frozen=True)
class Box:
    """A part of a picture that a layer runs for, in the layer's pixels: the picture's size, and the part's corner."""

    height: int
    width: int
    top: int = 0
    left: int = 0


@dataclass(frozen=True)
class Origin:
    """A sampling, by the host's names: the job, the node that samples, and a digest of all that leads to that node."""

    job: str
    sampler: str
    digest: str | None


@dataclass
class Frame:
    """Some steps' sums: layer -> probabilities [B, H, h, w, T], and how many forwards saw each pixel [h, w]."""

    first: int
    last: int
    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)

    def join(self, other: Frame) -> None:
        """Takes in a later frame."""
        self.last = other.last
        for mine, its in ((self.sums, other.sums), (self.counts, other.counts)):
            for layer, values in its.items():
                mine[layer] = mine[layer].add_(values) if layer in mine else values

    def tensors(self) -> Iterator[tuple[dict[str, Tensor], str]]:
        """Where each of the tensors is."""
        for table in (self.sums, self.counts):
            for layer in table:
                yield table, layer


def halve(maps: Tensor, side: int) -> Tensor:
    """Means over squares of `side` pixels: [B, H, h, w, T] -> [B, H, h / side, w / side, T], rounded up."""
    if side == 1:
        return maps
    flat = rearrange(maps, "b k h w t -> b (k t) h w")
    pooled = F.avg_pool2d(flat, side, ceil_mode=True, count_include_pad=False)
    return rearrange(pooled, "b (k t) h w -> b k h w t", k=maps.shape[1])


def resized(maps: Tensor, height: int, width: int) -> Tensor:
    """Maps [B, H, h, w, T] brought to another size; their columns still sum to 1."""
    flat = rearrange(maps, "b k h w t -> b (k t) h w")
    shrinks = height * width < flat.shape[2] * flat.shape[3]
    flat = F.interpolate(flat, (height, width), mode="area" if shrinks else "bilinear")
    return rearrange(flat, "b (k t) h w -> b k h w t", k=maps.shape[1])
