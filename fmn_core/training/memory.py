"""A device's memory: what a training takes of it, holding less where it is short, and saying so where it runs out."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ..host import DiffusionHost, Prompts
from ..log import logger, quoted
from .gradient import blocks_of, recomputable, recomputed

T = TypeVar("T")
RECOMPUTED = "recomputed"
SHORT = re.compile(r"out of memory|can't allocate memory|not enough memory", re.IGNORECASE)
REMEDY = (
    "There is not enough memory on the device: lower `batch_size` or `resolution`, or close what else uses it, and queue "
    "again."
)
FORWARDS = {"full": 2.0, RECOMPUTED: 2.6, "skip_connections": 1.2}  # that a forward with its backward takes as long as


@contextmanager
def out_of_memory_told() -> Iterator[None]:
    """Context in which running out of memory stays the same exception, by which hosts know that they have to free some, and
    says what the user can do; another inside it changes nothing."""
    try:
        yield
    except RuntimeError as error:
        if not ran_out(error) or REMEDY in str(error):
            raise
        kind = type(error) if isinstance(error, torch.cuda.OutOfMemoryError) else RuntimeError
        raise kind(f"{error} {REMEDY}") from error


def ran_out(error: RuntimeError) -> bool:
    """Whether a device has run out of memory; CPUs, MPS and others have no exception of their own for that."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or bool(SHORT.search(str(error)))


@dataclass(frozen=True)
class MemoryEstimate:
    """Of one forward of one picture: its seconds, and the bytes that a backward would hold of it, by `backprop`."""

    seconds: float
    held: dict[str, float]


@torch.no_grad()
def estimate_memory(host: DiffusionHost, x_t: Tensor, t: Tensor, prompts: Prompts) -> MemoryEstimate:
    """Runs x_t [1, C, h, w] through the UNet and adds up what its layers put out, since that is what a backward needs."""
    unet, layers = host.unet, host.cross_attentions()
    out: dict[str, int] = {}
    into: dict[str, int] = {}

    def size(value: object) -> int:
        return value.numel() * value.element_size() if isinstance(value, Tensor) else 0

    def put_out(name):
        return lambda module, args, output: out.update({name: out.get(name, 0) + size(output)})

    def taken_in(name):
        return lambda module, args: into.update({name: size(args[0])})

    with ExitStack() as stack:
        for name, module in unet.named_modules():
            if not module._modules:
                stack.callback(module.register_forward_hook(put_out(name)).remove)
        for name, block in recomputable(unet).items():
            stack.callback(block.register_forward_pre_hook(taken_in(name)).remove)
        start = time.perf_counter()
        host.predict(x_t, t, prompts).sum().item()  # waits for a GPU
        seconds = time.perf_counter() - start

    def of(prefix: str) -> int:
        return sum(value for name, value in out.items() if name.startswith(f"{prefix}."))

    inner = {name: of(name) for name in blocks_of(unet)}
    outside = sum(out.values()) - sum(inner.values())
    once = sum(value for name, value in inner.items() if name not in into)  # of blocks that are not computed again
    held: dict[str, float] = {
        "full": sum(out.values()),
        RECOMPUTED: outside + sum(into.values()) + once + max(inner.values()),
        "skip_connections": outside + sum(map(of, layers)) + max(inner.values()),
    }
    return MemoryEstimate(seconds, held)


class AdaptiveCheckpointing:
    """Takes training steps as they are until memory runs out; from then on, or from the start where little is free, each
    holds less by computing more (gradient checkpointing)."""

    def __init__(self, host: DiffusionHost, on: bool = False):
        self.host, self.on = host, on

    @classmethod
    def of(
        cls, host: DiffusionHost, estimate: MemoryEstimate, rows: int, forwards: float, backprop: str = "full"
    ) -> AdaptiveCheckpointing:
        """For a training on `rows` pictures at once, which takes the time of so many of the rehearsed forwards and their
        backwards; tells the log how much memory and time that is, about."""
        free = host.free_memory()
        on = host.recomputes and backprop == "full" and rows * estimate.held[backprop] > free
        way = RECOMPUTED if on else backprop
        info: dict[str, object] = {"held_gb": rows * estimate.held[way] / 2**30, "free_gb": free / 2**30}
        info |= {"estimated_seconds": forwards * estimate.seconds * FORWARDS[way], "backprop": way}
        logger.info("forget.estimate%s", "".join(f" {key}={quoted(value)}" for key, value in info.items()))
        return cls(host, on)

    def take(self, step: Callable[[], T], generator: torch.Generator) -> T:
        """What `step`, a forward with its backward, returns; taken again with the same random numbers where memory has run
        out in it."""
        before = generator.get_state()
        try:
            with recomputed(self.host.unet) if self.on else nullcontext():
                return step()
        except RuntimeError as error:
            if self.on or not self.host.recomputes or not ran_out(error):
                raise
            logger.warning("forget.memory %s", quoted(f"{error} Continuing with gradient checkpointing."))
        self.on = True  # the exception is gone, and with it the graph that its frames held
        generator.set_state(before)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return self.take(step, generator)
