"""LoRA adapters (Hu et al., 2021) on the projections of cross-attention layers and, if asked, on the rest of a UNet."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..host import CrossAttention, DiffusionHost, weight_of


class LoRA(nn.Module):
    """Delta of a Linear, up @ down, or of a convolution, up after down; alpha = rank, so the scale is 1; fp32, zero at the
    start.

    Down is Kaiming-uniform with a = sqrt(5), i.e. uniform within 1 / sqrt(in), up is zero (kohya networks/lora.py).
    """

    def __init__(self, module: nn.Module, rank: int, generator: torch.Generator):
        super().__init__()
        out_features, *inner = weight_of(module).shape
        ones = [1] * (len(inner) - 1)  # a convolution's up is one of 1 x 1
        how = ("stride", "padding", "dilation") if ones else ()
        self.convolution = {name: getattr(getattr(module, "base_layer", module), name) for name in how}
        self.down = nn.Parameter((torch.rand(rank, *inner, generator=generator) * 2 - 1) * math.prod(inner) ** -0.5)
        self.up = nn.Parameter(torch.zeros(out_features, rank, *ones))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out] or [B, in, h, w] -> [B, out, h', w'], in x's dtype."""
        if self.convolution:
            return F.conv2d(F.conv2d(x.float(), self.down, **self.convolution), self.up).to(x.dtype)
        return (x.float() @ self.down.T @ self.up.T).to(x.dtype)


class LoRAs(nn.ModuleDict):
    """One LoRA for each module, by name, attached by forward hooks, so that any host's Linear and convolution will do."""

    def __init__(self, patched: dict[str, nn.Module], rank: int, generator: torch.Generator):
        super().__init__({self._key(name): LoRA(module, rank, generator) for name, module in patched.items()})
        self.patched = patched

    @staticmethod
    def _key(name: str) -> str:
        return name.replace(".", "/")  # a module's name may hold no dot

    def lora(self, name: str) -> LoRA:
        """The LoRA of the module of this name."""
        lora = self[self._key(name)]
        assert isinstance(lora, LoRA)
        return lora

    @contextmanager
    def attached(self, strength: float = 1.0) -> Iterator[None]:
        """Context in which the modules compute W x + strength * up (down x)."""

        def add(lora):
            return lambda module, args, output: output + strength * lora(args[0]).to(output.dtype)

        with ExitStack() as stack:
            for name, module in self.patched.items():
                stack.callback(module.register_forward_hook(add(self.lora(name))).remove)
            yield


class CrossAttentionLoRA(LoRAs):
    """One LoRA for each chosen projection of each layer."""

    def __init__(self, layers: dict[str, CrossAttention], matrices: tuple[str, ...], rank: int, generator: torch.Generator):
        self.targets = [(layer, matrix) for layer in layers for matrix in matrices]
        super().__init__({".".join(one): layers[one[0]].linear(one[1]) for one in self.targets}, rank, generator)

    def adapter(self, layer: str, matrix: str) -> LoRA:
        """The LoRA of one projection."""
        return self.lora(f"{layer}.{matrix}")

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
