"""Each architecture in the real ComfyUI, with random weights: in full, or narrow."""

from __future__ import annotations

import torch

BLOCKS = {"num_res_blocks": [2] * 4, "channel_mult": [1, 2, 4, 4], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
          "transformer_depth_output": [1] * 9 + [0] * 3, "transformer_depth_middle": 1}  # fmt: skip
BLOCKS_XL = {"num_res_blocks": [2] * 3, "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10],
             "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "transformer_depth_middle": 10}  # fmt: skip
CONTEXT = {"sd1": 768, "sd2": 1024, "sd2_v": 1024, "sdxl": 2048}
NARROW = 32  # channels; the real ones have 320
POOLED = 1280  # what SDXL's second text encoder gives beside its columns


def make_model(
    family: str,
    channels: int = 320,
    context: int | None = None,
    pooled: int = POOLED,
    *,
    depth: int = 10,
    dtype=torch.float32,
):
    """MODEL of sd1, sd2, sd2_v or sdxl, in the host's own classes and on its blocks and layers, for the host's device.

    With fewer channels than the real ones have, attention heads have 16 each. `depth`: transformer blocks in a row, at most.
    """
    import comfy.model_base
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    sdxl = family == "sdxl"
    kind = {"sd1": comfy.supported_models.SD15, "sdxl": comfy.supported_models.SDXL}.get(family, comfy.supported_models.SD20)
    config = kind(
        {
            **kind.unet_config, **{name: at_most(depth, value) for name, value in (BLOCKS_XL if sdxl else BLOCKS).items()},
            "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": channels, "legacy": False,
            "context_dim": context or CONTEXT[family], "use_spatial_transformer": True, "dtype": dtype,
            "use_linear_in_transformer": family != "sd1", "num_classes": "sequential" if sdxl else None,
            "adm_in_channels": pooled + 6 * 256 if sdxl else None,
        }
    )  # fmt: skip
    if channels < 320:
        config.unet_config |= {"num_head_channels": 16, "num_heads": -1}
    elif sdxl:
        config.unet_config |= {"num_head_channels": 64, "num_heads": -1}
    predicts = comfy.model_base.ModelType.V_PREDICTION if family == "sd2_v" else comfy.model_base.ModelType.EPS
    model = (comfy.model_base.SDXL if sdxl else comfy.model_base.BaseModel)(config, model_type=predicts)
    randomize(model.diffusion_model)
    devices = {"load_device": comfy.model_management.get_torch_device(), "offload_device": torch.device("cpu")}
    return comfy.model_patcher.ModelPatcher(model.eval(), **devices)


def narrow_clip(family: str):
    """ComfyUI's own CLIP of a family, in small widths."""
    import comfy.sd
    import comfy.sd1_clip
    import comfy.sdxl_clip
    import comfy.supported_models_base
    import comfy.text_encoders.sd2_clip

    parts = {
        "sd1": (comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel),
        "sdxl": (comfy.sdxl_clip.SDXLTokenizer, comfy.sdxl_clip.SDXLClipModel),
    }.get(family, (comfy.text_encoders.sd2_clip.SD2Tokenizer, comfy.text_encoders.sd2_clip.SD2ClipModel))
    sizes = {"num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    widths = {f"clip_{name}_model_config": {"hidden_size": 48, **sizes} for name in ("l", "g", "h")}
    clip = comfy.sd.CLIP(comfy.supported_models_base.ClipTarget(*parts), model_options=widths)
    randomize(clip.cond_stage_model)
    return clip


def at_most(depth: int, blocks: int | list[int]) -> int | list[int]:
    """Numbers of blocks, none of them above `depth`."""
    return [min(depth, each) for each in blocks] if isinstance(blocks, list) else min(depth, blocks)


def narrow_model(family: str, depth: int = 10):
    """MODEL and CLIP that go together, both narrow, and with few transformer blocks in a row where `depth` says so."""
    clip = narrow_clip(family)
    context, pooled = clip.encode_from_tokens(clip.tokenize("a"), return_pooled=True)
    return make_model(family, NARROW, context.shape[-1], pooled.shape[-1], depth=depth), clip


def randomize(module: torch.nn.Module) -> None:
    """Weights of a size that lets signals through."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(generator=generator).div_(parameter[0].numel() ** 0.5)
        else:
            parameter.data.normal_(generator=generator).mul_(0.1).add_(1)
