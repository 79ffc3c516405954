"""Patches that ComfyUI's layers compute beside their weights, which stay as they are.

A merge into a quantised weight rounds the whole matrix again, which changes every prompt by more than the patch's own side
effects; computed beside the layer, W x + up (down x) is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import comfy.lora
import comfy.patcher_extension
import torch
from torch import Tensor, nn

from ...patch.patch import DOWN, UP, Patch

WRAPPER = comfy.patcher_extension.WrappersMP.APPLY_MODEL


def factors(model, patch: Patch) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer name -> (up [out, r], down [r, in]) in fp32 of a patch on a model patcher's model; none is an inference tensor,
    since a model is trained with what is on it."""
    keys = comfy.lora.model_lora_keys_unet(model.model, {})

    def factor(name: str) -> Tensor:
        return patch[name].to(torch.float32, copy=True)

    with torch.inference_mode(False):
        return {keys[m].removesuffix(".weight"): (factor(m + UP), factor(m + DOWN)) for m in patch.modules}


class LoRABeside:
    """A wrapper of the host's `apply_model` in which layers compute W x + strength up (down x), their weights untouched.

    `weights`: layer name -> (up [out, r], down [r, in]).
    """

    def __init__(self, weights: dict[str, tuple[Tensor, Tensor]], strength: float):
        self.weights, self.strength = weights, strength
        self.on = False  # whether the layers compute it now
        self.known: dict[str, tuple[Callable, Callable]] = {}  # by layer: what it computes without and with it

    def __deepcopy__(self, memo) -> LoRABeside:
        return self  # the host copies the options of a model with every clone; it is the same on all

    def __call__(self, executor, *args, **kwargs):
        with self.attached(executor.class_obj):
            return executor(*args, **kwargs)

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Context in which the layers of a model compute it; another inside it changes nothing.

        Their `forward` is another meanwhile: hooks are passed over where a model was compiled before they came.
        """
        with ExitStack() as stack:
            if not self.on:
                for name in self.weights:
                    stack.enter_context(self.in_place(model.get_submodule(name), name))
                self.on = True
                stack.callback(setattr, self, "on", False)
            yield

    @contextmanager
    def in_place(self, layer: nn.Module, name: str) -> Iterator[None]:
        """Context in which one layer computes it."""
        own = layer.__dict__.get("forward")
        layer.forward = self.added_to(layer.forward, name)
        try:
            yield
        finally:
            layer.__dict__.pop("forward")
            if own is not None:
                layer.forward = own

    def added_to(self, forward: Callable, name: str) -> Callable:
        """What one layer computes in the place of `forward`: the same function each time, which a model is compiled for, and
        which leaves its factors on the layer's device for the next time."""

        def added(x: Tensor, *args, **kwargs) -> Tensor:
            output = forward(x, *args, **kwargs)
            with torch.inference_mode(False):
                up, down = self.weights[name]
                up, down = self.weights[name] = up.to(x.device), down.to(x.device)
            return output + self.strength * (x.float() @ down.T @ up.T).to(output.dtype)

        if self.known.get(name, (None,))[0] != forward:
            self.known[name] = forward, added
        return self.known[name][1]


@contextmanager
def attached_throughout(model) -> Iterator[None]:
    """Context in which the layers of a model patcher's model compute what is beside them also where the host does not run
    it, and before any hook that comes later: for what reads their outputs, and for blocks that a backward runs again."""
    with ExitStack() as stack:
        for wrapper in comfy.patcher_extension.get_all_wrappers(WRAPPER, model.model_options, True):
            if isinstance(wrapper, LoRABeside):
                stack.enter_context(wrapper.attached(model.model))
        yield
