"""LoRA adapters (Hu et al., 2021) on the projections of cross-attention layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .hosts.base import CrossAttention, DiffusionHost


class LoRA(nn.Module):
    """Delta of a Linear: up @ down, alpha = rank, so the scale is 1; fp32, zero at the start.

    Down is Kaiming-uniform with a = sqrt(5), i.e. uniform within 1 / sqrt(in), up is zero (kohya networks/lora.py).
    """

    def __init__(self, in_features: int, out_features: int, rank: int, generator: torch.Generator):
        super().__init__()
        bound = in_features**-0.5
        self.down = nn.Parameter((torch.rand(rank, in_features, generator=generator) * 2 - 1) * bound)
        self.up = nn.Parameter(torch.zeros(out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in x's dtype."""
        return (x.float() @ self.down.T @ self.up.T).to(x.dtype)


class CrossAttentionLoRA(nn.ModuleDict):
    """One LoRA for each chosen projection of each layer, attached by forward hooks, so any host's Linear will do."""

    def __init__(self, layers: dict[str, CrossAttention], matrices: tuple[str, ...], rank: int, generator: torch.Generator):
        super().__init__()
        self.layers = layers
        self.targets = [(layer, matrix) for layer in layers for matrix in matrices]
        for layer, matrix in self.targets:
            out_features, in_features = layers[layer].linear(matrix).weight.shape
            self[self._key(layer, matrix)] = LoRA(in_features, out_features, rank, generator)

    @staticmethod
    def _key(layer: str, matrix: str) -> str:
        return f"{layer}.{matrix}".replace(".", "/")  # a module's name may hold no dot

    def adapter(self, layer: str, matrix: str) -> LoRA:
        """The LoRA of one projection."""
        return self[self._key(layer, matrix)]

    @classmethod
    def of(cls, host: DiffusionHost, factors: dict[tuple[str, str], tuple[Tensor, Tensor]]) -> CrossAttentionLoRA:
        """The adapters that these factors, (layer, matrix) -> (up [out, r], down [r, in]), are of, on the host's device."""
        matrices = tuple(dict.fromkeys(matrix for _, matrix in factors))
        rank = len(next(iter(factors.values()))[1])
        lora = cls(host.cross_attentions(), matrices, rank, torch.Generator())
        with torch.no_grad():
            for target, (up, down) in factors.items():
                lora.adapter(*target).up.copy_(up)
                lora.adapter(*target).down.copy_(down)
        return lora.to(host.device)

    def factors(self) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
        """(layer, matrix) -> (up [out, r], down [r, in])."""
        return {target: (self.adapter(*target).up, self.adapter(*target).down) for target in self.targets}

    @contextmanager
    def attached(self, strength: float = 1.0) -> Iterator[None]:
        """Context in which the layers compute W x + strength * up (down x)."""

        def add(lora):
            return lambda module, args, output: output + strength * lora(args[0]).to(output.dtype)

        with ExitStack() as stack:
            for layer, matrix in self.targets:
                hook = add(self.adapter(layer, matrix))
                stack.callback(self.layers[layer].linear(matrix).register_forward_hook(hook).remove)
            yield


def balanced(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The same product up @ down with its singular values' roots on both sides: fp16 keeps it best.

    up [out, r], down [r, in]. Exact: QR of both factors, then the SVD of an r x r matrix. Where r is larger than
    the matrix allows, zeros keep it r, since a patch has one rank throughout.
    """
    rank = len(down)
    q_up, r_up = torch.linalg.qr(up.double())
    q_down, r_down = torch.linalg.qr(down.double().T)
    u, s, vh = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    up, down = (q_up @ u) * s.sqrt(), s.sqrt()[:, None] * (vh @ q_down.T)
    return F.pad(up, (0, rank - len(s))).float(), F.pad(down, (0, 0, 0, rank - len(s))).float()
