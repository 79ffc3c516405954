"""Patches on ComfyUI's models: merged by the host where its weights are of full precision, else computed beside them.

A merge into a quantised weight rounds the whole matrix anew, which changes every prompt by more than the patch's own side
effects; computed beside the layer, W x + up (down x) is exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import comfy.lora
import comfy.patcher_extension
import comfy.sd
from torch import Tensor, nn

from ...patch.patch import DOWN, UP, Patch, check_fits, check_strength, model_shapes
from .model import ComfyHost
from .weights import is_quantized

WRAPPER = comfy.patcher_extension.WrappersMP.APPLY_MODEL


def apply_patch(model, patch: Patch, strength: float):
    """A clone of MODEL with the patch at this strength; at 0 the model itself.

    Raises ForgetError where the patch was made for another architecture, and for a strength that is no number.
    """
    check_strength(strength)
    host = ComfyHost(model, None)
    check_fits(patch, model_shapes(host), host.model_name())
    if strength == 0:
        return model
    if not is_quantized(host.unet):
        return comfy.sd.load_lora_for_models(model, None, dict(patch), strength, 0)[0]
    model = model.clone()
    comfy.patcher_extension.add_wrapper(WRAPPER, LoRABeside(factors(model, patch), strength), model.model_options, True)
    return model


def factors(model, patch: Patch) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer name -> (up [out, r], down [r, in]) in fp32 of a patch on a model patcher's model."""
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    return {
        keys[module].removesuffix(".weight"): (patch[module + UP].float(), patch[module + DOWN].float())
        for module in patch.modules
    }


class LoRABeside:
    """A wrapper of the host's `apply_model` in which layers compute W x + strength up (down x), their weights untouched.

    `weights`: layer name -> (up [out, r], down [r, in]).
    """

    def __init__(self, weights: dict[str, tuple[Tensor, Tensor]], strength: float):
        self.weights, self.strength = weights, strength

    def __deepcopy__(self, memo) -> LoRABeside:
        return self  # the host copies the options of a model with every clone; nothing changes this

    def __call__(self, executor, *args, **kwargs):
        with self.attached(executor.class_obj):
            return executor(*args, **kwargs)

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Context in which the layers of a model compute it."""
        with ExitStack() as stack:
            for name in self.weights:
                stack.callback(model.get_submodule(name).register_forward_hook(self.added(name)).remove)
            yield

    def added(self, name: str):
        """The forward hook of one layer, which leaves its factors on the layer's device for the next time."""

        def add(module, args, output):
            x = args[0]
            up, down = self.weights[name] = tuple(factor.to(x.device) for factor in self.weights[name])
            return output + self.strength * (x.float() @ down.T @ up.T).to(output.dtype)

        return add
