"""What a training step differentiates through, and what it computes twice in order to hold less."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..attention.capture import RUNNING, can_recompute, recomputed_call

# What residual blocks, self-attention and feed-forward layers add to what they pass on, in the ldm's names and diffusers'.
BRANCH = re.compile(r"\.(attn1|ff|out_layers\.3|conv2)$")
BLOCK_PARTS = ({"attn1", "attn2", "ff"}, {"in_layers", "out_layers"}, {"conv1", "conv2", "norm1"})  # parts that tell a block


@contextmanager
def gradient_path(unet: nn.Module, backprop: str) -> Iterator[None]:
    """Context in which a UNet is differentiated through all of it (`full`), or through its `skip_connections` alone:
    what blocks pass on, and the cross-attention, but not what convolutions, self-attention and feed-forward layers add.

    Estimates and attention stay as they are. The gradient is no longer the loss's own, and costs a fifth of the forward.
    """
    with ExitStack() as stack:
        for name, module in unet.named_modules() if backprop == "skip_connections" else ():
            if BRANCH.search(name):
                stack.callback(module.register_forward_hook(detach).remove)
        yield


def detach(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    """A forward hook: the same without its graph."""
    return output.detach()


def blocks_of(unet: nn.Module) -> dict[str, nn.Module]:
    """Name -> residual block or transformer block of a UNet."""
    return {name: m for name, m in unet.named_modules() if any(parts <= m._modules.keys() for parts in BLOCK_PARTS)}


def recomputable(unet: nn.Module) -> dict[str, nn.Module]:
    """Name -> each block but the last transformer block, in which a forward may end."""
    blocks = blocks_of(unet)
    attending = [name for name, block in blocks.items() if "attn2" in block._modules]
    upwards = [name for name in attending if name.startswith(("up_blocks.", "output_blocks."))]  # diffusers lists mid later
    return {name: block for name, block in blocks.items() if name not in (upwards or attending)[-1:]}


@contextmanager
def recomputed(unet: nn.Module) -> Iterator[None]:
    """Context in which the backward computes each block again and the forward holds no more than its input (gradient
    checkpointing, Chen et al., arXiv 1604.06174). The gradient is the same, but for the order of its sums.

    What is hooked onto the blocks has to stay there until the backward is done.
    """
    blocks = [*recomputable(unet).values()]
    own = [(block, block.__dict__.get("forward")) for block in blocks]
    try:
        for block in blocks:
            block.forward = partial(recompute, block.forward)
        yield
    finally:
        for block, forward in own:
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.forward = forward


def recompute(forward, x: Tensor, *args, **kwargs) -> Tensor:
    """A block's output, its forward to be computed again in the backward: on a copy, since hosts add to `x` in place, with
    the options of this call, since hosts change them from block to block, and with the random numbers that other packs'
    patches drew in it."""
    if not can_recompute(x):
        return forward(x, *args, **kwargs)
    values = [dict(value) if isinstance(value, dict) else value for value in args]
    options = {name: dict(value) if isinstance(value, dict) else value for name, value in kwargs.items()}

    call = object()

    def run(x: Tensor) -> Tensor:
        outer, RUNNING.call = recomputed_call(), call
        try:
            return forward(x.clone(), *values, **options)
        finally:
            RUNNING.call = outer

    return checkpoint(run, x, use_reentrant=False)
