"""A patch at work on a host's model, by hooks: for measuring it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor

from .hosts.base import MATRICES, DiffusionHost
from .patch import ALPHA, DOWN, UP, Patch, check_fits, model_shapes


def patch_factors(host: DiffusionHost, patch: Patch) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """(layer, matrix) -> (up [out, r], down [r, in]) in fp32, as the file holds them."""
    found = {}
    for layer in host.cross_attentions():
        for matrix in MATRICES:
            name = host.lora_key(layer, matrix)
            if name + ALPHA in patch:
                found[layer, matrix] = patch[name + UP].float(), patch[name + DOWN].float()
    return found


@contextmanager
def applied(host: DiffusionHost, patch: Patch, strength: float = 1.0) -> Iterator[None]:
    """Context in which the host's cross-attention computes W x + strength up (down x), and its weights stay as they are.

    Raises ForgetError where the patch was made for another architecture.
    """
    check_fits(patch, model_shapes(host), host.model_name())

    def add(up: Tensor, down: Tensor):
        return lambda module, args, output: output + (args[0].to(down) @ down.T @ up.T * strength).to(output.dtype)

    layers = host.cross_attentions()
    with ExitStack() as stack:
        for (layer, matrix), factors in patch_factors(host, patch).items():
            up, down = (factor.to(host.device) for factor in factors)
            stack.callback(layers[layer].linear(matrix).register_forward_hook(add(up, down)).remove)
        yield
