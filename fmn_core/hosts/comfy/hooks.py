"""Patches that ride on ComfyUI's conditioning: each prompt has its own."""

from __future__ import annotations

import weakref

import comfy.hooks
import comfy.patcher_extension
from torch import Tensor, nn

from ...patch.gate import gate
from ...patch.patch import Patch, check_strength
from .beside import WRAPPER, LoRABeside, factors
from .weights import is_quantized

KEYFRAMES = 20  # of a strength that changes over the steps


def gated(conditioning, patch: Patch, strengths: tuple[float, float], span: tuple[float, float], threshold: float):
    """The conditioning, with the patch on every prompt in it that calls for its concept; each prompt's gate, and whether the
    patch is on it.

    `strengths` at the start and at the end of `span`, parts of the sampling in 0..1; outside it the patch is off. A prompt
    below the threshold stays as it is. Raises ForgetError as `gate` does, and for a strength that is not a number.
    """
    for strength in strengths:
        check_strength(strength)
    values = [max(gate(patch, columns) for columns in one[0]) for one in conditioning]
    hooks = comfy.hooks.HookGroup()
    hooks.add(MergedHook(patch))
    hooks.add(BesideHook(patch))
    hooks.set_keyframes_on_hooks(keyframes(strengths, span))
    acts = [value >= threshold and any(strengths) for value in values]
    hooked = comfy.hooks.set_hooks_for_conditioning(conditioning, hooks)
    return [new if on else old for new, old, on in zip(hooked, conditioning, acts, strict=True)], values, acts


def keyframes(strengths: tuple[float, float], span: tuple[float, float]) -> comfy.hooks.HookKeyframeGroup:
    """The host's schedule: off, from the first strength to the second, off."""
    (first, last), (start, end) = strengths, span
    group = comfy.hooks.HookKeyframeGroup()
    count = 1 if first == last else KEYFRAMES
    frames = [(0.0, 0.0)] if start > 0 else []
    for i in range(count):
        part = i / count
        frames.append((start + part * (end - start), first + (last - first) * (i / max(count - 1, 1))))
    if end < 1:
        frames.append((end, 0.0))
    for percent, strength in frames:
        group.add(comfy.hooks.HookKeyframe(strength, percent, guarantee_steps=0))
    return group


class MergedHook(comfy.hooks.WeightHook):
    """The patch on a model of full precision: the host merges it for each prompt that has the hook."""

    def __init__(self, patch: Patch | None = None):  # the host's `clone` makes one without arguments
        super().__init__(strength_model=1.0, strength_clip=0.0)
        self.weights = patch

    def should_register(self, model, model_options, target_dict, registered):
        return not model.is_clip and not is_quantized(model.model.diffusion_model)


class BesideHook(comfy.hooks.TransformerOptionsHook):
    """The patch on a quantised model: layers compute it beside their weights while a prompt that has the hook runs."""

    def __init__(self, patch: Patch | None = None):
        super().__init__({}, comfy.hooks.EnumHookScope.HookedOnly)
        self.patch = patch
        # Of each model, its layers' factors, or None.
        self.known: weakref.WeakKeyDictionary[nn.Module, dict[str, tuple[Tensor, Tensor]] | None]
        self.known = weakref.WeakKeyDictionary()

    def clone(self):
        clone = super().clone()
        clone.patch, clone.known = self.patch, self.known
        return clone

    def on_apply_hooks(self, model, transformer_options):
        if model.model not in self.known:
            assert self.patch is not None
            quantized = is_quantized(model.model.diffusion_model)
            self.known[model.model] = factors(model, self.patch) if quantized else None
        weights = self.known[model.model]
        if weights and self.strength:
            comfy.patcher_extension.add_wrapper(WRAPPER, LoRABeside(weights, self.strength), transformer_options)
