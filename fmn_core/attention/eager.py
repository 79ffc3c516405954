"""Compiled models: hooks that come after a compilation are seen only where it is set aside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..errors import ForgetError


def uncompiled(module):
    """The module that `torch.compile` has wrapped, or the module itself."""
    return getattr(module, "_orig_mod", module)


@contextmanager
def run_eagerly(*modules: nn.Module) -> Iterator[None]:
    """Context in which what torch has compiled runs as it is written: hooks that came later are seen in no other way.

    Raises ForgetError where a module is compiled and torch is too old for that (before 2.6).
    """
    if hasattr(torch.compiler, "set_stance"):
        with torch.compiler.set_stance("force_eager"):
            yield
        return
    parts = [part for module in modules for part in module.modules()]
    if any(uncompiled(part) is not part or getattr(part, "_compiled_call_impl", None) for part in parts):
        raise ForgetError("The model is compiled, which this torch cannot set aside: load it again, or update torch to 2.6.")
    yield
