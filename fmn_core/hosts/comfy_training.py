"""Autograd on ComfyUI's own modules, which are left as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import comfy.ldm.modules.attention
import comfy.model_management
import torch
from torch import Tensor, nn

from ..errors import ForgetError


def require_loaded(patchers: list) -> None:
    """Raises ForgetError where the host has taken a model off its device, or what is merged into it, while it is used."""
    loaded = comfy.model_management.loaded_models()
    for patcher in patchers:
        if not any(patcher.is_clone(other) for other in loaded):
            raise ForgetError(
                f"{type(patcher.model).__name__} was unloaded while it was trained on, by another node pack or a request to "
                "free memory: queue again, and the training goes on where it was."
            )


def differentiable_attention(func, *args, **kwargs):
    """The host's PyTorch attention in place of backends that have no backward (sage, flash, int8)."""
    return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)


@contextmanager
def ordinary_parameters(module: nn.Module) -> Iterator[None]:
    """Context in which a module's parameters and buffers are ordinary frozen tensors on the very same memory.

    A model loaded while a graph runs has inference tensors, which autograd refuses to save. A second tensor on the
    same storage is an ordinary one, costs nothing, and is never written to; the originals come back on leaving, but for
    those in whose place, or at whose place in memory, the host has put others: it has unloaded the model meanwhile.
    """
    originals = []
    try:
        for part in module.modules():
            for table in (part._parameters, part._buffers):
                for name, tensor in table.items():
                    if type(tensor) in (nn.Parameter, Tensor):
                        alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
                        alias.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
                        alias = nn.Parameter(alias, requires_grad=False) if type(tensor) is nn.Parameter else alias
                        originals.append((table, name, tensor, alias))
                        table[name] = alias
        yield
    finally:
        for table, name, tensor, alias in originals:
            if table.get(name) is alias and (alias.device, alias.data_ptr()) == (tensor.device, tensor.data_ptr()):
                table[name] = tensor
