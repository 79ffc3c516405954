"""Cross-attention maps: reading them where the layers project, recording them while a sampler runs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .hosts.base import CrossAttention, Token


def attention_probabilities(q: Tensor, k: Tensor, heads: int) -> Tensor:
    """softmax(Q K^T / sqrt(d)) in fp32: q [B, N, heads * d], k [B, T, heads * d] -> [B, heads, N, T]."""
    q = rearrange(q.float(), "b n (h d) -> b h n d", h=heads)
    k = rearrange(k.float(), "b t (h d) -> b h t d", h=heads)
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)


@contextmanager
def tapped(layers: dict[str, CrossAttention]) -> Iterator[dict[str, Tensor]]:
    """Context whose dict holds, after a forward, each layer's map [B, heads, N, T], with its graph.

    Reads the outputs of to_q and to_k, adapters included, so it works with any attention backend and leaves the
    forward as it is.
    """
    maps: dict[str, Tensor] = {}
    queries: dict[str, Tensor] = {}

    def read_q(name):
        def hook(module, args, output):
            queries[name] = output

        return hook

    def read_k(name, heads):
        def hook(module, args, output):
            maps[name] = attention_probabilities(queries.pop(name), output, heads)

        return hook

    with ExitStack() as stack:
        for name, layer in layers.items():
            for hook, matrix in ((read_q(name), "to_q"), (read_k(name, layer.heads), "to_k")):
                stack.callback(layer.linear(matrix).register_forward_hook(hook).remove)
        yield maps


@contextmanager
def attention_set_to_zero(layers: dict[str, CrossAttention], columns: Tensor) -> Iterator[None]:
    """Context in which nothing attends to the columns [B, T].

    A value of zero takes a column's contribution away, as a probability of zero would, without rescaling the others.
    """
    keep = ~columns[:, :, None]

    def hook(module, args, output):
        return output * keep.to(output)

    with ExitStack() as stack:
        for layer in layers.values():
            stack.callback(layer.linear("to_v").register_forward_hook(hook).remove)
        yield


def layer_size(height: int, width: int, pixels: int) -> tuple[int, int]:
    """Height and width of a layer with this many pixels, in a UNet that halves the latent's, rounding up."""
    ratio = height / width
    while height * width > pixels:
        height, width = -(-height // 2), -(-width // 2)
    if height * width != pixels:  # another pack has shrunk it by some other factor: what fits the picture's shape best
        heights = (h for h in range(1, pixels + 1) if pixels % h == 0)
        height = min(heights, key=lambda h: abs(math.log(h * h / pixels / ratio)))
        width = pixels // height
    return height, width


def concept_mass(maps: dict[str, Tensor], columns: Tensor) -> Tensor:
    """Share of attention that goes to the columns [B, T], a mean over layers, heads, pixels and the batch: 0..1."""
    return torch.stack([(A * columns[:, None, None, :]).sum(-1).mean() for A in maps.values()]).mean()


@dataclass
class AttentionRecording:
    """What one prompt's words attended to while a picture was sampled: a running mean over steps, for each layer.

    `maps`: layer name -> [B, h, w, T], the mean over heads and steps. `tokens`: the prompt's T columns. `samplers`:
    who sampled with it in the job `job`, by the host's names.
    """

    text: str
    tokens: tuple[Token, ...]
    maps: dict[str, Tensor] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    job: str | None = None
    samplers: set[str | None] = field(default_factory=set)

    def begin(self, job: str | None, sampler: str | None) -> None:
        """Forgets what was recorded: a new sampling starts."""
        if job != self.job:
            self.job, self.samplers = job, set()
        self.samplers.add(sampler)
        self.maps.clear()
        self.steps.clear()

    def add(self, layer: str, probabilities: Tensor, height: int, width: int) -> None:
        """Takes in one forward of one layer: probabilities [B, heads, N, T] with N = height * width.

        A prompt that the host tiled to a common length comes back to its own: a column is the sum of its repeats.
        Where a layer is run for parts of the picture besides, the first size counts.
        """
        mean = probabilities.detach().mean(1)
        mean = rearrange(mean, "b (h w) (r t) -> b h w r t", h=height, t=len(self.tokens)).sum(-2)
        n = self.steps.get(layer, 0)
        if n and mean.shape != self.maps[layer].shape:
            return
        self.maps[layer] = mean if n == 0 else self.maps[layer].lerp(mean, 1 / (n + 1))
        self.steps[layer] = n + 1

    def heat_maps(self, columns: list[int], height: int, width: int) -> Tensor:
        """Those columns of DAAM's global heat map, [B, columns, height, width] on the CPU: layers up-sampled
        bicubically, clamped at zero, averaged (Tang et al., arXiv 2210.04885, section 3)."""
        total = 0
        for map in self.maps.values():
            heat = map[..., columns].permute(0, 3, 1, 2).float()
            total = total + F.interpolate(heat, (height, width), mode="bicubic").clamp(min=0)
        return (total / len(self.maps)).cpu()
