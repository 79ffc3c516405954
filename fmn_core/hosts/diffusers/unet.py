"""What the adapter uses of a UNet2DConditionModel; diffusers may not be there, so this is for annotations."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn


class UNetConfig(Protocol):
    """What is asked of the config of a UNet2DConditionModel."""

    sample_size: int | tuple[int, int] | None
    in_channels: int
    out_channels: int
    layers_per_block: int
    cross_attention_dim: int
    encoder_hid_dim_type: str | None
    addition_embed_type: str | None
    class_embed_type: str | None
    num_class_embeds: int | None


class UNet(nn.Module):
    """The model itself."""

    config: UNetConfig
    device: torch.device
    dtype: torch.dtype
