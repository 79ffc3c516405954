"""The losses of Forget-Me-Not (Zhang et al., arXiv 2303.17591)."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce

import torch
from torch import Tensor

LEAST = 1e-20  # under a root, whose gradient at zero is infinite
MOST_WEIGHT = 20.0  # of a noise error, where there is most noise


def attention_resteering_loss(maps: Iterable[Tensor], token_mask: Tensor, regions: Iterable[Tensor] | None = None) -> Tensor:
    """Attention re-steering loss: the squared norm of what attends to the concept (Algorithm 1).

    sum over layers, heads, pixels and concept tokens of A^2, as a mean over the batch. `maps`: one [B, heads, N, T]
    of probabilities a layer; `token_mask`: boolean [B, T]; `regions`: one [B, N] in 0..1 a layer, which weights pixels.
    """
    squares = [A.square() * token_mask[:, None, None, :] for A in maps]
    if regions is not None:
        squares = [square * M[:, None, :, None] for square, M in zip(squares, regions, strict=True)]
    return reduce(torch.add, (square.sum() for square in squares)) / len(token_mask)


def joint_norm_loss(maps: Iterable[Tensor], token_mask: Tensor, regions: Iterable[Tensor] | None = None) -> Tensor:
    """Attention re-steering as the released code has it (SHI-Labs/Forget-Me-Not, train_attn.py): one norm, not squared, of
    what attends to the concept in all layers, heads and pixels of the batch. Arguments as for attention_resteering_loss."""
    squares = attention_resteering_loss(maps, token_mask, regions) * len(token_mask)
    return squares.clamp(min=LEAST).sqrt()


def mean_attention_loss(maps: Iterable[Tensor], token_mask: Tensor, regions: Iterable[Tensor] | None = None) -> Tensor:
    """Attention re-steering on one scale for every model: A^2 of the concept's tokens, summed over tokens, as a mean
    over heads, pixels, layers and the batch. Arguments as for attention_resteering_loss."""
    squares = [(A.square() * token_mask[:, None, None, :]).sum(-1) for A in maps]
    if regions is not None:
        squares = [square * M[:, None, :] for square, M in zip(squares, regions, strict=True)]
    return reduce(torch.add, (square.mean() for square in squares)) / len(squares)


def predicted_x0(x_t: Tensor, epsilon: Tensor, alpha_bar: Tensor) -> Tensor:
    """The clean latent that a noise estimate implies: (x_t - sqrt(1 - a) epsilon) / sqrt(a), a = alpha_bar [B]
    (Ho et al., 2020, eq. 15)."""
    a = alpha_bar[:, None, None, None]
    return (x_t - (1 - a).sqrt() * epsilon) / a.sqrt()


def noise_weight(alpha_bar: Tensor) -> Tensor:
    """What turns squared errors of noise into those of x0, min((1 - a) / a, MOST_WEIGHT): alpha_bar [B] -> [B, 1, 1, 1]
    (after min-SNR, Hang et al., arXiv 2303.09556)."""
    a = alpha_bar[:, None, None, None]
    return ((1 - a) / a).clamp(max=MOST_WEIGHT)


def visual_denoising_loss(x_t: Tensor, epsilon: Tensor, alpha_bar: Tensor, x0_without: Tensor) -> Tensor:
    """Visual denoising loss: MSE between the predicted x0 and the counterpart made without attention to the concept.

    x_t noises a latent made with the concept; `x0_without` [B, C, h, w] came from the same noise with the attention
    to the concept set to zero (the CVPRW 2024 version of the paper).
    """
    return (predicted_x0(x_t, epsilon, alpha_bar) - x0_without).square().mean()
