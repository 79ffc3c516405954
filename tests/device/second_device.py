"""A device without hardware: what it holds lies in the CPU's memory, and mixes with the CPU's no more than a GPU's does.

    if reason := register(): pytest.skip(reason)
    model.to(NAME)

What fails on a GPU fails here: an operation on tensors of both devices (of the CPU's only single numbers, and indices, are
taken), the CPU's random numbers, `numpy()`, and with `double=False` every tensor in float64, as on Apple's MPS and Intel's
small cards. What does not fail gives the CPU's own numbers. Each operation goes through Python: for small models, few steps.
It rests on torch's Python backends, which are experimental.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import return_and_correct_aliasing

NAME = "second"
MOVES = {"aten::copy_", "aten::_to_copy", "aten::_copy_from"}  # between devices
INDEXED = {"aten::index", "aten::_unsafe_index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
MAKERS = (  # all else that makes a tensor is made of these
    "empty.memory_format", "empty_strided", "arange", "arange.start", "arange.start_step", "linspace", "eye", "eye.m",
)  # fmt: skip
COMPOSED = torch._C.DispatchKey.CompositeImplicitAutograd
kept: list = []  # what torch forgets when nobody holds it


class AnyTensor(type(Tensor)):
    """On a GPU a tensor has no class of its own: nor has it here, to whoever compares classes."""

    def __eq__(cls, other):
        return other in (Tensor, torch.nn.Parameter) or cls is other

    __hash__ = type(Tensor).__hash__


class SecondTensor(Tensor, metaclass=AnyTensor):
    """A tensor of the device; `held` is the CPU's with its numbers."""

    __slots__ = ("held",)
    knows_double = True  # whether the device knows float64
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor, requires_grad: bool = False):
        if held.dtype == torch.float64 and not cls.knows_double:
            raise TypeError(f"Cannot convert a tensor to float64, which the device {NAME} does not support.")
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "layout": held.layout}
        of = {"dtype": held.dtype, "device": torch.device(NAME, 0), "requires_grad": requires_grad}
        tensor = Tensor._make_wrapper_subclass(cls, held.size(), **layout, **of)
        tensor.held = held
        return tensor

    def __repr__(self):
        return f"{self.held!r} on {NAME}"

    def __deepcopy__(self, memo):
        return memo.setdefault(id(self), type(self)(self.held.clone(), self.requires_grad))

    def as_subclass(self, cls):
        return self

    def data_ptr(self):
        return self.held.data_ptr()

    def untyped_storage(self):
        storage = super().untyped_storage()  # it is empty
        storage.held = self.held.untyped_storage()
        return storage

    def numpy(self, *args, **kwargs):
        raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    def tolist(self):
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, operation._schema.name
        if name == "aten::_has_compatible_shallow_copy_type":
            return all(isinstance(tensor, cls) for tensor in args)
        if operation.has_kernel_for_dispatch_key(COMPOSED):  # in inference mode these come whole
            return operation.decompose(*args, **kwargs)
        require_here(name, args, kwargs)
        told = dict(kwargs)
        device = told.get("device")
        if device is not None:
            told["device"] = torch.device("cpu")
        result = operation(*each(held, args), **each(held, told))
        if device is not None and torch.device(device).type == "cpu":
            return result
        views = any(returned.alias_info and not returned.alias_info.is_write for returned in operation._schema.returns)
        with torch.inference_mode(args[0].is_inference()) if views else nullcontext():  # as what they are views of
            result = each(lambda value: cls(value) if isinstance(value, Tensor) and not on_device(value) else value, result)
        return return_and_correct_aliasing(operation, args, kwargs, result)


def each(function, value):
    """The function of a value, or of each inside a tuple, a list and a dict."""
    if isinstance(value, dict):
        return {key: each(function, own) for key, own in value.items()}
    return type(value)(each(function, own) for own in value) if type(value) in (tuple, list) else function(value)


def held(value):
    """The CPU's tensor or storage behind one of the device; anything else as it is."""
    return value.held if isinstance(value, SecondTensor | torch.UntypedStorage) else value


def require_here(name: str, args: tuple, kwargs: dict) -> None:
    """Raises RuntimeError, as CUDA does, where an operation has what lies on the CPU beside what lies on the device."""
    values: list = []
    each(values.append, (args, kwargs))
    if any(isinstance(value, torch.Generator) for value in values):
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found 'cpu' ({name})")
    if name in MOVES:
        return
    taken = {id(index) for index in args[1] if index is not None} if name in INDEXED and on_device(args[0]) else set()
    others = [v for v in values if isinstance(v, Tensor) and not on_device(v) and v.dim() and id(v) not in taken]
    if others:
        shapes = ", ".join(str(tuple(other.shape)) for other in others)
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {NAME}:0 and cpu ({name}: {shapes})")


def on_device(value) -> bool:
    return isinstance(value, SecondTensor)


class Module:
    """What torch asks of `torch.second`."""

    def is_available(self):
        return True

    is_initialized = is_available

    def device_count(self):
        return 1

    def current_device(self):
        return 0

    def _is_in_bad_fork(self):
        return False

    def get_amp_supported_dtype(self):
        return [torch.float16, torch.bfloat16]

    def get_rng_state(self, device=None):
        return torch.get_rng_state()

    def nothing(self, *args, **kwargs):
        pass

    manual_seed = manual_seed_all = empty_cache = synchronize = set_device = set_rng_state = nothing


def register(double: bool = True) -> str:
    """Makes the device known to torch, with float64 or without; returns why not where it cannot be, or nothing."""
    SecondTensor.knows_double = double
    if kept:
        return ""
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        return f"torch {torch.__version__} has no backends in Python, which the device without hardware is: torch 2.13 has."
    module, library = Module(), torch.library.Library("aten", "IMPL")
    backend_registration._setup_privateuseone_for_python_backend(NAME, module)
    for maker in MAKERS:
        packet, _, overload = maker.partition(".")
        library.impl(maker, partial(make, getattr(getattr(torch.ops.aten, packet), overload or "default")), "PrivateUse1")
    library.impl("_copy_from", copy_from, "PrivateUse1")
    kept.extend((module, library))
    return ""


def make(operation, *args, device=None, pin_memory=None, **kwargs) -> Tensor:
    """A new tensor, on the device."""
    return SecondTensor(operation(*args, device=torch.device("cpu"), **kwargs))


def copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """What becomes of `copy_` between devices."""
    held(target).copy_(held(source))
    return target
