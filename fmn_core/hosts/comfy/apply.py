"""Patches on ComfyUI's models: merged by the host where its weights are of full precision, else computed beside them."""

from __future__ import annotations

import comfy.patcher_extension
import comfy.sd

from ...patch.patch import Patch, check_fits, check_strength, model_shapes
from .beside import WRAPPER, LoRABeside, factors
from .model import ComfyHost
from .weights import is_quantized


def apply_patch(model, patch: Patch, strength: float):
    """A clone of MODEL with the patch at this strength; at 0 the model itself.

    Raises ForgetError where the patch was made for another architecture, and for a strength that is not a number.
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
