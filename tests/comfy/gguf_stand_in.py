"""A stand-in for the ComfyUI-GGUF pack, whose tensors and layers behave as that pack's do; import it after ComfyUI.

Tensors hold the file's bytes and tell the weight's shape, layers compute with what they stand for, and LoRAs that the host
loads ride on quantised tensors instead of being merged.
"""

from __future__ import annotations

import enum

import comfy.lora
import comfy.model_patcher
import comfy.ops
import comfy.utils
import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 32  # values that share a scale


class Kind(enum.IntEnum):
    """Some of ggml's types, by its own numbers."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q8_0 = 8
    BF16 = 30


COMPATIBLE = (None, Kind.F32, Kind.F16)


class GGMLTensor(Tensor):
    """Of a quantised weight its bytes, of another the weight; `shape` is the weight's, `size()` that of the bytes."""

    def __new__(cls, data, *, tensor_type, tensor_shape):
        return super().__new__(cls, data)

    def __init__(self, data, *, tensor_type, tensor_shape):
        super().__init__()
        self.tensor_type, self.tensor_shape, self.patches = tensor_type, torch.Size(tensor_shape), []

    def to(self, *args, **kwargs):
        moved = super().to(*args, **kwargs)
        moved.tensor_type = getattr(self, "tensor_type", None)
        moved.tensor_shape = getattr(self, "tensor_shape", moved.data.shape)
        moved.patches = [*getattr(self, "patches", [])]
        return moved

    def clone(self, *args, **kwargs):
        return self

    def detach(self, *args, **kwargs):
        return self

    @property
    def shape(self):
        if not hasattr(self, "tensor_shape"):
            self.tensor_shape = self.size()
        return self.tensor_shape


def quantize(weight: Tensor, kind: Kind) -> GGMLTensor:
    """A weight in a GGUF file's form; rows of Q4_0 and Q8_0 are whole blocks."""
    if kind == Kind.BF16:
        data = weight.bfloat16().view(torch.uint8)
    elif kind in COMPATIBLE:
        data = weight.to(torch.float16 if kind == Kind.F16 else torch.float32)
    else:
        blocks = weight.float().reshape(-1, BLOCK)
        largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
        scale = (largest.abs() / 127 if kind == Kind.Q8_0 else largest / -8).half()
        steps = blocks / torch.where(scale == 0, 1, scale.float())
        if kind == Kind.Q8_0:
            steps = steps.round().clamp(-127, 127).to(torch.int8).view(torch.uint8)
        else:
            low, high = (steps + 8.5).clamp(0, 15).to(torch.uint8).chunk(2, 1)
            steps = low | high << 4
        data = torch.cat([scale.view(torch.uint8), steps], 1).reshape(len(weight), -1)
    return GGMLTensor(data.contiguous(), tensor_type=kind, tensor_shape=weight.shape)


def dequantize_tensor(tensor: Tensor, dtype=None, dequant_dtype=None) -> Tensor:
    """What a tensor stands for; a block's values are computed in fp16, as the pack does."""
    kind = getattr(tensor, "tensor_type", None)
    if kind in COMPATIBLE:
        return tensor.to(dtype)
    data = tensor.data.as_subclass(Tensor)
    if kind == Kind.BF16:
        return data.view(torch.bfloat16).reshape(tensor.tensor_shape).to(dtype)
    steps = BLOCK if kind == Kind.Q8_0 else BLOCK // 2
    scale, steps = data.reshape(-1, 2 + steps).split([2, steps], 1)
    if kind == Kind.Q8_0:
        steps = steps.view(torch.int8)
    else:
        steps = torch.cat([steps & 15, steps >> 4], 1).to(torch.int8) - 8
    return (scale.view(torch.float16) * steps).reshape(tensor.tensor_shape).to(dtype)


def is_quantized(tensor: Tensor | None) -> bool:
    return getattr(tensor, "tensor_type", None) not in COMPATIBLE


class GGMLLayer(nn.Module):
    """A layer that dequantises its weight whenever it runs."""

    comfy_cast_weights = True

    def has_bytes(self) -> bool:
        return is_quantized(self.weight) or is_quantized(self.bias)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        own = {name: state_dict.get(prefix + name) for name in ("weight", "bias")}
        if not isinstance(self, nn.Linear) and not any(map(is_quantized, own.values())):
            return super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        for name, tensor in own.items():
            if tensor is not None:
                setattr(self, name, nn.Parameter(tensor, requires_grad=False))

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if not self.has_bytes():
            return super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self._parameters.items():
            if tensor is not None:
                destination[prefix + name] = torch.zeros_like(tensor, device="meta")

    def value(self, tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """What one of its tensors stands for, with the LoRAs that ride on it."""
        if tensor is None:
            return None
        value = dequantize_tensor(tensor, dtype)
        value = Tensor(value) if isinstance(value, GGMLTensor) else value
        for patches, key in getattr(tensor, "patches", []):
            value = comfy.lora.calculate_weight(patches, value, key)
        return value

    def forward_comfy_cast_weights(self, x, *args, **kwargs):
        if self.has_bytes():
            weight, bias = (
                self.value(None if one is None else one.to(x.device), x.dtype) for one in (self.weight, self.bias)
            )
            return self.compute(x, weight, bias)
        output = super().forward_comfy_cast_weights(x, *args, **kwargs)
        return Tensor(output) if isinstance(output, GGMLTensor) else output


class GGMLOps(comfy.ops.manual_cast):
    """The host's layers, with weights of a GGUF file."""

    class Linear(GGMLLayer, comfy.ops.manual_cast.Linear):
        def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
            nn.Module.__init__(self)
            self.in_features, self.out_features = in_features, out_features
            self.weight = self.bias = None

        def compute(self, x, weight, bias):
            return F.linear(x, weight, bias)

    class Conv2d(GGMLLayer, comfy.ops.manual_cast.Conv2d):
        def compute(self, x, weight, bias):
            return self._conv_forward(x, weight, bias)


class GGUFModelPatcher(comfy.model_patcher.ModelPatcher):
    """A patcher that puts LoRAs beside quantised weights, in whatever order the host loads the model."""

    def patch_weight_to_device(self, key, device_to=None, inplace_update=False, **kwargs):
        weight = comfy.utils.get_attr(self.model, key)
        if not is_quantized(weight):
            return super().patch_weight_to_device(key, device_to, inplace_update, **kwargs)
        if key in self.patches:
            weight = weight.to(device_to)
            weight.patches = [(self.patches[key], key)]
            comfy.utils.set_attr_param(self.model, key, weight)

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        for weight in self.model.parameters() if unpatch_weights else ():
            if is_quantized(weight):
                weight.patches = []
        return super().unpatch_model(device_to=device_to, unpatch_weights=unpatch_weights)

    def load(self, *args, force_patch_weights=False, **kwargs):
        return super().load(*args, force_patch_weights=True, **kwargs)

    def clone(self, *args, **kwargs):
        own, self.__class__ = self.__class__, GGUFModelPatcher
        clone = super().clone(*args, **kwargs)
        self.__class__ = own
        return clone
