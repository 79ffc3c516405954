"""A patch at work on a host's model, by hooks: for measuring it."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch import Tensor

from ..host import MATRICES, DiffusionHost
from ..lora.layers import CrossAttentionLoRA
from .patch import ALPHA, DOWN, UP, Patch, check_fits, check_strength, model_shapes


def patch_factors(host: DiffusionHost, patch: Patch) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """(layer, matrix) -> (up [out, r], down [r, in]) in fp32, as the file holds them."""
    found = {}
    for layer in host.cross_attentions():
        for matrix in MATRICES:
            name = host.lora_key(layer, matrix)
            if name + ALPHA in patch:
                found[layer, matrix] = patch[name + UP].float(), patch[name + DOWN].float()
    return found


def applied(host: DiffusionHost, patch: Patch, strength: float = 1.0) -> AbstractContextManager[None]:
    """Context in which the host's cross-attention computes W x + strength up (down x), and its weights stay as they are.

    Raises ForgetError where the patch was made for another architecture, and for a strength that is not a number.
    """
    check_strength(strength)
    check_fits(patch, model_shapes(host), host.model_name())
    return CrossAttentionLoRA.of(host, patch_factors(host, patch)).requires_grad_(False).attached(strength)
