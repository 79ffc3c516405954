"""What tells one of ComfyUI's models, with all that is on it, from another."""

from __future__ import annotations

from torch import Tensor

from .base import sampled


def identity(patchers: list, clip) -> object:
    """The weights of model patchers as they are without what was merged into them, and what patches are to be merged."""
    weights = [
        {key: sampled(part.backup[key].weight if key in part.backup else w) for key, w in part.model.state_dict().items()}
        for part in patchers
    ]
    return [weights, [plain_patches(part.patches) for part in patchers], str(getattr(clip, "layer_idx", None))]


def plain_patches(value: object) -> object:
    """What LoRAs and their kind put on weights, as tensors and plain values; functions by their names."""
    if isinstance(value, dict):
        return {str(key): plain_patches(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain_patches(one) for one in value]
    if isinstance(value, Tensor):
        return sampled(value)
    if isinstance(value, str | int | float) or value is None:
        return value
    return [type(value).__name__, plain_patches(getattr(value, "weights", getattr(value, "__qualname__", None)))]
