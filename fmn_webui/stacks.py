"""Several patches for a generation as one file, solved jointly."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from modules import shared

from fmn_core.erasure.forget import summary
from fmn_core.files.atomic import NameTakenError
from fmn_core.files.header import tensor_hash
from fmn_core.patch.patch import read_patch, save_patch
from fmn_core.patch.stack import stack
from fmn_core.patch.weighted import Member

from . import webui
from .cards import write_words
from .names import STACKS
from .work import find_patch


def joint(rows: Sequence[tuple[str, float]]) -> Path:
    """The file of the rows as one LoRA at strength 1, which is made once for these patches at these strengths.

    Raises ForgetError as `stack` does.
    """
    members = [Member(read_patch(find_patch(name)), strength) for name, strength in rows]
    key = sorted((tensor_hash(dict(member.patch)), member.strength) for member in members)
    path = place_of(f"fmn-stack-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.safetensors")
    if not path.exists():
        patch = stack(members)
        try:
            save_patch(patch, path)
        except NameTakenError:
            pass  # another webui on this folder has made the same
        if not path.with_suffix(".json").exists():
            write_words(patch, path, summary(patch))
        webui.refresh_loras()
    return path


def place_of(file: str) -> Path:
    """Where a stacked file is or goes: into the hidden folder, unless it is in the other or the host looks into no hidden
    ones."""
    hidden, shown = (webui.lora_folder() / folder / file for folder in STACKS)
    return hidden if getattr(shared.opts, "list_hidden_files", False) and not shown.exists() else shown
