"""ComfyUI's CLIP and CLIP_VISION as one scorer of pictures against texts."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import ForgetError
from .training import as_host


def clip_scorer(clip, clip_vision) -> Callable[[Tensor, list[str]], Tensor]:
    """A function of pictures [B, H, W, 3] in 0..1 and texts that returns cosines [B, T] in the space CLIP shares.

    Raises ForgetError where the two encoders have no space in common: SD1's checkpoints come without the text
    encoder's projection.
    """
    model = clip.cond_stage_model
    encoder = getattr(model, "clip_g", None) or getattr(model, model.clip)  # SDXL pools with its second
    texts = encoder.transformer.text_model.embeddings.token_embedding.weight.shape[1]
    pictures = getattr(getattr(clip_vision.model, "visual_projection", None), "out_features", None)
    if not encoder.return_projected_pooled or texts != pictures:
        lacking = "" if encoder.return_projected_pooled else ", without its projection"
        raise ForgetError(
            f"This CLIP gives texts of width {texts}{lacking}, and the CLIP Vision model pictures of width {pictures}: they "
            "share no space in which to compare. Take `clip_vision` off; ViT-H belongs to SD2.x and ViT-bigG to SDXL, and "
            "SD1.x has none."
        )

    def score(images: Tensor, prompts: list[str]) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            image_embeds = as_host(clip_vision.encode_image, images)["image_embeds"].float().cpu()
            pooled = [as_host(clip.encode_from_tokens, clip.tokenize(text), return_pooled=True)[1] for text in prompts]
            text_embeds = torch.cat(pooled).float().cpu()
            return F.normalize(image_embeds, dim=-1) @ F.normalize(text_embeds, dim=-1).T

    return score
