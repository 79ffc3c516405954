"""Cross-attention maps: what the layers project, and what becomes of it."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from einops import rearrange
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..host import CrossAttention

RUNNING = threading.local()  # `call` stands for the call of a recomputed block that this thread is in


def attention_probabilities(q: Tensor, k: Tensor, heads: int) -> Tensor:
    """softmax(Q K^T / sqrt(d)) in fp32: q [B, N, heads * d], k [B, T, heads * d] -> [B, heads, N, T]."""
    q = rearrange(q.float(), "b n (h d) -> b h n d", h=heads)
    k = rearrange(k.float(), "b t (h d) -> b h t d", h=heads)
    return (q / q.shape[-1] ** 0.5 @ k.transpose(-1, -2)).softmax(-1)


def attention_columns(q: Tensor, k: Tensor, heads: int, columns: Tensor) -> Tensor:
    """The columns of these numbers [n] of attention_probabilities, the last one where there are fewer: [B, heads, N, n]."""
    return attention_probabilities(q, k, heads)[..., columns.clamp(max=k.shape[1] - 1)]


@contextmanager
def projections(layers: dict[str, CrossAttention], take: Callable[[str, Tensor, Tensor, Tensor], None]) -> Iterator[None]:
    """Context in which every forward calls `take(layer, q, k, context)`: q [B, N, heads * d], k [B, T, heads * d], and
    the context [B, T, D] that k comes from.

    Reads the outputs of to_q and to_k, adapters included, so it works with any attention backend and leaves the
    forward as it is.
    """
    queries: dict[str, Tensor] = {}

    def read_q(name):
        def hook(module, args, output):
            queries[name] = output

        return hook

    def read_k(name):
        def hook(module, args, output):
            if (q := queries.pop(name, None)) is not None:
                take(name, q, output, args[0])

        return hook

    with ExitStack() as stack:
        for name, layer in layers.items():
            for hook, matrix in ((read_q(name), "to_q"), (read_k(name), "to_k")):
                stack.callback(layer.linear(matrix).register_forward_hook(hook).remove)
        yield


class StopForward(Exception):
    """Every map is there, and nobody asked for more."""


@contextmanager
def capture_attention_maps(
    layers: dict[str, CrossAttention], columns: Tensor | None = None, stop: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Context whose dict holds, after a forward, each layer's map [B, heads, N, T], with its graph, or of it the `columns`
    with these numbers alone; with `stop` the forward ends, by AllTaken, where the last one is made.

    Of columns no whole map is held: the backward computes it again, by itself or with the block that it is in. The maps are
    of the first forward, and none is made in another. The backward has to come within the context.
    """
    maps: dict[str, Tensor] = {}
    calls: dict[str, object | None] = {}  # of the block that made it

    def take(name, q, k, context):
        heads, call = layers[name].heads, recomputed_call()
        if name in maps and (call is None or call is not calls[name]):
            return
        if columns is None:
            A = attention_probabilities(q, k, heads)
        elif torch.is_grad_enabled() and call is None and can_recompute(q):
            A = checkpoint(attention_columns, q, k, heads, columns, use_reentrant=False, preserve_rng_state=False)
        else:
            A = attention_columns(q, k, heads, columns)
        if name not in maps:
            maps[name], calls[name] = A, call
            if stop and len(maps) == len(layers):
                raise StopForward

    with projections(layers, take):
        yield maps


def used_tokens(token_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The token indices [n] that a mask [B, T] has for any row, and the mask of these [B, n]."""
    indices = token_mask.any(0).nonzero()[:, 0]
    return indices, token_mask[:, indices]


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


# A context is a prompt's if it is this near, relatively: hosts cast it to the model's dtype on the way.
SAME_PROMPT = 0.005


def is_prompt(context: Tensor, embedding: Tensor) -> bool:
    """Whether a context [R * T, D] is the embedding [T, D], or that tiled R times to a length common to the batch."""
    length, expected = len(context), len(embedding)
    if length % expected or context.shape[1] != embedding.shape[1]:
        return False
    tiles = context.float().reshape(-1, *embedding.shape)
    wanted = embedding.to(tiles)
    return bool(((tiles - wanted).norm(dim=(1, 2)) <= SAME_PROMPT * wanted.norm()).all())


# A column of the context is still the prompt's where another pack has changed less than half of it.
CHANGED = 0.5


def prompt_columns(context: Tensor, prompt: Tensor, count: int) -> Tensor:
    """Which columns of a context [B, L, D] are which of the `count` columns of a prompt [B, R * count, D] that another pack
    has made it from: [B, L, count], with a 1 where they are the same, and zeros for a column that is none of the prompt's.

    The prompt is sought wherever it fits in. Where the pack has changed its columns, as a hypernetwork does, they are still
    the prompt's as long as the change is less than half of their norm.
    """
    length, own = context.shape[1], prompt.shape[1]
    offsets = torch.arange(abs(length - own) + 1, device=context.device)[:, None]
    places = torch.arange(min(length, own), device=context.device)
    there, here = (places + offsets * (longer > 0) for longer in (length - own, own - length))
    change = torch.cdist(context.float(), prompt.float())[:, there, here]
    best = change.sum((0, 2)).argmin()
    kept = change[:, best] <= CHANGED * prompt.float().norm(dim=-1)[:, here[best]]
    names = torch.zeros(len(context), length, count, device=context.device)
    names[:, there[best], here[best] % count] = kept.float()
    return names


def can_recompute(x: Tensor) -> bool:
    """Whether torch's checkpointing knows the device, which it does not for DirectML's."""
    return hasattr(torch, x.device.type)


def recomputed_call() -> object | None:
    """What stands for the call of a recomputed block that runs now: the same object when it is computed again."""
    return getattr(RUNNING, "call", None)
