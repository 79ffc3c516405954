"""The most memory that tensors take while something runs, on any device or on none."""

from __future__ import annotations

import weakref

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, each storage once; `held` are there from the start."""

    def __init__(self, held=()):
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()
        for tensor in held:
            self.count(tensor.untyped_storage())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return out

    def count(self, storage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.seen:
            self.seen.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.free, key, size)

    def free(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


class Imagined(LiveTensors):
    """The same for tensors of shapes alone, inside a FakeTensorMode: what asks for a value is told 0, 1.0 or yes, and
    what asks which are not zero, that one is."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 0
        if func is torch.ops.aten.nonzero.default:
            return torch.zeros(1, args[0].ndim, dtype=torch.long)
        return super().__torch_dispatch__(func, types, args, kwargs)


def imagine() -> FakeTensorMode:
    """Context in which tensors have shapes and no memory."""
    return FakeTensorMode(allow_non_fake_inputs=True)
