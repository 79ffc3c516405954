"""What surrounds autograd on ComfyUI's own modules, which are left as they were."""

from __future__ import annotations

import comfy.ldm.modules.attention
import comfy.model_management
import torch

from ...errors import ForgetError


def as_host(function, *args, **kwargs):
    """What a function of the host returns that may load a model, and take another off the device to make room: in inference
    mode, as the host does both, since its quantised tensors change modes in neither direction."""
    with torch.inference_mode():
        return function(*args, **kwargs)


def require_loaded(patchers: list) -> None:
    """Raises ForgetError where the host has taken a model off its device, or what is merged into it, while it is used."""
    loaded = comfy.model_management.loaded_models()
    for patcher in patchers:
        if not any(patcher.is_clone(other) for other in loaded):
            raise ForgetError(
                f"{type(patcher.model).__name__} was unloaded while it was trained on, by another node pack or a request to "
                "free memory: queue again, and the training goes on where it was."
            )


def attention_with_backward(func, *args, **kwargs):
    """The host's PyTorch attention in place of backends that have no backward (sage, flash, int8)."""
    return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)
