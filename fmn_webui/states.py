"""Where the states of trainings are kept until they end: among the webui's models, out of the LoRA folder.

The page of LoRAs has a button for every folder in the LoRA folder, hidden ones too unless its user has set otherwise.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from fmn_core.files.atomic import remove_left_over
from fmn_core.training.checkpoint import BESIDE, ENDING

from . import webui


def states_folder() -> Path:
    """The folder, with what earlier versions kept in the LoRA folder."""
    folder = webui.models_folder() / "forget-me-not"
    try:
        move_states(webui.lora_folder() / BESIDE, folder)
    except OSError as error:  # they stay where they are, and the next job tries again
        logging.warning("Forget-Me-Not: unfinished trainings could not be moved to %s", folder, exc_info=error)
    return folder


def move_states(old: Path, new: Path) -> None:
    """Moves the states of one folder into another, where of two of one training the later stays; raises OSError."""
    if not old.is_dir():
        return
    remove_left_over(old)
    for file in old.glob(f"*{ENDING}"):
        place = new / file.name
        if place.exists() and place.stat().st_mtime >= file.stat().st_mtime:
            file.unlink()
        else:
            new.mkdir(parents=True, exist_ok=True)
            shutil.move(file, place)
    if not any(old.iterdir()):
        old.rmdir()
