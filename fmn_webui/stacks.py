"""Several patches for a generation as one file, solved jointly."""

from __future__ import annotations

import hashlib
import itertools
import os
import time
from collections.abc import Sequence
from pathlib import Path

from modules import shared

from fmn_core.files.atomic import NameTakenError
from fmn_core.files.header import tensor_hash
from fmn_core.patch.file import save_patch
from fmn_core.patch.stack import stack
from fmn_core.patch.summary import summary

from . import webui
from .lora_cards import write_words
from .names import CARD_ENDINGS, STACKS
from .tasks import patches_in

KEPT_FILES = 32  # files that stay, those that were used last
IN_USE = 3600.0  # seconds for which one may be in use by a generation, in another webui on the same folder too


def joint(rows: Sequence[tuple[str, float]]) -> Path:
    """The file of the rows as one LoRA at strength 1, which is made once for these patches at these strengths.

    Raises ForgetError as `stack` does.
    """
    members = [*patches_in(rows)]
    key = sorted((tensor_hash(dict(member.patch)), member.strength) for member in members)
    path = place_of(f"fmn-stack-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.safetensors")
    if not used(path):
        patch = stack(members)
        try:
            save_patch(patch, path)
        except NameTakenError:
            pass  # another webui on this folder has made the same
        if not path.with_suffix(".json").exists():
            write_words(patch, path, summary(patch))
        prune_stacks(path)
        webui.refresh_loras()
    return path


def used(path: Path) -> bool:
    """Whether a file is there, which is in use from now on: its card's words are dated today. Its own date stays, by which
    the host tells whether to read it again."""
    if not path.exists():
        return False
    try:
        os.utime(path.with_suffix(".json"))
    except OSError:  # gone, or another user's
        pass
    return True


def last_used(path: Path) -> float:
    """When a file was last used; raises OSError where it is gone."""
    card = path.with_suffix(".json")
    return max(each.stat().st_mtime for each in (path, card) if each is path or card.exists())


def prune_stacks(own: Path) -> None:
    """Takes away what was stacked beyond the KEPT files that were used last, with its cards; never `own`, nor what may be in
    use."""
    found, folders = [], [webui.lora_folder() / folder for folder in STACKS]
    for file in itertools.chain(*(folder.glob("fmn-stack-*.safetensors") for folder in folders)):
        try:
            found.append((last_used(file), file))
        except OSError:  # another webui was quicker
            continue
    for at, file in sorted(found, reverse=True)[KEPT_FILES:]:
        if file != own and time.time() - at > IN_USE:
            for each in (file, *(file.with_suffix(suffix) for suffix in CARD_ENDINGS)):
                try:
                    each.unlink(missing_ok=True)
                except OSError:
                    continue


def place_of(file: str) -> Path:
    """Where a stacked file is or goes: into the hidden folder, unless it is in the other or the host looks into no hidden
    ones."""
    hidden, visible = (webui.lora_folder() / folder / file for folder in STACKS)
    return hidden if getattr(shared.opts, "list_hidden_files", False) and not visible.exists() else visible
