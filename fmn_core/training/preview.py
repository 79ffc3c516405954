"""What a training shows of itself while it runs."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..attention.capture import layer_size
from ..plots.colormaps import overlay


@torch.no_grad()
def preview(maps: dict[str, Tensor], token_mask: Tensor, pictures: Tensor | None, indices: list[int], x_t: Tensor) -> Tensor:
    """Where the first of a batch of pictures attends to the concept, a mask [B, n] of the maps' tokens: a heat map over the
    picture, [H, W, 3] in 0..1."""
    latent_height, latent_width = x_t.shape[-2:]
    height, width = latent_height * 8, latent_width * 8
    heat = torch.zeros(1, 1, height, width)
    masses: dict[int, Tensor] = {}  # by their pixels, since large layers are many
    for A in maps.values():
        mass = (A[0] * token_mask[0]).sum(-1).mean(0)
        masses[len(mass)] = masses.get(len(mass), 0) + mass
    for pixels, mass in masses.items():
        h, w = layer_size(latent_height, latent_width, pixels)
        heat += F.interpolate(mass.reshape(1, 1, h, w).cpu(), (height, width), mode="bilinear") / len(maps)
    if pictures is None:
        picture = torch.zeros(height, width, 3)
    else:
        picture = F.interpolate(pictures[indices[0]].permute(2, 0, 1)[None].cpu(), (height, width))
        picture = rearrange(picture, "1 c h w -> h w c")
    return overlay(picture, heat[0, 0], opacity=0.6)


def linear_decoder(latents: Tensor, pictures: Tensor) -> Callable[[Tensor], Tensor]:
    """latents [1, C, h, w] -> a picture [8 h, 8 w, 3]: the linear map that best explains these pictures by these
    latents. For previews: the VAE would take as long as a training step."""
    height, width = latents.shape[-2:]
    small = F.interpolate(pictures[..., :3].movedim(-1, 1).float().cpu(), (height, width), mode="area")

    def with_constant(x: Tensor) -> Tensor:
        flat = rearrange(x.float().cpu(), "p c h w -> (p h w) c")  # a GPU solves no system of deficient rank
        return torch.cat([flat, torch.ones_like(flat[:, :1])], 1)

    with torch.no_grad():
        colours = torch.linalg.lstsq(with_constant(latents), rearrange(small, "p c h w -> (p h w) c")).solution

    @torch.no_grad()
    def decode(x0: Tensor) -> Tensor:
        small = rearrange(with_constant(x0) @ colours, "(h w) c -> 1 c h w", h=height)
        return rearrange(F.interpolate(small, scale_factor=8, mode="bilinear"), "1 c h w -> h w c").clamp(0, 1)

    return decode
