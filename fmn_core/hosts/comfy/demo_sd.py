"""The demo model in ComfyUI: SD1's architecture in smaller widths."""

from __future__ import annotations

import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base

from ...errors import ForgetError

TEXT_MODEL = {
    "hidden_act": "quick_gelu",
    "hidden_size": 112,
    "intermediate_size": 448,
    "max_position_embeddings": 77,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 49408,
    "eos_token_id": 49407,
    "layer_norm_eps": 1e-5,
}
TENSORS = {"UNet": 404, "text encoder": 36, "autoencoder": 136}


def require_whole(part: str, weights: dict, tensors: dict[str, int]) -> dict:
    """The weights of one part of a demo model, as they are; raises ForgetError where there are fewer than `tensors` says or
    some are not finite.

    Of a part that is not there at all the host says so itself.
    """
    if not weights:
        return weights
    broken = sum(not weight.float().isfinite().all() for weight in weights.values())
    if len(weights) < tensors[part] or broken:  # a quantised copy has more: its scales
        raise ForgetError(
            f"The checkpoint is a demo model, but its {part} is damaged: {len(weights)} tensors where there should be "
            f"{tensors[part]}, {broken} of them with values that are not finite. Restore the files in demo/checkpoints from "
            "the repository; emoji-flux-128.safetensors is made again by `python install.py demo`."
        )
    return weights


class EmojiTextModel(comfy.sd1_clip.SDClipModel):
    """SD1's text encoder at the demo model's widths."""

    def __init__(self, device="cpu", dtype=None, model_options={}):  # noqa: B006 (the host's own signature)
        super().__init__(
            device=device,
            dtype=dtype,
            textmodel_json_config=dict(TEXT_MODEL),
            return_projected_pooled=False,
            model_options=model_options,
        )


class EmojiClipModel(comfy.sd1_clip.SD1ClipModel):
    def __init__(self, device="cpu", dtype=None, model_options={}):  # noqa: B006
        super().__init__(device=device, dtype=dtype, model_options=model_options, clip_model=EmojiTextModel)


class EmojiSD(comfy.supported_models.SD15):
    """The demo model: SD1's architecture in smaller widths."""

    unet_config = {**comfy.supported_models.SD15.unet_config, "context_dim": 112, "model_channels": 64}
    unet_extra_config = {**comfy.supported_models.SD15.unet_extra_config, "num_heads": 4}
    native_size = 128

    def process_unet_state_dict(self, state_dict):
        return require_whole("UNet", super().process_unet_state_dict(state_dict), TENSORS)

    def process_clip_state_dict(self, state_dict):
        return require_whole("text encoder", super().process_clip_state_dict(state_dict), TENSORS)

    def process_vae_state_dict(self, state_dict):
        return require_whole("autoencoder", super().process_vae_state_dict(state_dict), TENSORS)

    def clip_target(self, state_dict={}):  # noqa: B006
        return comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, EmojiClipModel)
