"""The weights of ComfyUI's layers, in whatever form the host keeps them: fp8 with and without scales, GGUF, and others."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType

import comfy.ops
import comfy.utils
import torch
from comfy.model_patcher import get_key_weight
from torch import Tensor, nn

from ...errors import ForgetError, brief
from ...host import weight_of

FULL_PRECISION = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
CHECKED_INPUTS = 4  # inputs that a weight is checked with
INPUT_ROUNDING = 0.3  # of the output, at most, by which layers that round their inputs to 4 bits differ from their weight
READABLE_KINDS = "load the checkpoint in fp16, bf16, fp8 or GGUF"


def is_full_precision(weight: Tensor) -> bool:
    """Whether a tensor holds its weights' own values, neither quantised nor scaled."""
    return type(weight) in (nn.Parameter, Tensor) and weight.dtype in FULL_PRECISION


def is_quantized(module: nn.Module) -> bool:
    """Whether any weight of a module is quantised or scaled."""
    return not all(map(is_full_precision, module.parameters()))


def raw_values(weight: Tensor) -> Tensor:
    """The numbers that a weight is kept as, in a plain tensor: enough to tell one model from another."""
    return weight._qdata if hasattr(weight, "_qdata") else weight.detach().as_subclass(Tensor)


def stored_weight(patcher, key: str) -> Tensor:
    """A weight as the host keeps it, without the LoRAs that are merged into it."""
    backup = patcher.backup.get(key)
    return comfy.utils.get_attr(patcher.model, key) if backup is None else backup.weight


def read_weight(patcher, key: str) -> Tensor:
    """A weight [out, in] without the LoRAs that are on it: as it is, or of a quantised layer in fp32 on the CPU.

    Raises ForgetError where the host's form of it cannot be read.
    """
    weight = stored_weight(patcher, key)
    if is_full_precision(weight):
        return weight
    try:
        with torch.inference_mode(False), torch.no_grad():
            return dequantized(weight, get_key_weight(patcher.model, key)[2])
    except Exception as error:  # every pack that quantises has errors of its own
        raise unreadable_weight(patcher.model, key, brief(error)) from error


def dequantized(weight: Tensor, convert) -> Tensor:
    """A quantised weight in fp32 on the CPU; `convert` is the layer's own function that applies its scale, or None."""
    if hasattr(weight, "tensor_type"):  # GGUF: the module that made the tensor has the function beside it
        dequantize_tensor = sys.modules[type(weight).__module__].dequantize_tensor
        return Tensor(dequantize_tensor(weight.to("cpu"), torch.float32)).float().clone()
    if hasattr(weight, "_qdata"):  # the host's QuantizedTensor
        if hasattr(weight, "_layout_params") and hasattr(weight, "_layout_type"):
            # ComfyUI 0.3.75 has no dtype there before the layer is first used.
            params = {**weight._layout_params, "orig_dtype": torch.float32}
            weight = type(weight)(weight._qdata, weight._layout_type, params)
        return weight.dequantize().detach().float().cpu()
    weight = weight.detach().to("cpu", torch.float32, copy=True)
    return weight if convert is None else convert(weight, inplace=True)


def require_readable(patcher, keys: Iterable[str]) -> None:
    """Raises ForgetError unless `read_weight` gives what the layers of these weights really compute with.

    Of each form in which they are quantised one layer is tried, without LoRAs on it where there is such a one.
    """
    forms: dict[tuple[type, str], dict[bool, str]] = {}
    for key in keys:
        layer = comfy.utils.get_attr(patcher.model, key.rpartition(".")[0])
        if not isinstance(getattr(layer, "weight", None), Tensor):  # nunchaku's layers hold parts of it, under other names
            raise unreadable_weight(patcher.model, key, "the layer has no such weight")
        stored = stored_weight(patcher, key)
        if not is_full_precision(stored):
            patched = key in patcher.backup or getattr(stored, "patches", None) or getattr(layer, "weight_function", None)
            forms.setdefault((type(layer), form_of(stored)), {}).setdefault(bool(patched), key)
    for found in forms.values():
        if False in found:
            require_equal(patcher, found[False])
        else:
            read_weight(patcher, found[True])


def require_equal(patcher, key: str) -> None:
    """Raises ForgetError unless a layer without LoRAs computes with the weight that is read, on random inputs."""
    weight, layer = read_weight(patcher, key), comfy.utils.get_attr(patcher.model, key.rpartition(".")[0])
    if weight.ndim != 2:
        raise unreadable_weight(patcher.model, key, f"it has the shape {[*weight.shape]}")
    x = torch.randn(CHECKED_INPUTS, weight.shape[1], generator=torch.Generator().manual_seed(0))
    settle_dtypes(patcher.model)
    try:
        with torch.inference_mode():  # as the host runs it: ComfyUI 0.3.75's quantised layers compute in no other
            inputs = torch.cat([x, torch.zeros_like(x[:1])]).to(layer.weight.device, compute_dtype(patcher.model))
            *outputs, bias = layer(inputs).float().cpu()
    except Exception as error:
        raise unreadable_weight(patcher.model, key, brief(error)) from error
    expected = x @ weight.T
    if not (torch.stack(outputs) - bias - expected).norm() <= INPUT_ROUNDING * expected.norm():
        raise unreadable_weight(patcher.model, key, "what is read differs from what the layer computes")


def compute_dtype(model) -> torch.dtype:
    """What the model computes in; where it multiplies in fp8, what goes between the layers is taken for fp32."""
    dtype = model.manual_cast_dtype or model.get_dtype()
    return dtype if dtype in FULL_PRECISION else torch.float32


def settle_dtypes(model) -> None:
    """Tells quantised weights what dtype the model computes in, as its first run does: in ComfyUI 0.3.75 they take it in
    inference mode alone, and autograd has to find it."""
    dtype = compute_dtype(model)
    with torch.inference_mode():
        for weight in model.diffusion_model.parameters():
            if getattr(weight, "_layout_params", {}).get("orig_dtype", dtype) is None:
                weight.to(dtype)


@contextmanager
def differentiable_products(unet: nn.Module) -> Iterator[None]:
    """Context in which quantised layers multiply in the dtype that the model computes in.

    Where a GPU multiplies in fp8 the host's layers do, and such a product has no gradient.
    """
    layers = [*unet.modules()]
    whole = "_full_precision_mm"  # of those that the host made mixed
    mixed = [layer for layer in layers if getattr(layer, whole, None) is False]
    changed = "forward_comfy_cast_weights"  # by the context outside, where this stands in one
    scaled = [one for one in layers if one._parameters.get("scale_weight") is not None and changed not in vars(one)]
    with ExitStack() as stack:
        for layer in mixed:
            setattr(layer, whole, True)
            stack.callback(setattr, layer, whole, False)
        if scaled and hasattr(comfy.ops, "scaled_fp8_ops"):  # newer hosts keep such checkpoints as mixed
            product = comfy.ops.scaled_fp8_ops(fp8_matrix_mult=False).Linear.forward_comfy_cast_weights
            for layer in scaled:
                setattr(layer, changed, MethodType(product, layer))
                stack.callback(delattr, layer, changed)
        yield


def require_differentiable(unet: nn.Module) -> None:
    """Raises ForgetError where a form in which layers are quantised passes no gradient on, or a wrong one.

    Of each form one layer is tried: with g the gradient of its summed output, g x is what x adds to that sum. For inside a
    host's `training`.
    """
    layers = [module for module in unet.modules() if getattr(module._parameters.get("weight"), "ndim", 0) == 2]
    weights = [(layer, weight_of(layer)) for layer in layers]
    quantized = {form_of(weight): (layer, weight) for layer, weight in weights if not is_full_precision(weight)}
    for form, (layer, weight) in quantized.items():
        reason = (
            f"This form of quantisation ({form}) has no gradient to train with: use the preset `fast`, or {READABLE_KINDS}."
        )
        x = torch.randn(1, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.device)
        at = torch.zeros_like(x, requires_grad=True)
        try:
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(layer(at).sum(), at)
            with torch.no_grad():
                added = (layer(x) - layer(at)).sum()
        except RuntimeError as error:
            raise ForgetError(f"{reason} ({brief(error)})") from error
        size = gradient.norm() * x.norm()
        if not ((gradient * x).sum() - added).abs() <= INPUT_ROUNDING * size:
            raise ForgetError(reason)


def form_of(weight: Tensor) -> str:
    """What a weight is kept as, for people."""
    kinds = (getattr(weight, name, None) for name in ("_layout_cls", "_layout_type", "tensor_type"))
    kind = next(filter(None, kinds), weight.dtype)
    return str(getattr(kind, "__name__", None) or getattr(kind, "name", kind))


def unreadable_weight(model, key: str, reason: str) -> ForgetError:
    """What to raise where a weight cannot be read."""
    layer = comfy.utils.get_attr(model, key.rpartition(".")[0])
    weight = getattr(layer, "weight", None)
    form = form_of(weight) if isinstance(weight, Tensor) else type(layer).__name__
    return ForgetError(
        f"The weights of this {type(model.model_config).__name__} are kept in a form that cannot be read "
        f"({form}, {key}: {reason}): {READABLE_KINDS}."
    )
