"""A CLIP model of transformers, from a local folder, as a scorer of pictures against texts."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ForgetError
from ..files.libraries import take_from

# As transformers' CLIPImageProcessor, which needs torchvision.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's own


def load_clip(folder: str) -> Callable[[Tensor, list[str]], Tensor]:
    """A function of pictures [B, H, W, 3] in 0..1 and texts that returns cosines [B, T]; raises ForgetError where the
    folder holds no CLIP model."""
    clip, clip_tokenizer = take_from("transformers", "CLIPModel", "CLIPTokenizer")
    try:
        model = clip.from_pretrained(folder, local_files_only=True, use_safetensors=True).float()
        tokenizer = clip_tokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ForgetError(
            f"There is no CLIP model in {folder}: name a folder with a transformers CLIPModel as safetensors, and its "
            "tokenizer."
        ) from error
    side = model.config.vision_config.image_size
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))

    @torch.no_grad()
    def score(pictures: Tensor, texts: list[str]) -> Tensor:
        height, width = pictures.shape[1:3]
        size = [round(length * side / min(height, width)) for length in (height, width)]
        pixels = F.interpolate(pictures.movedim(-1, 1), size, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = ((length - side) // 2 for length in size)
        pixels = (pixels[..., top : top + side, left : left + side] - mean) / std
        tokens = tokenizer(list(texts), padding="max_length", truncation=True, max_length=77, return_tensors="pt")
        out = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=pixels)
        return out.logits_per_image / model.logit_scale.exp()

    return score
