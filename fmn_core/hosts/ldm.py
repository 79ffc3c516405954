"""What UNets with the ldm's names for their blocks have in common: those of ComfyUI, of the webui and of Forge."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..host import CrossAttention, Token, linear_name
from ..lora.keys import one_name

PLACES = {"input_blocks": "down", "middle_block": "mid", "output_blocks": "up"}
NATIVE_SIZE = {"sd1": 512, "sd2": 512, "sd2_v": 768, "sdxl": 1024}
# What a training step holds beyond one forward of the host's own estimate: the activations that backward needs.
TRAINING_MEMORY_FACTOR = 4


def cross_attentions(unet: nn.Module) -> dict[str, CrossAttention]:
    """Layer name -> cross-attention layer of a UNet with the ldm's block names; empty for other architectures."""
    return {
        name: CrossAttention(name, module, module.heads, PLACES[name.split(".")[0]])
        for name, module in unet.named_modules()
        if name.endswith("attn2") and name.split(".")[0] in PLACES
    }


def other_layers(unet: nn.Module) -> dict[str, nn.Module]:
    """Name -> every Linear and convolution of the UNet's blocks outside the cross-attention; Forge's are no nn.Linear."""
    return {
        name: module
        for name, module in unet.named_modules()
        if getattr(getattr(module, "weight", None), "ndim", 0) in (2, 4)
        and name.split(".")[0] in PLACES
        and name != "input_blocks.0.0"  # the UNet's first convolution, no block
        and ".attn2." not in name
    }


def kohya_name(name: str, family: str, per_level: int) -> str:
    """A layer's name in a LoRA file: the ldm's own for SDXL, diffusers' for the others, as sd-scripts writes them.

    `per_level` is what `lora.keys.blocks_per_level` finds in the UNet.
    """
    return "lora_unet_" + (name.replace(".", "_") if family == "sdxl" else one_name(name, per_level))


def weight_key(layer: str, matrix: str) -> str:
    """The name of a projection's weight in ComfyUI and in Forge."""
    return f"diffusion_model.{layer}.{linear_name(matrix)}.weight"


def learned_token(vector: Tensor, kind: str) -> Token:
    """The column of one vector of an embedding: its id is below zero, and the same for the same vector."""
    digest = hashlib.sha256(vector.detach().float().cpu().numpy().tobytes()).digest()
    return Token(-1 - int.from_bytes(digest[:6], "big"), "embedding", kind)


def block_of(layer: str) -> tuple[str, int, int]:
    """`input_blocks.4.1.transformer_blocks.0.attn2` -> ("input", 4, 0), as ComfyUI and Forge name it to patches."""
    parts = layer.split(".")
    number = 0 if parts[0] == "middle_block" else int(parts[1])
    return parts[0].split("_")[0], number, int(parts[-2])


@contextmanager
def ordinary_parameters(module: nn.Module) -> Iterator[None]:
    """Context in which a module's parameters and buffers are ordinary frozen tensors on the very same memory.

    A model loaded while a graph runs has inference tensors, which autograd refuses to save. A second tensor on the
    same storage is an ordinary one, costs nothing, and is never written to; the originals come back on leaving, but for
    those in whose place, or at whose place in memory, the host has put others: it has unloaded the model meanwhile.
    """
    originals: list[tuple[dict, str, Tensor, Tensor]] = []
    try:
        for part in module.modules():
            tables: tuple[dict, dict] = (part._parameters, part._buffers)
            for table in tables:
                for name, tensor in table.items():
                    if tensor is not None and not hasattr(tensor, "_qdata"):  # quantised tensors of the host have no memory
                        alias = alias_of(tensor)
                        originals.append((table, name, tensor, alias))
                        table[name] = alias
        yield
    finally:
        for table, name, tensor, alias in originals:
            if table.get(name) is alias and (alias.device, alias.data_ptr()) == (tensor.device, tensor.data_ptr()):
                table[name] = tensor


def alias_of(tensor: Tensor) -> Tensor:
    """A second tensor of the same class and attributes on the same memory."""
    own = tensor.as_subclass(Tensor)  # a class of its own, as GGUF's, may tell another shape
    alias = torch.empty(0, dtype=own.dtype, device=own.device)
    alias.set_(own.untyped_storage(), own.storage_offset(), own.shape, own.stride())
    if type(tensor) is nn.Parameter:
        return nn.Parameter(alias, requires_grad=False)
    if type(tensor) is Tensor:
        return alias
    alias = alias.as_subclass(type(tensor))
    alias.__dict__.update(tensor.__dict__)
    return alias


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Context in which no parameter of a module asks for a gradient, and what would hide others' gradients is off."""
    flags: list[tuple[nn.Module | nn.Parameter, str, bool]]
    flags = [(p, "requires_grad", p.requires_grad) for p in module.parameters()]
    # The ldm's own gradient checkpointing knows the layer's parameters and no adapter's: these would get no gradient.
    switches = ("checkpoint", "use_checkpoint")
    flags += [(m, name, m.__dict__[name]) for m in module.modules() for name in switches if m.__dict__.get(name) is True]
    try:
        for owner, name, _ in flags:
            setattr(owner, name, False)
        yield
    finally:
        for owner, name, value in flags:
            setattr(owner, name, value)


@contextmanager
def norms_of_copies(module: nn.Module) -> Iterator[None]:
    """Context in which layer norms see a copy of their input: the host adds to it in place, and autograd needs it as it
    was."""
    with ExitStack() as stack:
        for part in module.modules():
            if isinstance(part, nn.LayerNorm):
                hook = part.register_forward_pre_hook(lambda norm, args: (args[0].clone(), *args[1:]))
                stack.callback(hook.remove)
        yield


@contextmanager
def differentiable_attention(unet: nn.Module) -> Iterator[None]:
    """Context in which every attention layer computes PyTorch's own attention: the host's may have no backward.

    It is put on the layers themselves, so that other models of their class keep the host's.
    """
    layers = [m for m in unet.modules() if {"to_q", "to_k", "to_v", "to_out"} <= m._modules.keys()]
    own = [(layer, layer.__dict__.get("forward")) for layer in layers]
    try:
        for layer in layers:
            layer.forward = partial(attention_forward, layer)
        yield
    finally:
        for layer, forward in own:
            layer.__dict__.pop("forward", None)
            if forward is not None:
                layer.forward = forward


def attention_forward(layer, x: Tensor, context: Tensor | None = None, value: Tensor | None = None, **options) -> Tensor:
    """What an attention layer computes of x [B, N, C] and a context [B, T, D], its own `x` where there is none."""
    context = x if context is None else context
    q, k, v = layer.to_q(x), layer.to_k(context), layer.to_v(context if value is None else value)
    q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=layer.heads) for t in (q, k, v))
    return layer.to_out(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))
