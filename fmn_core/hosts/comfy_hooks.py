"""Patches that ride on ComfyUI's conditioning: each prompt has its own."""

from __future__ import annotations

import comfy.hooks

from ..gate import gate
from ..patch import Patch, check_strength

KEYFRAMES = 20  # of a strength that changes over the steps


def gated(conditioning, patch: Patch, strengths: tuple[float, float], span: tuple[float, float], threshold: float):
    """The conditioning, with the patch on every prompt in it that calls for its concept; each prompt's gate, and whether the
    patch is on it.

    `strengths` at the start and at the end of `span`, parts of the sampling in 0..1; outside it the patch is off. A prompt
    below the threshold stays as it is. Raises ForgetError as `gate` does, and for a strength that is no number.
    """
    for strength in strengths:
        check_strength(strength)
    values = [max(gate(patch, columns) for columns in one[0]) for one in conditioning]
    hooks = comfy.hooks.create_hook_lora(dict(patch), 1.0, 0.0)
    hooks.set_keyframes_on_hooks(keyframes(strengths, span))
    called = [value >= threshold and any(strengths) for value in values]
    hooked = comfy.hooks.set_hooks_for_conditioning(conditioning, hooks)
    return [new if on else old for new, old, on in zip(hooked, conditioning, called, strict=True)], values, called


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
