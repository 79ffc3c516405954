"""Forget-Me-Not: concept forgetting by attention re-steering (Zhang et al., arXiv 2303.17591), for any host.

The names below are the public API; each is imported when it is first asked for. See docs/python-api.md.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

PUBLIC = {
    "DiffusersHost": "hosts.diffusers.model",
    "EvaluationConfig": "evaluation.config",
    "ForgetError": "errors",
    "ImportConfig": "convert.config",
    "InversionConfig": "inversion.config",
    "Patch": "patch.patch",
    "RecordingConfig": "attention.recorder",
    "ViewConfig": "attention.visualize",
    "WeightedPatch": "patch.weighted",
    "applied": "patch.apply",
    "evaluate": "evaluation.evaluate",
    "forget": "erasure.forget",
    "import_patch": "convert.importer",
    "inspect_patch": "inspection.inspect",
    "invert_pictures": "inversion.textual_inversion",
    "load_pipeline": "hosts.diffusers.pipeline",
    "make_config": "erasure.config",
    "read_patch": "patch.file",
    "record_attention": "hosts.diffusers.attention",
    "save_embedding": "inversion.embedding",
    "save_patch": "patch.file",
    "stack": "patch.stack",
    "summary": "patch.summary",
    "unstack": "patch.stack",
    "visualize": "attention.visualize",
}
__all__ = ["__version__", *PUBLIC]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
