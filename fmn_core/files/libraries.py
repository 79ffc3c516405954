"""Classes of libraries that may not be there, or may not fit one another."""

from __future__ import annotations

import importlib

from ..errors import ForgetError, brief


def take_from(library: str, *names: str) -> list:
    """Classes of a library, of which nothing is known before; raises ForgetError, with the cause that lies deepest, where
    importing them fails."""
    try:
        module = importlib.import_module(library)
        return [getattr(module, name) for name in names]
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        cause: BaseException = error
        while below := cause.__cause__ or cause.__context__:
            cause = below
        raise ForgetError(
            f"{library} cannot be imported ({brief(cause)}): install torch, torchvision, transformers and diffusers in "
            "versions that fit one another."
        ) from error
