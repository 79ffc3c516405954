"""What tells one of ComfyUI's models, with all that is on it, from another."""

from __future__ import annotations

from torch import Tensor

from ...host import sampled
from .beside import LoRABeside
from .weights import raw_values

UNET_KEYS = "diffusion_model."


def identity(model, clip, vae) -> object:
    """The weights of a model, a text encoder and a VAE without what was merged into them, what patches are to be merged,
    the model's noise schedule, and what else is on it."""
    parts = [model, *([] if clip is None else [clip.patcher])]
    weights = [
        {
            key: sampled(raw_values(part.backup[key].weight) if key in part.backup else weight)
            for key, weight in own_weights(part).items()
        }
        for part in parts
    ]
    sampling = model.get_model_object("model_sampling")
    return [
        weights,
        [plain_values(part.patches) for part in parts],
        str(getattr(clip, "layer_idx", None)),
        [cls.__qualname__ for cls in type(sampling).__mro__],
        sampled(sampling.sigmas),
        plain_values(model.model_options),
        {} if vae is None else {key: sampled(weight) for key, weight in vae.first_stage_model.state_dict().items()},
    ]


def own_weights(patcher) -> dict[str, Tensor]:
    """A UNet's weights alone, without the noise schedule, which patches replace while they are on; a text encoder's all."""
    parts = (*patcher.model.named_parameters(), *patcher.model.named_buffers())  # GGUF's state_dict holds no values
    weights = {key: raw_values(weight) for key, weight in parts}
    unet = {key: weight for key, weight in weights.items() if key.startswith(UNET_KEYS)}
    return unet or weights


def plain_values(value: object) -> object:
    """What LoRAs and other packs put on a model, as tensors and plain values; functions by their names."""
    if isinstance(value, dict):
        return {str(key): plain_values(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(one) for one in value]
    if isinstance(value, Tensor):
        return sampled(value)
    if isinstance(value, str | int | float) or value is None:
        return value
    if isinstance(value, LoRABeside):
        return [type(value).__name__, plain_values(value.weights), value.strength]
    return [type(value).__name__, plain_values(getattr(value, "weights", getattr(value, "__qualname__", None)))]
